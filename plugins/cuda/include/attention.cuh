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

// What a chunk of positions says of one head: the largest score, and the mean of exponentials under it. Its outputs are the mean of
// values by the same exponentials, as halves: no larger than the values are.
struct Share {
    float peak, mean;
};

struct Merged {
    float value[8];
};

// One warp: the outputs of a row and head [chunks][stride] put together, eight values a lane of each quarter warp; the quarters take
// turns with the chunks, and all get the result. `shares` [chunks][share_stride]. `chunks` of them count, but `room` are there
// to be read: loads need not wait for the count.
template <int MOST>
DEVICE Merged merge_chunks(const Share* shares, int share_stride, const u16* outputs, int stride, int chunks, int room) {
    constexpr int HELD = MOST / 32, BATCH = 8;  // a batch is 32 chunks
    const int lane = lane_id(), quarter = lane >> 3;
    Share share[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        share[i] = Share{MINUS_INFINITY, 0.f};
        const int chunk = i * 32 + lane;
        if (chunk < room) share[i] = shares[chunk * share_stride];
    }
    uint4 value[2][BATCH];
    auto load = [&](int batch) {
#pragma unroll
        for (int c = 0; c < BATCH; ++c) {
            const int chunk = 4 * (batch * BATCH + c) + quarter;
            value[batch & 1][c] = uint4{0, 0, 0, 0};
            if (chunk < room)
                value[batch & 1][c] = *reinterpret_cast<const uint4*>(outputs + size_t(chunk) * stride + 8 * (lane & 7));
        }
    };
    load(0);
    if (HELD > 1) load(1);
    float peak = MINUS_INFINITY, sum = 0.f, weight[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i)
        if (i * 32 + lane < chunks) peak = fmaxf(peak, share[i].peak);
    peak = warp_max(peak);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const bool counts = i * 32 + lane < chunks;
        weight[i] = counts ? exp2f(share[i].peak - peak) : 0.f;
        sum += counts ? weight[i] * share[i].mean : 0.f;
    }
    sum = warp_sum(sum);
    Merged out = {};
#pragma unroll
    for (int batch = 0; batch < HELD; ++batch) {
        if (batch * 32 >= chunks) break;
#pragma unroll
        for (int c = 0; c < BATCH; ++c) {
            const int chunk = 4 * (batch * BATCH + c) + quarter;
            const float w = __shfl_sync(EVERY_LANE, weight[batch], chunk & 31);
            // What was read past the count may be anything.
            if (chunk < chunks) {
                const uint4 v = value[batch & 1][c];
                const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    out.value[2 * i] += w * low_half(pairs[i]), out.value[2 * i + 1] += w * high_half(pairs[i]);
            }
        }
        if (batch + 2 < HELD) load(batch + 2);
    }
    const float scale = 1.f / sum;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        out.value[i] += __shfl_xor_sync(EVERY_LANE, out.value[i], 8);
        out.value[i] = (out.value[i] + __shfl_xor_sync(EVERY_LANE, out.value[i], 16)) * scale;
    }
    return out;
}

DEVICE uint4 merged_halves(const Merged& merged) {
    const float* v = merged.value;
    return uint4{floats_to_halves(v[0], v[1]), floats_to_halves(v[2], v[3]), floats_to_halves(v[4], v[5]), floats_to_halves(v[6], v[7])};
}
