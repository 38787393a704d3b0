// The experts of 1 to 8 activation rows in one launch, after `route` of decode.cu: a lone row's experts (experts_row.cu) with up to SLOTS of the
// rows that chose an expert side by side. What each group of a row's hidden values gives is put down, and added up in the same order.
// Macros: as decode.cu's.
#define SLOTS 4
#include "int4_moe/row_merge.cuh"
#include "int4_moe/rows_part.cuh"

// The first `routed` blocks have the parts of the chosen experts, of entry 0 of the work list, of entry 1 ..., in turns; each finds the list for
// itself, which is sooner there than if one had told the others. The others add up, MERGE_BLOCKS for each SLOTS rows. They wait for blocks of their
// own launch, which always find room: blocks are given out in order.
extern "C" __global__ void __launch_bounds__(32 * ROW_WARPS, 2)
    experts_rows(const char* inputs, const float* input_scales, float* logits, const float* bias, const uint4* up_codes,
                 const u32* up_scales, const u16* next_scale, const uint4* down_codes, const u32* down_scales, float* given,
                 const uint4* shared_codes, const u32* shared_scales, const u16* shared_hidden, float* residual, float* square_sums,
                 Done* done, int rows, int routed, TurnCounters* turns, int index, int before) {
    extern __shared__ uint4 shared[];
    const Turn turn = {turns, index, before};
    const int merging = int(gridDim.x) - routed, block = blockIdx.x;
    if (block < routed) {
        __shared__ int chosen[COLUMNS][TOP_K], counts[ROW_WARPS];
        __shared__ Entry entries[MOST_TWICE];
        await_turn(turn);
        const int count = list_work<ROW_WARPS, SLOTS>(logits, bias, rows, chosen, entries, counts);
        const Experts all = {inputs, input_scales, up_codes, up_scales, next_scale, down_codes, down_scales, given};
        routed_parts(*reinterpret_cast<Routed*>(shared), entries, block, routed, count * DOWN_GROUPS, all);
        count_done(&done->routed);
        return;
    }
    const int row0 = (block - routed) / MERGE_BLOCKS * SLOTS;
    const Scores scores = {logits + row0 * EXPERTS, nullptr, nullptr, 0.f};
    const Given all = {given + size_t(row0) * TOP_K * DOWN_GROUPS * HIDDEN, scores, bias, shared_codes, shared_scales,
                       shared_hidden + size_t(row0) * SHARED, routed, 0};
    merge_part(*reinterpret_cast<Merge*>(shared), (block - routed) % MERGE_BLOCKS, smaller(SLOTS, rows - row0), all,
               residual + size_t(row0) * HIDDEN, square_sums + row0 * (HIDDEN / 16), done, turn);
    finish_turn(turn);
    if (threadIdx.x == 0 && atomicAdd(&done->merged, 1u) == u32(merging) - 1) *done = Done{};
}
