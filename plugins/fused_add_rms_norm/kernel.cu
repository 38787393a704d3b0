// added = x + residual; normalised = added / rms(added) * weight. One block a row; x, residual and weight are of one type:
// TYPE 0 half, 1 bfloat16, 2 float.
#include "common.cuh"

constexpr int BYTES = TYPE == 2 ? 4 : 2;
constexpr int ITEMS = 16 / BYTES;  // values of a 16-byte word
constexpr int THREADS = 256;
constexpr int WORDS = (N / ITEMS + THREADS - 1) / THREADS;  // words a thread
static_assert(N % ITEMS == 0, "rows are whole 16-byte words");

DEVICE float widen(u32 bits) {
    if (TYPE == 0) return half_to_float(u16(bits));
    return __uint_as_float(TYPE == 1 ? bits << 16 : bits);
}

DEVICE u32 narrow(float value) {
    if (TYPE == 0) return float_to_half(value);
    if (TYPE == 2) return __float_as_uint(value);
    u16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
}

DEVICE void unpack(float (&out)[ITEMS], const uint4& word) {
    const u32 words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) out[i] = widen(BYTES == 4 ? words[i % 4] : words[i / 2] >> (i % 2 * 16) & 0xffffu);
}

DEVICE uint4 pack(const float (&values)[ITEMS]) {
    u32 words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        if (BYTES == 4) words[i % 4] = narrow(values[i]);
        else words[i / 2] |= narrow(values[i]) << (i % 2 * 16);
    }
    return uint4{words[0], words[1], words[2], words[3]};
}

DEVICE float rounded(float value) { return widen(narrow(value)); }

extern "C" __global__ void __launch_bounds__(THREADS)
    fused_add_rms_norm(const uint4* x, const uint4* residual, const uint4* weight, float eps, uint4* normalised, uint4* added) {
    __shared__ float warps[THREADS / 32];
    const u64 row = u64(blockIdx.x) * (N / ITEMS);
    float sums[WORDS][ITEMS], squares = 0.f;
#pragma unroll
    for (int word = 0; word < WORDS; ++word) {
        const int at = word * THREADS + threadIdx.x;
        if (at < N / ITEMS) {
            float other[ITEMS];
            unpack(sums[word], x[row + at]);
            unpack(other, residual[row + at]);
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                sums[word][i] = rounded(sums[word][i] + other[i]);  // the residual stream holds it so
                squares += sums[word][i] * sums[word][i];
            }
            added[row + at] = pack(sums[word]);
        }
    }
    squares = warp_sum(squares);
    if (lane_id() == 0) warps[warp_id()] = squares;
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < THREADS / 32; ++i) total += warps[i];
    const float scale = 1.f / sqrtf(total / N + eps);
#pragma unroll
    for (int word = 0; word < WORDS; ++word) {
        const int at = word * THREADS + threadIdx.x;
        if (at < N / ITEMS) {
            float gain[ITEMS], out[ITEMS];
            unpack(gain, weight[at]);
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) out[i] = rounded(sums[word][i] * scale) * gain[i];
            normalised[row + at] = pack(out);
        }
    }
}
