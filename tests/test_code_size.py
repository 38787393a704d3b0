"""How much machine code a step of one row runs through in a layer: every multiprocessor fetches it anew, layer by layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from trtvlm.model.cache import KVCache
from trtvlm.model.sizes import SIZES, language_size
from trtvlm.plugins.cuda import ahead, launch
from trtvlm.plugins.cuda.compiler import PLUGINS, compile_source
from trtvlm.plugins.cuda.cubin import code_bytes
from trtvlm.plugins.random_checkpoint import RandomCheckpoint
from trtvlm.runtime.cuda.decode import DecodeProgram
from trtvlm.runtime.cuda.weights import load_weights


class Shapes(RandomCheckpoint):
    """A checkpoint without numbers."""

    def get(self, name: str) -> Tensor:
        dtype, shape = self.layout[name]
        return torch.empty(shape, dtype=dtype, device="meta")


class Noted:
    """A kernel that is never run."""

    def __call__(self, *_: object, shared: int = 0) -> None:
        pass


def kernels_of_a_layer(model: str, monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str, launch.Defines]]:
    """Path, name and macros of what the second layer, a MoE layer, launches for one row."""
    noted: list[tuple[str, str, launch.Defines]] = []

    def note(path: str, name: str, macros: launch.Defines, device: int | None) -> Noted:
        noted.append((path, name, macros))
        return Noted()

    monkeypatch.setattr(launch, "makers", [note])
    monkeypatch.setattr(ahead, "l2_bytes", lambda: 1 << 20)
    config = dataclasses.replace(language_size(model), num_hidden_layers=2)
    weights = load_weights(Shapes(config, device="meta"), "meta")
    program = DecodeProgram(weights, KVCache(config, 1, 1280, torch.half, "meta"), 1, overlap=False)
    cursor = torch.empty(1, dtype=torch.int32, device="meta")
    noted.clear()
    program.launch_attention(1, cursor, 1, 1280)
    program.launch_mlp(1, 1)
    return set(noted)


@pytest.mark.parametrize("arch", ["sm_86", "sm_90"])
@pytest.mark.parametrize("model", SIZES)
def test_a_layer_of_one_row(model: str, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        (name, macros): code_bytes(compile_source((PLUGINS / path).read_text("utf-8"), dict(macros), arch)[0])[name]
        for path, name, macros in kernels_of_a_layer(model, monkeypatch)
    }
    names = {name for name, _ in sizes}
    assert {"linear", "attend", "combine", "dense_row", "experts_row"} <= names
    # When this was written: 82, 98 and 120 KB for sm_90 (130 with two tiles a block, as Base has them on 132 multiprocessors).
    assert sum(sizes.values()) < 140_000, {name: size for (name, _), size in sizes.items()}


def test_something_else_than_a_cubin() -> None:
    with pytest.raises(ValueError, match="not a cubin"):
        code_bytes(b"MZ" + bytes(100))
