// The shared expert's first half, for one row.
#pragma once
#include "int4_moe/row.cuh"

constexpr int SHARED_TILES = ROUTE_WARPS / UP_WARPS;  // of gated products a block has
constexpr int SHARED_UP_BLOCKS = SHARED / TILE_ROWS / SHARED_TILES;
// Of a row, under way at once in a lane. A short one all at once; a longer one would be in the way of the experts' blocks, which read it too.
constexpr int READS = Up::STEPS <= 8 ? (Up::STEPS + 1) / 2 : 1;
constexpr int SHARES = ROUTE_WARPS / UP_WARPS;  // decode.cu shares these inputs among ROUTE_WARPS warps: here a warp has the sums of SHARES

struct SharedUp {
    uint4 codes[ROUTE_WARPS][2][Up::STEPS][32];
    u32 scales[ROUTE_WARPS][2][Up::STEPS][8];
    char inputs[UP_WARPS][Up::STEPS * GROUP_BYTES];
    float input_scales[UP_WARPS][Up::STEPS];
    Partials<SHARES * UP_WARPS> partials[SHARED_TILES];
};

// Asks for the weights of part `block`.
DEVICE void ask_shared(SharedUp& held, int block, const uint4* codes, const u32* scales) {
    const int slice = warp_id() % UP_WARPS, pair = warp_id() / UP_WARPS;
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
        const size_t tile = size_t(block * SHARED_TILES + pair + r * (SHARED / TILE_ROWS)) * Up::GROUPS;
#pragma unroll
        for (int step = 0; step < Up::STEPS; ++step)
            if (Up::has(step, slice)) copy_async(&held.codes[warp_id()][r][step][lane_id()], codes + (tile + Up::group(step, slice)) * 32 + lane_id());
        const int step = lane_id() >> 1, part = 4 * (lane_id() & 1);
        if (step < Up::STEPS && Up::has(step, slice))
            copy_async(&held.scales[warp_id()][r][step][part], scales + (tile + Up::group(step, slice)) * 8 + part);
    }
    copy_commit();
}

// SHARED_TILES * 16 gated products, as halves, when the row is there.
DEVICE void shared_up(SharedUp& held, int block, const float* residual, const float* square_sums, const u16* norm, float eps,
                      const u16* scale, const u16* next_scale, u16* hidden) {
    const int slice = warp_id() % UP_WARPS, pair = warp_id() / UP_WARPS, output = block * SHARED_TILES * TILE_ROWS + threadIdx.x;
    float next = 1.f;
    if (next_scale && threadIdx.x < SHARED_TILES * TILE_ROWS) next = half_to_float(next_scale[output]);
    if (warp_id() < UP_WARPS) {
        u16* own = reinterpret_cast<u16*>(held.inputs[warp_id()]);
        normalise_row<HIDDEN, UP_WARPS, SHARED_SCALED != 0, READS>(AsHalves<Up::STRIDE>{own}, residual, square_sums, norm, scale, eps);
        __syncwarp();
        fix_groups<Up::STEPS>(own, held.input_scales[warp_id()], Up::count());
    }
    copy_wait<0>();
    __syncthreads();
    float sum[SHARES][2][2] = {};
#pragma unroll 1
    for (int first = 0; first < Up::STEPS; first += SHARES) {
#pragma unroll
        for (int split = 0; split < SHARES; ++split) {
            const int step = first + split;
            if ((Up::STEPS % SHARES && step >= Up::STEPS) || !Up::has(step, slice)) continue;
            const uint4 x = load_fixed_row(held.inputs[slice] + step * GROUP_BYTES);
            const float x_scale = held.input_scales[slice][step];
#pragma unroll
            for (int r = 0; r < 2; ++r)
                fixed_row_tile(sum[split][r], held.codes[warp_id()][r][step][lane_id()], held.scales[warp_id()][r][step][lane_id() >> 2], x,
                               x_scale);
        }
    }
#pragma unroll
    for (int i = 0; i < 2 * SHARES; ++i) store_sums(held.partials[pair][slice + i / 2 * UP_WARPS][i & 1][0], sum[i / 2][i & 1]);
    __syncthreads();
    if (threadIdx.x < SHARED_TILES * TILE_ROWS)
        hidden[output] = float_to_half(gated<SHARES * UP_WARPS>(held.partials[threadIdx.x / TILE_ROWS], threadIdx.x % TILE_ROWS) * next);
}
