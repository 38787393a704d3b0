// The experts' products over many rows, grouped by expert (int4_linear/gemm.cuh): grid (tiles of outputs, entries of the plan).
// GATED: fc, which gathers a slot's activation row and leaves its result in the plan's order; else proj, which reads that
// order and writes [row, slot].
#include "int4_linear/gemm.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    grouped(const uint4* x, const uint4* codes, const uint4* scales, u16* out, const u16* next_scale, const int4* plan,
            const int* order, int top_k, int groups, int count) {
    extern __shared__ uint4 memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int4 entry = plan[blockIdx.y];  // expert, first place in the order, rows
    if (entry.z == 0) return;
    for (int r = threadIdx.x; r < BLOCK_ROWS; r += THREADS) {
        int source = -1, target = -1;
        if (r < entry.z) {
            const int place = entry.y + r, slot = order[place];
            source = (GATED ? slot / top_k : place) * groups * WORDS;
            target = GATED ? place : slot;
        }
        shared.source[r] = source;
        shared.target[r] = target;
    }
    __syncthreads();
    const size_t weight = size_t(entry.x) * PAIR * count * groups;
    run_needed({x, codes + weight * 32, scales + weight * 2, out, next_scale, groups, count, int(blockIdx.x) * BLOCK_OUT, entry.z},
        shared);
}
