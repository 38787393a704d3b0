"""An engine directory's quantized checkpoint in Hugging Face's layout, as ModelOpt's unified export names things.

Every INT4 layer X has X.weight uint8 [out / 2, in] (two outputs a byte, as TensorRT-LLM has them), X.weight_scale float32
[out, in / 64] and X.pre_quant_scale [in]; AWQ's scale stays explicit, because folding it into a norm would change what the router
sees. INT8 layers have one weight_scale an output. Router, norms, embeddings, the vision part and the LM head are 16 bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trtvlm import __version__
from trtvlm.builder.stream import SafetensorsWriter, Spec
from trtvlm.model.artifacts import PROCESSOR_FILES, EngineDir, atomic_directory, write_json
from trtvlm.plugins.int4_linear.packing import GROUP_SIZE
from trtvlm.plugins.quantized_checkpoint import (
    ALGORITHMS,
    PREQUANT,
    QUANTIZATIONS,
    SCALES,
    QuantizedReader,
    layer_prefix,
    linears,
    pieces,
    plain_tensors,
)

WEIGHTS = "model.safetensors"
EXCLUDED = ("vision*", "projector*", "*lm_head*", "*mlp.gate*", "*kv_a_proj*", "*kv_b_proj*", "*q_a_proj*")


def export_hf(engine: Path, output: Path, overwrite: bool = False) -> dict[str, Any]:
    """Write `output` from the engine directory `engine` (its target), a tensor at a time; returns what was written.

    UserError: no whole engine directory, or an output that may not be written; nothing is left there then.
    """
    source = EngineDir(engine)
    reader = QuantizedReader(source)
    specs: dict[str, Spec] = {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in _tensors(reader, source, meta=True)
    }
    with atomic_directory(output, overwrite) as folder:
        with SafetensorsWriter(folder / WEIGHTS, specs) as writer:
            for name, tensor in _tensors(reader, source):
                writer.write(name, tensor)
        for name in PROCESSOR_FILES:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, folder / name)
        quantization = _quantization(reader)
        config = json.loads(source.model_config_file.read_text(encoding="utf-8"))
        if quantization is not None:
            write_json(folder / "hf_quant_config.json", {"producer": _producer(), "quantization": quantization})
            config["quantization_config"] = {
                "quant_method": "modelopt", "quant_algo": quantization["quant_algo"], "group_size": GROUP_SIZE,
                "ignore": quantization["exclude_modules"], "producer": _producer(),
            }  # fmt: skip
        write_json(folder / "config.json", config)
    return {"tensors": len(specs), "bytes": (output / WEIGHTS).stat().st_size, "quantization": quantization}


def _producer() -> dict[str, str]:
    return {"name": "trtvlm", "version": __version__}


def _quantization(reader: QuantizedReader) -> dict[str, Any] | None:
    algorithm = next(ALGORITHMS[name] for name, kind in QUANTIZATIONS.items() if kind == reader.kind)
    if algorithm is None:
        return None
    found: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": list(EXCLUDED)}
    if reader.kind == "int4":
        found |= {"group_size": GROUP_SIZE, "has_zero_point": False, "pre_quant_scale": True}
    return found


def _tensors(reader: QuantizedReader, source: EngineDir, meta: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name; with `meta`, only their dtypes and shapes, read from the layout."""

    def get(name: str) -> Tensor:
        if not meta:
            return reader.get(name)
        dtype, shape = reader.layout[name]
        return torch.empty(shape, dtype=dtype, device="meta")

    language = "language.model."
    yield f"{language}embed_tokens.weight", get("transformer.vocab_embedding.weight")
    yield f"{language}norm.weight", get("transformer.ln_f.weight")
    yield "language.lm_head.weight", get("lm_head.weight").half() if meta else reader.float_weight("lm_head").half()
    for index in range(reader.config.num_hidden_layers):
        at, to = layer_prefix(index), f"{language}layers.{index}."
        for name, (sources, _, _) in plain_tensors(reader.config, index).items():
            tensor, start = get(at + name), 0
            for part, count in zip(sources, _rows(reader, sources, tensor), strict=True):
                yield to + part, tensor[start : start + count].clone()
                start += count
        for fused in linears(reader.config, index):
            stored = {
                suffix: get(f"{at}{fused.name}.{suffix}")
                for suffix in ("weight", *SCALES.values(), PREQUANT)
                if f"{at}{fused.name}.{suffix}" in reader.layout
            }
            for number in range(fused.experts or 1):
                one = stored if fused.experts is None else {name: part[number] for name, part in stored.items()}
                for part, rows in pieces(reader.config, fused):
                    yield from _layer(to + part.format(number), one, rows)
    with safe_open(str(source.vision_weights), framework="pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            yield name, tensor.to("meta") if meta else tensor


def _layer(name: str, stored: dict[str, Tensor], rows: slice) -> Iterator[tuple[str, Tensor]]:
    """One linear layer of a fused one: its rows of the weight and the scales."""
    weight = stored["weight"]
    if SCALES["int4"] in stored:
        half = slice(rows.start // 2, rows.stop // 2)
        yield f"{name}.weight", weight[half].view(torch.uint8).clone()
        yield f"{name}.weight_scale", stored[SCALES["int4"]][rows].clone()
        yield f"{name}.pre_quant_scale", stored[PREQUANT].clone()
        return
    yield f"{name}.weight", weight[rows].clone()
    if SCALES["int8"] in stored:
        yield f"{name}.weight_scale", stored[SCALES["int8"]][rows].clone()


def _rows(reader: QuantizedReader, sources: tuple[str, ...], tensor: Tensor) -> list[int]:
    """How many rows of a plain tensor each of its sources has."""
    if len(sources) == 1:
        return [tensor.shape[0]]
    config = reader.config
    first = config.q_lora_rank or 0
    return [first, tensor.shape[0] - first]
