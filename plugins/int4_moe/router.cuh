// The blocks of a launch that route: those of the router's product, and those that write what the experts read.
#pragma once
#include "fixed.cuh"
#include "int4_moe/routing.cuh"
#include "int4_moe/sums.cuh"
#include "turns.cuh"

constexpr int ROUTE_WARPS = 8;
constexpr int ROUTER_PARTS = 4, ROUTER_EXPERTS = ROUTE_WARPS / ROUTER_PARTS;  // warps that share an expert; experts a block
constexpr int ROUTER_BLOCKS = (EXPERTS + ROUTER_EXPERTS - 1) / ROUTER_EXPERTS;
constexpr int INPUT_QUADS = 64, INPUT_BLOCKS = (QUADS + INPUT_QUADS - 1) / INPUT_QUADS;  // of the experts' inputs

// A block of the router: its experts' logits [all rows, EXPERTS].
DEVICE void router_logits(const float* residual, const float* square_sums, const u16* norm, float eps, const float* router,
                          float* logits, int rows, const Turn& turn) {
    static_assert(COLUMNS * ROUTER_EXPERTS <= 32, "a lane of the first warp has a logit");
    __shared__ u64 sums[COLUMNS][ROUTE_WARPS];
    const int expert = blockIdx.x * ROUTER_EXPERTS + warp_id() / ROUTER_PARTS;
    RouterRow<ROUTER_PARTS> held;
    if (expert < EXPERTS) held.load(router, norm, expert, warp_id() % ROUTER_PARTS);
    await_turn(turn);
    const float all_rms = reciprocal_rms<HIDDEN>(square_sums, rows, eps);
    if (expert < EXPERTS) held.multiply(residual, rows, [&](int row, u64 sum) { sums[row][warp_id()] = sum; });
    __syncthreads();
    if (warp_id()) return;
    const int row = lane_id() / ROUTER_EXPERTS, mine = lane_id() % ROUTER_EXPERTS;
    const float rms = __shfl_sync(ALL, all_rms, 4 * row & 31);
    if (row >= rows || blockIdx.x * ROUTER_EXPERTS + mine >= EXPERTS) return;
    u64 sum = 0;
#pragma unroll
    for (int part = 0; part < ROUTER_PARTS; ++part) sum += sums[row][mine * ROUTER_PARTS + part];
    logits[row * EXPERTS + blockIdx.x * ROUTER_EXPERTS + mine] = logit_of(sum, rms);
}

// A quad of what the experts read, as fixed point. The scales of 8 rows stand side by side.
DEVICE void store_inputs(const float4& x, int row, int quad, char* inputs, float* scales) {
    const int group = quad / 16;
    store_fixed(x, quad < QUADS, inputs + (size_t(row) * Up::GROUPS + group) * GROUP_BYTES, quad % 16, scales + group * COLUMNS + row);
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
        if (quad < QUADS) {
            x = reinterpret_cast<const float4*>(residual + size_t(row) * HIDDEN)[quad];
            normalise_quad(x, reinterpret_cast<const uint2*>(norm)[quad], r);
            if (EXPERT_SCALED) scale_quad(x, reinterpret_cast<const uint2*>(scale)[quad]);
        }
        store_inputs(x, row, quad, inputs, scales);
    }
}
