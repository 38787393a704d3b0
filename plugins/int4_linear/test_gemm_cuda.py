"""The kernels of many rows compile everywhere, and give what a float64 product of the same codes and scales gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trtvlm.model.sizes import SIZES, language_size
from trtvlm.plugins.cuda.compiler import ARCHITECTURES, PLUGINS, SHARED_LIMIT, compile_source
from trtvlm.plugins.cuda.tiles import int4_tiles
from trtvlm.plugins.int4_linear import gemm as subject
from trtvlm.plugins.int4_linear.gemm import SHAPES, Shape, gated_gemm, gemm
from trtvlm.plugins.int4_linear.packing import unpack

MODELS = (*SIZES, "nano")
REGISTERS, THREADS = 65536, 1536  # of a multiprocessor of SM 8.6
MULTIPROCESSOR_SHARED = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228}  # KB


def random_weight(outputs: int, inputs: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Row tiles of a random weight and, in float64, the weight itself, whose outputs are about as large as its inputs."""
    packed = torch.randint(-128, 128, (outputs // 2, inputs), dtype=torch.int8, device=device)
    scales = torch.rand(outputs, inputs // 64, device=device).add(0.5).div(4.6 * inputs**0.5).half()
    return *int4_tiles(packed, scales), unpack(packed).double() * scales.double().repeat_interleave(64, -1)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def products(model: str) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a model's INT4 layers."""
    config = language_size(model)
    hidden, heads = config.hidden_size, config.num_attention_heads
    each = 1 if config.use_mla else 3
    shared = config.moe_intermediate_size * (config.n_shared_experts or 0)
    return {
        "qkv": (each * heads * config.head_dim, hidden), "o": (hidden, heads * config.value_head_dim),
        "fc": (2 * config.intermediate_size, hidden), "proj": (hidden, config.intermediate_size),
        "shared fc": (2 * shared, hidden), "shared proj": (hidden, shared),
    }  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiles(shape: Shape, arch: str) -> None:
    stages = shape.stages(MULTIPROCESSOR_SHARED[arch] * 1024)
    for gated in (False, True):
        macros = dict(shape.macros(stages, shape.row_tiles // 4, gated=gated))
        _, kernels = compile_source((PLUGINS / subject.SOURCE).read_text(encoding="utf-8"), macros, arch)
        assert kernels["gemm"].spilled == 0
        assert kernels["gemm"].registers * shape.threads * shape.blocks <= REGISTERS
        assert shape.threads * shape.blocks <= THREADS
        assert shape.shared(stages) <= SHARED_LIMIT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_many_blocks_fit_as_are_said_to(shape: Shape) -> None:
    for size in MULTIPROCESSOR_SHARED.values():
        stages = shape.stages(size * 1024)
        # Two stages are the least there can be.
        assert stages == 2 or shape.blocks * (shape.shared(stages) + 1024) <= size * 1024
    assert shape.stages(228 * 1024) >= 3


def test_large_products_take_large_tiles_and_small_ones_more_blocks() -> None:
    assert subject.best_shape(4096, 21888, 132) == subject.WIDE
    assert subject.best_shape(64, 2048, 132) == SHAPES[-1]
    # 128 blocks of the largest tile leave each multiprocessor with one.
    assert subject.best_shape(1024, 2048, 132) == SHAPES[1]


def test_the_lanes_see_what_the_product_needs() -> None:
    """gemm.cuh's places in shared memory and registers, as torch indices: one weight tile, one row tile, one group."""
    codes, scales, weight = random_weight(16, 64)
    x = torch.randn(8, 64).half()
    words = x.view(8, 8, 8)  # row, 16-byte word, half
    row, word = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    shared = torch.empty(64, 8, dtype=torch.half)
    shared[row * 8 + (word ^ (row & 1))] = words
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    pairs = scales.view(8, 2)
    total = torch.zeros(16, 8, dtype=torch.float64)
    for part in range(2):
        read = shared[g * 8 + ((2 * t + part) ^ (g & 1))]  # [lane, 8 halves]
        for step in range(2):
            code = codes.view(32, 4)[:, 2 * part + step].long() & 0xFFFFFFFF
            a, b = torch.zeros(16, 16, dtype=torch.float64), torch.zeros(16, 8, dtype=torch.float64)
            for register in range(4):
                for half in range(2):
                    nibble = (code >> (4 * register + 16 * half)) & 15
                    value = (nibble - 8).half() * pairs[g, register & 1]
                    a[g + 8 * (register & 1), 2 * t + half + 8 * (register >> 1)] = value.double()
            for register in range(2):
                for half in range(2):
                    b[2 * t + half + 8 * register, g] = read[lane, 4 * step + 2 * register + half].double()
            total += a @ b
    assert error(total, weight @ x.double().t()) < 1e-3


def test_reads_of_shared_memory_have_no_bank_conflicts() -> None:
    """A 16-byte read takes the banks of 128 bytes for each eight lanes."""
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    for part in range(2):
        at = (g * 8 + ((2 * t + part) ^ (g & 1))) % 8
        assert all(len(set(eight.tolist())) == 8 for eight in at.split(8))


def test_refuses_what_does_not_fit() -> None:
    codes, scales, _ = random_weight(48, 64)
    x, out = torch.zeros(3, 64).half(), torch.zeros(3, 48).half()
    with pytest.raises(ValueError, match="activations"):
        gemm(x.float(), codes, scales, out)
    with pytest.raises(ValueError, match="result"):
        gemm(x, codes, scales, out[:, :32])
    with pytest.raises(ValueError, match="no INT4 tiles"):
        gemm(x, codes, scales[:1], out)
    with pytest.raises(ValueError, match="pre_quant_scale"):
        gemm(x, codes, scales, out, torch.ones(64))
    with pytest.raises(ValueError, match="up and gate"):
        gated_gemm(x, codes, scales, out[:, :24].contiguous())


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_same_as_float64(model: str, scaled: bool) -> None:
    for name, (outputs, inputs) in products(model).items():
        codes, scales, weight = random_weight(outputs, inputs, "cuda")
        pre = torch.rand(inputs, device="cuda").add(0.5).half() if scaled else None
        for rows in (1, 17, 128, 300):
            x = torch.randn(rows, inputs, device="cuda").half()
            expected = (x if pre is None else x * pre).double() @ weight.t()
            for shape in (None, *SHAPES):
                out = torch.full((rows, outputs), torch.nan, device="cuda").half()
                gemm(x, codes, scales, out, pre, shape)
                assert error(out, expected) < 2e-3, (name, rows, shape)
                if "fc" in name:
                    up, gate = expected.chunk(2, dim=-1)
                    after = torch.rand(outputs // 2, device="cuda").add(0.5).half()
                    gated = torch.full((rows, outputs // 2), torch.nan, device="cuda").half()
                    gated_gemm(x, codes, scales, gated, pre, after, shape)
                    assert error(gated, up * F.silu(gate) * after.double()) < 2e-3, (name, rows, shape)


@pytest.mark.gpu
def test_sizes_that_divide_into_no_whole_blocks() -> None:
    for outputs in (16, 80, 144, 2064):
        codes, scales, weight = random_weight(outputs, 192, "cuda")
        x = torch.randn(77, 192, device="cuda").half()
        for shape in SHAPES:
            beyond = torch.full((78, outputs), torch.nan, device="cuda").half()
            gemm(x, codes, scales, beyond[:77], None, shape)
            assert error(beyond[:77], x.double() @ weight.t()) < 2e-3
            assert beyond[77].isnan().all()


@pytest.mark.gpu
def test_a_row_depends_on_neither_the_others_nor_the_shape() -> None:
    codes, scales, _ = random_weight(3072, 2048, "cuda")
    x = torch.randn(300, 2048, device="cuda").half()
    out = torch.empty(300, 3072, device="cuda").half()
    gemm(x, codes, scales, out)
    for shape in SHAPES:
        for rows in (slice(0, 300), slice(7, 8), slice(131, 150), slice(299, 300)):
            part = torch.empty_like(out[rows])
            gemm(x[rows], codes, scales, part, None, shape)
            assert torch.equal(part, out[rows])


@pytest.mark.gpu
def test_a_graph_replays_it() -> None:
    codes, scales, weight = random_weight(512, 256, "cuda")
    x, out = torch.randn(40, 256, device="cuda").half(), torch.empty(40, 512, device="cuda").half()
    pre = torch.rand(256, device="cuda").half()
    gemm(x, codes, scales, out, pre)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm(x, codes, scales, out, pre)
    x.copy_(torch.randn(40, 256).half())
    out.fill_(torch.nan)
    graph.replay()
    assert error(out, (x * pre).double() @ weight.t()) < 2e-3
