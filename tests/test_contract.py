"""The directories against TensorRT-LLM's formats, whose facts are written out here once more, apart from the code.

Where a fact comes from: [ran] what ModelOpt 0.47 wrote for TensorRT-LLM, dequantized and compared with the originals; [read]
TensorRT-LLM's sources of about release 1.2. docs/tensorrt.md has the table.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import tiny_checkpoint
from trtvlm.builder import one_engine
from trtvlm.builder.build import BuildSettings, build
from trtvlm.builder.trtllm_config import BuildConfig
from trtvlm.model.artifacts import EngineDir
from trtvlm.model.chain import Chain
from trtvlm.model.checkpoint import load_model
from trtvlm.model.vlm import DeepseekVL2

# [read] models/modeling_utils.py, PretrainedConfig: what it must have, and what else it knows.
REQUIRED = {"architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads"}
OPTIONAL = {
    "vocab_size", "hidden_act", "logits_dtype", "norm_epsilon", "position_embedding_type", "max_position_embeddings",
    "rotary_embedding_dim", "num_key_value_heads", "intermediate_size", "mapping", "quantization",
    "use_parallel_embedding", "embedding_sharding_dim", "head_size", "qk_layernorm", "runtime_defaults",
}  # fmt: skip
# [read] models/deepseek_v2/config.py; [ran] producer and share_embedding_table, which ModelOpt writes for every model.
DEEPSEEK = {
    "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_inter_size", "topk_method",
    "first_k_dense_replace", "moe_layer_freq", "rotary_base", "rotary_scaling", "moe", "producer", "share_embedding_table",
}  # fmt: skip
MOE = {
    "num_experts", "shared_expert_intermediate_size", "top_k", "normalization_mode", "device_limited_n_group",
    "device_limited_topk_group", "device_limited_routed_scaling_factor", "topk_method",
}  # fmt: skip
# [read] QuantConfig, whose constructor gets the dictionary whole: another key is a TypeError there.
QUANTIZATION = {
    "quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val", "use_meta_recipe",
    "has_zero_point", "pre_quant_scale", "exclude_modules",
}  # fmt: skip
# [read] builder.py, BuildConfig.
BUILD = {
    "max_input_len", "max_seq_len", "opt_batch_size", "max_batch_size", "max_beam_width", "max_num_tokens",
    "opt_num_tokens", "max_prompt_embedding_table_size", "kv_cache_type", "gather_context_logits",
    "gather_generation_logits", "strongly_typed", "force_num_profiles", "profiling_verbosity", "enable_debug_output",
    "max_draft_len", "speculative_decoding_mode", "use_refit", "input_timing_cache", "output_timing_cache",
    "lora_config", "weight_sparsity", "weight_streaming", "plugin_config", "use_strip_plan", "max_encoder_input_len",
    "monitor_memory", "use_mrope",
}  # fmt: skip
OURS = {"sm", "flavour", "engines"}

GROUP = 64
KINDS = ("mla", "mha", "base")


class Built:
    """An engine directory, what is in it, and the model it was made from."""

    def __init__(self, folder: Path, kind: str) -> None:
        source = tiny_checkpoint(folder / "source", kind, seed=4)
        settings = BuildSettings(
            build=BuildConfig(max_seq_len=128), awq="lite", calibration_samples=1, verify_samples=0, compile=False
        )
        self.kind = kind
        self.engine = EngineDir(folder / "engine")
        build(str(source), self.engine.path, settings)
        self.config: dict[str, Any] = json.loads((self.engine.path / "config.json").read_text())
        self.tensors = load_file(self.engine.path / "rank0.safetensors")
        self.model: DeepseekVL2 = load_model(source)


@pytest.fixture(scope="module", params=KINDS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp(request.param), request.param)


def test_config_has_tensorrt_llm_s_three_parts(built: Built) -> None:
    # [read] EngineConfig: version, pretrained_config, build_config; ours stands beside them.
    assert built.config.keys() == {"version", "pretrained_config", "build_config", "trtvlm"}
    assert built.config["version"] == "1.2.1"


def test_pretrained_config(built: Built) -> None:
    found, language = built.config["pretrained_config"], built.model.config.language
    assert found.keys() >= REQUIRED | DEEPSEEK | {"quantization", "mapping", "logits_dtype"}
    assert found.keys() <= REQUIRED | OPTIONAL | DEEPSEEK
    assert found["moe"].keys() == MOE
    mla = built.kind != "mha"
    # [read] both are in its table of models; which of them has latent attention.
    assert found["architecture"] == ("DeepseekV2ForCausalLM" if mla else "DeepseekForCausalLM")
    # [read] deepseek_v2/config.py: the latent and the rotated part stand for one key head.
    assert (found["num_key_value_heads"], found["head_size"]) == ((1, 64 + 16) if mla else (2, 32))
    assert found["mapping"] == {"world_size": 1, "tp_size": 1, "pp_size": 1}
    assert (found["dtype"], found["logits_dtype"]) == ("float16", "float32")
    assert (found["hidden_size"], found["num_hidden_layers"], found["vocab_size"]) == (64, 3, 544)
    assert found["moe"]["shared_expert_intermediate_size"] == 2 * language.moe_intermediate_size
    assert found["moe"]["normalization_mode"] == (1 if built.kind == "base" else 0)
    assert found["topk_method"] == found["moe"]["topk_method"] == language.topk_method


def test_quantization(built: Built) -> None:
    found = built.config["pretrained_config"]["quantization"]
    assert found.keys() <= QUANTIZATION
    assert {name: found[name] for name in found if name != "exclude_modules"} == {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": None,
        "group_size": GROUP,
        "has_zero_point": False,
        "pre_quant_scale": True,
    }
    # [read] its fine-grained kernels take groups of 64 or 128.
    assert GROUP in (64, 128)


def test_exclude_modules_are_what_is_not_int4(built: Built) -> None:
    patterns = built.config["pretrained_config"]["quantization"]["exclude_modules"]
    for name, tensor in built.tensors.items():
        module, _, part = name.rpartition(".")
        if part != "weight" or tensor.dim() < 2:
            continue
        int4 = f"{module}.prequant_scaling_factor" in built.tensors
        assert int4 != any(fnmatch.fnmatch(module, pattern) for pattern in patterns), name


def test_build_config(built: Built) -> None:
    found = built.config["build_config"]
    assert found.keys() - OURS <= BUILD
    assert (found["max_seq_len"], found["max_batch_size"], found["max_beam_width"]) == (128, 1, 1)
    assert (found["max_draft_len"], found["strongly_typed"]) == (7, True)
    assert found["max_input_len"] <= found["max_seq_len"]


def test_names(built: Built) -> None:
    """[ran], but latent attention: [read] layers/attention.py, where the query's projection has no INT4 form."""
    linear = ("weight", "weights_scaling_factor", "prequant_scaling_factor")
    layer = {"input_layernorm.weight", "post_layernorm.weight", *(f"attention.dense.{part}" for part in linear)}
    if built.kind == "mha":
        layer |= {f"attention.qkv.{part}" for part in linear}
    else:
        layer |= {"attention.fused_a.weight", "attention.kv_a_layernorm.weight", "attention.kv_b_proj.weight"}
        layer |= {f"attention.q_proj.{part}" for part in linear}
    dense = {f"mlp.{name}.{part}" for name in ("fc", "gate", "proj") for part in linear}
    experts = {"mlp.router.weight", *(f"mlp.{name}.{part}" for name in ("fc", "proj") for part in linear)}
    experts |= {f"mlp.shared_expert.{name}.{part}" for name in ("fc", "gate", "proj") for part in linear}
    if built.kind == "base":
        experts.add("mlp.e_score_correction_bias")
    expected = {
        "transformer.vocab_embedding.weight",
        "transformer.ln_f.weight",
        "lm_head.weight",
        "lm_head.per_channel_scale",
    }
    for index in range(3):
        names = layer | (dense if index == 0 else experts)
        expected |= {f"transformer.layers.{index}.{name}" for name in names}
    assert set(built.tensors) == expected


def test_types_and_shapes_of_int4_linears(built: Built) -> None:
    """[ran]: int8 [out / 2, in], float32 [out, in / group], half [in]; experts stacked in front."""
    found = 0
    for name, codes in built.tensors.items():
        if f"{name.removesuffix('weight')}prequant_scaling_factor" not in built.tensors or not name.endswith(".weight"):
            continue
        found += 1
        module = name.removesuffix(".weight")
        scales, pre = (
            built.tensors[f"{module}.{part}"] for part in ("weights_scaling_factor", "prequant_scaling_factor")
        )
        # [read] preprocess_perlayer_weights looks for int8, not uint8.
        assert (codes.dtype, scales.dtype, pre.dtype) == (torch.int8, torch.float32, torch.float16)
        *lead, half, inputs = codes.shape
        assert scales.shape == (*lead, 2 * half, inputs // GROUP)
        assert pre.shape == (*lead, inputs)
        # [read] preprocess_weights_for_mixed_gemm: inputs in 64s, outputs in 16s.
        assert inputs % 64 == 0
        assert 2 * half % 16 == 0
        # Scales are rounded to the engine's type before the codes are made.
        assert torch.equal(scales, scales.half().float())
        # [read] of stacked experts its loader keeps row 0.
        assert torch.equal(pre, pre[:1].expand_as(pre)) if lead else True
    assert found == {"mla": 2 + 3, "mha": 2 + 3, "base": 2 + 3}[built.kind] + 2 * (2 + 5)


def dequantized(built: Built, module: str) -> Tensor:
    """[ran] The format in words: a byte holds two's complement nibbles of outputs 2r (low) and 2r + 1 (high)."""
    codes = built.tensors[f"{module}.weight"].numpy().view(np.uint8)
    nibbles = np.stack((codes & 15, codes >> 4), axis=-2).astype(np.int16)
    signed = np.where(nibbles > 7, nibbles - 16, nibbles)
    rows = torch.from_numpy(signed.reshape(*codes.shape[:-2], -1, codes.shape[-1])).float()
    scales = built.tensors[f"{module}.weights_scaling_factor"].repeat_interleave(GROUP, dim=-1)
    return rows * scales * built.tensors[f"{module}.prequant_scaling_factor"].float().unsqueeze(-2)


def near(found: Tensor, original: Tensor) -> bool:
    """Rounded to four bits: a tenth off. Rows, nibbles or projections taken for one another are all off."""
    return bool((found - original).norm() < 0.2 * original.norm())


def test_packing_stacking_and_naming(built: Built) -> None:
    layers: Any = built.model.language.model.layers
    at = "transformer.layers."
    attention = layers[1].self_attn
    assert near(dequantized(built, f"{at}1.attention.dense"), attention.o_proj.weight)
    if built.kind == "mha":
        stacked = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
        assert near(dequantized(built, f"{at}1.attention.qkv"), stacked)
    else:
        assert near(dequantized(built, f"{at}1.attention.q_proj"), attention.q_proj.weight)
        fused = built.tensors[f"{at}1.attention.fused_a.weight"].float()
        assert near(fused, attention.kv_a_proj_with_mqa.weight)
    # A dense MLP's fc is the side that is activated; of experts, the first half of fc is the other one.
    for name, mlp in ((f"{at}0.mlp", layers[0].mlp), (f"{at}1.mlp.shared_expert", layers[1].mlp.shared_experts)):
        for part, linear in (("fc", mlp.gate_proj), ("gate", mlp.up_proj), ("proj", mlp.down_proj)):
            assert near(dequantized(built, f"{name}.{part}"), linear.weight)
    fc, proj = dequantized(built, f"{at}2.mlp.fc"), dequantized(built, f"{at}2.mlp.proj")
    for number, expert in enumerate(layers[2].mlp.experts):
        assert near(fc[number], torch.cat((expert.up_proj.weight, expert.gate_proj.weight)))
        assert near(proj[number], expert.down_proj.weight)
    assert not near(fc[0], torch.cat((expert.gate_proj.weight, expert.up_proj.weight)))
    router = built.tensors[f"{at}1.mlp.router.weight"]
    assert router.dtype == torch.float32
    assert torch.equal(router, layers[1].mlp.gate.weight.float())


def test_scales_shared_where_inputs_are(built: Built) -> None:
    def pre(module: str) -> Tensor:
        return built.tensors[f"transformer.layers.{module}.prequant_scaling_factor"]

    for name in ("0.mlp", "1.mlp.shared_expert"):
        assert torch.equal(pre(f"{name}.fc"), pre(f"{name}.gate"))


def test_one_engine_is_rank0_engine(graphs: EngineDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[read] Engine.save: rankN.engine beside config.json. TensorRT's part is left out here."""
    folder = tmp_path / "engine"
    shutil.copytree(graphs.path, folder)
    chain = Chain.from_json((graphs.language / "chain.json").read_text())

    def join(part: str, engine: EngineDir, path: Path, *rest: Any) -> tuple[Chain, dict[str, Any]]:
        path.write_bytes(b"graph")
        return chain, {"agreement": 1.0}

    monkeypatch.setattr(one_engine, "check_gpu", lambda sm: None)
    monkeypatch.setattr(one_engine, "join", join)
    monkeypatch.setattr(one_engine, "compile_plugins", lambda name, path, profiles: f"{name}'s plan".encode())
    records = one_engine.build_one_engine(folder, sm=86, max_seq_len=128, max_width=8)
    assert [(record["part"], record["name"]) for record in records] == [
        ("target", "vision"), ("target", "rank0"), ("draft", "vision"), ("draft", "rank0"),
    ]  # fmt: skip
    for place in (folder, folder / "draft"):
        assert (place / "rank0.engine").read_bytes() == b"rank0's plan"
        assert (place / "vision" / "vision.engine").read_bytes() == b"vision's plan"
        assert EngineDir(place).engine == place / "rank0.engine"
        assert not list(place.glob(".graphs*"))
