// New rows of latent attention, rotated (arXiv 2104.09864) and put into the caches: a block a row. Macros: HEADS, NOPE, ROPE, RANK;
// INT8_LATENT: latent.cuh.
#include "mla_attention/latent.cuh"

constexpr int THREADS = 128;
constexpr int HEAD = NOPE + ROPE, PAIRS = ROPE / 2;
static_assert(RANK % 2 == 0 && ROPE % 2 == 0, "pairs");

// q half [rows][HEADS][HEAD], whose rotary parts are rotated in place (neighbouring pairs, to half-split order); kv half
// [rows][RANK + ROPE]: its latent, normalised by `norm`, to latent_cache [S][RANK] (codes have latent_scales [S] too), its key
// part, rotated, to rope_cache [S][ROPE]. cosines and sines float [positions][PAIRS].
extern "C" __global__ void __launch_bounds__(THREADS)
    append_latent(u16* q, const u16* kv, const u16* norm, const float* cosines, const float* sines, const int* cursor,
                  Latent* latent_cache, u16* latent_scales, u16* rope_cache) {
    __shared__ float sums[THREADS / 32];
    const size_t row = blockIdx.x, position = *cursor + row;
    q += row * HEADS * HEAD;
    kv += row * (RANK + ROPE);
    constexpr int VALUES = (RANK / 2 + THREADS - 1) / THREADS, TURNS = ((HEADS + 1) * PAIRS + THREADS - 1) / THREADS;
    u32 value[VALUES], turned[TURNS];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
        const int pair = i * THREADS + threadIdx.x;
        value[i] = pair < RANK / 2 ? reinterpret_cast<const u32*>(kv)[pair] : 0;
        sum += low_half(value[i]) * low_half(value[i]) + high_half(value[i]) * high_half(value[i]);
    }
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {  // head HEADS stands for the key
        const int index = i * THREADS + threadIdx.x, head = index / PAIRS;
        const u16* from = head < HEADS ? q + head * HEAD + NOPE : kv + RANK;
        turned[i] = index < (HEADS + 1) * PAIRS ? reinterpret_cast<const u32*>(from)[index % PAIRS] : 0;
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) sums[warp_id()] = sum;
    __syncthreads();  // also: every rotary part was read before one is written
    sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; ++warp) sum += sums[warp];
    // The official layer does not pass rms_norm_eps here: always 1e-6.
    const float rms = rsqrtf(sum * (1.f / RANK) + 1e-6f);
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
        const int pair = i * THREADS + threadIdx.x;
        if (pair < RANK / 2) {
            const u32 factor = reinterpret_cast<const u32*>(norm)[pair];
            value[i] = floats_to_halves(low_half(value[i]) * rms * low_half(factor), high_half(value[i]) * rms * high_half(factor));
        }
    }
    store_latent<RANK, THREADS>(value, position, latent_cache, latent_scales);
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
        const int index = i * THREADS + threadIdx.x, head = index / PAIRS, pair = index % PAIRS;
        if (index < (HEADS + 1) * PAIRS) {
            u16* to = head < HEADS ? q + head * HEAD + NOPE : rope_cache + position * ROPE;
            const float x = low_half(turned[i]), y = high_half(turned[i]);
            const float c = cosines[position * PAIRS + pair], s = sines[position * PAIRS + pair];
            to[pair] = float_to_half(x * c - y * s);
            to[pair + PAIRS] = float_to_half(y * c + x * s);
        }
    }
}
