"""AWQ (Lin et al., arXiv 2306.00978) by ModelOpt: the input scales of a bag of linear layers."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from packaging.version import Version
from torch import Tensor, nn

from trtvlm.model.errors import UserError
from trtvlm.plugins.int4_linear.packing import GROUP_SIZE, group_scales, quantize_int4

ALPHA_STEP = 0.1
Search = Literal["lite", "clip", "full"]
"""What INT4 searches for: AWQ's scales; also each group's range; also codes that make up for each other's rounding."""
# Of a group's largest weight, how much is kept: from all of it downwards.
CLIP_RATIOS = tuple(1 - 0.04 * step for step in range(13))
# Bytes of weights from which on a collection is cheap beside the search.
_WORTH_COLLECTING = 16 << 20
_TINY = torch.finfo(torch.float32).tiny
# The rules below are an ordered list since then.
LEAST_MODELOPT = "0.47"


class _Bag(nn.Module):
    """Linear layers side by side, each with the inputs it is calibrated on."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights.values())
        with torch.no_grad():
            for layer, weight in zip(self.layers, weights.values(), strict=True):
                assert isinstance(layer, nn.Linear)
                layer.weight.copy_(weight)


@torch.no_grad()
def pre_quant_scales(weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factor AWQ multiplies each linear layer's inputs by (its weights are divided by it): float32 [in] each.

    weights float32 [out, in] and inputs float32 [tokens, in], by layer name. The search (alpha from 0 to 1 in steps of
    0.1) minimises each layer's own output error on its own inputs; a layer without inputs gets ones.
    """
    with _quiet():
        try:
            import modelopt
            import modelopt.torch.quantization as mtq
        except ImportError as error:
            raise UserError(
                f"INT4 AWQ needs nvidia-modelopt, which cannot be imported ({error}); install it, or use --quant int8_wo."
            ) from None
        if Version(modelopt.__version__) < Version(LEAST_MODELOPT):
            raise UserError(
                f"INT4 AWQ needs nvidia-modelopt {LEAST_MODELOPT} or newer, but {modelopt.__version__} is installed; "
                "upgrade it, or build in another environment."
            )
        bag = _Bag(weights)
        rows = [inputs[name] for name in weights]

        def run(module: nn.Module) -> None:
            assert isinstance(module, _Bag)
            for layer, x in zip(module.layers, rows, strict=True):
                if x.shape[0]:
                    layer(x)

        group = {"num_bits": 4, "block_sizes": {-1: GROUP_SIZE, "type": "static"}}
        config = {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": group, "enable": True},
            ],
            "algorithm": {"method": "awq_lite", "alpha_step": ALPHA_STEP},
        }
        mtq.quantize(bag, config, run)
    # ModelOpt leaves its modules, and what they were run with, in reference cycles: their memory would be held for long.
    rows.clear()
    found = {}
    for name, layer in zip(weights, bag.layers, strict=True):
        scale = getattr(layer.input_quantizer, "_pre_quant_scale", None)
        found[name] = torch.ones(weights[name].shape[1]) if scale is None else scale.detach().float().flatten()
        assert isinstance(layer.weight, nn.Parameter)
        layer.weight.data = torch.empty(0)
    if sum(weight.nbytes for weight in weights.values()) > _WORTH_COLLECTING:
        del bag, layer
        gc.collect()
    return found


@torch.no_grad()
def searched_scales(weight: Tensor, hessian: Tensor, magnitude: Tensor) -> Tensor:
    """`pre_quant_scales` of many layers at once, without ModelOpt: float32 [layers, in].

    weight float32 [layers, out, in]; of the inputs only X^T X / rows [layers, in, in] and their mean magnitude
    [layers, in] are needed, since the mean square of an output error E x is E (X^T X / rows) E^T. What it chooses is what
    ModelOpt chooses but for ties within float32's rounding; on a GPU it costs a few products a layer of a model.
    """
    grouped = weight.abs().unflatten(-1, (-1, GROUP_SIZE))
    share = (grouped / (grouped.amax(-1, keepdim=True) + _TINY)).flatten(-2).mean(-2)
    del grouped
    best = torch.ones_like(share)
    least = torch.full(share.shape[:1], torch.inf, device=share.device)
    for step in range(round(1 / ALPHA_STEP) + 1):
        alpha = step * ALPHA_STEP
        scale = (magnitude.pow(alpha) / (share.pow(1 - alpha) + _TINY)).clamp(1e-4, 1e4)
        scale /= (scale.amax(-1, keepdim=True) * scale.amin(-1, keepdim=True)).sqrt()
        spread = scale.unsqueeze(-2)
        folded = weight * spread
        groups = group_scales(folded)
        folded = quantize_int4(folded, groups).unflatten(-1, (-1, GROUP_SIZE)) * groups.unsqueeze(-1)
        error = folded.flatten(-2).div_(spread).sub_(weight)
        loss = (error @ hessian).mul_(error).sum((-2, -1))
        better = loss < least
        best = torch.where(better.unsqueeze(-1), 1 / scale, best)
        least = torch.where(better, loss, least)
    return best


def shared_scale(scales: Sequence[Tensor]) -> Tensor:
    """One scale for layers that share their input: the mean, rounded to float16 as it is stored; never 0."""
    mean = torch.stack(list(scales)).mean(0)
    return mean.clamp(min=2.0**-14, max=60000.0).half().float()


@torch.no_grad()
def clipped_scales(weight: Tensor, importance: Tensor) -> Tensor:
    """Scales of a weight [..., out, in] that lose least: float32 [..., out, in / 64], rounded to float16.

    AWQ's clip search, group by group: the largest weights may be clipped when the others gain more. The loss of a group
    is the sum over its inputs of importance [..., in] (the mean square of the input) times the squared error.
    """
    folded, importance = weight.float(), importance.float().unsqueeze(-2)
    widest = group_scales(folded)
    best, least = widest.half().float(), torch.full_like(widest, torch.inf)
    for ratio in CLIP_RATIOS:
        scales = (widest * ratio).half().float().clamp(min=2.0**-24)
        spread = scales.repeat_interleave(GROUP_SIZE, dim=-1)
        error = (quantize_int4(folded, scales) * spread - folded).square() * importance
        loss = error.unflatten(-1, (-1, GROUP_SIZE)).sum(-1)
        best, least = torch.where(loss < least, scales, best), torch.minimum(loss, least)
    return best


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep ModelOpt's progress bars and notices off the terminal."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
