// What the blocks of a lone row's kernels (row.cu) have in common.
#pragma once
#include "int4_moe/router.cuh"
#include "int4_linear/weights.cuh"

constexpr int ROW_WARPS = 4 * UP_WARPS, ROUTED_BLOCKS = TOP_K * DOWN_GROUPS;  // of experts_row; a block 64 gated products of an expert
constexpr int SHARED_GROUPS = SHARED / TILE_INPUTS;

// What blocks tell each other across launches, besides turns: how many have done their part. Zero between layers.
struct Done {
    u32 shared_up, routed, merged;
};

// The partial sums of 16 outputs of gate (1) and up (0), of each slice of the inputs.
template <int SLICES>
using Partials = float[SLICES][2][TILE_ROWS];

// A warp's sums of outputs g and g + 8, in lanes of t = 0.
DEVICE void store_sums(float* to, const float (&sum)[2]) {
    if (lane_id() & 3) return;
    to[lane_id() >> 2] = sum[0], to[(lane_id() >> 2) + 8] = sum[1];
}

template <int SLICES>
DEVICE float gated(const Partials<SLICES>& partials, int output) {
    const float gate = silu(sum_partials<SLICES>(&partials[0][1][output], 2 * TILE_ROWS));
    return sum_partials<SLICES>(&partials[0][0][output], 2 * TILE_ROWS) * gate;
}
