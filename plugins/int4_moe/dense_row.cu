// Of a MoE layer's lone row: attention's output projection and the router's product with what it gives (row_dense.cuh), then the shared
// expert's first half (row_shared.cuh). experts_row.cu goes on from there.
// Loops are left loops where they can be: a step's kernels together should stay in the instruction cache, and each runs its code once a
// layer.
// Macros: as decode.cu's, and DENSE_IN, the projection's inputs; DENSE_SCALED: they have a pre_quant_scale; DENSE_TURNS: tiles of 16
// outputs that a block has at most, 1 or 2.
#include "int4_moe/row_dense.cuh"
#include "int4_moe/row_shared.cuh"

union DenseOrShared {
    Dense dense;
    SharedUp shared;
};

// Blocks 0 .. tile_blocks - 1 have the projection's tiles; the next launch waits for them as its turn, and for the parts of the shared expert
// only where it adds up. `shared_blocks` blocks begin with those parts, and the first ones, the last of them first, go on with what is left,
// which they may only if all blocks are there at once. Further blocks do nothing but keep their places until it is known where the next
// launch's blocks stand: on a multiprocessor with two of the chosen experts' blocks these take half as long again.
extern "C" __global__ void __launch_bounds__(32 * ROUTE_WARPS, DENSE_RESIDENT)
    dense_row(const u16* x, const u16* dense_scale, const uint4* codes, const u32* scales, float* residual, float* square_sums,
              const float* router, u64* logit_sums, const u16* norm, float eps, const u16* shared_scale, const uint4* shared_codes,
              const u32* shared_scales, const u16* shared_next, u16* shared_hidden, Done* done, int tile_blocks, int shared_blocks,
              TurnCounters* turns, int index, int before) {
    extern __shared__ uint4 shared[];
    DenseOrShared& held = *reinterpret_cast<DenseOrShared*>(shared);
    u32* finished = turns ? &turns[index].finished : &done->dense;
    const int tile = blockIdx.x, other = tile - tile_blocks;
    int part = other < 0 ? shared_blocks + tile_blocks - 1 - tile : other < shared_blocks ? other : SHARED_UP_BLOCKS;
    fetch_halves(norm, HIDDEN);
    if (SHARED_SCALED) fetch_halves(shared_scale, HIDDEN);
    if (other < 0) {
        dense_tiles(held.dense, tile, tile_blocks, x, dense_scale, codes, scales, residual, square_sums, router, norm, logit_sums,
                    Turn{turns, index, before});
        count_done(finished);
        if (part >= SHARED_UP_BLOCKS) return;
    }
    bool asked = other < 0;  // before, the weights would be in the way of what the projection has to write
    if (asked) ask_shared(held.shared, part, shared_codes, shared_scales);
    await_count(finished, tile_blocks);
#pragma unroll 1
    for (; part < SHARED_UP_BLOCKS; part += tile_blocks + shared_blocks) {
        if (!asked) ask_shared(held.shared, part, shared_codes, shared_scales);
        asked = false;
        shared_up(held.shared, part, residual, square_sums, norm, eps, shared_scale, shared_next, shared_hidden);
        count_done(&done->shared_up);
    }
}
