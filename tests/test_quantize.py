"""The quantized checkpoint: its layout, what it is equal to, and what it costs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.tiny import tiny_checkpoint
from trtvlm.builder.awq import Search, clipped_scales, pre_quant_scales
from trtvlm.builder.calibrate import Sample, embeddings, prepare, read_samples
from trtvlm.builder.compensate import compensated_codes, gram
from trtvlm.builder.quantize import quantize_language
from trtvlm.builder.seen import FEW_TOKENS, Seen
from trtvlm.builder.trtllm_config import BuildConfig, engine_config
from trtvlm.model.artifacts import EngineDir, write_json
from trtvlm.model.checkpoint import CheckpointReader, load_model
from trtvlm.model.config import ModelConfig
from trtvlm.model.errors import UserError
from trtvlm.model.inputs import ModelInputs
from trtvlm.model.processor import Processor
from trtvlm.plugins.int4_linear import packing
from trtvlm.plugins.quantized_checkpoint import QUANTIZATIONS, layout, linears, load_quantized, load_quantized_packed

KINDS = ("mla", "mha", "base")


def _samples(folder: Path, count: int = 4) -> list[ModelInputs]:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (40, 90, 3), dtype=np.uint8)) for _ in range(count)]
    return prepare([Sample(image, answer="hello world") for image in images], Processor.from_pretrained(folder))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, EngineDir]]:
    """Checkpoint and engine directory of a kind and quantization, made once."""
    made: dict[tuple[str, str], tuple[Path, EngineDir]] = {}

    def make(kind: str, quant: str) -> tuple[Path, EngineDir]:
        if (kind, quant) not in made:
            source = tiny_checkpoint(tmp_path_factory.mktemp(kind), kind)
            made[kind, quant] = source, _quantize(source, tmp_path_factory.mktemp(quant), quant)
        return made[kind, quant]

    return make


def _quantize(source: Path, output: Path, quant: str, awq: Search = "lite") -> EngineDir:
    engine, config = EngineDir(output), ModelConfig.from_pretrained(source)
    head = "fp16" if quant == "none" else "int8"
    write_json(engine.model_config_file, config.to_dict())
    write_json(engine.config_file, engine_config(config, quant, head, BuildConfig()))  # type: ignore[arg-type]
    quantize_language(CheckpointReader(source), config, engine, QUANTIZATIONS[quant], head, _samples(source), awq=awq)  # type: ignore[arg-type]
    return engine


@pytest.mark.parametrize("quant", QUANTIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_costs_little_and_both_ways_of_loading_agree(quantized, kind: str, quant: str) -> None:  # type: ignore[no-untyped-def]
    source, engine = quantized(kind, quant)
    original, dequantized, packed = load_model(source), load_quantized(engine.path), load_quantized_packed(engine.path)
    inputs = _samples(source, 1)[0]
    expected = original.language(embeddings(original, inputs))
    found = dequantized.language(embeddings(dequantized, inputs))
    # Round-to-nearest INT4 of normal weights is about 10% off a layer; three layers and flipped experts follow.
    bound = {"none": 1e-2, "int8_wo": 0.12, "int4_awq": 0.5}[quant]
    assert float((found - expected).norm() / expected.norm()) < bound
    wide = packed.float()
    # The same codes and scales; INT8 rounds the dequantized weight to the activation's type, here float32.
    torch.testing.assert_close(wide.language(embeddings(wide, inputs)), found, atol=2e-2, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_types_are_tensorrt_llm_s(quantized, kind: str) -> None:  # type: ignore[no-untyped-def]
    """Held against the layout TensorRT-LLM's own tools write (docs/formats.md), written out here once more."""
    _, engine = quantized(kind, "int4_awq")
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in load_file(engine.weights).items()}
    config = engine.model_config().language
    assert found == layout(config, "int4", "int8")
    experts, hidden, width = 4, 64, 64
    layer = "transformer.layers.1."
    expected = {
        "transformer.vocab_embedding.weight": (torch.float16, (544, 64)),
        "transformer.ln_f.weight": (torch.float16, (64,)),
        "lm_head.weight": (torch.int8, (544, 64)),
        "lm_head.per_channel_scale": (torch.float32, (544,)),
        "transformer.layers.0.mlp.fc.weight": (torch.int8, (128 // 2, hidden)),
        "transformer.layers.0.mlp.gate.weights_scaling_factor": (torch.float32, (128, 1)),
        "transformer.layers.0.mlp.proj.prequant_scaling_factor": (torch.float16, (128,)),
        layer + "input_layernorm.weight": (torch.float16, (hidden,)),
        layer + "post_layernorm.weight": (torch.float16, (hidden,)),
        layer + "attention.dense.weight": (torch.int8, (hidden // 2, 64)),
        layer + "mlp.router.weight": (torch.float32, (experts, hidden)),
        layer + "mlp.fc.weight": (torch.int8, (experts, 2 * width // 2, hidden)),
        layer + "mlp.fc.weights_scaling_factor": (torch.float32, (experts, 2 * width, 1)),
        layer + "mlp.fc.prequant_scaling_factor": (torch.float16, (experts, hidden)),
        layer + "mlp.proj.weight": (torch.int8, (experts, hidden // 2, width)),
        layer + "mlp.proj.prequant_scaling_factor": (torch.float16, (experts, width)),
        layer + "mlp.shared_expert.fc.weight": (torch.int8, (2 * width // 2, hidden)),
    }
    if kind == "mha":
        expected[layer + "attention.qkv.weight"] = (torch.int8, (3 * 64 // 2, hidden))
    else:
        expected[layer + "attention.fused_a.weight"] = (torch.float16, (64 + 16, hidden))
        expected[layer + "attention.kv_b_proj.weight"] = (torch.float16, (2 * (32 + 32), 64))
        expected[layer + "attention.kv_a_layernorm.weight"] = (torch.float16, (64,))
    assert expected.items() <= found.items()
    written = engine.config()["pretrained_config"]
    assert written["quantization"].items() >= {
        "quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False, "pre_quant_scale": True
    }.items()  # fmt: skip
    # QuantConfig.from_dict passes the whole dictionary to its constructor: a key it does not have is a TypeError there.
    assert written["quantization"].keys() <= {
        "quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val", "use_meta_recipe",
        "has_zero_point", "pre_quant_scale", "exclude_modules",
    }  # fmt: skip
    required = {"architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads", "logits_dtype"}
    assert required <= written.keys()
    rows = load_file(engine.weights)[layer + "mlp.fc.prequant_scaling_factor"]
    assert torch.equal(rows, rows[:1].expand_as(rows))


@pytest.mark.parametrize("kind", ["mla", "mha"])
def test_moe_rows_are_up_then_gate_and_codes_are_near(quantized, kind: str) -> None:  # type: ignore[no-untyped-def]
    source, engine = quantized(kind, "int4_awq")
    tensors, model = load_file(engine.weights), load_model(source)
    name = "transformer.layers.1.mlp.fc."
    weight = packing.dequantize(
        *(tensors[name + p] for p in ("weight", "weights_scaling_factor", "prequant_scaling_factor"))
    )
    for number, expert in enumerate(model.language.model.layers[1].mlp.experts):  # type: ignore[union-attr,arg-type]
        both = torch.cat((expert.up_proj.weight, expert.gate_proj.weight))
        assert float((weight[number] - both).norm() / both.norm()) < 0.15


def test_same_inputs_same_bytes(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source, engine = quantized("mla", "int4_awq")
    again = _quantize(source, tmp_path, "int4_awq")
    assert again.weights.read_bytes() == engine.weights.read_bytes()
    assert again.vision_weights.read_bytes() == engine.vision_weights.read_bytes()


@pytest.mark.parametrize("kind", ["mla", "mha"])
def test_layer_by_layer_equals_the_whole_model_at_once(quantized, kind: str) -> None:  # type: ignore[no-untyped-def]
    """The scales of a layer are those found when the whole float model runs and every layer is recorded at once."""
    source, engine = quantized(kind, "int4_awq")
    model, tensors = load_model(source), load_file(engine.weights)
    samples = _samples(source)
    total = sum(inputs.input_ids.numel() for inputs in samples)
    seen = [Seen(layer, total) for layer in model.language.model.layers]  # type: ignore[arg-type]
    for inputs in samples:
        model.language(embeddings(model, inputs))
    for index, record in enumerate(seen):
        record.finish()
        layer = model.language.model.layers[index]
        scale = pre_quant_scales({"o": layer.self_attn.o_proj.weight}, {"o": record.rows("self_attn.o_proj")})["o"]  # type: ignore[union-attr,dict-item]
        stored = tensors[f"transformer.layers.{index}.attention.dense.prequant_scaling_factor"]
        assert torch.equal(scale.half(), stored)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_modelopt_run_on_the_whole_model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor by tensor: ModelOpt's own AWQ of the whole language model at once, from the same tokens in one batch."""
    import modelopt.torch.quantization as mtq

    # ModelOpt leaves experts to the tokens the router sends them; here ours do so too.
    monkeypatch.setattr("trtvlm.builder.seen.FEW_TOKENS", 1)
    source = tiny_checkpoint(tmp_path / "in", kind)
    (tmp_path / "out").mkdir()
    stored = load_file(_quantize(source, tmp_path / "out", "int4_awq").weights)
    model, config = load_model(source), ModelConfig.from_pretrained(source).language
    batch = torch.cat([embeddings(model, inputs) for inputs in _samples(source)])
    before = {name: weight.clone() for name, weight in model.language.model.layers.named_parameters()}
    int4 = {"num_bits": 4, "block_sizes": {-1: 64, "type": "static"}}
    names = [f"{layer}.{source.format(expert)}" for layer in range(config.num_hidden_layers)
             for fused in linears(config, layer) for source in fused.sources
             for expert in range(fused.experts or 1)]  # fmt: skip
    rules = [{"quantizer_name": "*", "enable": False}] + [
        {"quantizer_name": f"*layers.{name}.weight_quantizer", "cfg": int4, "enable": True} for name in names
    ]
    awq = {"method": "awq_lite", "alpha_step": 0.1}
    mtq.quantize(model.language, {"quant_cfg": rules, "algorithm": awq}, lambda language: language(batch))
    layers = model.language.model.layers
    found = {name: layers.get_submodule(name).input_quantizer._pre_quant_scale.float() for name in names}
    for layer in range(config.num_hidden_layers):
        for fused in linears(config, layer):
            groups = [[f"{layer}.{s.format(e)}" for s in fused.sources] for e in range(fused.experts or 1)]
            sharing = [name for group in groups for name in group]
            if fused.name.endswith((".fc", ".gate")) and fused.experts is None:
                sharing = [f"{layer}.{fused.sources[0].rpartition('.')[0]}.{part}_proj" for part in ("gate", "up")]
            scale = torch.stack([found[name] for name in sorted(sharing)]).mean(0).half()
            weight = torch.stack([torch.cat([before[f"{name}.weight"] for name in group]) for group in groups])
            folded = (weight if fused.experts else weight[0]) / scale.float()
            scales = folded.unflatten(-1, (-1, 64)).abs().amax(-1).div(7).half().float()
            codes = (folded.unflatten(-1, (-1, 64)) / scales[..., None]).round().clamp(-8, 7).flatten(-2).to(torch.int8)
            name = f"transformer.layers.{layer}.{fused.name}"
            assert torch.equal(
                stored[f"{name}.prequant_scaling_factor"], scale.expand(*weight.shape[:-2][: bool(fused.experts)], -1)
            )
            assert torch.equal(stored[f"{name}.weights_scaling_factor"], scales)
            low, high = (codes.unflatten(-2, (-1, 2))[..., half, :] & 15 for half in (0, 1))
            assert torch.equal(stored[f"{name}.weight"], low | (high << 4))


def test_awq_beats_rounding_where_channels_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    x = torch.randn(512, 128, generator=generator)
    x[:, ::16] *= 30
    scale = pre_quant_scales({"w": weight}, {"w": x})["w"]

    def error(folded: torch.Tensor, scale: torch.Tensor) -> float:
        scales = packing.group_scales(folded)
        rounded = packing.dequantize(packing.pack(packing.quantize_int4(folded, scales)), scales, scale)
        return float((x @ (rounded - weight).T).norm())

    assert error(weight / scale, scale) < 0.7 * error(weight, torch.ones(128))


def test_clipping_never_loses_and_mostly_gains() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 32, 128, generator=generator)
    weight[0, 0, :64] = 0.0
    importance = torch.rand(3, 128, generator=generator) + 0.1

    def losses(scales: torch.Tensor) -> torch.Tensor:
        error = packing.dequantize(packing.pack(packing.quantize_int4(weight, scales)), scales) - weight
        lost: torch.Tensor = (error.square() * importance.unsqueeze(1)).unflatten(-1, (-1, 64)).sum(-1)
        return lost

    clipped = clipped_scales(weight, importance)
    assert torch.equal(clipped, clipped.half().float())
    rounded, found = losses(packing.group_scales(weight, dtype=torch.float16)), losses(clipped)
    assert (found <= rounded).all()
    assert found.sum() < 0.95 * rounded.sum()


def test_compensated_rounding_keeps_the_products_of_correlated_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 128, generator=generator)
    scales = packing.group_scales(weight, dtype=torch.float16)
    x = torch.randn(512, 24, generator=generator) @ torch.randn(24, 128, generator=generator)
    x += 0.3 * torch.randn(512, 128, generator=generator)

    def loss(codes: torch.Tensor) -> float:
        rounded = packing.dequantize(packing.pack(codes), scales)
        return float((x @ (rounded - weight).t()).square().mean())

    assert loss(compensated_codes(weight, scales, gram(x))) < 0.5 * loss(packing.quantize_int4(weight, scales))


def test_compensation_has_nothing_to_do_for_independent_inputs() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    scales = packing.group_scales(weight, dtype=torch.float16)
    for x in (torch.eye(128), torch.zeros(4, 128)):
        assert torch.equal(compensated_codes(weight, scales, gram(x)), packing.quantize_int4(weight, scales))


def test_experts_few_tokens_reach_are_calibrated_on_everyone_s_and_those_none_reach_on_nothing(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, "mla")
    model = load_model(source)
    layer = model.language.model.layers[1]
    layer.mlp.gate.weight[2] = -10 * layer.mlp.gate.weight.abs().sum()  # type: ignore[union-attr,operator,index]
    seen = Seen(layer, 300)  # type: ignore[arg-type]
    layer.mlp(torch.rand(300, 64))  # type: ignore[operator,union-attr]
    seen.finish()
    assert seen.expert_tokens[2] == 0
    assert sum(seen.expert_tokens) == 600
    assert seen.never == [2]
    assert not seen.reached("mlp.experts.2.down_proj")
    assert seen.rows("mlp.experts.2.gate_proj").shape == (0, 64)
    assert seen.sparse == [number for number, count in enumerate(seen.expert_tokens) if 0 < count < FEW_TOKENS]
    for number, count in enumerate(seen.expert_tokens):
        if count:
            rows = seen.rows(f"mlp.experts.{number}.down_proj")
            assert rows.shape == (300 if number in seen.sparse else count, 64)


@pytest.mark.parametrize(
    ("tensor", "value", "sentence"),
    [
        ("language.model.layers.1.mlp.experts.1.up_proj.weight", float("nan"), "experts.1.up_proj.weight holds values"),
        ("vision.blocks.0.attn.qkv.weight", float("inf"), "vision.blocks.0.attn.qkv.weight holds values"),
        ("language.model.embed_tokens.weight", 1e6, "beyond float16"),
    ],
)
def test_damaged_weights_are_named(tmp_path: Path, tensor: str, value: float, sentence: str) -> None:
    from safetensors.torch import save_file

    source = tiny_checkpoint(tmp_path / "in", "mla", dtype=torch.float32)
    weights = load_file(source / "model.safetensors")
    weights[tensor].view(-1)[3] = value
    save_file(weights, source / "model.safetensors")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=sentence):
        _quantize(source, tmp_path / "out", "none")


def test_calibration_data_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no images"):
        read_samples(tmp_path, 4)
    with pytest.raises(UserError, match="no calibration data"):
        read_samples(tmp_path / "absent", 4)
    lines = tmp_path / "data.jsonl"
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("nine")
    for bad, sentence in (
        ("", "has no samples"),
        ('{"image": "a.png"}\n{', "Line 2 .* not a JSON object"),
        ('{"image": 7}', "Line 1 .* as strings"),
        ('{"prompt": "x"}', "Line 1 .* has no 'image'"),
        ('\n{"image": "b.png"}', "Line 2 .* not there"),
    ):
        lines.write_text(bad)
        with pytest.raises(UserError, match=sentence):
            read_samples(lines, 4)
    lines.write_text('{"image": "a.png", "prompt": "What?", "answer": "nine"}\n')
    assert read_samples(lines, 4) == [Sample(tmp_path / "a.png", "What?", "nine")]
    assert read_samples(tmp_path, 4) == [Sample(tmp_path / "a.png", answer="nine")]
