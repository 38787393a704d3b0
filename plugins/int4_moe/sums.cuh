// How the sums over an expert's inputs are cut, which decides their bits: for one row and for many alike.
#pragma once
#include "int4_linear/slice.cuh"

constexpr int UP_WARPS = 4;  // share the inputs of gate and up products
constexpr int EXPERT_TILES = WIDTH / TILE_ROWS;
using Up = Slice<HIDDEN, UP_WARPS>;

constexpr int SHARED_PARTS = SHARED / WIDTH;  // the shared expert, as parts of an expert's width
static_assert(SHARED % WIDTH == 0, "the shared expert is as wide as several experts");

// The sum over K of a unit (an expert, or a part of the shared one) is that of its first groups and that of the others.
constexpr int DOWN_GROUPS = WIDTH / TILE_INPUTS, FIRST_GROUPS = (DOWN_GROUPS + 1) / 2;
