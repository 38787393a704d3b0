// The experts of one activation row in one launch, after dense_row.cu: the chosen ones (row_routed.cuh), the shared expert's second half and the
// sum of all (row_merge.cuh). Every sum is in the order of decode.cu, so that the bits are those of a row among others.
// Macros: as decode.cu's.
#include "int4_moe/row_merge.cuh"
#include "int4_moe/row_whole.cuh"

// Blocks 0 .. ROUTED_BLOCKS - 1 are the chosen experts', a slot after the other, and leave given float [TOP_K, DOWN_GROUPS, HIDDEN]. The
// others add up what these and the shared expert's give. They wait for blocks of their own launch, which always find room: blocks
// are given out in order. The last of them leaves counters and logit_sums at 0 for the next layer.
extern "C" __global__ void __launch_bounds__(32 * ROW_WARPS, 2)
    experts_row(float* residual, const float* square_sums, const u16* norm, float eps, const u16* scale, u64* logit_sums, float* logits,
                const float* bias, const uint4* up_codes, const u32* up_scales, const u16* next_scale, const uint4* down_codes,
                const u32* down_scales, float* given, const uint4* shared_codes, const u32* shared_scales, const u16* shared_hidden,
                int shared_blocks, float* new_square_sums, Done* done, TurnCounters* turns, int index, int before) {
    extern __shared__ uint4 shared[];
    const Turn turn = {turns, index, before};
    if (blockIdx.x < ROUTED_BLOCKS) {
        const int slot = blockIdx.x / DOWN_GROUPS;
        routed_part(*reinterpret_cast<Routed*>(shared), slot, blockIdx.x - slot * DOWN_GROUPS, residual, square_sums, norm, eps, scale, logit_sums,
                    bias, up_codes, up_scales, next_scale, down_codes, down_scales, given, turn);
        count_done(&done->routed);
        return;
    }
    const Given all = {given, {logits, logit_sums, square_sums, eps}, bias, shared_codes, shared_scales, shared_hidden, ROUTED_BLOCKS, shared_blocks};
    merge_part(*reinterpret_cast<Merge*>(shared), blockIdx.x - ROUTED_BLOCKS, 1, all, residual, new_square_sums, done, turn);
    finish_turn(turn);
    __shared__ bool last;
    if (threadIdx.x == 0) {
        last = atomicAdd(&done->merged, 1u) == MERGE_BLOCKS - 1;
        if (last) *done = Done{};
    }
    __syncthreads();
    if (last && threadIdx.x < EXPERTS) logit_sums[threadIdx.x] = 0;
}
