// Parts of chosen experts, one after the other, each for up to SLOTS of the rows that chose its expert. What a part begins with is asked for
// before the part ahead ends, so that memory is kept busy.
#pragma once
#include "int4_moe/row_routed.cuh"

// What all parts have in common.
struct Experts {
    const char* inputs;
    const float* input_scales;
    const uint4* up_codes;
    const u32* up_scales;
    const u16* next_scale;
    const uint4* down_codes;
    const u32* down_scales;
    float* given;
};

// Where the compiler sees no further: else it would compute ahead of a loop what depends on x alone, into registers that are not there.
DEVICE int not_ahead(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The row in slot `slot`.
DEVICE int row_of(u32 rows, int slot) {
    for (int i = 0; i < slot; ++i) rows &= rows - 1;
    return __ffs(rows) - 1;
}

// One part: of 64 gated products, of an entry of the work list.
struct Part {
    const Entry& entry;
    int part;

    DEVICE Part(const Entry* entries, int index) : entry(entries[index / DOWN_GROUPS]), part(index % DOWN_GROUPS) {}

    DEVICE int count() const { return __popc(entry.rows); }
    DEVICE void begin(UpWeights& up) const { up.begin(entry.expert, part); }
    DEVICE Down down(const Experts& all) const { return {all.down_codes, all.down_scales, entry.expert, part}; }

    // The rows' inputs and what goes with them; the caller waits.
    DEVICE void ask_inputs(Routed& held, const Experts& all) const {
        constexpr int PIECES = UP_WARPS * Up::STEPS * 8, SCALES = UP_WARPS * Up::STEPS;
        if (all.next_scale && threadIdx.x < TILE_INPUTS / 8)
            copy_async(held.scale + 8 * threadIdx.x, all.next_scale + part * TILE_INPUTS + 8 * threadIdx.x);
#pragma unroll 1
        for (int i = not_ahead(threadIdx.x); i < count() * PIECES; i += 32 * ROW_WARPS) {
            const int slot = i / PIECES, at = i - slot * PIECES, step = at / 8 % Up::STEPS, slice = at / (8 * Up::STEPS);
            if (!Up::has(step, slice)) continue;
            const size_t group = row_of(entry.rows, slot) * Up::GROUPS + Up::group(step, slice);
            copy_async(held.inputs[0][0] + 16 * i, all.inputs + group * GROUP_BYTES + 16 * (at & 7));
        }
        copy_commit();
#pragma unroll 1
        for (int i = not_ahead(threadIdx.x); i < count() * SCALES; i += 32 * ROW_WARPS) {
            const int slot = i / SCALES, at = i - slot * SCALES, step = at % Up::STEPS, slice = at / Up::STEPS;
            if (Up::has(step, slice))
                held.input_scales[slice][step][slot] = all.input_scales[Up::group(step, slice) * COLUMNS + row_of(entry.rows, slot)];
        }
    }

    // This lane's slot's place in given float [rows, TOP_K, DOWN_GROUPS, HIDDEN]; null if there is no such slot.
    DEVICE float* place(float* given) const {
        if (own_slot() >= count()) return nullptr;
        const int row = row_of(entry.rows, own_slot()), slot = entry.slots >> (4 * row) & 15;
        return given + ((size_t(row) * TOP_K + slot) * DOWN_GROUPS + part) * HIDDEN;
    }
};

constexpr int EARLY_TURNS = EARLY_TILES / ROW_WARPS;  // of a warp's tiles, those that are all early

// Parts first, first + stride .. of `count`.
DEVICE void routed_parts(Routed& held, const Entry* entries, int first, int stride, int count, const Experts& all) {
    if (first >= count) return;
    if (threadIdx.x == 0) held.known = count;
    UpWeights up(all.up_codes, all.up_scales);
    Part(entries, first).begin(up);
    Part(entries, first).ask_inputs(held, all);
#pragma unroll 1
    for (int index = first;; index += stride) {
        const Part mine(entries, index);
        copy_wait<0>();
        __syncthreads();
        float sum[2][2] = {};
        routed_up(held, up, mine.down(all), sum);
        const bool more = index + stride < held.known;
        if (more) Part(entries, index + stride).begin(up);
        store_up(held, sum);
        __syncthreads();
#pragma unroll
        for (int i = EARLY_TURNS; i < WARP_TILES; ++i) mine.down(all).ask(held, i, EARLY_TILES, DOWN_TILES);
        copy_commit();
        if (warp_id() < mine.count()) routed_hidden(held, warp_id(), all.next_scale ? held.scale : nullptr);
        float* given = mine.place(all.given);
        copy_wait<0>();
        __syncthreads();
        routed_down(held, given, EARLY_TURNS, WARP_TILES);
        if (more) {
            __syncthreads();  // the last tiles lie where the next inputs will
            Part(entries, index + stride).ask_inputs(held, all);
        }
        routed_down(held, given, 0, EARLY_TURNS);
        if (!more) return;
    }
}
