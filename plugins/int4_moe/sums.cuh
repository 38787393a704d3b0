// How the sums over an expert's inputs are cut, which decides their bits: for one row and for many alike.
#pragma once
#include "fixed.cuh"
#include "int4_linear/slice.cuh"

constexpr int UP_WARPS = 4;  // share the inputs of gate and up products
constexpr int EXPERT_TILES = WIDTH / TILE_ROWS;
using Up = Slice<HIDDEN, UP_WARPS>;

constexpr int SHARED_PARTS = SHARED / WIDTH;  // the shared expert, as parts of an expert's width
static_assert(SHARED % WIDTH == 0, "the shared expert is as wide as several experts");
static_assert(WIDTH % TILE_INPUTS == 0, "sizes the kernels were written for");

// The sum over K of a unit (an expert, or a part of the shared one) is that of its first groups and that of the others.
constexpr int DOWN_GROUPS = WIDTH / TILE_INPUTS, FIRST_GROUPS = (DOWN_GROUPS + 1) / 2;

// One warp: two gated products each of the 64 of a row and group, as halves and then as fixed point; `first` and first + 2 are whose.
DEVICE void store_hidden(const float (&y)[2], int first, char* group, float* scale) {
    const float x = half_to_float(float_to_half(y[0])), z = half_to_float(float_to_half(y[1]));
    const u32 largest = warp_largest(__float_as_uint(fmaxf(fabsf(x), fabsf(z))));  // as integers, positive floats have the same order
    const FixedScale by = fixed_scale(__uint_as_float(largest));
    const u32 a = fixed_bits(x, by.inverse), b = fixed_bits(z, by.inverse);
    u16* to = reinterpret_cast<u16*>(group + (first & ~3) + 2 * (first & 1));
    to[0] = u16(high_parts(a, b)), to[TILE_INPUTS / 2] = u16(low_parts(a, b));
    if (lane_id() == 0) *scale = by.scale;
}
