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

// Loads that the compiler leaves where they stand: what is asked for first stays first.
DEVICE uint4 load_now(const u16* address) {
    uint4 out;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w) : "l"(address));
    return out;
}

// One warp: the outputs of a row and head [chunks][stride] put together, eight values a lane of each quarter warp; the quarters take
// turns with the chunks, and all get the result. `shares` [chunks][share_stride]; `weights`: room for MOST floats of this warp's.
template <int MOST>
DEVICE Merged merge_chunks(const Share* shares, int share_stride, const u16* outputs, int stride, int chunks, float* weights) {
    constexpr int HELD = MOST / 32, BATCH = 9;  // a batch is 36 chunks
    const int lane = lane_id(), quarter = lane >> 3;
    uint4 value[BATCH];
    // Past the last chunk it is that one again, with no weight.
    auto load = [&](int first) {
#pragma unroll
        for (int c = 0; c < BATCH; ++c)
            value[c] = load_now(outputs + size_t(smaller(first + 4 * c + quarter, chunks - 1)) * stride + 8 * (lane & 7));
    };
    Share share[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) share[i] = shares[smaller(i * 32 + lane, chunks - 1) * share_stride];
    load(0);
    float peak = MINUS_INFINITY, sum = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; ++i) peak = fmaxf(peak, share[i].peak);
    peak = warp_max(peak);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const float weight = i * 32 + lane < chunks ? exp2f(share[i].peak - peak) : 0.f;
        weights[i * 32 + lane] = weight;
        sum += weight * share[i].mean;
    }
    sum = warp_sum(sum);
    __syncwarp();
    Merged out = {};
#pragma unroll 1
    for (int first = 0; first < chunks; first += 4 * BATCH) {
        if (first) load(first);
#pragma unroll
        for (int c = 0; c < BATCH; ++c) {
            const float w = weights[first + 4 * c + quarter];
            const u32 pairs[4] = {value[c].x, value[c].y, value[c].z, value[c].w};
#pragma unroll
            for (int i = 0; i < 4; ++i)
                out.value[2 * i] += w * low_half(pairs[i]), out.value[2 * i + 1] += w * high_half(pairs[i]);
        }
    }
    const float scale = __fdividef(1.f, sum);
#pragma unroll
    for (int i = 0; i < 8; ++i) out.value[i] += __shfl_xor_sync(EVERY_LANE, out.value[i], 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) out.value[i] = (out.value[i] + __shfl_xor_sync(EVERY_LANE, out.value[i], 16)) * scale;
    __syncwarp();  // the weights may be overwritten
    return out;
}

DEVICE uint4 merged_halves(const Merged& merged) {
    const float* v = merged.value;
    return uint4{floats_to_halves(v[0], v[1]), floats_to_halves(v[2], v[3]), floats_to_halves(v[4], v[5]), floats_to_halves(v[6], v[7])};
}
