"""Times of what stands between the layers of a speculative step: `python -m trtvlm.plugins.sampling.bench`."""

from functools import partial

import torch
from torch import Tensor

from trtvlm.plugins.cuda.timing import time_graph
from trtvlm.plugins.embedding.cuda import embed
from trtvlm.plugins.sampling import cuda
from trtvlm.plugins.speculative_accept import cuda as accept
from trtvlm.plugins.speculative_accept.state import Start, new_ring, target_inputs

COPIES = 20
BLOCK = 64  # logits a candidate


def main() -> None:
    """One line for each vocabulary and number of drafted tokens, in microseconds."""
    for hidden, vocab in ((1280, 129280), (2048, 102400), (2560, 129280), (256, 1024)):
        for drafted in (0, 3, 7):
            print(f"hidden {hidden:5} vocab {vocab:6} drafted {drafted}: {_times(hidden, vocab, drafted)}")


def _times(hidden: int, vocab: int, drafted: int) -> str:
    rows = drafted + 1
    state = Start(0, 0, 1, 2**30, temperature=1.0, top_p=0.9).state().cuda()
    ring = new_ring(4096)
    table = torch.zeros(vocab, hidden, dtype=torch.float16, device="cuda")
    residual, sums = torch.empty(rows, hidden, device="cuda"), torch.empty(rows, hidden // 16, device="cuda")
    logits = [torch.randn(rows, vocab, device="cuda") * 2 for _ in range(COPIES)]
    candidates = [_candidates(logit) for logit in logits]
    last = [(values[-1], tokens[-1]) for values, tokens in candidates]
    probs, drafts = torch.empty(rows, vocab, device="cuda"), torch.rand(max(drafted, 1), vocab, device="cuda") / vocab
    work, accepting = cuda.workspace(rows, vocab), accept.workspace(vocab)
    inputs = target_inputs(state, drafted)
    both = zip(logits, candidates, strict=True)
    times = {
        "embed": time_graph([partial(embed, inputs, table, residual, sums, rows, c) for c in last]),
        "accept_greedy": time_graph([partial(accept.accept_greedy, state, ring, drafted, None, c) for c in candidates]),
        "probabilities": time_graph([partial(cuda.probabilities, x, c, state, probs, work, rows) for x, c in both]),
        "accept_sampled": time_graph(
            [partial(accept.accept_sampled, state, ring, drafted, drafts, probs, accepting)] * COPIES
        ),
    }
    return ", ".join(f"{name} {value:.1f} us" for name, value in times.items())


def _candidates(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, tokens = logits.view(len(logits), -1, BLOCK).max(-1)
    return values, (tokens + torch.arange(0, logits.shape[-1], BLOCK, device=logits.device)).int()


if __name__ == "__main__":
    main()
