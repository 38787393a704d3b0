// INT4 weights on their way through shared memory: a warp's ring of DEPTH slots, a slot being COUNT tiles that are asked for together.
// Each lane copies the codes that it will read itself. Asking takes no registers, so that all of a warp's weights can be under way,
// and loops stay loops: unrolled, the kernels of a layer would not fit the instruction cache together.
#pragma once
#include "tiles.cuh"

constexpr int TILE_BYTES = 512 + 32;  // codes and scales

template <int COUNT, int DEPTH>
struct WeightRing {
    static constexpr int SLOT = COUNT * TILE_BYTES, BYTES = DEPTH * SLOT;
    static_assert(2 * COUNT <= 32, "a lane a piece of the scales");
    char* own;  // this warp's

    // `tile_of(k)`: row tile * groups + group of tile k. One group of copies; every turn of a loop must commit one.
    template <class TileOf>
    DEVICE void ask(int slot, const uint4* codes, const u32* scales, TileOf tile_of) {
        char* to = own + slot * SLOT;
#pragma unroll
        for (int k = 0; k < COUNT; ++k)
            copy_async(to + k * 512 + lane_id() * 16, codes + size_t(tile_of(k)) * 32 + lane_id());
        if (lane_id() < 2 * COUNT)
            copy_async(to + COUNT * 512 + lane_id() * 16, scales + size_t(tile_of(lane_id() >> 1)) * 8 + 4 * (lane_id() & 1));
        copy_commit();
    }

    // The oldest slot has come, when DEPTH were asked for and not yet awaited.
    DEVICE static void await_oldest() {
        copy_wait<DEPTH - 1>();
        __syncwarp();  // scales come by other lanes
    }

    DEVICE void multiply(float (&sum)[4], int slot, int k, const Activation& x) const {
        const char* from = own + slot * SLOT;
        const u32 scale = reinterpret_cast<const u32*>(from + COUNT * 512)[k * 8 + (lane_id() >> 2)];
        int4_tile(sum, *reinterpret_cast<const uint4*>(from + k * 512 + lane_id() * 16), scale, x);
    }
};
