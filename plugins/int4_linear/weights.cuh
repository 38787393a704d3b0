// A lane's part of one weight tile, as registers: load() only asks for it, multiply() waits for it.
#pragma once
#include "tiles.cuh"

// Volatile, as load_stream: what is asked for first stays first.
DEVICE u32 load_stream(const u32* address) {
    u32 out;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(out) : "l"(address));
    return out;
}

struct Int4Weight {
    static constexpr int WORDS = 32;  // of 16 bytes a tile
    uint4 codes;
    u32 scale;

    // `tile`: row tile * groups + group.
    DEVICE void load(const uint4* all, const u32* scales, int tile) {
        load_further(all + size_t(tile) * 32 + lane_id(), scales + size_t(tile) * 8 + (lane_id() >> 2), 0);
    }
    // From this lane's place in one tile, `tiles` further on: where that is a constant, it takes no register and no instruction.
    DEVICE void load_further(const uint4* at, const u32* scales_at, int tiles) {
        codes = load_stream(at + tiles * 32);
        scale = load_stream(scales_at + tiles * 8);
    }
    DEVICE void multiply(float (&sum)[4], const Activation& x) const { int4_tile(sum, codes, scale, x); }
};

struct HalfWeight {
    uint4 steps[4];

    DEVICE void load(const uint4* all, const u32*, int tile) { load_further(all + size_t(tile) * 128 + lane_id(), nullptr, 0); }
    DEVICE void load_further(const uint4* at, const u32*, int tiles) {
#pragma unroll
        for (int step = 0; step < 4; ++step) steps[step] = load_stream(at + tiles * 128 + step * 32);
    }
    static constexpr int WORDS = 128;  // of 16 bytes a tile
    DEVICE void multiply(float (&sum)[4], const Activation& x) const { half_tile(sum, steps, x); }
};
