"""A checkpoint -> the quantized language checkpoint, one decoder layer at a time.

A layer is loaded, run on what came out of the layer before it, calibrated on what its linear layers saw, packed, written
and freed. Its float outputs go on to the next layer, so the result is that of calibrating the whole float model at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trtvlm import __version__
from trtvlm.builder.awq import Search, clipped_scales, pre_quant_scales, shared_scale
from trtvlm.builder.calibrate import embeddings
from trtvlm.builder.compensate import compensated_codes
from trtvlm.builder.stream import SafetensorsWriter
from trtvlm.builder.unfinished import FinishedLayers, digest_of
from trtvlm.model.artifacts import EngineDir
from trtvlm.model.attention import causal_mask
from trtvlm.model.checkpoint import CheckpointReader
from trtvlm.model.config import ModelConfig
from trtvlm.model.errors import UserError
from trtvlm.model.inputs import ModelInputs
from trtvlm.model.language import DecoderLayer
from trtvlm.model.moe import MoE
from trtvlm.model.rope import rope_table
from trtvlm.model.vlm import DeepseekVL2
from trtvlm.plugins.int4_linear import packing as int4
from trtvlm.plugins.int8_linear import packing as int8
from trtvlm.plugins.quantized_checkpoint import (
    PREQUANT,
    SCALES,
    Fused,
    Kind,
    layer_prefix,
    layout,
    linears,
    plain_tensors,
)

# Rows a linear layer is calibrated on, at most: more change the scales no more, and the search costs as many.
MAX_ROWS = 4096
# An expert the router sent fewer tokens than this is calibrated on everyone's.
FEW_TOKENS = 128

Progress = Callable[[str], None]


@dataclass
class QuantizationReport:
    """What calibration saw: tokens each expert received under the real routing, and who had too few."""

    tokens: int = 0
    expert_tokens: dict[int, list[int]] = field(default_factory=dict)
    shared_calibration: dict[int, list[int]] = field(default_factory=dict)

    def restore(self, stored: dict[str, Any]) -> None:
        """Take over what `to_dict` said."""
        self.expert_tokens = {int(layer): counts for layer, counts in stored["expert_tokens"].items()}
        found = stored["experts_calibrated_on_all_tokens"]
        self.shared_calibration = {int(layer): names for layer, names in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """For build_report.json; layers are keyed by their number."""
        return {
            "calibration_tokens": self.tokens,
            "expert_tokens": {str(layer): counts for layer, counts in self.expert_tokens.items()},
            "experts_calibrated_on_all_tokens": {str(layer): names for layer, names in self.shared_calibration.items()},
        }


@torch.no_grad()
def quantize_language(
    reader: CheckpointReader,
    config: ModelConfig,
    engine: EngineDir,
    kind: Kind,
    lm_head: Kind,
    samples: list[ModelInputs],
    progress: Progress = lambda what: None,
    awq: Search = "full",
    unfinished: Path | None = None,
) -> QuantizationReport:
    """Write `engine`'s rank0.safetensors and vision part. `samples` calibrate INT4; other kinds need none.

    awq: "lite" searches AWQ's scales and rounds to nearest, as ModelOpt does; "clip" also searches how much of each
    group's range to keep; "full" also compensates rounding errors.

    unfinished: a folder to keep finished layers in; with one, a run goes on where a killed one was.

    Calls `progress` with what comes next: the vision part, every layer, the head. Raises UserError naming a tensor that
    is missing, misshapen, not finite, or does not fit float16.
    """
    language, report = config.language, QuantizationReport()
    progress("vision")
    samples = samples if kind == "int4" else []
    state = None
    if unfinished is not None:
        seen_by = [part for sample in samples for part in (sample.input_ids, *(i.pixels for i in sample.images))]
        state = FinishedLayers(
            unfinished, digest_of(config, kind, lm_head, awq, versions_of(), reader.folder, *seen_by)
        )
    done = 0 if state is None else state.count
    hidden = _first_hidden(reader, config, engine, [] if done else samples)
    if state is not None and done:
        hidden = state.outputs()
        report.restore(state.report)
    report.tokens = sum(x.shape[1] for x in hidden)
    rope = rope_table(language.rope_dim, language.max_position_embeddings, language.rope_theta)
    target = engine.weights if state is None else state.weights
    with SafetensorsWriter(target, layout(language, kind, lm_head), resume=done > 0) as writer:
        _write_linear(writer, "lm_head", _checked(reader, "language.lm_head.weight"), lm_head)
        for name, source in (("vocab_embedding", "embed_tokens"), ("ln_f", "norm")):
            writer.write(f"transformer.{name}.weight", _half(reader, f"language.model.{source}.weight"))
        for index in range(language.num_hidden_layers):
            progress(f"layer {index + 1} of {language.num_hidden_layers}")
            if index < done:
                writer.written(layer_prefix(index))
                continue
            hidden = _quantize_layer(writer, reader, config, index, kind, awq, hidden, rope, report)
            if state is not None:
                writer.sync()
                state.finish(hidden, report.to_dict())
    if state is not None:
        target.replace(engine.weights)
    return report


def versions_of() -> dict[str, str]:
    """Versions that may change a bit of the result."""
    return {name: version(name) for name in ("torch", "nvidia-modelopt")} | {"trtvlm": __version__}


def _quantize_layer(
    writer: SafetensorsWriter,
    reader: CheckpointReader,
    config: ModelConfig,
    index: int,
    kind: Kind,
    awq: Search,
    hidden: list[Tensor],
    rope: tuple[Tensor, Tensor],
    report: QuantizationReport,
) -> list[Tensor]:
    """Load a layer, run what came out of the last one through it, write it: what comes out of this one."""
    layer = DecoderLayer(config.language, index).eval().requires_grad_(False)
    reader.load_into(layer, f"language.model.layers.{index}.")
    _check_finite(layer, f"language.model.layers.{index}.")
    seen = Seen(layer) if hidden else None
    hidden = [_run(layer, x, rope) for x in hidden]
    if seen is not None:
        seen.finish()
        if isinstance(layer.mlp, MoE):
            report.expert_tokens[index] = seen.expert_tokens
            report.shared_calibration[index] = seen.sparse
    _write_layer(writer, layer, index, config, kind, seen.inputs if seen else {}, awq)
    return hidden


class Seen:
    """Records what every linear layer of a decoder layer is given; experts with few tokens get everyone's at the end."""

    def __init__(self, layer: DecoderLayer) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.expert_tokens: list[int] = []
        self.sparse: list[int] = []
        self._layer = layer
        self._rows: dict[str, list[Tensor]] = defaultdict(list)
        self._hooks = [
            module.register_forward_pre_hook(self._recorder(name))
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear | MoE)
        ]

    def _recorder(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._rows[name].append(args[0].reshape(-1, args[0].shape[-1]))

        return record

    def finish(self) -> None:
        """Stop recording; `inputs` [rows, in] by layer name, at most MAX_ROWS rows spread evenly over what was seen."""
        for hook in self._hooks:
            hook.remove()
        mlp = self._layer.mlp
        if isinstance(mlp, MoE):
            everyone = _spread(torch.cat(self._rows.pop("mlp")))
            for number, expert in enumerate(mlp.experts):
                rows = self._rows.get(f"mlp.experts.{number}.gate_proj", [])
                self.expert_tokens.append(sum(x.shape[0] for x in rows))
                if self.expert_tokens[-1] < FEW_TOKENS:
                    self.sparse.append(number)
                    inner = torch.nn.functional.silu(expert.gate_proj(everyone)) * expert.up_proj(everyone)  # type: ignore[operator]
                    for part, x in (("gate_proj", everyone), ("up_proj", everyone), ("down_proj", inner)):
                        self._rows[f"mlp.experts.{number}.{part}"] = [x]
        self.inputs = {name: _spread(torch.cat(rows)) for name, rows in self._rows.items()}
        self._rows.clear()


def _spread(rows: Tensor) -> Tensor:
    step = -(-rows.shape[0] // MAX_ROWS)
    return rows[::step]


def _run(layer: DecoderLayer, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    length = x.shape[1]
    cos, sin = (table[:length].unsqueeze(0) for table in rope)
    out: Tensor = layer(x, (cos, sin), causal_mask(length, 0, None, x.device))
    return out


def _first_hidden(
    reader: CheckpointReader, config: ModelConfig, engine: EngineDir, samples: list[ModelInputs]
) -> list[Tensor]:
    """Write the vision part; what the first decoder layer sees of every sample."""
    with torch.device("meta"):
        model = DeepseekVL2(config)
    for name in ("vision", "projector", *(("language.model.embed_tokens",) if samples else ())):
        module = model.get_submodule(name)
        module.to_empty(device="cpu")
        reader.load_into(module, f"{name}.")
        _check_finite(module, f"{name}.")
    for name in ("image_newline", "view_seperator"):
        setattr(model, name, nn.Parameter(reader.get(name).float(), requires_grad=False))
    part = {n: _to_half(n, p) for n, p in model.named_parameters() if not n.startswith("language.")}
    engine.vision.mkdir(parents=True, exist_ok=True)
    with SafetensorsWriter(engine.vision_weights, {n: (t.dtype, tuple(t.shape)) for n, t in part.items()}) as writer:
        for name, tensor in part.items():
            writer.write(name, tensor)
    return [embeddings(model, sample) for sample in samples]


def _write_layer(
    writer: SafetensorsWriter,
    layer: DecoderLayer,
    index: int,
    config: ModelConfig,
    kind: Kind,
    inputs: dict[str, Tensor],
    awq: Search,
) -> None:
    prefix = layer_prefix(index)
    for name, (sources, dtype, _) in plain_tensors(config.language, index).items():
        tensor = torch.cat([layer.get_parameter(source) for source in sources])
        writer.write(prefix + name, tensor if dtype == torch.float32 else _to_half(prefix + name, tensor))
    found = linears(config.language, index)
    scales = _fusion_scales(layer, found, inputs) if kind == "int4" else {}
    for fused in found:
        if fused.experts is None:
            weight = torch.cat([layer.get_parameter(f"{source}.weight") for source in fused.sources])
        else:
            weight = torch.stack([
                torch.cat([layer.get_parameter(f"{source.format(number)}.weight") for source in fused.sources])
                for number in range(fused.experts)
            ])  # fmt: skip
        scale = scales.get(fused.name)
        seen = None if scale is None or awq == "lite" else _scaled_inputs(fused, inputs, scale)
        _write_linear(writer, prefix + fused.name, weight, kind, scale, seen, awq)


def _fusion_scales(layer: DecoderLayer, found: list[Fused], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """AWQ's scale of each of TensorRT-LLM's layers: one for all linear layers that are fed the same tensor.

    Those are the parts of one fused layer, over all experts, and the two first halves of an MLP.
    """
    names = {fused.name: [s.format(e) for e in range(fused.experts or 1) for s in fused.sources] for fused in found}
    every = [name for group in names.values() for name in group]
    weights = {name: layer.get_parameter(f"{name}.weight") for name in every}
    single = pre_quant_scales(weights, {name: inputs[name] for name in every})
    scales = {}
    for fused in found:
        group = list(names[fused.name])
        twin = {"fc": "gate", "gate": "fc"}.get(fused.name.rpartition(".")[2])
        if twin is not None and fused.experts is None:
            group += names[f"{fused.name.rpartition('.')[0]}.{twin}"]
        scales[fused.name] = shared_scale([single[name] for name in sorted(group)])
    return scales


def _scaled_inputs(fused: Fused, inputs: dict[str, Tensor], scale: Tensor) -> list[Tensor]:
    """What the quantized layer is given, AWQ's scale included: [rows, in], one for every expert."""
    return [inputs[fused.sources[0].format(number)] * scale for number in range(fused.experts or 1)]


def _write_linear(
    writer: SafetensorsWriter,
    name: str,
    weight: Tensor,
    kind: Kind,
    scale: Tensor | None = None,
    seen: list[Tensor] | None = None,
    awq: Search = "lite",
) -> None:
    """Quantize a weight [..., out, in] and write its tensors; `scale` is AWQ's [in], `seen` as `_scaled_inputs`."""
    if kind == "fp16":
        writer.write(f"{name}.weight", _to_half(name, weight))
    elif kind == "int8":
        rows = int8.row_scales(weight, torch.float16)
        writer.write(f"{name}.weight", int8.quantize_int8(weight, rows))
        writer.write(f"{name}.{SCALES['int8']}", rows)
    else:
        folded = weight.float() if scale is None else weight.float() / scale
        if seen is None:
            groups = int4.group_scales(folded, dtype=torch.float16)
            codes = int4.quantize_int4(folded, groups)
        else:
            groups, codes = _searched(folded, seen, awq)
        writer.write(f"{name}.weight", int4.pack(codes))
        writer.write(f"{name}.{SCALES['int4']}", groups)
        if f"{name}.{PREQUANT}" in writer.layout:
            stored = torch.ones(weight.shape[-1]) if scale is None else scale
            writer.write(f"{name}.{PREQUANT}", stored.half().expand(*weight.shape[:-2], -1))


def _searched(weight: Tensor, seen: list[Tensor], awq: Search) -> tuple[Tensor, Tensor]:
    """Scales and codes of a weight [..., out, in] that lose least on the inputs seen, one list entry an expert."""
    stacked = weight if weight.dim() == 3 else weight.unsqueeze(0)
    groups = clipped_scales(stacked, torch.stack([x.square().mean(0) for x in seen]))
    if awq == "clip":
        codes = int4.quantize_int4(stacked, groups)
    else:
        codes = torch.stack([compensated_codes(*each) for each in zip(stacked, groups, seen, strict=True)])
    return groups.view(*weight.shape[:-1], -1), codes.view(weight.shape)


def _check_finite(module: nn.Module, prefix: str) -> None:
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f"The checkpoint's tensor {prefix}{name} holds values that are not finite; it is damaged.")


def _checked(reader: CheckpointReader, name: str) -> Tensor:
    tensor = reader.get(name).float()
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"The checkpoint's tensor {name} holds values that are not finite; it is damaged.")
    return tensor


def _half(reader: CheckpointReader, name: str) -> Tensor:
    return _to_half(name, _checked(reader, name))


def _to_half(name: str, tensor: Tensor) -> Tensor:
    half = tensor.detach().half()
    if not bool(torch.isfinite(half).all()):
        raise UserError(f"The tensor {name} has values beyond float16's range (65,504), in which engines compute.")
    return half.contiguous()
