"""The emulator runs what a GPU would run, and says what is wrong with a kernel that is wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trtvlm.plugins.cuda.emulation import emulator
from trtvlm.plugins.cuda.emulation.emulator import (
    ORDERS,
    EmulatedKernel,
    EmulationError,
    Schedule,
    compiler,
    emulated,
    emulated_kernel,
)
from trtvlm.plugins.cuda.emulation.translate import translate

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler")

KERNEL = """
extern "C" __global__ void __launch_bounds__(64, 2) {name}({parameters}) {{
    {body}
}}
"""
KERNELS: dict[str, tuple[str, str]] = {}
"""Name -> parameters and body. They are compiled together: each compilation takes longer than all that they do."""


def kernel(name: str, parameters: str, body: str) -> str:
    """Add one to what `launch` knows."""
    KERNELS[name] = parameters, body
    return name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("kernels") / "kernels.cu"
    kernels = [KERNEL.format(name=name, parameters=p, body=body) for name, (p, body) in KERNELS.items()]
    file.write_text('#include "common.cuh"\n' + COUNTERS + TEMPLATE + "".join(kernels))
    return file


Launch = Callable[..., None]


@pytest.fixture
def launch(source: Path) -> Launch:
    def call(
        name: str, *arguments: Tensor | int | float | None, grid: int = 1, block: int = 64, shared: int = 0
    ) -> None:
        emulated_kernel(str(source), name)((grid,), block, *arguments, shared=shared)

    return call


REVERSE = """
    __shared__ int values[64];
    values[threadIdx.x] = threadIdx.x + blockIdx.x;
    {barrier}
    out[blockIdx.x * 64 + threadIdx.x] = values[63 - threadIdx.x];
"""
kernel("reverse", "int* out", REVERSE.format(barrier="__syncthreads();"))
kernel("reverse_early", "int* out", REVERSE.format(barrier=""))


@pytest.mark.parametrize("order", ORDERS)
def test_a_barrier_is_waited_for_and_its_absence_seen(launch: Launch, order: str) -> None:
    expected = torch.arange(63, -1, -1).repeat(3, 1) + torch.arange(3)[:, None]
    with emulated(Schedule(order)):
        for name in ("reverse", "reverse_early"):
            out = torch.zeros(3, 64, dtype=torch.int32)
            launch(name, out, grid=3)
            assert torch.equal(out.long(), expected) == (name == "reverse")


# add_release and load_acquire: blocks of one launch wait for each other here.
COUNTERS = '#include "turns.cuh"\n'
TEMPLATE = """
template <int N> DEVICE int* of_a_template() {
    __shared__ int values[N];
    return values;
}
"""
kernel(
    "templates", "int* out, u32* counter", """
    int* values = of_a_template<64>();
    out[64 * (2 * blockIdx.x) + threadIdx.x] = values[threadIdx.x];
    values[threadIdx.x] = blockIdx.x;
    add_release(counter, 1);
    while (load_acquire(counter) < 64 * gridDim.x) {}
    out[64 * (2 * blockIdx.x + 1) + threadIdx.x] = values[threadIdx.x];
    """,
)  # fmt: skip


def test_every_block_has_its_own_shared_memory_full_of_poison(launch: Launch) -> None:
    out, counter = torch.zeros(5, 2, 64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with emulated():
        launch("templates", out, counter, grid=5)
    assert out[:, 0].eq(-1).all()
    assert out[:, 1].equal(torch.arange(5, dtype=torch.int32)[:, None].expand(-1, 64))


kernel(
    "last_block", "int* out, u32* counter", """
    __shared__ bool last;
    out[1 + blockIdx.x * 64 + threadIdx.x] = 1;
    {barrier}
    if (threadIdx.x == 0) last = atomicAdd(counter, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!last || threadIdx.x) return;
    for (int i = 0; i < 64 * gridDim.x; ++i) out[0] += out[1 + i];
    """,
)  # fmt: skip
KERNELS["last_block_early"] = (KERNELS["last_block"][0], KERNELS["last_block"][1].replace("{barrier}", ""))
KERNELS["last_block"] = (KERNELS["last_block"][0], KERNELS["last_block"][1].replace("{barrier}", "__syncthreads();"))


def test_blocks_that_count_themselves_too_early_are_seen(launch: Launch) -> None:
    sums: dict[str, set[int]] = {"last_block": set(), "last_block_early": set()}
    for name, found in sums.items():
        for seed in range(20):
            out, counter = torch.zeros(1 + 6 * 64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            with emulated(Schedule("shuffled", seed, together=True)):
                launch(name, out, counter, grid=6)
            found.add(int(out[0]))
    assert sums["last_block"] == {6 * 64}
    assert len(sums["last_block_early"]) > 1


WAITING = kernel(
    "waiting",
    "int* out, u32* counter",
    """
    __shared__ int seen;
    for (int round = 1; round <= 3; ++round) {
        if (threadIdx.x == 0) {
            out[blockIdx.x] += round;
            add_release(counter, 1);
            while (load_acquire(counter) < u32(gridDim.x * round)) {}
            seen = *reinterpret_cast<volatile int*>(out + (blockIdx.x + 1) % gridDim.x);
        }
        __syncthreads();
        if (threadIdx.x == 63) out[blockIdx.x + gridDim.x * round] = seen;
        if (threadIdx.x == 0) {
            add_release(counter + 32, 1);
            while (load_acquire(counter + 32) < u32(gridDim.x * round)) {}
        }
        __syncthreads();
    }
""",
)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_blocks_wait_for_each_other(launch: Launch, order: str, together: bool) -> None:
    out, counter = torch.zeros(4, 132, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    with emulated(Schedule(order, together=together)):
        launch(WAITING, out, counter, grid=132)
    assert out[1:].equal(torch.tensor([1, 3, 6], dtype=torch.int32)[:, None].expand(-1, 132))


def test_more_blocks_than_fit_wait_for_ever(launch: Launch) -> None:
    out, counter = torch.zeros(4, 5, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    with emulated(Schedule(resident=4)), pytest.raises(EmulationError, match=r"deadlock.*1 poll"):
        launch(WAITING, out, counter, grid=5)


WRONG = (
    ("out[64 + threadIdx.x] = 1;", "outside of"),
    ("if (threadIdx.x == 0) out[-1] = 1;", "outside of"),
    ("out[threadIdx.x] = out[threadIdx.x - 1000 * int(threadIdx.x)];", "outside of"),
    ("extern __shared__ int shared[]; shared[8 + threadIdx.x] = 0; out[0] = shared[threadIdx.x];", "outside of"),
    ("out[0] = reinterpret_cast<uint4*>(out + 1)->x;", "not aligned"),
    ("if (threadIdx.x < 63) __syncwarp(); else __ballot_sync(~0u, 1);", "__syncwarp and __ballot_sync"),
    ("if (threadIdx.x < 63) __syncwarp();", "deadlock: of 31 threads 0 wait at a barrier, 31 for lanes"),
    ("if (threadIdx.x) __syncwarp(0xffffffffu << 1);", "lacks the lane"),
    ("extern __shared__ uint4 shared[]; copy_async(shared, out); copy_commit();", "did not wait for"),
    ("extern __shared__ uint4 shared[]; copy_async(shared + 2, out); copy_wait<0>();", "beyond its end"),
    ("copy_async(out, out);", "of shared memory"),
)
for number, (body, _) in enumerate(WRONG):
    kernel(f"wrong_{number}", "int* out", body)
kernel("right", "int* out", "out[threadIdx.x] = 1;")


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_is_wrong_is_said(launch: Launch, number: int) -> None:
    with pytest.raises(EmulationError, match=WRONG[number][1]):
        launch(f"wrong_{number}", torch.zeros(64, dtype=torch.int32), shared=32)
    # And the process goes on.
    out = torch.zeros(64, dtype=torch.int32)
    launch("right", out)
    assert out.eq(1).all()


kernel("scaled", "float* out, float x", "out[threadIdx.x] = x;")


def test_arguments_and_sizes_are_checked(launch: Launch) -> None:
    out = torch.zeros(64)
    for wrong in ((out,), (out, 1), (1.0, out), (out, 1.0, 2)):
        with pytest.raises(EmulationError, match="takes pf "):
            launch("scaled", *wrong)
    with pytest.raises(EmulationError, match="96 threads"):
        launch("scaled", out, 1.0, block=96)
    with pytest.raises(EmulationError, match="not of meta"):
        launch("scaled", out.to("meta"), 1.0)
    with pytest.raises(ValueError, match="no kernel"):
        launch("unheard_of")


def test_sources_it_does_not_know(tmp_path: Path) -> None:
    file = tmp_path / "kernel.cu"
    file.write_text('asm("unheard.of %0;" :: "r"(1));')
    with pytest.raises(RuntimeError, match="unheard_of"):
        EmulatedKernel(str(file), "subject")
    with pytest.raises(ValueError, match="understand"):
        translate('asm("@p bra LATER;");')


kernel(
    "overlapping", "int* a, int* b", """
    if (threadIdx.x < 3) a[100 * threadIdx.x] = 7;
    __syncthreads();
    if (threadIdx.x) b[threadIdx.x] += b[0];
    """,
)  # fmt: skip


def test_overlapping_tensors_stay_one(launch: Launch) -> None:
    base = torch.zeros(3, 100, dtype=torch.int32)
    launch("overlapping", base[:, 3], base[1, 3:67])
    assert base[:, 3].eq(7).all()
    assert base[1, 4:67].eq(7).all()
    assert base.sum() == 66 * 7


kernel(
    "copies",
    "const uint4* x, uint4* out",
    """
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x;
    copy_async(shared + lane, x + lane);
    copy_commit();
    copy_async(shared + 64 + lane, x + 64 + lane, lane % 17);
    copy_commit();
    copy_wait<1>();
    out[lane] = shared[lane];
    copy_wait<0>();
    out[64 + lane] = shared[64 + lane];
""",
)


@pytest.mark.parametrize("order", ORDERS)
def test_asynchronous_copies_come_by_groups(launch: Launch, order: str) -> None:
    x = torch.randint(0, 256, (128, 16), dtype=torch.uint8)
    out = torch.zeros_like(x)
    with emulated(Schedule(order)):
        launch("copies", x, out, shared=2048)
    kept = torch.arange(16) < (torch.arange(64) % 17)[:, None]
    assert torch.equal(out, torch.cat([x[:64], x[64:] * kept]))


kernel(
    "product",
    "const u16* a, const u16* b, float* out",
    """
    extern __shared__ u16 shared[];
    const int lane = lane_id(), g = lane >> 2, t = lane & 3;
    for (int i = threadIdx.x; i < 256; i += 64) shared[i] = a[i];
    for (int i = threadIdx.x; i < 128; i += 64) shared[256 + i] = b[i];
    __syncthreads();
    u32 left[4], right[4];
    load_matrices(left, shared + (lane & 15) * 16 + (lane >> 4) * 8);
    load_matrices_transposed(right, shared + 256 + (lane & 15) * 8);
    float c[4] = {1.f, 1.f, 1.f, 1.f};
    mma_16x8x16(c, left, right[0], right[1]);
    if (warp_id() == 1)
        for (int i = 0; i < 4; ++i) out[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)] = c[i];
""",
)


def test_the_tensor_core_product(launch: Launch) -> None:
    a, b, out = torch.randn(16, 16).half(), torch.randn(16, 8).half(), torch.zeros(16, 8)
    launch("product", a, b, out, shared=768)
    torch.testing.assert_close(out, (a.double() @ b.double() + 1).float())


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "COMPILERS", ("no-such-compiler",))
    with pytest.raises(RuntimeError, match="no-such-compiler"):
        EmulatedKernel("embedding/kernel.cu", "embed", (("HIDDEN", 64),))
