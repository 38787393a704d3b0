"""Decoding attention over the cache, so that a row has the shapes and the bits that it has alone."""

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from trtvlm.plugins.rows.linear import check_row_invariance

BUCKET = 64
"""Spans are rounded up to a multiple of this: a row's shape depends on its own position only, and rows can share it."""


def bucket_end(position: int) -> int:
    """The span that a row at this position has, unless the cache ends before."""
    return position // BUCKET * BUCKET + BUCKET


class LatentAttention:
    """Multi-head latent attention whose queries are already absorbed: the latent is key and value of every head.

    Rows in the same bucket of positions go through one product if that product is invariant on this machine (tried
    once a shape), one by one otherwise.
    """

    def __init__(self, heads: int, rank: int, rope: int, scale: float) -> None:
        self.heads, self.rank, self.rope, self.scale = heads, rank, rope, scale
        self._together: dict[tuple[int, int], bool] = {}

    def __call__(self, q_latent: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, start: int) -> Tensor:
        """Attend from M rows at positions start, start + 1, ... whose own latents are in the cache already.

        q_latent [M, heads * rank], q_pe [M, heads, rope] rotated; latent [max_len, rank] and k_pe [max_len, rope], of
        which the last row's bucket is read and must be finite -> mixed latents [M, heads * rank].
        """
        outs = []
        for first, last, span in self._runs(start, q_latent.shape[0], latent.shape[0]):
            q = q_latent[first:last].reshape(-1, self.rank), q_pe[first:last].reshape(-1, self.rope)
            mask = _mask(start + first, last - first, span, self.heads)
            outs.append(self._attend(*q, latent[:span], k_pe[:span], mask).view(last - first, -1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _runs(self, start: int, rows: int, longest: int) -> Iterator[tuple[int, int, int]]:
        """Rows first..last that attend together, and the span they see."""
        first = 0
        while first < rows:
            end = bucket_end(start + first)
            span = min(end, longest)
            last = min(rows, end - start)
            if last - first > 1 and not self._invariant(span):
                last = first + 1
            yield first, last, span
            first = last

    def _invariant(self, span: int) -> bool:
        # More threads cut a product into other pieces.
        shape = span, torch.get_num_threads()
        if shape not in self._together:
            generator = torch.Generator().manual_seed(0)
            latent = torch.randn(span, self.rank, generator=generator)
            k_pe = torch.randn(span, self.rope, generator=generator)
            mask = torch.zeros(1, 1)

            def attend(x: Tensor) -> Tensor:
                q = torch.split(x.view(-1, self.rank + self.rope), [self.rank, self.rope], dim=1)
                return self._attend(q[0].contiguous(), q[1].contiguous(), latent, k_pe, mask).view(x.shape[0], -1)

            self._together[shape] = check_row_invariance(attend, self.heads * (self.rank + self.rope))
        return self._together[shape]

    def _attend(self, q_latent: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, mask: Tensor) -> Tensor:
        scores = torch.addmm(mask, q_latent, latent.t(), alpha=self.scale)
        scores.addmm_(q_pe, k_pe.t(), alpha=self.scale)
        return scores.softmax(-1) @ latent


def head_attention(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
    """Plain attention row by row: row i sees positions up to start + i, its own keys and values cached already.

    q [M, heads, d], k and v [kv_heads, max_len, d] -> [M, heads * d].
    """
    grouped = q.shape[1] != k.shape[0]
    rows = []
    for number, row in enumerate(q.unbind()):
        span = start + number + 1
        keys, values = k[None, :, :span], v[None, :, :span]
        out = F.scaled_dot_product_attention(row[None, :, None], keys, values, scale=scale, enable_gqa=grouped)
        rows.append(out.view(1, -1))
    return rows[0] if len(rows) == 1 else torch.cat(rows)


@lru_cache(maxsize=16)  # every layer of a step asks for the same few
def _mask(position: int, rows: int, span: int, heads: int) -> Tensor:
    """What is added to the scores [rows * heads, span] of rows at `position` on: -inf ahead of each row, else 0."""
    ahead = torch.arange(span) > torch.arange(position, position + rows).unsqueeze(1)
    mask = torch.zeros(rows, span).masked_fill_(ahead, float("-inf"))
    return mask.repeat_interleave(heads, dim=0)
