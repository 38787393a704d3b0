// A part of a chosen expert for up to SLOTS of the rows that chose it.
#pragma once
#include "int4_moe/row_routed.cuh"

struct Listed {
    Entry mine;
    int count, known;
};

// Entry `at` of the work list, or none: what block 0 has told, or, for the first blocks, which would wait longer for it, found here.
DEVICE Listed find_entry(int at, const float* logits, const float* bias, int* work, Done* done, int rows, bool first) {
    __shared__ int chosen[COLUMNS][TOP_K], counts[ROW_WARPS];
    __shared__ Entry entries[MOST_TWICE];
    __shared__ Listed listed;
    if (!first) {
        if (threadIdx.x == 0) {
            listed.known = int(load_acquire(&done->listed));
            if (listed.known) listed.count = work[0], listed.mine = read_work(work, at);
        }
        __syncthreads();
        if (listed.known) return listed;
    }
    const int count = list_work<ROW_WARPS, SLOTS>(logits, bias, rows, chosen, entries, counts);
    if (blockIdx.x == 0) {
        write_work<ROW_WARPS>(work, entries, count);
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
