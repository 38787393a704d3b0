// The router of many rows in float32, and the experts and weights it chooses (int4_moe/routing.cuh), 8 rows a block.
// Macros: HIDDEN, EXPERTS, TOP_K; SIGMOID, NORMALISE, SCALING, BIASED.
#include "int4_moe/routing.cuh"

constexpr int WARPS = 8, PAIR = 2;  // experts a warp takes at once, so that a row's value is read for two
static_assert(WARPS == COLUMNS, "a warp a row, to normalise and to choose");

// residual float [rows][HIDDEN], router float [EXPERTS][HIDDEN], bias float [EXPERTS] or null; index [rows][TOP_K] and
// weight float [rows][TOP_K]. Dynamic shared memory: 8 rows of floats.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    route(const float* residual, const u16* norm, float eps, const float* router, const float* bias, long long* index,
          float* weight, int all_rows) {
    extern __shared__ uint4 memory[];
    __shared__ float logits[COLUMNS][EXPERTS], weights[COLUMNS][TOP_K];
    __shared__ int chosen[COLUMNS][TOP_K];
    float4* rows = reinterpret_cast<float4*>(memory);  // [COLUMNS][QUADS]
    const int row = blockIdx.x * COLUMNS + warp_id(), lane = lane_id();
    float4* mine = rows + warp_id() * QUADS;
    float sum = 0.f;
    for (int quad = lane; quad < QUADS; quad += 32) {
        float4 x = {0.f, 0.f, 0.f, 0.f};
        if (row < all_rows) x = reinterpret_cast<const float4*>(residual + size_t(row) * HIDDEN)[quad];
        mine[quad] = x;
        sum += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    }
    const float rms = rsqrtf(warp_sum(sum) * (1.f / HIDDEN) + eps);
    for (int quad = lane; quad < QUADS; quad += 32) {  // each lane what it wrote itself
        const uint2 factor = reinterpret_cast<const uint2*>(norm)[quad];
        float4 x = mine[quad];
        x.x *= rms * low_half(factor.x), x.y *= rms * high_half(factor.x);
        x.z *= rms * low_half(factor.y), x.w *= rms * high_half(factor.y);
        mine[quad] = x;
    }
    __syncthreads();
    for (int expert = PAIR * warp_id(); expert < EXPERTS; expert += PAIR * WARPS) {
        const int other = min(expert + 1, EXPERTS - 1);
        const float4* first = reinterpret_cast<const float4*>(router + size_t(expert) * HIDDEN);
        const float4* second = reinterpret_cast<const float4*>(router + size_t(other) * HIDDEN);
        float sums[PAIR][COLUMNS] = {};
#pragma unroll 2
        for (int quad = lane; quad < QUADS; quad += 32) {
            const float4 a = first[quad], b = second[quad];
#pragma unroll
            for (int r = 0; r < COLUMNS; ++r) {
                const float4 x = rows[r * QUADS + quad];
                sums[0][r] += x.x * a.x + x.y * a.y + x.z * a.z + x.w * a.w;
                sums[1][r] += x.x * b.x + x.y * b.y + x.z * b.z + x.w * b.w;
            }
        }
#pragma unroll
        for (int r = 0; r < COLUMNS; ++r) {
            const float upper = warp_sum(sums[0][r]), lower = warp_sum(sums[1][r]);
            if (lane == 0) logits[r][expert] = upper, logits[r][other] = other == expert ? upper : lower;
        }
    }
    __syncthreads();
    if (row >= all_rows) return;
    choose_experts(logits[warp_id()], bias, chosen[warp_id()]);
    __syncwarp();
    weigh_experts(logits[warp_id()], chosen[warp_id()], weights[warp_id()]);
    __syncwarp();
    if (lane < TOP_K) {
        index[size_t(row) * TOP_K + lane] = chosen[warp_id()][lane];
        weight[size_t(row) * TOP_K + lane] = weights[warp_id()][lane];
    }
}
