"""`int8_linear` on the device: the LM head's kernel, for few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from trtvlm.plugins.cuda.repacked import Repacked
from trtvlm.plugins.cuda.tiles import INPUTS, ROWS
from trtvlm.plugins.int4_linear.decode import MOST_ROWS, Norm
from trtvlm.plugins.int8_linear.decode import HeadWeight, candidates, head


def _pack(codes: Tensor, scales: Tensor) -> HeadWeight:
    return HeadWeight.pack("int8", codes, scales)


_weights = Repacked(_pack)


def supports(x: Tensor, codes: Tensor) -> bool:
    """Whether the kernel takes these: up to 16 rows of halves, whole tiles of 16 outputs by 64 inputs."""
    outputs, inputs = codes.shape
    whole = inputs > 0 and inputs % INPUTS == 0 and outputs > 0 and outputs % ROWS == 0
    return x.dtype == torch.half and whole and x.numel() <= MOST_ROWS * inputs


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """`reference.int8_linear` of what `supports` allows, each result rounded once.

    The kernel normalises first. Sums of squares that make every row's mean 1 leave halves as they are: the root is 1 up
    to rounding in float32, which the rounding to halves takes back.
    """
    weight = _weights(codes, scales)
    flat = x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    if not rows:
        return x.new_empty(*x.shape[:-1], weight.vocab)
    sums = torch.full((rows, weight.hidden // 16), 16.0, device=x.device)
    norm = Norm(torch.ones(weight.hidden, dtype=torch.half, device=x.device), sums, 0.0)
    logits = torch.empty(rows, weight.vocab, device=x.device)
    head(flat.float().contiguous(), norm, weight, candidates(weight.vocab, rows, x.device), rows, logits)
    return logits.to(x.dtype).view(*x.shape[:-1], weight.vocab)
