// How a position's latent lies in the cache. Macro INT8_LATENT: 0 halves; 1 codes of 8 bits, and of every position a scale in
// half (trtvlm.model.latent_codes: the very same bits). A latent's bits depend on that latent alone.
#pragma once
#include "common.cuh"

#if INT8_LATENT
using Latent = i8;
#else
using Latent = u16;
#endif

DEVICE u16 float_to_half_up(float value) {
    u16 out;
    asm("cvt.rp.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
}

// Loads of the cache, out of L2: another launch may write other positions meanwhile.
DEVICE uint2 load_codes(const void* address) {
    uint2 out;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(out.x), "=r"(out.y) : "l"(address));
    return out;
}
DEVICE u32 load_scale(const u16* address) {  // the same half twice
    u16 out;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(out) : "l"(address));
    return pack_halves(out, out);
}

// Two codes, which `selector` picks out of a word whose sign bits were flipped, times the scale (the same half twice). Byte u
// under 0x64 is the half 1024 + u, and u is code + 128: halves are exact until the product.
DEVICE u32 decoded(u32 flipped, u32 selector, u32 scale) {
    constexpr u32 minus_1152 = 0x64806480;
    return half2_mul(half2_sub(__byte_perm(flipped, 0x64646464, selector), minus_1152), scale);
}

// Eight codes times the scale, each rounded to half once.
DEVICE uint4 decoded(uint2 codes, u32 scale) {
    const u32 low = codes.x ^ 0x80808080, high = codes.y ^ 0x80808080;
    return uint4{decoded(low, 0x4140, scale), decoded(low, 0x4342, scale), decoded(high, 0x4140, scale),
                 decoded(high, 0x4342, scale)};
}

// One row of halves in pairs, of which thread i of the block has i, THREADS + i, ..., to `position` of the cache. Every thread of
// the block is here.
template <int WIDTH, int THREADS, int EACH>
DEVICE void store_latent(const u32 (&value)[EACH], size_t position, Latent* cache, u16* scales) {
#if INT8_LATENT
    __shared__ float peaks[THREADS / 32];
    float peak = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; ++i)
        if (i * THREADS + threadIdx.x < WIDTH / 2) peak = fmaxf(peak, fmaxf(fabsf(low_half(value[i])), fabsf(high_half(value[i]))));
    peak = warp_max(peak);
    if (lane_id() == 0) peaks[warp_id()] = peak;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; ++warp) peak = fmaxf(peak, peaks[warp]);
    const u16 held = float_to_half_up(fminf(fmaxf(peak * (1.f / 127.f), 0x1p-24f), 515.5f));
    const float scale = half_to_float(held);
    if (threadIdx.x == 0) scales[position] = held;
#endif
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int pair = i * THREADS + threadIdx.x;
        if (pair >= WIDTH / 2) continue;
#if INT8_LATENT
        const int low = __float2int_rn(low_half(value[i]) / scale), high = __float2int_rn(high_half(value[i]) / scale);
        reinterpret_cast<u16*>(cache + position * WIDTH)[pair] = u16((low & 0xff) | (high & 0xff) << 8);
#else
        reinterpret_cast<u32*>(cache + position * WIDTH)[pair] = value[i];
#endif
    }
}
