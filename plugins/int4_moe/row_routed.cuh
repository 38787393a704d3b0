// A part of a chosen expert, for one row: 64 gated products, and at once what they give of every output. All of its weights can be asked
// for as soon as the expert is known.
#pragma once
#include "int4_moe/row.cuh"

constexpr int BLOCK_TILES = TILE_INPUTS / TILE_ROWS;
static_assert(ROW_WARPS == BLOCK_TILES * UP_WARPS, "a warp 16 gated products of a slice of the inputs");
constexpr int DOWN_TILES = HIDDEN / TILE_ROWS, WARP_TILES = (DOWN_TILES + ROW_WARPS - 1) / ROW_WARPS;
constexpr int UP_DEPTH = smaller(Up::STEPS, 2);  // steps of gate and up weights under way

struct Routed {
    uint4 down[DOWN_TILES][32];
    u32 down_scales[DOWN_TILES][8];
    char inputs[UP_WARPS][Up::STEPS * GROUP_BYTES], hidden[GROUP_BYTES];
    u16 scale[TILE_INPUTS];
    float input_scales[UP_WARPS][Up::STEPS];
    Partials<UP_WARPS> partials[BLOCK_TILES];
    float hidden_scale;
    int chosen;
};

// Second weights of a group of inputs, of which a warp has every ROW_WARPS-th tile of 16 outputs.
struct Down {
    const uint4* codes;
    const u32* scales;

    DEVICE void ask(Routed& held, int i) const {
        const int tile = warp_id() + i * ROW_WARPS;
        if (i * ROW_WARPS + ROW_WARPS > DOWN_TILES && tile >= DOWN_TILES) return;
        copy_async(&held.down[tile][lane_id()], codes + size_t(tile) * DOWN_GROUPS * 32 + lane_id());
        if (lane_id() < 2) copy_async(&held.down_scales[tile][4 * lane_id()], scales + size_t(tile) * DOWN_GROUPS * 8 + 4 * lane_id());
    }
};

// A warp's 16 outputs of gate and up, for its slice of the inputs, to held.partials; asks for the second weights between.
DEVICE void routed_up(Routed& held, const uint4* codes, const u32* scales, int first_tile, const Down& down) {
    const int slice = warp_id() % UP_WARPS, pair = warp_id() / UP_WARPS;
    const size_t tile = size_t(first_tile + pair) * Up::GROUPS;
    codes += tile * 32, scales += tile * 8;
    Int4Weight weight[UP_DEPTH][2];
    auto ask = [&](int place, int step) {
        if (!Up::has(step, slice)) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) weight[place][r].load(codes, scales, r * EXPERT_TILES * Up::GROUPS + Up::group(step, slice));
    };
#pragma unroll
    for (int step = 0; step < UP_DEPTH; ++step) ask(step, step);
    float sum[2][2] = {};
    // A loop, or else the inputs of all steps would be read first, into registers that are not there.
#pragma unroll 1
    for (int first = 0; first < Up::STEPS; first += UP_DEPTH) {
#pragma unroll
        for (int i = 0; i < UP_DEPTH; ++i) {
            const int step = first + i;
            if (Up::STEPS % UP_DEPTH && step >= Up::STEPS) break;
            if (Up::has(step, slice)) {
                const uint4 x = load_fixed_row(held.inputs[slice] + step * GROUP_BYTES);
                const float x_scale = held.input_scales[slice][step];
#pragma unroll
                for (int r = 0; r < 2; ++r) fixed_row_tile(sum[r], weight[i][r].codes, weight[i][r].scale, x, x_scale);
            }
            if (step + UP_DEPTH < Up::STEPS) ask(i, step + UP_DEPTH);
            for (int tile = step; tile < WARP_TILES; tile += Up::STEPS) down.ask(held, tile);
        }
    }
    copy_commit();
#pragma unroll
    for (int r = 0; r < 2; ++r) store_sums(held.partials[pair][slice][r], sum[r]);
}

// One warp: the block's 64 gated products, as fixed point.
DEVICE void routed_hidden(Routed& held, bool scaled) {
    const int at = 4 * (lane_id() >> 1) + (lane_id() & 1);
    float y[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int output = at + 2 * i;
        y[i] = gated<UP_WARPS>(held.partials[output / TILE_ROWS], output % TILE_ROWS);
        if (scaled) y[i] *= half_to_float(held.scale[output]);
    }
    store_hidden(y, at, held.hidden, &held.hidden_scale);
}

// What 64 inputs give of every output, to given [HIDDEN].
DEVICE void routed_down(const Routed& held, float* given) {
    const uint4 x = load_fixed_row(held.hidden);
    const float x_scale = held.hidden_scale;
    const int g = lane_id() >> 2;
#pragma unroll 4
    for (int i = 0; i < WARP_TILES; ++i) {
        const int tile = warp_id() + i * ROW_WARPS;
        if (i * ROW_WARPS + ROW_WARPS > DOWN_TILES && tile >= DOWN_TILES) break;
        float product[2];
        fixed_row_products(product, held.down[tile][lane_id()], x);
        const u32 scale = held.down_scales[tile][g];
        if ((lane_id() & 3) == 0) {  // column 0
            given[tile * TILE_ROWS + g] = __fmul_rn(product[0], low_half(scale) * x_scale);
            given[tile * TILE_ROWS + g + 8] = __fmul_rn(product[1], high_half(scale) * x_scale);
        }
    }
}

// Part `part` of the expert in slot `slot`.
DEVICE void routed_part(Routed& held, int slot, int part, const char* inputs, const float* input_scales, const float* logits,
                        const float* bias, const uint4* up_codes, const u32* up_scales, const u16* next_scale, const uint4* down_codes,
                        const u32* down_scales, float* given) {
    if (next_scale && threadIdx.x < TILE_INPUTS / 8)
        copy_async(held.scale + 8 * threadIdx.x, next_scale + part * TILE_INPUTS + 8 * threadIdx.x);
    if (warp_id() < UP_WARPS) {
        char* own = held.inputs[warp_id()];
#pragma unroll 1
        for (int i = lane_id(); i < Up::STEPS * 8; i += 32)
            if (Up::has(i >> 3)) copy_async(own + i * 16, inputs + Up::group(i >> 3) * GROUP_BYTES + (i & 7) * 16);
        if (lane_id() < Up::STEPS && Up::has(lane_id()))
            held.input_scales[warp_id()][lane_id()] = input_scales[Up::group(lane_id()) * COLUMNS];
    }
    copy_commit();
    if (warp_id() == ROW_WARPS - 1) {
        const int expert = choose_experts(logits, bias, nullptr, slot + 1);
        if (lane_id() == 0) held.chosen = expert;
    }
    copy_wait<0>();
    __syncthreads();
    const int expert = held.chosen;
    const size_t group = size_t(expert) * DOWN_TILES * DOWN_GROUPS + part;
    const Down down = {down_codes + group * 32, down_scales + group * 8};
    routed_up(held, up_codes, up_scales, expert * 2 * EXPERT_TILES + part * BLOCK_TILES, down);
    __syncthreads();
    if (warp_id() == 0) routed_hidden(held, next_scale != nullptr);
    copy_wait<0>();
    __syncthreads();
    routed_down(held, given + (size_t(slot) * DOWN_GROUPS + part) * HIDDEN);
}
