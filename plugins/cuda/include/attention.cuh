// What the two attention kernels share: fragments out of shared memory, and merging the chunks of a split softmax.
#pragma once
#include "common.cuh"

constexpr u32 EVERY_LANE = 0xffffffffu;
constexpr float MINUS_INFINITY = -3.0e38f;  // below any score, and its exponential is 0

// Two 8 x 8 matrices; lane i < 16 gives the address of row i % 8 of matrix i / 8.
DEVICE void load_matrix_pair(u32& first, u32& second, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(first), "=r"(second)
                 : "r"(shared_address(row)));
}

// The A operand of 16 rows and 16 inputs from `from`, rows `stride` halves apart.
DEVICE void load_a(u32 (&a)[4], const u16* from, int stride) {
    load_matrices(a, from + (lane_id() & 15) * stride + (lane_id() >> 4) * 8);
}

// The B operand of 8 columns stored as rows (columns x inputs), 16 inputs.
DEVICE void load_b(u32& b0, u32& b1, const u16* from, int stride) {
    load_matrix_pair(b0, b1, from + (lane_id() & 7) * stride + (lane_id() >> 3 & 1) * 8);
}

// The B operands of two steps, 32 inputs, of 8 columns stored as inputs x columns.
DEVICE void load_b_transposed(u32 (&b)[4], const u16* from, int stride) {
    load_matrices_transposed(b, from + lane_id() * stride);
}

// What a chunk of positions says of one head: the largest score, and the sum of exponentials under it.
struct Share {
    float peak, sum;
};

// One warp: the outputs of a row and head [chunks][stride] put together, four values a lane of each half warp; the halves take
// turns with the chunks, and both get the result. `shares` [chunks][share_stride]. `chunks` of them count, but `room` are there
// to be read: loads need not wait for the count.
template <int MOST>
DEVICE float4 merge_chunks(const Share* shares, int share_stride, const float* outputs, int stride, int chunks, int room) {
    constexpr int HELD = MOST / 32, BATCH = 8;
    const int lane = lane_id(), half = lane >> 4;
    Share share[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        share[i] = Share{MINUS_INFINITY, 0.f};
        const int chunk = i * 32 + lane;
        if (chunk < room) share[i] = shares[chunk * share_stride];
    }
    float4 value[2][BATCH];
    auto load = [&](int batch) {
#pragma unroll
        for (int c = 0; c < BATCH; ++c) {
            const int chunk = 2 * (batch * BATCH + c) + half;
            value[batch & 1][c] = float4{0.f, 0.f, 0.f, 0.f};
            if (chunk < room)
                value[batch & 1][c] = *reinterpret_cast<const float4*>(outputs + size_t(chunk) * stride + 4 * (lane & 15));
        }
    };
    load(0);
    load(1);
    float peak = MINUS_INFINITY, sum = 0.f, weight[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i)
        if (i * 32 + lane < chunks) peak = fmaxf(peak, share[i].peak);
    peak = warp_max(peak);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const bool counts = i * 32 + lane < chunks;
        weight[i] = counts ? exp2f(share[i].peak - peak) : 0.f;
        sum += counts ? weight[i] * share[i].sum : 0.f;
    }
    sum = warp_sum(sum);
    float4 out = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int batch = 0; batch < MOST / (2 * BATCH); ++batch) {
        if (batch * 2 * BATCH >= chunks) break;
#pragma unroll
        for (int c = 0; c < BATCH; ++c) {
            const int chunk = 2 * (batch * BATCH + c) + half;
            const float w = __shfl_sync(EVERY_LANE, weight[batch * 2 * BATCH / 32], chunk & 31);
            // What was read past the count may be anything.
            if (chunk < chunks) {
                const float4 v = value[batch & 1][c];
                out.x += w * v.x, out.y += w * v.y, out.z += w * v.z, out.w += w * v.w;
            }
        }
        if (batch + 2 < MOST / (2 * BATCH)) load(batch + 2);
    }
    const float scale = 1.f / sum;
    out.x = (out.x + __shfl_xor_sync(EVERY_LANE, out.x, 16)) * scale;
    out.y = (out.y + __shfl_xor_sync(EVERY_LANE, out.y, 16)) * scale;
    out.z = (out.z + __shfl_xor_sync(EVERY_LANE, out.z, 16)) * scale;
    out.w = (out.w + __shfl_xor_sync(EVERY_LANE, out.w, 16)) * scale;
    return out;
}
