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
    static constexpr int REGISTERS = 5;
    static constexpr bool FIXED = true;  // multiplies fixed point, too
    uint4 codes;
    u32 scale;

    // `tile`: row tile * groups + group.
    DEVICE void load(const uint4* all, const u32* scales, int tile) {
        codes = load_stream(all + size_t(tile) * 32 + lane_id());
        scale = load_stream(scales + size_t(tile) * 8 + (lane_id() >> 2));
    }
    DEVICE void multiply(float (&sum)[4], const Activation& x) const { int4_tile(sum, codes, scale, x); }

    // The same by way of shared memory, BYTES a tile, for what registers have no room for: land() asks, and take() after a wait of
    // the whole warp has it.
    static constexpr int BYTES = 512 + 32;
    DEVICE static void land(char* to, const uint4* all, const u32* scales, int tile) {
        copy_async(to + 16 * lane_id(), all + size_t(tile) * 32 + lane_id());
        if (lane_id() < 2) copy_async(to + 512 + 16 * lane_id(), scales + size_t(tile) * 8 + 4 * lane_id());
    }
    DEVICE void take(const char* from) {
        codes = reinterpret_cast<const uint4*>(from)[lane_id()];
        scale = reinterpret_cast<const u32*>(from + 512)[lane_id() >> 2];
    }
};

struct HalfWeight {
    static constexpr int REGISTERS = 16;
    static constexpr bool FIXED = false;
    uint4 steps[4];

    DEVICE void load(const uint4* all, const u32*, int tile) {
#pragma unroll
        for (int step = 0; step < 4; ++step) steps[step] = load_stream(all + (size_t(tile) * 4 + step) * 32 + lane_id());
    }
    DEVICE void multiply(float (&sum)[4], const Activation& x) const { half_tile(sum, steps, x); }

    static constexpr int BYTES = 0;  // has no use for it
    DEVICE static void land(char*, const uint4*, const u32*, int) {}
    DEVICE void take(const char*) {}
};
