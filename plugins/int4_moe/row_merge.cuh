// The shared expert's second half, and the sum of all that experts give, for one row or up to SLOTS of them.
#pragma once
#include "int4_moe/row.cuh"

constexpr int UNITS = TOP_K + SHARED_PARTS;  // the chosen experts, then the parts of the shared one
constexpr int MERGE_TILES = 2, MERGED = MERGE_TILES * TILE_ROWS, MERGE_BLOCKS = HIDDEN / MERGED;  // of outputs a block; outputs; blocks
constexpr int SHARED_HALVES = 2 * SHARED_PARTS;  // sums over halves of the shared expert's parts
static_assert(HIDDEN % MERGED == 0, "sizes the kernels were written for");

struct Merge {
    uint4 codes[MERGE_TILES][larger(1, SHARED_GROUPS)][32];
    u32 scales[MERGE_TILES][larger(1, SHARED_GROUPS)][8];
    char hidden[SLOTS][larger(1, SHARED_GROUPS)][GROUP_BYTES];
    float hidden_scales[SLOTS][larger(1, SHARED_GROUPS)], sums[UNITS][2][SLOTS][MERGED], weights[SLOTS][TOP_K];
    int chosen[SLOTS][TOP_K];
    float logits[SLOTS == 1 ? EXPERTS : 1];

    // What a group gives of a tile's outputs, float [SLOTS, TILE_ROWS], in place of its codes.
    DEVICE float* products(int tile, int group) { return reinterpret_cast<float*>(codes[tile][group]); }
};

// Sum `half` of unit `unit` is that of groups first .. first + count - 1.
struct Half {
    int first, count;
};
DEVICE Half half_of(int unit, int half) {
    return {unit * DOWN_GROUPS + half * FIRST_GROUPS, half ? DOWN_GROUPS - FIRST_GROUPS : FIRST_GROUPS};
}

DEVICE void shared_down(Merge& held, int rows) {
#pragma unroll 1
    for (int i = warp_id(); i < MERGE_TILES * SHARED_GROUPS; i += ROW_WARPS) {
        const int tile = i % MERGE_TILES, group = i / MERGE_TILES;
        const uint4 weight = held.codes[tile][group][lane_id()];
        __syncwarp();
        float product[2] = {0.f, 0.f};
        fixed_row_tile<true>(product, weight, held.scales[tile][group][lane_id() >> 2],
                             load_slots(held.hidden[0][group], sizeof(held.hidden[0])), held.hidden_scales[some_slot()][group]);
        store_sums(held.products(tile, group), product);
    }
    __syncthreads();
    const int at = threadIdx.x % MERGED, tile = at / TILE_ROWS, slot = threadIdx.x / MERGED % SLOTS;
#pragma unroll 1
    for (int part = threadIdx.x / (MERGED * SLOTS); slot < rows && part < SHARED_HALVES; part += 32 * ROW_WARPS / (MERGED * SLOTS)) {
        const Half groups = half_of(part >> 1, part & 1);
        float sum = 0.f;
#pragma unroll 4
        for (int i = groups.first; i < groups.first + groups.count; ++i) sum += held.products(tile, i)[slot * TILE_ROWS + at % TILE_ROWS];
        held.sums[TOP_K + (part >> 1)][part & 1][slot][at] = sum;
    }
}

// Where the experts' scores are: several rows' logits float32 [rows, EXPERTS], or what those of a lone row add up to, of which block 0 leaves
// the logits.
struct Scores {
    float* logits;
    const u64* sums;
    const float* square_sums;
    float eps;
};

// One warp: a lone row's logits.
DEVICE const float* lone_logits(Merge& held, const Scores& from, bool told) {
    const float rms = __shfl_sync(ALL, reciprocal_rms<HIDDEN>(from.square_sums, 1, from.eps), 0);
    for (int expert = lane_id(); expert < EXPERTS; expert += 32) {
        const float logit = logit_of(from.sums[expert], rms);
        held.logits[expert] = logit;
        if (told) from.logits[expert] = logit;
    }
    __syncwarp();
    return held.logits;
}

// What is added up, of `rows` rows side by side: given float [rows, TOP_K, DOWN_GROUPS, HIDDEN] by `routed` blocks, shared half
// [rows, SHARED] by `shared_up` blocks.
struct Given {
    const float* given;
    Scores scores;
    const float* bias;
    const uint4* shared_codes;
    const u32* shared_scales;
    const u16* shared;
    int routed, shared_up;
};

// Outputs MERGED * block and on.
DEVICE void merge_part(Merge& held, int block, int rows, const Given& from, float* residual, float* square_sums, const Done* done,
                       const Turn& turn) {
    const int at = threadIdx.x % MERGED, output = block * MERGED + at;
    const int own_row = SLOTS == 1 ? 0 : smaller(warp_id(), rows - 1);
    constexpr int WORDS = MERGE_TILES * SHARED_GROUPS * 32;
    const size_t first_tile = size_t(block) * MERGE_TILES * SHARED_GROUPS;
#pragma unroll 1
    for (int i = threadIdx.x; i < WORDS; i += 32 * ROW_WARPS) copy_async(held.codes[0][0] + i, from.shared_codes + first_tile * 32 + i);
#pragma unroll 1
    for (int i = threadIdx.x; i < WORDS / 16; i += 32 * ROW_WARPS)
        copy_async(held.scales[0][0] + 4 * i, from.shared_scales + first_tile * 8 + 4 * i);
    copy_commit();
    await_turn(turn);
    const float was = residual[size_t(own_row) * HIDDEN + output];
    auto ask_hidden = [&] {
#pragma unroll 1
        for (int i = threadIdx.x; i < rows * (SHARED / 8); i += 32 * ROW_WARPS) copy_async(held.hidden[0][0] + 16 * i, from.shared + 8 * i);
        copy_commit();
    };
    if (SHARED && SLOTS > 1) ask_hidden();
    if (warp_id() < rows) {
        const float* logits = SLOTS == 1 ? lone_logits(held, from.scores, block == 0) : from.scores.logits + own_row * EXPERTS;
        choose_experts(logits, from.bias, held.chosen[own_row]);
        __syncwarp();
        weigh_experts(logits, held.chosen[own_row], held.weights[own_row]);
    }
    if (SHARED) {
        if (SLOTS == 1) {
            await_count(&done->shared_up, from.shared_up);
            ask_hidden();
        }
        copy_wait<0>();
        __syncthreads();
#pragma unroll 1
        for (int first = 4 * warp_id(); first < rows * SHARED_GROUPS; first += 4 * ROW_WARPS)
            fix_groups<4>(held.hidden[0][first], held.hidden_scales[0] + first, smaller(4, rows * SHARED_GROUPS - first));
        __syncthreads();
        shared_down(held, rows);
    }
    await_count(&done->routed, from.routed);
    // A thread has one output of half a unit; then one of the sum.
#pragma unroll 2
    for (int i = threadIdx.x / MERGED; i < rows * 2 * TOP_K; i += 32 * ROW_WARPS / MERGED) {
        const int row = SLOTS == 1 ? 0 : i / (2 * TOP_K), unit = (i - row * 2 * TOP_K) >> 1, half = i & 1;
        const Half groups = half_of(unit, half);
        const float* given = from.given + (size_t(row) * TOP_K * DOWN_GROUPS + groups.first) * HIDDEN + output;
        float group[FIRST_GROUPS], sum = 0.f;
#pragma unroll
        for (int j = 0; j < FIRST_GROUPS; ++j) group[j] = j < groups.count ? given[size_t(j) * HIDDEN] : 0.f;
#pragma unroll
        for (int j = 0; j < FIRST_GROUPS; ++j)
            if (j < groups.count) sum += group[j];
        held.sums[unit][half][row][at] = sum;
    }
    __syncthreads();
    if (warp_id() < rows) {
        auto sum_of = [&](int unit) { return held.sums[unit][0][own_row][at] + held.sums[unit][1][own_row][at]; };
        float y = 0.f;
#pragma unroll
        for (int slot = 0; slot < TOP_K; ++slot) y += held.weights[own_row][slot] * sum_of(slot);
#pragma unroll
        for (int unit = TOP_K; unit < UNITS; ++unit) y += sum_of(unit);
        y += was;
        float square = y * y;
#pragma unroll
        for (int offset = 8; offset; offset >>= 1) square += __shfl_xor_sync(ALL, square, offset);
        residual[size_t(own_row) * HIDDEN + output] = y;
        if (at % TILE_ROWS == 0) square_sums[(own_row * HIDDEN + output) / TILE_ROWS] = square;
    }
}
