"""Which matrix products give a row the same bits at every width, and what they cost: `python -m trtvlm.plugins.rows.compare`.

Prints the table of README.md for the machine it runs on, with as many threads as OMP_NUM_THREADS says.
"""

import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trtvlm.plugins.rows import linear
from trtvlm.plugins.rows.linear import Kernel

SHAPES = [(256, 800), (256, 2560), (1280, 256), (128, 384), (256, 1024)]
"""(in, out) of the nano pair's products, and its LM head."""

WIDTHS = (1, 2, 5, 8)


def ordinary(weight: Tensor) -> Kernel:
    """F.linear as it is."""
    return lambda x: F.linear(x, weight)


def transposed(weight: Tensor) -> Kernel:
    """The same product over a weight stored [in, out]."""
    stored = weight.t().contiguous()
    return lambda x: torch.mm(x, stored)


def padded(weight: Tensor) -> Kernel:
    """F.linear of rows padded to eight."""
    return lambda x: F.linear(F.pad(x, (0, 0, 0, 8 - x.shape[0])), weight)[: x.shape[0]]


def expanded(weight: Tensor) -> Kernel:
    """A batch of matrix-vector products over one expanded weight."""
    return lambda x: torch.bmm(weight.expand(x.shape[0], -1, -1), x.unsqueeze(2)).squeeze(2)


CANDIDATES: tuple[Callable[[Tensor], Kernel], ...] = (
    ordinary,
    transposed,
    expanded,
    padded,
    linear.row_by_row_kernel,
    linear.half_kernel_dispatched,
    linear.half_kernel,
)


def best_microseconds(call: Callable[[], object], repeats: int = 5, calls: int = 100) -> float:
    """The least mean time of a call over `repeats` runs of `calls`: the machine is shared, its noise only adds."""
    call()
    means = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        means.append((time.perf_counter() - start) / calls)
    return 1e6 * min(means)


@torch.inference_mode()
def main() -> None:
    """Print a line for every shape and candidate."""
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; microseconds at {WIDTHS} rows")
    for inputs, outputs in SHAPES:
        weight = torch.randn(outputs, inputs).half().float()
        for make in CANDIDATES:
            try:
                kernel = make(weight)
            except (AttributeError, RuntimeError) as error:
                print(f"{inputs:5d} -> {outputs:5d}  {make.__name__:24s} not here: {str(error).splitlines()[0]}")
                continue
            verdict = "invariant" if linear.check_row_invariance(kernel, inputs) else "VARIES"
            rows = [torch.randn(width, inputs) for width in WIDTHS]
            times = " ".join(f"{best_microseconds(lambda: kernel(x)):7.0f}" for x in rows)  # noqa: B023
            print(f"{inputs:5d} -> {outputs:5d}  {make.__name__:24s} {verdict:10s} {times}")


if __name__ == "__main__":
    main()
