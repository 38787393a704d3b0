"""On a GPU: the decode kernels against float32 over the same quantized weights, and speculation against plain decoding."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from trtvlm.builder.build import BuildSettings, build
from trtvlm.model.cache import KVCache
from trtvlm.model.cache_kind import CACHE_KINDS, CacheKind
from trtvlm.model.sizes import SIZES, language_size
from trtvlm.plugins.random_checkpoint import RandomCheckpoint
from trtvlm.runtime.cuda.decode import DecodeProgram
from trtvlm.runtime.cuda.weights import load_weights
from trtvlm.runtime.engine import open_engine
from trtvlm.runtime.session import Session
from trtvlm.scripts import check_cuda, check_lossless

CASES = [
    (model, kind)
    for model in (*SIZES, "nano", "nano-draft")
    for kind in CACHE_KINDS
    if kind == "fp16" or language_size(model).use_mla
]


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "kv_cache"), CASES)
def test_decodes_as_the_reference_and_rows_do_not_depend_on_each_other(model: str, kv_cache: CacheKind) -> None:
    config = language_size(model)
    config = dataclasses.replace(config, num_hidden_layers=min(2, config.num_hidden_layers))
    row = check_cuda.check(model, config, "int8", 48, 0, kv_cache)
    assert row["ok"], json.dumps(row)  # all of it: pytest shortens a dictionary


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache", CACHE_KINDS)
def test_speculation_changes_no_token(tmp_path: Path, kv_cache: CacheKind) -> None:
    engine = tmp_path / "engine"
    build("nano", engine, BuildSettings(compile=False, verify_samples=0), "nano-draft")
    session = Session(open_engine(engine, "cuda", kv_cache=kv_cache))
    *_, total = check_lossless.compare(session, check_lossless.sample_pages(), 2000)
    assert not total.mismatches
    assert total.tokens >= 2000


@pytest.mark.parametrize("model", ["nano", "nano-draft"])
def test_weights_of_a_random_checkpoint_are_packed(model: str) -> None:
    config = language_size(model)
    checkpoint = RandomCheckpoint(config, device="cpu")
    assert torch.equal(checkpoint.get("lm_head.weight"), checkpoint.get("lm_head.weight"))
    weights = load_weights(checkpoint, "cpu")
    program = DecodeProgram(weights, KVCache(config, 1, 128, torch.half), max_rows=2)
    layer = weights.layers[-1]
    assert layer.moe is not None
    assert layer.moe.fc.codes.shape[:2] == (config.n_routed_experts, 2 * config.moe_intermediate_size // 16)
    assert (layer.qkv.inputs, layer.dense.outputs) == (config.hidden_size, config.hidden_size)
    assert program.logits.shape == (2, config.vocab_size)


def test_rows_beyond_the_kernels_are_refused() -> None:
    config = language_size("nano-draft")
    weights = load_weights(RandomCheckpoint(config, device="cpu"), "cpu")
    with pytest.raises(ValueError, match="rows"):
        DecodeProgram(weights, KVCache(config, 1, 128, torch.half), max_rows=17)


def test_a_best_token_that_differs_is_measured() -> None:
    expected = torch.tensor([[0.0, 3.0, 2.9, -5.0], [1.0, 0.0, 0.0, 0.0]])
    found = torch.tensor([[0.0, 2.9, 3.0, -5.0], [1.0, 0.0, 0.0, 0.0]])
    assert check_cuda.top1_margin(expected, expected) == 0.0
    assert check_cuda.top1_margin(found, expected) == pytest.approx(0.1 / float(expected[0].std()), rel=1e-4)
