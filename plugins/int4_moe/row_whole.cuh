// A part of a chosen expert in one block, for one row. The last warp finds the expert, the others make the inputs fixed point.
#pragma once
#include "int4_moe/row_routed.cuh"

constexpr int FIXERS = 32 * (ROW_WARPS - 1), FIX_TURNS = (QUADS + FIXERS - 1) / FIXERS;
static_assert(FIXERS % 16 == 0, "whole groups");

// The expert in slot `slot`, of what the router's products add up to.
struct Chooser {
    float bias[LANE_EXPERTS];
    u64 sum[LANE_EXPERTS];

    DEVICE static int expert_of(int i) { return i * 32 + lane_id(); }

    DEVICE void load_bias(const float* from) {
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; ++i) bias[i] = BIASED && expert_of(i) < EXPERTS ? from[expert_of(i)] : 0.f;
    }
    DEVICE void load(const u64* sums) {
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; ++i) sum[i] = expert_of(i) < EXPERTS ? sums[expert_of(i)] : 0;
    }
    DEVICE int choose(int slot, float rms) const {
        u32 key[LANE_EXPERTS];
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; ++i) key[i] = expert_of(i) < EXPERTS ? score_key(logit_of(sum[i], rms), bias[i]) : 0;
        return choose_by(key, nullptr, slot + 1);
    }
};

// This thread's quads of the inputs, x * rms * norm * scale.
struct InputQuads {
    float4 x[FIX_TURNS];
    uint2 norm[FIX_TURNS], scale[FIX_TURNS];

    DEVICE static int quad_of(int i) { return threadIdx.x + i * FIXERS; }

    DEVICE void load_scales(const u16* norms, const u16* scales) {
#pragma unroll
        for (int i = 0; i < FIX_TURNS; ++i) {
            if (quad_of(i) >= QUADS) continue;
            norm[i] = reinterpret_cast<const uint2*>(norms)[quad_of(i)];
            if (EXPERT_SCALED) scale[i] = reinterpret_cast<const uint2*>(scales)[quad_of(i)];
        }
    }
    DEVICE void load(const float* residual) {
#pragma unroll
        for (int i = 0; i < FIX_TURNS; ++i) {
            x[i] = {0.f, 0.f, 0.f, 0.f};
            if (quad_of(i) < QUADS) x[i] = reinterpret_cast<const float4*>(residual)[quad_of(i)];
        }
    }
    DEVICE void fix(Routed& held, float rms) {
#pragma unroll
        for (int i = 0; i < FIX_TURNS; ++i) {
            const int quad = quad_of(i), group = quad / 16, slice = group % UP_WARPS, step = group / UP_WARPS;
            if (quad < QUADS) {
                normalise_quad(x[i], norm[i], rms);
                if (EXPERT_SCALED) scale_quad(x[i], scale[i]);
            }
            store_fixed(x[i], quad < QUADS, held.inputs[0][slice] + step * GROUP_BYTES, quad % 16, held.input_scales[slice][step]);
        }
    }
};

// Part `part` of the expert in slot `slot`.
DEVICE void routed_part(Routed& held, int slot, int part, const float* residual, const float* square_sums, const u16* norm, float eps,
                        const u16* scale, const u64* logit_sums, const float* bias, const uint4* up_codes, const u32* up_scales,
                        const u16* next_scale, const uint4* down_codes, const u32* down_scales, float* given, const Turn& turn) {
    if (next_scale && threadIdx.x < TILE_INPUTS / 8)
        copy_async(held.scale + 8 * threadIdx.x, next_scale + part * TILE_INPUTS + 8 * threadIdx.x);
    copy_commit();
    const bool chooses = warp_id() == ROW_WARPS - 1;
    Chooser chooser;
    InputQuads inputs;
    if (chooses) chooser.load_bias(bias);
    else inputs.load_scales(norm, scale);
    await_turn(turn);
    if (chooses) chooser.load(logit_sums);
    else inputs.load(residual);
    const float rms = __shfl_sync(ALL, reciprocal_rms<HIDDEN>(square_sums, 1, eps), 0);
    if (chooses) {
        const int expert = chooser.choose(slot, rms);
        if (lane_id() == 0) held.known = expert;
    } else {
        inputs.fix(held, rms);
    }
    copy_wait<0>();
    __syncthreads();
    const int expert = held.known;
    const Down down(down_codes, down_scales, expert, part);
    UpWeights up(up_codes, up_scales);
    up.begin(expert, part);
    float sum[2][2] = {};
    routed_up(held, up, down, sum);
    store_up(held, sum);
    __syncthreads();
    if (warp_id() == 0) routed_hidden(held, 0, next_scale ? held.scale : nullptr);
    copy_wait<0>();
    __syncthreads();
    routed_down(held, given + (size_t(slot) * DOWN_GROUPS + part) * HIDDEN);
}
