// A vocabulary cut into slices, one a block: a thread holds SLICE_ITEMS tokens side by side, so threads and slices stand in
// the order of tokens. Weights are integers (fixed point): their sums are exact in every order, and so is every draw.
#pragma once
#include "common.cuh"

#ifdef VOCAB
constexpr int SLICE_ITEMS = 8;
constexpr int SLICE_THREADS = 512;
constexpr int SLICE_WARPS = SLICE_THREADS / 32;
constexpr int SLICE = SLICE_ITEMS * SLICE_THREADS;
constexpr int SLICES = (VOCAB + SLICE - 1) / SLICE;
static_assert(VOCAB % SLICE_ITEMS == 0, "a thread's tokens are all there or not");
static_assert(SLICES <= SLICE_THREADS, "slices are searched by one thread each");

constexpr float PROBABILITY_ONE = 1152921504606846976.f;  // 2^60: probabilities sum to about 1

DEVICE u64 to_fixed(float value, float one) { return __float2ull_rz(value * one); }

DEVICE int first_token(int slice) { return slice * SLICE + threadIdx.x * SLICE_ITEMS; }

// This thread's tokens of a slice of row [VOCAB]; `missing` where the vocabulary has ended.
DEVICE void load_slice(float (&out)[SLICE_ITEMS], const float* row, int slice, float missing) {
    const int first = first_token(slice);
    if (first < VOCAB) {
        const float4* at = reinterpret_cast<const float4*>(row + first);
        const float4 low = at[0], high = at[1];
        out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
        out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
    } else {
#pragma unroll
        for (int i = 0; i < SLICE_ITEMS; ++i) out[i] = missing;
    }
}

DEVICE u64 thread_sum(const u64 (&weights)[SLICE_ITEMS]) {
    u64 sum = 0;
#pragma unroll
    for (int i = 0; i < SLICE_ITEMS; ++i) sum += weights[i];
    return sum;
}

struct Scan {
    u64 before, total;  // what the threads before this one have, and all together
};

DEVICE Scan block_scan(u64 value) {
    __shared__ u64 warps[SLICE_WARPS];
    u64 sum = value;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        const u64 lower = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane_id() >= offset) sum += lower;
    }
    __syncthreads();  // an earlier scan may still be read
    if (lane_id() == 31) warps[warp_id()] = sum;
    __syncthreads();
    Scan out = {sum - value, 0};
#pragma unroll
    for (int warp = 0; warp < SLICE_WARPS; ++warp) {
        if (warp < warp_id()) out.before += warps[warp];
        out.total += warps[warp];
    }
    return out;
}

DEVICE u64 block_sum(u64 value) { return block_scan(value).total; }

// Whether this block is the last of its row to come here. What others wrote before is then visible.
DEVICE bool last_block(u32* counter) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(counter, 1u) == SLICES - 1;
        if (last) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    return last;
}

struct Place {
    int index;   // the slice, or the token
    u64 offset;  // how far into it
};

// Of sums [SLICES] that other blocks wrote.
DEVICE u64 sum_of(const u64* sums) { return block_sum(threadIdx.x < SLICES ? __ldcg(sums + threadIdx.x) : 0); }

// Which slice `offset`, below the total of sums [SLICES], falls into.
DEVICE Place find_slice(const u64* sums, u64 offset) {
    __shared__ Place place;
    if (threadIdx.x == 0) place = {0, 0};  // even of a total of nothing, no place outside is made
    const u64 mine = threadIdx.x < SLICES ? __ldcg(sums + threadIdx.x) : 0;
    const u64 before = block_scan(mine).before;
    if (before <= offset && offset - before < mine) place = {int(threadIdx.x), offset - before};
    __syncthreads();
    return place;
}

// The token that place.offset, below the total of the slice's weights, falls on; the same in every thread.
DEVICE int find_token(const u64 (&weights)[SLICE_ITEMS], Place place) {
    __shared__ int token;
    if (threadIdx.x == 0) token = 0;
    u64 before = block_scan(thread_sum(weights)).before;
#pragma unroll
    for (int i = 0; i < SLICE_ITEMS; ++i) {
        if (before <= place.offset && place.offset - before < weights[i]) token = first_token(place.index) + i;
        before += weights[i];
    }
    __syncthreads();
    return token;
}
#endif
