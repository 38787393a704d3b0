// A MoE layer for one activation row in two launches that overlap well.
// route_row: the router's product, the experts' inputs, and beside them the shared expert's first half (row_shared.cuh).
// experts_row: the chosen experts (row_routed.cuh), the shared expert's second half and the sum of all (row_merge.cuh).
// Loops are left loops where they can be: a step's kernels together should stay in the instruction cache, and each runs its code once a
// layer.
// Every sum is in the order of decode.cu, so that the bits are those of a row among others.
// Macros: as decode.cu's.
#define INPUT_QUADS 256  // few blocks, so that those of route_row have a multiprocessor each
#include "int4_moe/row_merge.cuh"
#include "int4_moe/row_shared.cuh"
#include "int4_moe/row_whole.cuh"

// Blocks 0 .. ROUTER_BLOCKS - 1 multiply with the router, the next INPUT_BLOCKS write what the experts read; the next launch waits for them
// as its turn, and for the parts of the shared expert only where it adds up. `shared_blocks` blocks begin with those parts, and the first ones
// go on with what is left when they have routed. Further blocks do nothing but keep their places until it is known where the next launch's
// blocks stand: on a multiprocessor with two of the chosen experts' blocks these take half as long again.
extern "C" __global__ void __launch_bounds__(32 * ROUTE_WARPS, 3)
    route_row(const float* residual, const float* square_sums, const u16* norm, float eps, const float* router, const u16* expert_scale,
              float* logits, char* inputs, float* input_scales, const u16* shared_scale, const uint4* shared_codes,
              const u32* shared_scales, const u16* shared_next, u16* shared_hidden, Done* done, int shared_blocks,
              TurnCounters* turns, int index, int before) {
    const Turn turn = {turns, index, before};
    constexpr int ROUTING = ROUTER_BLOCKS + INPUT_BLOCKS;
    int part = int(blockIdx.x) - ROUTING;  // of the shared expert's first half
    if (part >= shared_blocks) {
        if (turns) await_count(&turns[index].finished, ROUTING);
        return;
    }
    if (part < 0) {
        if (blockIdx.x < ROUTER_BLOCKS) router_logits(residual, square_sums, norm, eps, router, logits, 1, turn);
        else expert_inputs(residual, square_sums, norm, eps, expert_scale, inputs, input_scales, 1, turn);
        finish_turn(turn);
        part = shared_blocks + blockIdx.x;
    }
    extern __shared__ uint4 shared[];
#pragma unroll 1
    for (; part < SHARED_UP_BLOCKS; part += ROUTING + shared_blocks) {
        shared_up(*reinterpret_cast<SharedUp*>(shared), part, residual, square_sums, norm, eps, shared_scale, shared_codes, shared_scales,
                  shared_next, shared_hidden, turn);
        count_done(&done->shared_up);
    }
}

// Blocks 0 .. ROUTED_BLOCKS - 1 are the chosen experts', a slot after the other, and leave given float [TOP_K, DOWN_GROUPS, HIDDEN]. The
// others add up what these and the shared expert's give. They wait for blocks of their own launch, which always find room: blocks
// are given out in order.
extern "C" __global__ void __launch_bounds__(32 * ROW_WARPS, 2)
    experts_row(const char* inputs, const float* input_scales, const float* logits, const float* bias, const uint4* up_codes,
                const u32* up_scales, const u16* next_scale, const uint4* down_codes, const u32* down_scales, float* given,
                const uint4* shared_codes, const u32* shared_scales, const u16* shared_hidden, float* residual, float* square_sums,
                Done* done, TurnCounters* turns, int index, int before) {
    extern __shared__ uint4 shared[];
    const Turn turn = {turns, index, before};
    if (blockIdx.x >= ROUTED_BLOCKS) {
        const Given all = {given, logits, bias, shared_codes, shared_scales, shared_hidden, ROUTED_BLOCKS, SHARED_UP_BLOCKS};
        merge_part(*reinterpret_cast<Merge*>(shared), blockIdx.x - ROUTED_BLOCKS, 1, all, residual, square_sums, done, turn);
        finish_turn(turn);
        if (threadIdx.x == 0 && atomicAdd(&done->merged, 1u) == MERGE_BLOCKS - 1) *done = Done{};
        return;
    }
    const int slot = blockIdx.x / DOWN_GROUPS;
    await_turn(turn);
    routed_part(*reinterpret_cast<Routed*>(shared), slot, blockIdx.x - slot * DOWN_GROUPS, inputs, input_scales, logits, bias, up_codes, up_scales,
                next_scale, down_codes, down_scales, given);
    count_done(&done->routed);
}
