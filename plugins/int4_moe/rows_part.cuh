// A part of a chosen expert for up to SLOTS of the rows that chose it.
#pragma once
#include "int4_moe/row_routed.cuh"

constexpr int MOST_PARTS = MOST_LISTED<SLOTS>;  // entries of the work list

// The work list in memory, int32: how many entries; then of each its expert, rows and slots, as `Entry` has them.
constexpr int LISTED_ENTRIES = 4;

struct Listed {
    Entry mine;
    int count, known;
};

// Entry `at` of the work list, or none: what block 0 has told, or, for the first blocks, which would wait longer for it, found here.
DEVICE Listed find_entry(int at, const float* logits, const float* bias, int* work, Done* done, int rows, bool first) {
    __shared__ int chosen[COLUMNS][TOP_K], counts[ROW_WARPS];
    __shared__ Entry entries[MOST_PARTS];
    __shared__ Listed listed;
    if (!first) {
        if (threadIdx.x == 0) {
            listed.known = int(load_acquire(&done->listed));
            if (listed.known) {
                const int* from = work + LISTED_ENTRIES + 3 * at;
                listed.count = work[0], listed.mine = Entry{from[0], u32(from[1]), u32(from[2])};
            }
        }
        __syncthreads();
        if (listed.known) return listed;
    }
    if (warp_id() < rows) choose_experts(logits + warp_id() * EXPERTS, bias, chosen[warp_id()], TOP_K);
    __syncthreads();
    const int count = list_work<ROW_WARPS, SLOTS>(chosen, rows, entries, counts);
    if (blockIdx.x == 0) {
        if (threadIdx.x == 0) work[0] = count;
        if (threadIdx.x < count) {
            int* to = work + LISTED_ENTRIES + 3 * threadIdx.x;
            const Entry& entry = entries[threadIdx.x];
            to[0] = entry.expert, to[1] = int(entry.rows), to[2] = int(entry.slots);
        }
        count_done(&done->listed);
    }
    return Listed{entries[smaller(at, count - 1)], count, 1};
}

// The row in slot `slot`.
DEVICE int row_of(u32 rows, int slot) {
    for (int i = 0; i < slot; ++i) rows &= rows - 1;
    return __ffs(rows) - 1;
}

// Part `part` of an entry's expert, for its rows. given float [rows, TOP_K, DOWN_GROUPS, HIDDEN].
DEVICE void routed_part(Routed& held, const Entry& entry, int part, const char* inputs, const float* input_scales, const uint4* up_codes,
                        const u32* up_scales, const u16* next_scale, const uint4* down_codes, const u32* down_scales, float* given) {
    const int count = __popc(entry.rows);
    constexpr int PIECES = UP_WARPS * Up::STEPS * 8, SCALES = UP_WARPS * Up::STEPS;
    if (next_scale && threadIdx.x < TILE_INPUTS / 8)
        copy_async(held.scale + 8 * threadIdx.x, next_scale + part * TILE_INPUTS + 8 * threadIdx.x);
#pragma unroll 1
    for (int i = threadIdx.x; i < count * PIECES; i += 32 * ROW_WARPS) {
        const int slot = i / PIECES, at = i - slot * PIECES, step = at / 8 % Up::STEPS, slice = at / (8 * Up::STEPS);
        if (!Up::has(step, slice)) continue;
        const size_t group = row_of(entry.rows, slot) * Up::GROUPS + Up::group(step, slice);
        copy_async(held.inputs[0][0] + 16 * i, inputs + group * GROUP_BYTES + 16 * (at & 7));
    }
    copy_commit();
#pragma unroll 1
    for (int i = threadIdx.x; i < count * SCALES; i += 32 * ROW_WARPS) {
        const int slot = i / SCALES, at = i - slot * SCALES, step = at % Up::STEPS, slice = at / Up::STEPS;
        if (Up::has(step, slice)) held.input_scales[slice][step][slot] = input_scales[Up::group(step, slice) * COLUMNS + row_of(entry.rows, slot)];
    }
    const size_t group = size_t(entry.expert) * DOWN_TILES * DOWN_GROUPS + part;
    const Down down = {down_codes + group * 32, down_scales + group * 8};
    routed_up(held, up_codes, up_scales, entry.expert * 2 * EXPERT_TILES + part * BLOCK_TILES, down);
    __syncthreads();
#pragma unroll
    for (int i = EARLY_TILES / ROW_WARPS; i < WARP_TILES; ++i) down.ask(held, i, EARLY_TILES, DOWN_TILES);
    copy_commit();
    if (warp_id() < count) routed_hidden(held, warp_id(), next_scale ? held.scale : nullptr);
    float* to = nullptr;
    if (own_slot() < count) {
        const int row = row_of(entry.rows, own_slot()), slot = entry.slots >> (4 * row) & 15;
        to = given + ((size_t(row) * TOP_K + slot) * DOWN_GROUPS + part) * HIDDEN;
    }
    copy_wait<0>();
    __syncthreads();
    routed_down(held, to);
}
