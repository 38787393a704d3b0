"""A checkpoint -> the quantized language checkpoint, one decoder layer at a time.

A layer is loaded, run on what came out of the layer before it, calibrated on what its linear layers saw, packed, written
and freed. Its float outputs go on to the next layer, so the result is that of calibrating the whole float model at once.
Held-out samples go along, through the float layer and through what was written of it.

What stands in memory: a layer in float32, the samples' hidden states, CHUNK bytes of weights being quantized and a few
times that of what quantizing them takes. Nothing grows with the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trtvlm import __version__
from trtvlm.builder.awq import Search, clipped_scales, pre_quant_scales, searched_scales, shared_scale
from trtvlm.builder.calibrate import embeddings
from trtvlm.builder.compensate import compensated_codes, gram
from trtvlm.builder.finished_graphs import link
from trtvlm.builder.seen import Seen
from trtvlm.builder.stream import SafetensorsWriter
from trtvlm.builder.unfinished import FinishedLayers, digest_of
from trtvlm.builder.verify import Answer, Verification, load_written, written_head
from trtvlm.model.artifacts import EngineDir
from trtvlm.model.attention import causal_mask
from trtvlm.model.checkpoint import CheckpointReader
from trtvlm.model.config import ModelConfig
from trtvlm.model.errors import UserError
from trtvlm.model.inputs import ModelInputs
from trtvlm.model.language import DecoderLayer
from trtvlm.model.moe import MoE
from trtvlm.model.norm import RMSNorm
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

# Bytes of float32 weights that are quantized together: more of them are fewer kernel launches and more memory.
CHUNK = 256 << 20

Progress = Callable[[str], None]
_EMBEDDING, _HEAD = "language.model.embed_tokens.weight", "language.lm_head.weight"


@dataclass
class QuantizationReport:
    """What calibration saw: tokens each expert received under the real routing, and who had too few, or none."""

    tokens: int = 0
    expert_tokens: dict[int, list[int]] = field(default_factory=dict)
    shared_calibration: dict[int, list[int]] = field(default_factory=dict)
    never_reached: dict[int, list[int]] = field(default_factory=dict)
    layer_errors: list[float] = field(default_factory=list)
    accuracy: dict[str, Any] = field(default_factory=dict)

    def restore(self, stored: dict[str, Any]) -> None:
        """Take over what `to_dict` said."""
        self.expert_tokens = _by_number(stored["expert_tokens"])
        self.shared_calibration = _by_number(stored["experts_calibrated_on_all_tokens"])
        self.never_reached = _by_number(stored["experts_never_reached"]["by_layer"])
        self.layer_errors = stored["layer_errors"]

    def to_dict(self) -> dict[str, Any]:
        """For build_report.json; layers are keyed by their number."""
        never = {str(layer): names for layer, names in self.never_reached.items() if names}
        return {
            "calibration_tokens": self.tokens,
            "expert_tokens": {str(layer): counts for layer, counts in self.expert_tokens.items()},
            "experts_calibrated_on_all_tokens": {str(layer): names for layer, names in self.shared_calibration.items()},
            "experts_never_reached": {"count": sum(map(len, never.values())), "by_layer": never},
            "layer_errors": self.layer_errors,
        }


def _by_number(stored: dict[str, list[int]]) -> dict[int, list[int]]:
    return {int(layer): values for layer, values in stored.items()}


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
    answers: Sequence[Answer] = (),
    device: str = "cpu",
) -> QuantizationReport:
    """Write `engine`'s rank0.safetensors and vision part. `samples` calibrate INT4; other kinds need none.

    awq: "lite" searches AWQ's scales and rounds to nearest, as ModelOpt does; "clip" also searches how much of each
    group's range to keep; "full" also compensates rounding errors. On a CPU the scales are ModelOpt's.

    unfinished: a folder to keep finished layers in; with one, a run goes on where a killed one was. answers: held-out
    samples on which the two models are compared. device: where layers are computed.

    Calls `progress` with what comes next: the vision part, every layer, the head. Raises UserError naming a tensor that
    is missing, misshapen, not finite, or does not fit float16.
    """
    language, report = config.language, QuantizationReport()
    progress("vision")
    samples = samples if kind == "int4" else []
    place = torch.device(device)
    state = None
    if unfinished is not None:
        inputs = [*samples, *(answer.inputs for answer in answers)]
        seen_by = [part for sample in inputs for part in (sample.input_ids, *(i.pixels for i in sample.images))]
        options = (config, kind, lm_head, awq, len(samples), place.type, versions_of(), reader.folder)
        state = FinishedLayers(unfinished, digest_of(*options, *seen_by))
    done = 0 if state is None else state.count
    verification = Verification(list(answers))
    walk = (hidden, verification.expected, verification.found) = _first_hidden(
        reader, config, engine, *(([], []) if done else (samples, verification.answers)), place
    )
    if state is not None and done:
        kept = iter(state.outputs())
        for part, count in zip(walk, (len(samples), len(answers), len(answers)), strict=True):
            part[:] = [next(kept) for _ in range(count)]
        report.restore(state.report)
        verification.layer_errors = report.layer_errors
    report.tokens = sum(x.shape[1] for x in hidden)
    report.layer_errors = verification.layer_errors
    cos, sin = rope_table(language.rope_dim, language.max_position_embeddings, language.rope_theta)
    rope = cos.to(place), sin.to(place)
    target = engine.weights if state is None else state.weights
    with SafetensorsWriter(target, layout(language, kind, lm_head), resume=done > 0) as writer:
        _write_ends(writer, reader, config, lm_head)
        for index in range(language.num_hidden_layers):
            progress(f"layer {index + 1} of {language.num_hidden_layers}")
            if index < done:
                writer.written(layer_prefix(index))
                continue
            hidden = _quantize_layer(writer, reader, config, index, kind, awq, hidden, rope, report, verification)
            if state is not None:
                writer.sync()
                state.finish([*hidden, *verification.expected, *verification.found], report.to_dict())
        writer.sync()
        if answers:
            progress("comparing")
            report.accuracy = _accuracy(verification, reader, config, target, place)
    if state is not None:
        # And stays here: a build that is killed after this still has its layers.
        link(target, engine.weights)
    return report


def versions_of() -> dict[str, str]:
    """Versions that may change a bit of the result."""
    found = {"trtvlm": __version__}
    for name in ("torch", "nvidia-modelopt"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


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
    verification: Verification,
) -> list[Tensor]:
    """Load a layer, run what came out of the last one through it, write it: what comes out of this one."""
    device = rope[0].device
    with torch.device("meta"):
        layer = DecoderLayer(config.language, index).eval().requires_grad_(False)
    layer = layer.to_empty(device=device)
    reader.load_into(layer, f"language.model.layers.{index}.")
    _check_finite(layer, f"language.model.layers.{index}.")
    seen = Seen(layer, sum(x.shape[1] for x in hidden)) if hidden else None
    hidden = [_run(layer, x, rope) for x in hidden]
    if seen is not None:
        seen.finish()
        if isinstance(layer.mlp, MoE):
            report.expert_tokens[index] = seen.expert_tokens
            report.shared_calibration[index] = seen.sparse
            report.never_reached[index] = seen.never
    _write_layer(writer, layer, index, config, kind, seen, awq)
    del seen
    writer.flush()
    verification.compare_layer(
        lambda x: _run(layer, x, rope), lambda: load_written(writer.path, layer, config.language, index)
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return hidden


def _run(layer: DecoderLayer, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Hidden states [1, T, hidden] through a layer; they are kept on the CPU, the layer is where `rope` is."""
    length, device = x.shape[1], rope[0].device
    cos, sin = (table[:length].unsqueeze(0) for table in rope)
    out: Tensor = layer(x.to(device), (cos, sin), causal_mask(length, 0, None, device))
    return out.cpu()


class _Rows(nn.Module):
    """An embedding of the tokens that occur, gathered from the checkpoint."""

    def __init__(self, reader: CheckpointReader, inputs: Sequence[ModelInputs], device: torch.device) -> None:
        super().__init__()
        ids = torch.cat([sample.input_ids for sample in inputs]).unique()
        self.weight = nn.Parameter(reader.get(_EMBEDDING)[ids].float().to(device), requires_grad=False)
        self._ids = ids.to(device)

    def forward(self, ids: Tensor) -> Tensor:
        """Int64 ids [...] -> [..., hidden]."""
        return self.weight[torch.searchsorted(self._ids, ids)]


def _first_hidden(
    reader: CheckpointReader,
    config: ModelConfig,
    engine: EngineDir,
    samples: list[ModelInputs],
    answers: list[Answer],
    device: torch.device,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Write the vision part; what the first decoder layer sees of every sample, and of the held-out ones in both models."""
    with torch.device("meta"):
        model = DeepseekVL2(config)
    model.requires_grad_(False)
    model.language = nn.Module()  # type: ignore[assignment]
    for name in ("vision", "projector"):
        module = model.get_submodule(name)
        module.to_empty(device=device)
        reader.load_into(module, f"{name}.")
        _check_finite(module, f"{name}.")
    for name in ("image_newline", "view_seperator"):
        value = _finite(name, reader.get(name).float())
        setattr(model, name, nn.Parameter(value.to(device), requires_grad=False))
    engine.vision.mkdir(parents=True, exist_ok=True)
    shapes = {name: (torch.float16, tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    with SafetensorsWriter(engine.vision_weights, shapes) as writer:
        for name, parameter in model.named_parameters():
            writer.write(name, _to_half(name, parameter))
    heldout = [answer.inputs for answer in answers]
    if not samples and not heldout:
        return [], [], []
    model.language.model = nn.Module()  # type: ignore[assignment]
    model.language.model.embed_tokens = _Rows(reader, [*samples, *heldout], device)  # type: ignore[assignment]
    hidden, expected = ([embeddings(model, sample).cpu() for sample in part] for part in (samples, heldout))
    if heldout:
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return hidden, expected, [embeddings(model, sample).cpu() for sample in heldout]


def _write_ends(writer: SafetensorsWriter, reader: CheckpointReader, config: ModelConfig, lm_head: Kind) -> None:
    """The LM head and the embedding, some rows at a time, and the final norm."""
    vocabulary, hidden = config.language.vocab_size, config.language.hidden_size
    step = max(2, CHUNK // (4 * 4 * hidden) // 2 * 2)
    for start in range(0, vocabulary, step):
        stop = min(vocabulary, start + step)
        for name, tensor in _quantized("lm_head", _checked_rows(reader, _HEAD, start, stop), lm_head).items():
            if name in writer.layout:
                scaled = name.endswith(".weight") and lm_head == "int4"
                writer.write_rows(name, start // 2 if scaled else start, tensor)
        rows = _to_half(_EMBEDDING, _checked_rows(reader, _EMBEDDING, start, stop))
        writer.write_rows("transformer.vocab_embedding.weight", start, rows)
    writer.write("transformer.ln_f.weight", _half(reader, "language.model.norm.weight"))


def _accuracy(
    verification: Verification, reader: CheckpointReader, config: ModelConfig, written: Path, device: torch.device
) -> dict[str, Any]:
    """The comparison's end: the final norm and the LM head of both models."""
    norms = []
    for dtype in (torch.float32, torch.float16):
        norm = RMSNorm(config.language.hidden_size, config.language.rms_norm_eps).requires_grad_(False).to(device)
        norm.weight.copy_(reader.get("language.model.norm.weight").float().to(dtype))
        norms.append(norm)

    def head(start: int, stop: int) -> tuple[Tensor, Tensor]:
        return reader.rows(_HEAD, start, stop).float().to(device), written_head(written, start, stop, device)

    return verification.report((norms[0], norms[1]), head, config.language.vocab_size, device)


def _write_layer(
    writer: SafetensorsWriter,
    layer: DecoderLayer,
    index: int,
    config: ModelConfig,
    kind: Kind,
    seen: Seen | None,
    awq: Search,
) -> None:
    prefix = layer_prefix(index)
    for name, (sources, dtype, _) in plain_tensors(config.language, index).items():
        tensor = torch.cat([layer.get_parameter(source) for source in sources])
        writer.write(prefix + name, tensor if dtype == torch.float32 else _to_half(prefix + name, tensor))
    found = linears(config.language, index)
    scales = _fusion_scales(layer, found, seen) if kind == "int4" and seen is not None else {}
    for fused in found:
        scale = scales.get(fused.name)
        for numbers in _chunks(fused):
            weight = torch.stack([_weight(layer, fused, number) for number in numbers])
            hessian = None
            if scale is not None and seen is not None and awq != "lite":
                # The layer is given x times the scale, so H is scaled on both sides.
                grams = [gram(seen.rows(fused.sources[0].format(number))) for number in numbers]
                hessian = torch.stack(grams) * scale * scale.unsqueeze(-1)
            tensors = _quantized(prefix + fused.name, weight, kind, scale, hessian, awq)
            for name, tensor in tensors.items():
                if fused.experts is None:
                    writer.write(name, tensor[0])
                else:
                    writer.write_rows(name, numbers[0], tensor)


def _chunks(fused: Fused) -> Iterator[list[int]]:
    """The numbers of a layer's experts, as many at a time as CHUNK lets; [0] without experts."""
    most = max(1, CHUNK // (4 * fused.outputs * fused.inputs))
    experts = fused.experts or 1
    for start in range(0, experts, most):
        yield list(range(start, min(experts, start + most)))


def _weight(layer: DecoderLayer, fused: Fused, number: int) -> Tensor:
    """The float32 weight [out, in] of a fused layer, or of one of its experts."""
    return torch.cat([layer.get_parameter(f"{source.format(number)}.weight") for source in fused.sources])


def _fusion_scales(layer: DecoderLayer, found: list[Fused], seen: Seen) -> dict[str, Tensor]:
    """AWQ's scale of each of TensorRT-LLM's layers: one for all linear layers that are fed the same tensor.

    Those are the parts of one fused layer, over all experts, and the two first halves of an MLP. Experts that no token
    reached have no part in it.
    """
    every = [s.format(number) for fused in found for number in range(fused.experts or 1) for s in fused.sources]
    single: dict[str, Tensor] = {}
    for names in _bags(layer, [name for name in every if seen.reached(name)]):
        single |= _scales(layer, names, seen)
    scales = {}
    for fused in found:
        group = [source.format(number) for number in range(fused.experts or 1) for source in fused.sources]
        twin = {"fc": "gate", "gate": "fc"}.get(fused.name.rpartition(".")[2])
        if twin is not None and fused.experts is None:
            base = fused.name.rpartition(".")[0]
            group += [source for other in found if other.name == f"{base}.{twin}" for source in other.sources]
        reached = [single[name] for name in sorted(group) if name in single]
        scales[fused.name] = shared_scale(reached) if reached else torch.ones(fused.inputs).to(layer_device(layer))
    return scales


def _bags(layer: DecoderLayer, names: list[str]) -> Iterator[list[str]]:
    """Linear layers to search together: neighbours, as many as CHUNK lets; of one shape where that is needed."""
    apart = layer_device(layer).type != "cpu"
    bag: list[str] = []
    filled, shape = 0, None
    for name in names:
        weight = layer.get_parameter(f"{name}.weight")
        if bag and (filled + 4 * weight.numel() > CHUNK or (apart and weight.shape != shape)):
            yield bag
            bag, filled = [], 0
        bag.append(name)
        filled, shape = filled + 4 * weight.numel(), weight.shape
    if bag:
        yield bag


def layer_device(layer: nn.Module) -> torch.device:
    """Where a module's weights are."""
    return next(layer.parameters()).device


def _scales(layer: DecoderLayer, names: list[str], seen: Seen) -> dict[str, Tensor]:
    """AWQ's scale of each linear layer: by ModelOpt on a CPU, by the same search in few launches elsewhere."""
    weights = {name: layer.get_parameter(f"{name}.weight") for name in names}
    if layer_device(layer).type == "cpu":
        return pre_quant_scales(weights, {name: seen.rows(name) for name in names})
    rows = [seen.rows(name) for name in names]
    magnitude = torch.stack([x.abs().mean(0) for x in rows])
    hessian = torch.stack([gram(x) for x in rows])
    found = searched_scales(torch.stack(list(weights.values())), hessian, magnitude)
    return dict(zip(names, found, strict=True))


def _quantized(
    name: str,
    weight: Tensor,
    kind: Kind,
    scale: Tensor | None = None,
    hessian: Tensor | None = None,
    awq: Search = "lite",
) -> dict[str, Tensor]:
    """The tensors of a weight [..., out, in]; `scale` is AWQ's [in], `hessian` [..., in, in] of what it is given then."""
    if kind == "fp16":
        return {f"{name}.weight": _to_half(name, weight)}
    if kind == "int8":
        rows = int8.row_scales(weight, torch.float16)
        return {f"{name}.weight": int8.quantize_int8(weight, rows), f"{name}.{SCALES['int8']}": rows}
    folded = weight.float() if scale is None else weight.float() / scale
    if hessian is None:
        groups = int4.group_scales(folded, dtype=torch.float16)
    else:
        groups = clipped_scales(folded, hessian.diagonal(dim1=-2, dim2=-1))
    if hessian is not None and awq == "full":
        codes = compensated_codes(folded, groups, hessian)
    else:
        codes = int4.quantize_int4(folded, groups)
    stored = torch.ones(weight.shape[-1], device=weight.device) if scale is None else scale
    return {
        f"{name}.weight": int4.pack(codes),
        f"{name}.{SCALES['int4']}": groups,
        f"{name}.{PREQUANT}": stored.half().expand(*weight.shape[:-2], -1),
    }


def _check_finite(module: nn.Module, prefix: str) -> None:
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(
                f"The checkpoint's tensor {prefix}{name} holds values that are not finite; download it again."
            )


def _checked_rows(reader: CheckpointReader, name: str, start: int, stop: int) -> Tensor:
    return _finite(name, reader.rows(name, start, stop).float())


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"The checkpoint's tensor {name} holds values that are not finite; download it again.")
    return tensor


def _half(reader: CheckpointReader, name: str) -> Tensor:
    return _to_half(name, _finite(name, reader.get(name).float()))


def _to_half(name: str, tensor: Tensor) -> Tensor:
    half = tensor.detach().half()
    if not bool(torch.isfinite(half).all()):
        raise UserError(f"The tensor {name} has values beyond float16's range (65,504), in which engines compute.")
    return half.contiguous()
