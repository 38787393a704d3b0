// New rows of plain attention, rotated (arXiv 2104.09864) and put into the caches: a block a row. Macros: HEADS, KV_HEADS, WIDTH.
#include "common.cuh"

constexpr int THREADS = 128;
constexpr int PAIRS = WIDTH / 2, ROW = (HEADS + 2 * KV_HEADS) * WIDTH;
static_assert(WIDTH % 8 == 0, "values are copied 16 bytes at a time");

// qkv half [rows][HEADS + 2 KV_HEADS][WIDTH]: queries are rotated in place (pairs of the halves), keys rotated and values as
// they are go to the caches [KV_HEADS][positions][WIDTH].
extern "C" __global__ void __launch_bounds__(THREADS)
    append_heads(u16* qkv, const float* cosines, const float* sines, const int* cursor, u16* key_cache, u16* value_cache,
                 int positions) {
    const size_t row = blockIdx.x, position = *cursor + row;
    qkv += row * ROW;
    for (int index = threadIdx.x; index < (HEADS + KV_HEADS) * PAIRS; index += THREADS) {
        const int head = index / PAIRS, pair = index % PAIRS;
        u16* from = qkv + head * WIDTH + pair;
        u16* to = head < HEADS ? from : key_cache + ((head - HEADS) * size_t(positions) + position) * WIDTH + pair;
        const float x = half_to_float(from[0]), y = half_to_float(from[PAIRS]);
        const float c = cosines[position * PAIRS + pair], s = sines[position * PAIRS + pair];
        to[0] = float_to_half(x * c - y * s);
        to[PAIRS] = float_to_half(y * c + x * s);
    }
    constexpr int WORDS = WIDTH / 8;
    const uint4* values = reinterpret_cast<const uint4*>(qkv + (HEADS + KV_HEADS) * WIDTH);
    for (int index = threadIdx.x; index < KV_HEADS * WORDS; index += THREADS) {
        u16* to = value_cache + (index / WORDS * size_t(positions) + position) * WIDTH;
        reinterpret_cast<uint4*>(to)[index % WORDS] = values[index];
    }
}
