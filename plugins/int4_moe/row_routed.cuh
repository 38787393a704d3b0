// A part of a chosen expert, for one row or up to SLOTS of them: 64 gated products, and at once what they give of every output. All of
// its weights can be asked for as soon as the expert is known.
#pragma once
#include "int4_moe/row.cuh"

constexpr int BLOCK_TILES = TILE_INPUTS / TILE_ROWS;
static_assert(ROW_WARPS == BLOCK_TILES * UP_WARPS, "a warp 16 gated products of a slice of the inputs");
constexpr int DOWN_TILES = HIDDEN / TILE_ROWS, WARP_TILES = (DOWN_TILES + ROW_WARPS - 1) / ROW_WARPS;
constexpr int UP_DEPTH = smaller(Up::STEPS, 2);  // steps of gate and up weights under way

// The rows' inputs. The last tiles of second weights of several rows come into their place, when they have been read.
using Inputs = char[SLOTS][UP_WARPS][Up::STEPS * GROUP_BYTES];
constexpr int LATE_TILES = SLOTS == 1 ? 0 : smaller(DOWN_TILES, (int(sizeof(Inputs)) + 511) / 512), EARLY_TILES = DOWN_TILES - LATE_TILES;

struct Routed {
    uint4 down[EARLY_TILES][32];  // all of DOWN_TILES with what is in the union
    union {
        uint4 late[larger(LATE_TILES, 1)][32];
        Inputs inputs;
    };
    u32 down_scales[DOWN_TILES][8];
    char hidden[SLOTS][GROUP_BYTES];
    u16 scale[TILE_INPUTS];
    float input_scales[UP_WARPS][Up::STEPS][SLOTS];
    Partials<UP_WARPS> partials[BLOCK_TILES];
    float hidden_scale[SLOTS];
    int known;  // a lone row's expert; how many parts several rows have
};
static_assert(EARLY_TILES > 0, "sizes the kernels were written for");

// Second weights of a group of inputs, of which a warp has every ROW_WARPS-th tile of 16 outputs. group: of all experts' groups.
struct Down {
    const uint4* codes;
    const u32* scales;
    int group;

    DEVICE Down(const uint4* all_codes, const u32* all_scales, int expert, int part)
        : codes(all_codes), scales(all_scales), group(expert * DOWN_TILES * DOWN_GROUPS + part) {}

    // Tile i of this warp, if it is one of first .. end - 1.
    DEVICE void ask(Routed& held, int i, int first, int end) const {
        const int tile = warp_id() + i * ROW_WARPS;
        if (tile < first || (i * ROW_WARPS + ROW_WARPS > end && tile >= end)) return;
        const size_t at = group + tile * DOWN_GROUPS;
        copy_async(held.down[0] + tile * 32 + lane_id(), codes + at * 32 + lane_id());
        if (lane_id() < 2) copy_async(&held.down_scales[tile][4 * lane_id()], scales + at * 8 + 4 * lane_id());
    }
};

// A warp's gate and up weights, 16 outputs each of its slice of the inputs, UP_DEPTH steps under way.
struct UpWeights {
    const uint4* codes;
    const u32* scales;
    int tile;  // of up, times groups
    Int4Weight weight[UP_DEPTH][2];

    DEVICE UpWeights(const uint4* all_codes, const u32* all_scales) : codes(all_codes), scales(all_scales) {}

    DEVICE static int slice() { return warp_id() % UP_WARPS; }

    DEVICE void ask(int place, int step) {
        if (!Up::has(step, slice())) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) weight[place][r].load(codes, scales, tile + r * EXPERT_TILES * Up::GROUPS + Up::group(step, slice()));
    }
    // The first steps of a part.
    DEVICE void begin(int expert, int part) {
        tile = (expert * 2 * EXPERT_TILES + part * BLOCK_TILES + warp_id() / UP_WARPS) * Up::GROUPS;
#pragma unroll
        for (int step = 0; step < UP_DEPTH; ++step) ask(step, step);
    }
};

// What a warp's weights give with the inputs, to `sum`; asks for the second weights between.
DEVICE void routed_up(Routed& held, UpWeights& up, const Down& down, float (&sum)[2][2]) {
    const int slice = UpWeights::slice();
    // A loop, or else the inputs of all steps would be read first, into registers that are not there.
#pragma unroll 1
    for (int first = 0; first < Up::STEPS; first += UP_DEPTH) {
#pragma unroll
        for (int i = 0; i < UP_DEPTH; ++i) {
            const int step = first + i;
            if (Up::STEPS % UP_DEPTH && step >= Up::STEPS) break;
            if (Up::has(step, slice)) {
                const uint4 x = load_slots(held.inputs[0][slice] + step * GROUP_BYTES, sizeof(held.inputs[0]));
                const float x_scale = held.input_scales[slice][step][some_slot()];
#pragma unroll
                for (int r = 0; r < 2; ++r) fixed_row_tile(sum[r], up.weight[i][r].codes, up.weight[i][r].scale, x, x_scale);
            }
            if (step + UP_DEPTH < Up::STEPS) up.ask(i, step + UP_DEPTH);
            for (int tile = step; tile < WARP_TILES; tile += Up::STEPS) down.ask(held, tile, 0, EARLY_TILES);
        }
    }
    copy_commit();
}

// These sums to held.partials.
DEVICE void store_up(Routed& held, const float (&sum)[2][2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) store_sums(held.partials[warp_id() / UP_WARPS][UpWeights::slice()][r][0], sum[r]);
}

// One warp: the block's 64 gated products of a slot, as fixed point. scale: of these, or null.
DEVICE void routed_hidden(Routed& held, int slot, const u16* scale) {
    const int at = 4 * (lane_id() >> 1) + (lane_id() & 1);
    float y[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int output = at + 2 * i;
        y[i] = gated<UP_WARPS>(held.partials[output / TILE_ROWS], output % TILE_ROWS, slot);
        if (scale) y[i] *= half_to_float(scale[output]);
    }
    store_hidden(y, at, held.hidden[slot], &held.hidden_scale[slot]);
}

// What 64 inputs give of the outputs of this warp's tiles first, first + 1 .. end - 1, to given [HIDDEN] of this lane's slot; null if that
// is not there.
DEVICE void routed_down(const Routed& held, float* given, int first = 0, int end = WARP_TILES) {
    const uint4 x = load_slots(held.hidden[0], GROUP_BYTES);
    const float x_scale = held.hidden_scale[some_slot()];
    const int g = lane_id() >> 2;
#pragma unroll 4
    for (int i = first; i < end; ++i) {
        const int tile = warp_id() + i * ROW_WARPS;
        if (i * ROW_WARPS + ROW_WARPS > DOWN_TILES && tile >= DOWN_TILES) break;
        float product[2];
        fixed_row_products(product, held.down[0][tile * 32 + lane_id()], x);
        const u32 scale = held.down_scales[tile][g];
        if (SLOTS == 1 ? own_slot() == 0 : given != nullptr) {
            given[tile * TILE_ROWS + g] = __fmul_rn(product[0], low_half(scale) * x_scale);
            given[tile * TILE_ROWS + g + 8] = __fmul_rn(product[1], high_half(scale) * x_scale);
        }
    }
}
