// Attention's output projection of one row, added to the residual stream, with the bits of int4_linear/decode.cu; and what its outputs, a tile of
// 16 at a time, add to the router's product.
#pragma once
#include "int4_moe/logits.cuh"
#include "int4_moe/row.cuh"

using DensePart = Slice<DENSE_IN, ROUTE_WARPS>;
constexpr int DENSE_TILES = HIDDEN / TILE_ROWS, ROUTER_QUADS = EXPERTS * (TILE_ROWS / 4);
constexpr int DENSE_RESIDENT = DENSE_TURNS == 1 && DensePart::STEPS <= 4 ? 3 : 2;  // blocks on a multiprocessor that registers allow
static_assert(DENSE_TURNS == 1 || DENSE_TURNS == 2, "a block's tiles");

struct Dense {
    float4 router[DENSE_TURNS][ROUTER_QUADS];
    char landing[DENSE_TURNS > 1 ? ROUTE_WARPS : 1][DensePart::STEPS][Int4Weight::BYTES];  // of a second tile
    u16 x[ROUTE_WARPS][DensePart::STEPS * TILE_INPUTS];
    float partials[DENSE_TURNS][ROUTE_WARPS][TILE_ROWS];
    float4 normed[DENSE_TURNS][TILE_ROWS / 4];  // new residual stream times the norm's weight
};

// Tile `tile`, and with DENSE_TURNS 2 tile + blocks, if it is there. router float32 [DENSE_TILES, EXPERTS, 16].
DEVICE void dense_tiles(Dense& held, int tile, int blocks, const u16* from, const u16* scale, const uint4* codes, const u32* scales,
                        float* residual, float* square_sums, const float* router, const u16* norm, u64* logit_sums, const Turn& turn) {
    constexpr int STEPS = DensePart::STEPS, THREADS = 32 * ROUTE_WARPS;
    const int turns = DENSE_TURNS == 1 || tile + blocks >= DENSE_TILES ? 1 : 2;
    Int4Weight weight[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        if (DensePart::has(step)) weight[step].load(codes, scales, tile * DensePart::GROUPS + DensePart::group(step));
#pragma unroll 1
    for (int i = 0; i < turns; ++i) {
        const int one = tile + i * blocks;
#pragma unroll
        for (int step = 0; i && step < STEPS; ++step)
            if (DensePart::has(step))
                Int4Weight::land(held.landing[DENSE_TURNS > 1 ? warp_id() : 0][step], codes, scales, one * DensePart::GROUPS + DensePart::group(step));
#pragma unroll 1
        for (int at = threadIdx.x; at < ROUTER_QUADS; at += THREADS)
            copy_async(&held.router[i][at], router + 4 * (size_t(one) * ROUTER_QUADS + at));
    }
    copy_commit();
    RowPieces<DensePart, DENSE_SCALED != 0> pieces;
    pieces.load_scales(scale);
    // The first 16 threads, or 32, have an output each.
    const int own = threadIdx.x / TILE_ROWS, output = (tile + own * blocks) * TILE_ROWS + threadIdx.x % TILE_ROWS;
    const bool mine = own < turns;
    float was = 0.f, by = 0.f;
    if (mine) was = residual[output], by = half_to_float(norm[output]);
    await_turn(turn);
    pieces.stage(held.x[warp_id()], from);
    copy_wait<0>();
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < turns; ++i) {
        float sum[4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            if (!DensePart::has(step)) continue;
            if (i) weight[step].take(held.landing[DENSE_TURNS > 1 ? warp_id() : 0][step]);
            weight[step].multiply(sum, load_activation(held.x[warp_id()], 0, step, lane_id() < 4));
        }
        if ((lane_id() & 3) == 0) {
            held.partials[i][warp_id()][lane_id() >> 2] = sum[0];
            held.partials[i][warp_id()][(lane_id() >> 2) + 8] = sum[2];
        }
    }
    __syncthreads();
    if (warp_id() == 0) {
        float y = mine ? sum_partials<ROUTE_WARPS>(&held.partials[own][0][threadIdx.x % TILE_ROWS], TILE_ROWS) + was : 0.f;
        float square = y * y;
#pragma unroll
        for (int offset = 8; offset; offset >>= 1) square += __shfl_xor_sync(0xffffffffu, square, offset);
        if (mine) {
            residual[output] = y;
            if (threadIdx.x % TILE_ROWS == 0) square_sums[output / TILE_ROWS] = square;
            reinterpret_cast<float*>(held.normed[own])[threadIdx.x % TILE_ROWS] = y * by;
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < turns; ++i) {
#pragma unroll 1
        for (int base = 32 * warp_id(); base < ROUTER_QUADS; base += THREADS) {
            const int at = base + lane_id();
            const float quad = at < ROUTER_QUADS ? quad_product(held.normed[i][at & 3], held.router[i][at]) : 0.f;
            const u64 part = fixed_logit(quad);
            if ((at & 3) == 0 && at < ROUTER_QUADS) atomicAdd(&logit_sums[at >> 2], part);
        }
    }
}
