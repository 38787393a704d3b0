// Weights as the tensor cores want them: tiles of 16 outputs x 64 inputs, in the order of trtvlm.plugins.cuda.tiles.
// Within a tile, lane (g = lane / 4, t = lane % 4) holds rows g and g + 8 and inputs 16t .. 16t + 15, four inputs a step;
// so its part of an activation row is 16 halves side by side.
#pragma once
#include "common.cuh"

constexpr int TILE_ROWS = 16;
constexpr int TILE_INPUTS = 64;  // also the quantization group
constexpr int COLUMNS = 8;       // activation rows of one product
// Halves between two activation rows in shared memory, beyond the inputs: keeps 16-byte reads free of bank conflicts.
constexpr int ROW_PAD = 8;

// Eight codes (stored + 8) -> four registers of two exact halves each. The magic number 0x6400 is 1024 as a half, under
// which an integer below 1024 is its last bits (Kim et al., arXiv 2211.10017).
DEVICE void int4_to_halves(u32 (&out)[4], u32 codes) {
    constexpr u32 magic = 0x64006400, low = 0x000f000f, high = 0x00f000f0;
    constexpr u32 minus_1032 = 0x64086408;             // 1024 + 8
    constexpr u32 sixteenth = 0x2c002c00;              // 1 / 16
    constexpr u32 minus_72 = 0xd480d480;               // -(1024 / 16 + 8)
    const u32 next = codes >> 8;
    out[0] = half2_sub(and_or<low, magic>(codes), minus_1032);
    out[1] = half2_fma(and_or<high, magic>(codes), sixteenth, minus_72);
    out[2] = half2_sub(and_or<low, magic>(next), minus_1032);
    out[3] = half2_fma(and_or<high, magic>(next), sixteenth, minus_72);
}

// This lane's 16 halves of activation row g for one group; zeros where the row is not there.
struct Activation {
    uint4 first, second;
};

DEVICE Activation load_activation(const u16* rows, int stride, int group, bool present) {
    Activation out = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    if (present) {
        const int g = lane_id() >> 2, t = lane_id() & 3;
        const uint4* at = reinterpret_cast<const uint4*>(rows + g * stride + group * TILE_INPUTS + 16 * t);
        out.first = at[0];
        out.second = at[1];
    }
    return out;
}

// sum += scale * (codes of one tile x activations); scale holds rows g (low half) and g + 8 (high half).
DEVICE void int4_tile(float (&sum)[4], const uint4& codes, u32 scale, const Activation& x) {
    float part[4] = {0.f, 0.f, 0.f, 0.f};
    u32 a[4];
    int4_to_halves(a, codes.x);
    mma_16x8x16(part, a, x.first.x, x.first.y);
    int4_to_halves(a, codes.y);
    mma_16x8x16(part, a, x.first.z, x.first.w);
    int4_to_halves(a, codes.z);
    mma_16x8x16(part, a, x.second.x, x.second.y);
    int4_to_halves(a, codes.w);
    mma_16x8x16(part, a, x.second.z, x.second.w);
    const float upper = low_half(scale), lower = high_half(scale);
    sum[0] += upper * part[0];
    sum[1] += upper * part[1];
    sum[2] += lower * part[2];
    sum[3] += lower * part[3];
}

// The same for a tile of halves: step j of the tile is 16 bytes a lane, a[0..3].
DEVICE void half_tile(float (&sum)[4], const uint4 (&weights)[4], const Activation& x) {
    const u32 b[8] = {x.first.x, x.first.y, x.first.z, x.first.w, x.second.x, x.second.y, x.second.z, x.second.w};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const u32 a[4] = {weights[step].x, weights[step].y, weights[step].z, weights[step].w};
        mma_16x8x16(sum, a, b[2 * step], b[2 * step + 1]);
    }
}
