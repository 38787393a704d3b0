// A part of a chosen expert in one block, for one row.
#pragma once
#include "int4_moe/row_routed.cuh"

// Part `part` of the expert in slot `slot`.
DEVICE void routed_part(Routed& held, int slot, int part, const char* inputs, const float* input_scales, const float* logits,
                        const float* bias, const uint4* up_codes, const u32* up_scales, const u16* next_scale, const uint4* down_codes,
                        const u32* down_scales, float* given) {
    if (next_scale && threadIdx.x < TILE_INPUTS / 8)
        copy_async(held.scale + 8 * threadIdx.x, next_scale + part * TILE_INPUTS + 8 * threadIdx.x);
    if (warp_id() < UP_WARPS) {
        char* own = held.inputs[0][warp_id()];
#pragma unroll 1
        for (int i = lane_id(); i < Up::STEPS * 8; i += 32)
            if (Up::has(i >> 3)) copy_async(own + i * 16, inputs + Up::group(i >> 3) * GROUP_BYTES + (i & 7) * 16);
        if (lane_id() < Up::STEPS && Up::has(lane_id()))
            held.input_scales[warp_id()][lane_id()][0] = input_scales[Up::group(lane_id()) * COLUMNS];
    }
    copy_commit();
    if (warp_id() == ROW_WARPS - 1) {
        const int expert = choose_experts(logits, bias, nullptr, slot + 1);
        if (lane_id() == 0) held.chosen = expert;
    }
    copy_wait<0>();
    __syncthreads();
    const int expert = held.chosen;
    const size_t group = size_t(expert) * DOWN_TILES * DOWN_GROUPS + part;
    const Down down = {down_codes + group * 32, down_scales + group * 8};
    routed_up(held, up_codes, up_scales, expert * 2 * EXPERT_TILES + part * BLOCK_TILES, down);
    __syncthreads();
    if (warp_id() == 0) routed_hidden(held, 0, next_scale ? held.scale : nullptr);
    copy_wait<0>();
    __syncthreads();
    routed_down(held, given + (size_t(slot) * DOWN_GROUPS + part) * HIDDEN);
}
