// out = x @ W^T for many rows (gemm.cuh): a block a tile of outputs x rows, grid (tiles of outputs, tiles of rows).
#include "int4_linear/gemm.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    gemm(const uint4* x, const uint4* codes, const uint4* scales, u16* out, const u16* next_scale, int rows, int groups, int count) {
    extern __shared__ uint4 memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int row0 = blockIdx.y * BLOCK_ROWS, here = min(BLOCK_ROWS, rows - row0);
    for (int r = threadIdx.x; r < BLOCK_ROWS; r += THREADS) {
        shared.source[r] = r < here ? (row0 + r) * groups * WORDS : -1;
        shared.target[r] = r < here ? row0 + r : -1;
    }
    __syncthreads();
    run_needed({x, codes, scales, out, next_scale, groups, count, int(blockIdx.x) * BLOCK_OUT, here}, shared);
}
