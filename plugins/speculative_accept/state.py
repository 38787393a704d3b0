"""One small tensor holds all that a speculative step on the device reads and writes between launches.

`state` is int32 [STATE_SIZE] on the device. Its parts are read and written through views of it, so that a step captured
once in a CUDA graph serves every request: the host copies a new state in, replays, and reads the ring.

    DONE             1 after the last token: further steps emit nothing and move no cursor
    EMITTED, LIMIT   tokens emitted since the state was made, and at most how many
    EOS              the token that ends an answer (-1: none)
    TARGET_CURSOR    T, positions in the target's cache: every token but the newest
    STEP             steps taken: the counter of the random numbers
    SEED (2)         the request's 64-bit seed, low word first
    TEMPERATURE      float32 bits; 0 means the most likely token
    TOP_P            float32 bits
    DRAFTED          tokens drafted and tokens accepted so far
    ACCEPTED
    DRAFT_CURSORS    the cursor of each of the draft's K passes: T - 1, T + 1, T + 2, ...
    INPUTS           previous token, newest token, drafted tokens: what the passes embed

The draft's first pass always reads two rows, INPUTS[0:2], at T - 1 and T; pass i > 0 reads INPUTS[i + 1] at T + i. After
all drafted tokens were accepted, the draft has not read the one at T - 1 yet; otherwise its row is in the cache already
and is written again with the same bits, as rows do not depend on how many are computed together. The target reads
INPUTS[1:K + 2] at T. A pass writes up to position T + K, also after DONE: caches need K + 1 positions beyond the prompt and
LIMIT. Right after a prefill the draft writes the prompt's last row again, from its token and rounded as a decode rounds;
that decides nothing but what is proposed. Steps of different K > 0 may follow each other; after one of K = 0 the draft has
missed a token, so only such steps may follow it.

`ring` is int32 [RING_HEADER + capacity], by choice in pinned host memory. Token n (from 0) stands at RING_HEADER + n % capacity.
The header holds the count of tokens, DONE, steps, drafted and accepted; the count is written last, after all else has
become visible to the host, which may therefore wait for it to grow.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_DRAFTED = 15
"""The most tokens a step can draft: a pass of the target has up to 16 rows."""

DONE, EMITTED, LIMIT, EOS, TARGET_CURSOR, STEP = range(6)
SEED, TEMPERATURE, TOP_P, DRAFTED, ACCEPTED = 6, 8, 9, 10, 11
DRAFT_CURSORS = 16
INPUTS = 32
STATE_SIZE = 64

RING_COUNT, RING_DONE, RING_STEPS, RING_DRAFTED, RING_ACCEPTED = range(5)
RING_HEADER = 16

# Which of a step's random numbers is which: the draft's draws, the tests, the target's draw, the token after a prefill.
DRAFT_DRAW, ACCEPT_TEST, TARGET_DRAW, FIRST_DRAW = 0, 16, 32, 48


@dataclass(frozen=True)
class Start:
    """Where a request starts: its last prompt token, its first own token, and the prompt's length in both caches."""

    previous: int
    newest: int
    prompt: int
    limit: int
    eos: int = -1
    seed: int = 0
    temperature: float = 0.0
    top_p: float = 1.0

    def state(self) -> Tensor:
        """The state as int32 [STATE_SIZE] on the CPU. ValueError if the prompt is empty."""
        if self.prompt < 1:
            raise ValueError("the draft reads the prompt's last token again: there must be one")
        seed = self.seed % 2**64
        values = [0] * STATE_SIZE
        values[LIMIT], values[EOS], values[TARGET_CURSOR] = self.limit, self.eos, self.prompt
        values[SEED], values[SEED + 1] = _signed(seed % 2**32), _signed(seed // 2**32)
        values[TEMPERATURE], values[TOP_P] = _bits(self.temperature), _bits(self.top_p)
        values[DRAFT_CURSORS : DRAFT_CURSORS + MAX_DRAFTED] = draft_cursors(self.prompt)
        values[INPUTS], values[INPUTS + 1] = self.previous, self.newest
        values[DONE] = int(self.limit <= 0)
        return torch.tensor(values, dtype=torch.int32)


def draft_cursors(cursor: int) -> list[int]:
    """The cursor of each pass of the draft when the target's is `cursor`."""
    return [cursor - 1, *(cursor + i for i in range(1, MAX_DRAFTED))]


def new_ring(capacity: int, *, pinned: bool = True) -> Tensor:
    """An empty ring for `capacity` tokens: int32 [RING_HEADER + capacity], in host memory that the device can write."""
    return torch.zeros(RING_HEADER + capacity, dtype=torch.int32, pin_memory=pinned)


def target_cursor(state: Tensor) -> Tensor:
    """int32 [1]: the cursor of the target's pass."""
    return state[TARGET_CURSOR : TARGET_CURSOR + 1]


def target_inputs(state: Tensor, drafted: int) -> Tensor:
    """int32 [drafted + 1]: the tokens of the target's pass, the newest and the drafted ones."""
    return state[INPUTS + 1 : INPUTS + 2 + drafted]


def draft_cursor(state: Tensor, index: int) -> Tensor:
    """int32 [1]: the cursor of the draft's pass `index`."""
    return state[DRAFT_CURSORS + index : DRAFT_CURSORS + index + 1]


def draft_inputs(state: Tensor, index: int) -> Tensor:
    """The tokens of the draft's pass `index`: int32 [2] (previous, newest) for the first, then int32 [1]."""
    return state[INPUTS : INPUTS + 2] if index == 0 else state[INPUTS + 1 + index : INPUTS + 2 + index]


def drafted_token(state: Tensor, index: int) -> Tensor:
    """int32 [1]: where the token that the draft's pass `index` proposes is written."""
    return state[INPUTS + 2 + index : INPUTS + 3 + index]


def newest_token(state: Tensor) -> Tensor:
    """int32 [1]: the newest token; a draw after a prefill may be written there."""
    return state[INPUTS + 1 : INPUTS + 2]


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
