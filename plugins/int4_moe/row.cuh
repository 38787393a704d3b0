// What the blocks of a lone row's kernels (dense_row.cu, experts_row.cu) and of several rows' (rows.cu) have in common.
#pragma once
#include "int4_moe/router.cuh"
#include "int4_linear/weights.cuh"

constexpr int ROW_WARPS = 4 * UP_WARPS, ROUTED_BLOCKS = TOP_K * DOWN_GROUPS;  // of experts_row; a block 64 gated products of an expert
constexpr int SHARED_GROUPS = SHARED / TILE_INPUTS;

// What blocks tell each other across launches, besides turns: how many have done their part. Zero between layers.
struct Done {
    u32 shared_up, routed, merged, dense;
};

// Activation rows of one product, its high and low parts as columns 2 * slot and 2 * slot + 1.
#ifndef SLOTS
#define SLOTS 1
#endif
static_assert(SLOTS == 1 || SLOTS == 4, "the columns of a product");

// The partial sums of 16 outputs of gate (1) and up (0), of each slice of the inputs and each slot.
template <int SLICES>
using Partials = float[SLICES][2][SLOTS][TILE_ROWS];

// This lane's part of a group of fixed point for a product of all slots; `stride` bytes between their rows.
DEVICE uint4 load_slots(const void* group, int stride) {
    if (SLOTS == 1) return load_fixed_row(group);
    const int column = lane_id() >> 2;
    return *reinterpret_cast<const uint4*>(static_cast<const char*>(group) + (column >> 1) * stride + 64 * (column & 1) + 16 * (lane_id() & 3));
}

// The slot whose sums this lane has; only SLOTS of them are any.
DEVICE int own_slot() { return lane_id() & 3; }
DEVICE int some_slot() { return SLOTS == 1 ? 0 : own_slot(); }

// A warp's sums of outputs g and g + 8 of each slot; `stride` floats between slots.
DEVICE void store_sums(float* to, const float (&sum)[2], int stride = TILE_ROWS) {
    if (own_slot() >= SLOTS) return;
    to += some_slot() * stride;
    to[lane_id() >> 2] = sum[0], to[(lane_id() >> 2) + 8] = sum[1];
}

template <int SLICES>
DEVICE float gated(const Partials<SLICES>& partials, int output, int slot = 0) {
    constexpr int STRIDE = 2 * SLOTS * TILE_ROWS;
    const float gate = silu(sum_partials<SLICES>(&partials[0][1][slot][output], STRIDE));
    return sum_partials<SLICES>(&partials[0][0][slot][output], STRIDE) * gate;
}
