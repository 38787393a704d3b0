"""What the sampling kernels compute, step by step, in numpy: slow, and equal but for the rounding of exp.

Weights are integers, so every sum is exact in any order: a row's distribution and its draws depend on nothing else.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

WEIGHT_ONE = 2**44
"""The weight of the most likely token: what is 2^-44 times less likely has none."""
PROBABILITY_ONE = 2**60
LEVELS, BUCKETS = 3, 1024

Weights = NDArray[np.uint64]


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit words of a counter and a key (Salmon et al., SC 2011)."""
    (a, b, c, d), (low, high) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 ^ b ^ low, second % 2**32, first >> 32 ^ d ^ high, first % 2**32
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return a, b, c, d


def random_fraction(seed: int, step: int, which: int) -> int:
    """Random number `which` of a step, in units of 2^-64."""
    a, b, _, _ = philox((step, which, 0, 0), (seed % 2**32, seed // 2**32 % 2**32))
    return b << 32 | a


def unit(fraction: int) -> float:
    """The first 53 bits of a random number, in [0, 1)."""
    return (fraction >> 11) / 2**53


def relative(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """exp((logit - peak) / temperature) float32 [V]; at temperature 0, 1 for the (first) most likely token alone."""
    peak = int(logits.argmax())
    out = np.zeros_like(logits)
    if temperature > 0:
        with np.errstate(over="ignore", under="ignore"):
            out = np.exp((logits - logits[peak]) / np.float32(temperature)).astype(np.float32)
    out[peak] = 1
    return out


def kept(weights: NDArray[np.float32], top_p: float) -> NDArray[np.float32]:
    """Top-p: the smallest set of largest weights [V] that reaches `top_p` of all; the others become 0.

    Of equal ones on the border, the smaller tokens stay.
    """
    fixed = to_fixed(weights, WEIGHT_ONE)
    stays = fixed > 0
    top_p = float(np.float32(top_p))
    if top_p < 1:
        wanted = max(1, math.ceil(top_p * float(fixed.sum())))
        bits = weights.view(np.uint32)
        border, inside = 0, stays
        for level in range(LEVELS):
            # Radix selection: the bucket in which the weight from the top down reaches what is wanted.
            bucket = bits >> np.uint32(20 - 10 * level) & np.uint32(BUCKETS - 1)
            histogram = np.zeros(BUCKETS, np.uint64)
            np.add.at(histogram, bucket[inside], fixed[inside])
            at = BUCKETS - 1
            while int(histogram[at]) < wanted:
                wanted -= int(histogram[at])
                at -= 1
            border = border << 10 | at
            inside = inside & (bucket == at)
        weight = int(fixed[inside][0])  # the same of each
        equals = np.flatnonzero(inside)[: -(-wanted // weight)]
        stays = stays & (bits > border)
        stays[equals] = True
    return np.where(stays, weights, np.float32(0))


def distribution(logits: NDArray[np.float32], temperature: float, top_p: float) -> tuple[NDArray[np.float32], Weights]:
    """Probabilities float32 [V] of logits [V], and the integer weights [V] that a token is drawn by."""
    weights = kept(relative(logits, temperature), top_p)
    fixed = to_fixed(weights, WEIGHT_ONE)
    return weights / np.float32(float(fixed.sum()) / WEIGHT_ONE), fixed


def to_fixed(values: NDArray[np.float32], one: int) -> Weights:
    """Values of at most about 1 in units of 1 / one, rounded down; `one` is a power of two."""
    return (values.astype(np.float64) * one).astype(np.uint64)


def draw(weights: Weights, fraction: int) -> int:
    """The token that a random number falls on: where the sum of weights first exceeds fraction * total."""
    sums = weights.cumsum(dtype=np.uint64)
    return int(np.searchsorted(sums, int(sums[-1]) * fraction >> 64, side="right"))
