// The blocks of a launch that route: those of the router's product, and those that write what the experts read.
#pragma once
#include "fixed.cuh"
#include "int4_moe/routing.cuh"
#include "int4_moe/sums.cuh"
#include "turns.cuh"

constexpr int ROUTE_WARPS = 8;
constexpr int ROUTER_PARTS = 4, ROUTER_EXPERTS = ROUTE_WARPS / ROUTER_PARTS;  // warps that share an expert; experts a block
constexpr int ROUTER_BLOCKS = (EXPERTS + ROUTER_EXPERTS - 1) / ROUTER_EXPERTS;
#ifndef INPUT_QUADS
#define INPUT_QUADS 64
#endif
constexpr int INPUT_BLOCKS = (QUADS + INPUT_QUADS - 1) / INPUT_QUADS;  // of the experts' inputs

// A block of the router: its experts' logits [all rows, EXPERTS].
DEVICE void router_logits(const float* residual, const float* square_sums, const u16* norm, float eps, const float* router,
                          float* logits, int rows, const Turn& turn) {
    __shared__ float sums[COLUMNS][ROUTE_WARPS];
    const int expert = blockIdx.x * ROUTER_EXPERTS + warp_id() / ROUTER_PARTS;
    RouterRow<ROUTER_PARTS> held;
    if (expert < EXPERTS) held.load(router, norm, expert, warp_id() % ROUTER_PARTS);
    await_turn(turn);
    if (expert < EXPERTS)
        held.multiply(residual, square_sums, eps, rows, [&](int row, float sum) { sums[row][warp_id()] = sum; });
    __syncthreads();
    const int row = threadIdx.x / ROUTER_EXPERTS, mine = threadIdx.x % ROUTER_EXPERTS;
    if (row < rows && blockIdx.x * ROUTER_EXPERTS + mine < EXPERTS)
        logits[row * EXPERTS + blockIdx.x * ROUTER_EXPERTS + mine] = sum_partials<ROUTER_PARTS>(&sums[row][mine * ROUTER_PARTS], 1);
}

// A quad of what the experts read, as fixed point; sixteen lanes a group. The scales of 8 rows stand side by side.
DEVICE void store_inputs(const float4& x, int row, int quad, char* inputs, float* scales) {
    float largest = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
#pragma unroll
    for (int offset = 8; offset; offset >>= 1) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, offset));
    const FixedScale by = fixed_scale(largest);
    const FixedQuad fixed = fixed_quad(x, by.inverse);
    if (quad >= QUADS) return;
    const int group = quad / 16;
    u32* to = reinterpret_cast<u32*>(inputs + (size_t(row) * Up::GROUPS + group) * GROUP_BYTES) + quad % 16;
    to[0] = fixed.high, to[16] = fixed.low;
    if (quad % 16 == 0) scales[group * COLUMNS + row] = by.scale;
}

// A block's part of what the experts read: x * rms * norm * scale.
DEVICE void expert_inputs(const float* residual, const float* square_sums, const u16* norm, float eps, const u16* scale, char* inputs,
                          float* scales, int rows, const Turn& turn) {
    fetch_halves(norm, HIDDEN);
    if (EXPERT_SCALED) fetch_halves(scale, HIDDEN);
    await_turn(turn);
    const float rms = reciprocal_rms<HIDDEN>(square_sums, rows, eps);
    for (int base = warp_id() * 32; base < rows * INPUT_QUADS; base += 32 * ROUTE_WARPS) {  // whole warps, for the shuffles
        const int row = (base + lane_id()) / INPUT_QUADS;
        const int quad = (blockIdx.x - ROUTER_BLOCKS) * INPUT_QUADS + (base + lane_id()) % INPUT_QUADS;
        const float r = __shfl_sync(ALL, rms, 4 * row);
        float4 x = {0.f, 0.f, 0.f, 0.f};
        if (quad < QUADS) x = normalised_quad(residual + size_t(row) * HIDDEN, norm, EXPERT_SCALED ? scale : nullptr, quad, r);
        store_inputs(x, row, quad, inputs, scales);
    }
}
