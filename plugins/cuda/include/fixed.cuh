// Activations as 16-bit fixed point, for the tensor cores' products of bytes. A group of 64 values is scale * (256 * high + low) with
// both parts signed bytes: finer than halves for all but the smallest of a group. INT4 codes become bytes in a third of the
// instructions that halves take, and sums within a group are of integers: exact, whatever their order.
// In memory a group is 64 bytes of high parts, then 64 of low ones, the room of 64 halves. Of four inputs the order is 0, 2, 1, 3, as
// the nibbles of codes lie (tiles.cuh).
#pragma once
#include "tiles.cuh"

constexpr float FIXED_MOST = 32639.f;  // 127 * 256 + 127
constexpr int GROUP_BYTES = 2 * TILE_INPUTS;

// scale: of the products, in which codes count 16 times; inverse: from values to fixed point.
struct FixedScale {
    float scale, inverse;
};

DEVICE FixedScale fixed_scale(float largest) {
    return {largest * (1.f / (16.f * FIXED_MOST)), largest > 1e-30f ? __fdividef(FIXED_MOST, largest) : 0.f};
}

// The fixed point number is in the last 16 bits: what is added has room for no fraction.
DEVICE u32 fixed_bits(float x, float inverse) { return __float_as_uint(__fmaf_rn(x, inverse, 12582912.f)); }  // 1.5 * 2^23

// The low parts of two numbers, and the high ones, in 16 bits each. 128 more rounds the high part to the nearest.
DEVICE u32 low_parts(u32 a, u32 b) { return __byte_perm(a, b, 0x0040); }
DEVICE u32 high_parts(u32 a, u32 b) { return __byte_perm(a + 128, b + 128, 0x0051); }

// Four inputs.
struct FixedQuad {
    u32 high, low;
};

DEVICE FixedQuad fixed_quad(const float4& x, float inverse) {
    const u32 a = fixed_bits(x.x, inverse), b = fixed_bits(x.y, inverse), c = fixed_bits(x.z, inverse), d = fixed_bits(x.w, inverse);
    return {__byte_perm(high_parts(a, c), high_parts(b, d), 0x5410), __byte_perm(low_parts(a, c), low_parts(b, d), 0x5410)};
}

// Quad `quad` of a group of 64 becomes fixed point in its place, and the group's scale with the first one; sixteen lanes a group, all or none of
// them there.
DEVICE void store_fixed(const float4& x, bool there, void* group, int quad, float* scale) {
    float largest = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
#pragma unroll
    for (int offset = 8; offset; offset >>= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    const FixedScale by = fixed_scale(largest);
    const FixedQuad fixed = fixed_quad(x, by.inverse);
    if (!there) return;
    u32* to = static_cast<u32*>(group) + quad;
    to[0] = fixed.high, to[TILE_INPUTS / 4] = fixed.low;
    if (quad == 0) *scale = by.scale;
}

DEVICE u32 half2_larger(u32 a, u32 b) {
    u32 out;
    asm("max.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

DEVICE float4 quad_of(u32 first, u32 second) { return {low_half(first), high_half(first), low_half(second), high_half(second)}; }

// One warp: `count` groups of halves side by side become fixed point in their place, eight lanes a group.
// MOST: of count.
template <int MOST>
DEVICE void fix_groups(void* groups, float* scales, int count) {
    constexpr int TURNS = (MOST + 3) / 4;
    uint4 value[TURNS];
    const int eighth = lane_id() & 7;
    char* own = static_cast<char*>(groups) + (lane_id() >> 3) * GROUP_BYTES;
    auto there = [&](int turn) { return turn * 4 + (lane_id() >> 3) < count; };
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
        value[i] = uint4{0, 0, 0, 0};
        if (there(i)) value[i] = *reinterpret_cast<const uint4*>(own + i * 4 * GROUP_BYTES + 16 * eighth);
    }
    __syncwarp();  // all of a group are read before any is written
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
        constexpr u32 sizes = 0x7fff7fff;  // without the signs
        const uint4& v = value[i];
        u32 largest = half2_larger(half2_larger(v.x & sizes, v.y & sizes), half2_larger(v.z & sizes, v.w & sizes));
#pragma unroll
        for (int offset = 4; offset; offset >>= 1) largest = half2_larger(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
        const FixedScale by = fixed_scale(fmaxf(low_half(largest), high_half(largest)));
        const FixedQuad first = fixed_quad(quad_of(v.x, v.y), by.inverse), second = fixed_quad(quad_of(v.z, v.w), by.inverse);
        if (there(i)) {
            char* to = own + i * 4 * GROUP_BYTES + 8 * eighth;
            *reinterpret_cast<uint2*>(to) = uint2{first.high, second.high};
            *reinterpret_cast<uint2*>(to + TILE_INPUTS) = uint2{first.low, second.low};
            if (eighth == 0) scales[i * 4 + (lane_id() >> 3)] = by.scale;
        }
    }
}

// c += a * b for a tile of 16 x 8 x 32, signed bytes in, int32 out (PTX ISA, mma.m16n8k32). With g = lane / 4, t = lane % 4:
// a[0] = A[g][4t ..], a[1] = A[g+8][4t ..], a[2] = A[g][4t+16 ..], a[3] = A[g+8][4t+16 ..], four bytes each; b0 = B[4t ..][g],
// b1 = B[4t+16 ..][g]; c as for halves.
DEVICE void mma_16x8x32(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Half a tile's codes (stored + 8) -> 16 times their values, as signed bytes.
DEVICE void int4_to_bytes(u32 (&out)[4], u32 first, u32 second) {
    constexpr u32 mask = 0xf0f0f0f0, sign = 0x80808080;
    out[0] = and_xor<mask, sign>(first << 4);
    out[1] = and_xor<mask, sign>(first);
    out[2] = and_xor<mask, sign>(second << 4);
    out[3] = and_xor<mask, sign>(second);
}

// This lane's 16 inputs of one group of activation row g.
struct FixedActivation {
    uint4 high, low;
};

DEVICE FixedActivation load_fixed(const void* group) {
    const char* at = static_cast<const char*>(group) + 16 * (lane_id() & 3);
    return {*reinterpret_cast<const uint4*>(at), *reinterpret_cast<const uint4*>(at + TILE_INPUTS)};
}

// sum + product * by; APART: the product is rounded before it is added, as where products are put down first and added up later.
template <bool APART>
DEVICE float add_product(float sum, float product, float by) {
    return APART ? __fadd_rn(sum, __fmul_rn(product, by)) : __fmaf_rn(product, by, sum);
}

// sum += codes of one tile x activations, as int4_tile has it; scales: of the activations of columns 2t and 2t + 1.
template <bool APART = false>
DEVICE void fixed_tile(float (&sum)[4], const uint4& codes, u32 weight_scale, const FixedActivation& x, const float2& scales) {
    int high[4] = {0, 0, 0, 0}, low[4] = {0, 0, 0, 0};
    u32 a[4];
    int4_to_bytes(a, codes.x, codes.y);
    mma_16x8x32(high, a, x.high.x, x.high.y);
    mma_16x8x32(low, a, x.low.x, x.low.y);
    int4_to_bytes(a, codes.z, codes.w);
    mma_16x8x32(high, a, x.high.z, x.high.w);
    mma_16x8x32(low, a, x.low.z, x.low.w);
    const float upper = low_half(weight_scale), lower = high_half(weight_scale);
    sum[0] = add_product<APART>(sum[0], float(high[0] * 256 + low[0]), upper * scales.x);
    sum[1] = add_product<APART>(sum[1], float(high[1] * 256 + low[1]), upper * scales.y);
    sum[2] = add_product<APART>(sum[2], float(high[2] * 256 + low[2]), lower * scales.x);
    sum[3] = add_product<APART>(sum[3], float(high[3] * 256 + low[3]), lower * scales.y);
}

// A row alone has its high parts as column 0 and its low parts as column 1.
DEVICE uint4 load_fixed_row(const void* group) {
    uint4 out = {0, 0, 0, 0};
    if (lane_id() < 8) out = *reinterpret_cast<const uint4*>(static_cast<const char*>(group) + 64 * (lane_id() >> 2) + 16 * (lane_id() & 3));
    return out;
}

// Products of outputs g and g + 8, before any scale, in lanes of t = 0.
DEVICE void fixed_row_products(float (&out)[2], const uint4& codes, const uint4& x) {
    int both[4] = {0, 0, 0, 0};
    u32 a[4];
    int4_to_bytes(a, codes.x, codes.y);
    mma_16x8x32(both, a, x.x, x.y);
    int4_to_bytes(a, codes.z, codes.w);
    mma_16x8x32(both, a, x.z, x.w);
    out[0] = float(both[0] * 256 + both[1]), out[1] = float(both[2] * 256 + both[3]);
}

template <bool APART = false>
DEVICE void fixed_row_tile(float (&sum)[2], const uint4& codes, u32 weight_scale, const uint4& x, float scale) {
    float product[2];
    fixed_row_products(product, codes, x);
    sum[0] = add_product<APART>(sum[0], product[0], low_half(weight_scale) * scale);
    sum[1] = add_product<APART>(sum[1], product[1], high_half(weight_scale) * scale);
}
