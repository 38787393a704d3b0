// Routing of a tile of 8 rows: the router's product in float32, the choice and the weights of the experts, the work that makes.
// Macros: HIDDEN, EXPERTS, TOP_K; SIGMOID, NORMALISE, SCALING, BIASED.
#pragma once
#include "int4_linear/slice.cuh"
#include "int4_moe/logits.cuh"

constexpr int QUADS = HIDDEN / 4;                  // float4 of a row
constexpr int LANE_EXPERTS = (EXPERTS + 31) / 32;  // logits a lane holds
constexpr u32 ALL = 0xffffffffu;
constexpr float NONE = -3.0e38f;
static_assert(EXPERTS <= 128 && TOP_K <= 15 && HIDDEN % 64 == 0, "sizes the kernels were written for");

// One of PARTS warps that share an expert's inputs.
template <int PARTS>
struct RouterRow {
    static constexpr int HELD = (QUADS + 32 * PARTS - 1) / (32 * PARTS);
    float4 weight[HELD];
    uint2 factor[HELD];
    int part;

    DEVICE int quad_of(int i) const { return (i * PARTS + part) * 32 + lane_id(); }

    // The expert's weights, of float32 [HIDDEN / 16, EXPERTS, 16], and the norm's.
    DEVICE void load(const float* router, const u16* norm, int expert, int which) {
        part = which;
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int quad = quad_of(i);
            const bool there = quad < QUADS;
            weight[i] = there ? reinterpret_cast<const float4*>(router)[((quad >> 2) * EXPERTS + expert) * 4 + (quad & 3)] : float4{0.f, 0.f, 0.f, 0.f};
            factor[i] = there ? reinterpret_cast<const uint2*>(norm)[quad] : uint2{0, 0};
        }
    }

    // This part of the sum of each row's residual stream, to `store(row, sum)` in one lane.
    template <class Store>
    DEVICE void multiply(const float* residual, int rows, Store store) const {
        float4 next[HELD];
        auto load = [&](int i, int row) {
            if (quad_of(i) < QUADS && row < rows) next[i] = reinterpret_cast<const float4*>(residual + size_t(row) * HIDDEN)[quad_of(i)];
        };
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            next[i] = {0.f, 0.f, 0.f, 0.f};
            load(i, 0);
        }
#pragma unroll 1
        for (int row = 0; row < rows; ++row) {
            u64 sum = 0;
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                float4 value = next[i];
                load(i, row + 1);
                scale_quad(value, factor[i]);
                sum += fixed_logit(quad_product(value, weight[i]));
            }
            // Four lanes have the same.
#pragma unroll
            for (int offset = 4; offset < 32; offset <<= 1) sum += __shfl_xor_sync(ALL, sum, offset);
            if (lane_id() == 0) store(row, sum);
        }
    }
};

// A float as an unsigned integer of the same order.
DEVICE u32 sortable(float value) {
    const u32 bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// What experts are chosen by: above 0. The softmax keeps the order, so it is left out.
DEVICE u32 score_key(float logit, float bias) { return sortable((SIGMOID ? sigmoid(logit) : logit) + (BIASED ? bias : 0.f)); }

// One warp, one row: its first `count` experts in order of their score, the lower index of equals first, to `chosen` (unless it
// is null); the last of them. key: of expert i * 32 + lane, 0 where there is none.
DEVICE int choose_by(u32 (&key)[LANE_EXPERTS], int* chosen, int count) {
    int expert = EXPERTS;
#pragma unroll 1
    for (int slot = 0; slot < count; ++slot) {
        u32 best = key[0];
#pragma unroll
        for (int i = 1; i < LANE_EXPERTS; ++i) best = key[i] > best ? key[i] : best;
        best = warp_largest(best);
#pragma unroll
        for (int i = LANE_EXPERTS - 1; i >= 0; --i) {
            const u32 holders = __ballot_sync(ALL, key[i] == best);
            if (holders) expert = i * 32 + __ffs(holders) - 1;
        }
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; ++i)
            if (i * 32 + lane_id() == expert) key[i] = 0;
        if (chosen && lane_id() == 0) chosen[slot] = expert;
    }
    return expert;
}

// The same by logits.
DEVICE int choose_experts(const float* logits, const float* bias, int* chosen, int count = TOP_K) {
    u32 key[LANE_EXPERTS];
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; ++i) {
        const int expert = i * 32 + lane_id();
        key[i] = expert < EXPERTS ? score_key(logits[expert], BIASED ? bias[expert] : 0.f) : 0;
    }
    return choose_by(key, chosen, count);
}

// One warp, one row: the weights of its chosen experts.
DEVICE void weigh_experts(const float* logits, const int* chosen, float* weights) {
    float score[LANE_EXPERTS], peak = NONE, sum = 0.f;
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; ++i) {
        const int expert = i * 32 + lane_id();
        score[i] = expert < EXPERTS ? logits[expert] : NONE;
        peak = fmaxf(peak, score[i]);
    }
    if (!SIGMOID) {
        peak = warp_max(peak);
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; ++i) sum += expf(score[i] - peak);
        sum = warp_sum(sum);
    }
    const int slot = lane_id() < TOP_K ? lane_id() : 0;
    const float logit = logits[chosen[slot]];
    float mine = SIGMOID ? sigmoid(logit) : __fdividef(expf(logit - peak), sum);
    if (NORMALISE && TOP_K > 1) {
        float total = 0.f;
#pragma unroll
        for (int i = 0; i < TOP_K; ++i) total += __shfl_sync(ALL, mine, i);
        mine = __fdividef(mine, total + 1e-20f);
    }
    if (lane_id() < TOP_K) weights[lane_id()] = mine * SCALING;
}

struct Entry {
    int expert;
    u32 rows, slots;
};

// Entries of a work list at most, if an expert is there once, or twice.
constexpr int MOST_ENTRIES = COLUMNS * TOP_K < EXPERTS ? COLUMNS * TOP_K : EXPERTS;
constexpr int MOST_TWICE = COLUMNS * TOP_K < 2 * EXPERTS ? COLUMNS * TOP_K : 2 * EXPERTS;

// The whole block of at least EXPERTS threads: the experts each row chooses, to `chosen`, and a list of them in order, with their rows and
// slots; how many. An expert of more than MOST rows is there twice, with its first MOST rows and with the others.
template <int WARPS, int MOST = COLUMNS>
DEVICE int list_work(const float* logits, const float* bias, int rows, int (*chosen)[TOP_K], Entry* entries, int* counts) {
    static_assert(2 * MOST >= COLUMNS, "an expert is there twice at most");
    for (int row = warp_id(); row < rows; row += WARPS) choose_experts(logits + row * EXPERTS, bias, chosen[row]);
    __syncthreads();
    const int expert = threadIdx.x;
    u32 mask = 0, slots = 0;
    if (expert < EXPERTS) {
        for (int row = 0; row < rows; ++row) {
#pragma unroll
            for (int slot = 0; slot < TOP_K; ++slot)
                if (chosen[row][slot] == expert) mask |= 1u << row, slots |= u32(slot) << (4 * row);
        }
    }
    u32 others = mask;  // without its first MOST rows
#pragma unroll
    for (int i = 0; i < MOST; ++i) others &= others - 1;
    if (MOST == COLUMNS) others = 0;
    const u32 active = __ballot_sync(ALL, mask != 0), twice = MOST == COLUMNS ? 0 : __ballot_sync(ALL, others != 0);
    if (lane_id() == 0) counts[warp_id()] = __popc(active) + __popc(twice);
    __syncthreads();
    const u32 before = (1u << lane_id()) - 1;
    int entry = __popc(active & before) + __popc(twice & before), total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
        if (warp < warp_id()) entry += counts[warp];
        total += counts[warp];
    }
    if (mask) entries[entry] = Entry{expert, mask & ~others, slots};
    if (others) entries[entry + 1] = Entry{expert, others, slots};
    __syncthreads();
    return total;
}

// A tile of rows' work list in memory, int32: how many entries; then of each its expert, its rows as 8 bits, and the slot each row has it
// in, 4 bits a row.
constexpr int WORK_SIZE = 1 + 3 * MOST_ENTRIES;

// The whole block.
template <int WARPS>
DEVICE void write_work(int* work, const Entry* entries, int count) {
    if (threadIdx.x == 0) work[0] = count;
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += 32 * WARPS) {
        int* to = work + 1 + 3 * i;
        to[0] = entries[i].expert, to[1] = int(entries[i].rows), to[2] = int(entries[i].slots);
    }
}

DEVICE Entry read_work(const int* work, int entry) {
    const int* from = work + 1 + 3 * entry;
    return {from[0], u32(from[1]), u32(from[2])};
}
