// The shared expert's second half, and the sum of all that a row's experts give.
#pragma once
#include "int4_moe/row_shared.cuh"

constexpr int UNITS = TOP_K + SHARED_PARTS;  // the chosen experts, then the parts of the shared one
constexpr int MERGE_TILES = 2, MERGED = MERGE_TILES * TILE_ROWS, MERGE_BLOCKS = HIDDEN / MERGED;  // of outputs a block; outputs; blocks
constexpr int CHAINS = SHARED_PARTS * 2 * MERGE_TILES;  // sums of half a part's groups for 16 outputs, one a warp
static_assert(HIDDEN % MERGED == 0, "sizes the kernels were written for");

struct Merge {
    uint4 codes[MERGE_TILES][larger(1, SHARED_GROUPS)][32];
    u32 scales[MERGE_TILES][larger(1, SHARED_GROUPS)][8];
    char hidden[larger(1, SHARED_GROUPS)][GROUP_BYTES];
    float hidden_scales[larger(1, SHARED_GROUPS)], sums[UNITS][2][MERGED], weights[TOP_K];
    int chosen[TOP_K];
};

// Sum `half` of unit `unit` is that of groups first .. first + count - 1.
struct Half {
    int first, count;
};
DEVICE Half half_of(int unit, int half) {
    return {unit * DOWN_GROUPS + half * FIRST_GROUPS, half ? DOWN_GROUPS - FIRST_GROUPS : FIRST_GROUPS};
}

DEVICE void shared_down(Merge& held) {
#pragma unroll 1
    for (int chain = warp_id(); chain < CHAINS; chain += ROW_WARPS) {
        const int tile = chain % MERGE_TILES, part = chain / MERGE_TILES >> 1, half = chain / MERGE_TILES & 1;
        const Half groups = half_of(part, half);
        float sum[2] = {0.f, 0.f};
#pragma unroll 1
        for (int i = groups.first; i < groups.first + groups.count; ++i)
            fixed_row_tile<true>(sum, held.codes[tile][i][lane_id()], held.scales[tile][i][lane_id() >> 2], load_fixed_row(held.hidden[i]),
                                 held.hidden_scales[i]);
        store_sums(held.sums[TOP_K + part][half] + tile * TILE_ROWS, sum);
    }
}

// Outputs MERGED * block and on.
DEVICE void merge_part(Merge& held, int block, const float* given, const float* logits, const float* bias, const uint4* shared_codes,
                       const u32* shared_scales, const u16* shared_hidden, float* residual, float* square_sums, const Done* done,
                       const Turn& turn) {
    const int at = threadIdx.x % MERGED, output = block * MERGED + at;
    constexpr int WORDS = MERGE_TILES * SHARED_GROUPS * 32;
    const size_t first_tile = size_t(block) * MERGE_TILES * SHARED_GROUPS;
#pragma unroll 1
    for (int i = threadIdx.x; i < WORDS; i += 32 * ROW_WARPS) copy_async(held.codes[0][0] + i, shared_codes + first_tile * 32 + i);
#pragma unroll 1
    for (int i = threadIdx.x; i < WORDS / 16; i += 32 * ROW_WARPS) copy_async(held.scales[0][0] + 4 * i, shared_scales + first_tile * 8 + 4 * i);
    const float was = residual[output];
    copy_commit();
    await_turn(turn);
    if (warp_id() == 0) {
        choose_experts(logits, bias, held.chosen, TOP_K);
        __syncwarp();
        weigh_experts(logits, held.chosen, held.weights);
    }
    if (SHARED) {
        await_count(&done->shared_up, SHARED_UP_BLOCKS);
#pragma unroll 1
        for (int i = threadIdx.x; i < SHARED / 8; i += 32 * ROW_WARPS) copy_async(held.hidden[0] + 16 * i, shared_hidden + 8 * i);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
#pragma unroll 1
        for (int first = 4 * warp_id(); first < SHARED_GROUPS; first += 4 * ROW_WARPS)
            fix_groups<4>(held.hidden[first], held.hidden_scales + first, smaller(4, SHARED_GROUPS - first));
        __syncthreads();
        shared_down(held);
    }
    await_count(&done->routed, ROUTED_BLOCKS);
    // A thread has one output of half a unit; then one of the sum.
#pragma unroll 1
    for (int i = threadIdx.x / MERGED; i < 2 * TOP_K; i += 32 * ROW_WARPS / MERGED) {
        const Half groups = half_of(i >> 1, i & 1);
        const float* from = given + size_t(groups.first) * HIDDEN + output;
        float group[FIRST_GROUPS], sum = 0.f;
#pragma unroll
        for (int j = 0; j < FIRST_GROUPS; ++j) group[j] = j < groups.count ? from[size_t(j) * HIDDEN] : 0.f;
#pragma unroll
        for (int j = 0; j < FIRST_GROUPS; ++j)
            if (j < groups.count) sum += group[j];
        held.sums[i >> 1][i & 1][at] = sum;
    }
    __syncthreads();
    if (warp_id() == 0) {
        float y = 0.f;
#pragma unroll
        for (int slot = 0; slot < TOP_K; ++slot) y += held.weights[slot] * (held.sums[slot][0][at] + held.sums[slot][1][at]);
#pragma unroll
        for (int unit = TOP_K; unit < UNITS; ++unit) y += held.sums[unit][0][at] + held.sums[unit][1][at];
        y += was;
        float square = y * y;
#pragma unroll
        for (int offset = 8; offset; offset >>= 1) square += __shfl_xor_sync(ALL, square, offset);
        residual[output] = y;
        if (at % TILE_ROWS == 0) square_sums[output / TILE_ROWS] = square;
    }
}
