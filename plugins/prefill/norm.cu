// residual += what the last layers gave; then its RMSNorm, rounded once to half, as up to two products want it.
// Macros: HIDDEN.
#include "common.cuh"

constexpr int THREADS = 256, QUADS = HIDDEN / 4, EACH = (QUADS + THREADS - 1) / THREADS;
static_assert(HIDDEN % 4 == 0, "rows are whole 16-byte words");

// One block a row. residual float [rows][HIDDEN], floats float and halves half of the same shape (either may be null) are
// added in that order; first and second half [rows][HIDDEN] = x * rms * weight (* scale [HIDDEN], if not null); the second
// may be null.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_norm(float4* residual, const float4* floats, const uint2* halves, const uint2* weight, float eps,
             const uint2* first_scale, uint2* first, const uint2* second_scale, uint2* second) {
    __shared__ float sums[THREADS / 32];
    const size_t row = size_t(blockIdx.x) * QUADS;
    float4 x[EACH];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int quad = i * THREADS + threadIdx.x;
        if (quad >= QUADS) continue;
        x[i] = residual[row + quad];
        if (floats) {
            const float4 more = floats[row + quad];
            x[i].x += more.x, x[i].y += more.y, x[i].z += more.z, x[i].w += more.w;
        }
        if (halves) {
            const uint2 more = halves[row + quad];
            x[i].x += low_half(more.x), x[i].y += high_half(more.x), x[i].z += low_half(more.y), x[i].w += high_half(more.y);
        }
        if (floats || halves) residual[row + quad] = x[i];
        sum += x[i].x * x[i].x + x[i].y * x[i].y + x[i].z * x[i].z + x[i].w * x[i].w;
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) sums[warp_id()] = sum;
    __syncthreads();
    sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; ++warp) sum += sums[warp];
    const float rms = rsqrtf(sum * (1.f / HIDDEN) + eps);
    auto write = [&](uint2* out, const uint2* scale) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int quad = i * THREADS + threadIdx.x;
            if (quad >= QUADS) continue;
            const uint2 factor = weight[quad];
            float4 y = {x[i].x * rms * low_half(factor.x), x[i].y * rms * high_half(factor.x),
                        x[i].z * rms * low_half(factor.y), x[i].w * rms * high_half(factor.y)};
            if (scale) {
                const uint2 by = scale[quad];
                y.x *= low_half(by.x), y.y *= high_half(by.x), y.z *= low_half(by.y), y.w *= high_half(by.y);
            }
            out[row + quad] = uint2{floats_to_halves(y.x, y.y), floats_to_halves(y.z, y.w)};
        }
    };
    write(first, first_scale);
    if (second) write(second, second_scale);
}
