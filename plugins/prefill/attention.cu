// Causal attention of many new rows over cached positions, in one pass over the keys (flash attention, Dao, arXiv
// 2307.08691): a block has 64 rows of one head, a warp 16 of them; keys and values pass through shared memory, 64 positions at
// a time from position 0 on. Tiles are cut the same wherever a prompt is cut, and a tile that a row does not see changes
// nothing of it, so no row's bits depend on the rows beside it.
// Macros: HEADS, SHARE (query heads a key head), FIRST and SECOND (a key's part of its head, and the one all heads share; 0:
// none), VALUE.
#include "attention.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS, ROWS = 16 * WARPS, POSITIONS = 64;
constexpr int KEY = FIRST + SECOND, KEY_STRIDE = KEY + 8, VALUE_STRIDE = VALUE + 8;  // halves; an odd number of 16 bytes
constexpr int STEPS = KEY / 16, VALUE_TILES = VALUE / 8, SCORE_TILES = POSITIONS / 8;
static_assert(FIRST % 8 == 0 && SECOND % 8 == 0 && KEY % 32 == 0 && VALUE % 16 == 0, "whole steps of the tensor cores");

// Rows of halves to shared memory, 16 bytes a thread at a time; zeros from `there` on.
template <int WIDTH, int STRIDE>
DEVICE void copy_rows(u16* to, const u16* from, size_t stride, int there) {
    constexpr int WORDS = WIDTH / 8;
    for (int index = threadIdx.x; index < POSITIONS * WORDS; index += THREADS) {
        const int row = index / WORDS, word = index % WORDS;
        copy_async(to + row * STRIDE + word * 8, from + (row < there ? row : 0) * stride + word * 8, row < there ? 16 : 0);
    }
}

// A head's keys and values; strides in halves.
struct Cached {
    const u16* first;   // [positions][FIRST]
    const u16* second;  // [positions][SECOND]
    const u16* value;   // [positions][VALUE]
    int first_stride, value_stride;
};

DEVICE void copy_keys(u16* keys, const Cached& cached, int position, int end) {
    copy_rows<FIRST, KEY_STRIDE>(keys, cached.first + size_t(position) * cached.first_stride, cached.first_stride, end - position);
    if (SECOND) copy_rows<SECOND ? SECOND : 8, KEY_STRIDE>(keys + FIRST, cached.second + size_t(position) * SECOND, SECOND, end - position);
}

DEVICE void copy_values(u16* values, const Cached& cached, int position, int end) {
    copy_rows<VALUE, VALUE_STRIDE>(values, cached.value + size_t(position) * cached.value_stride, cached.value_stride, end - position);
}

// Grid (HEADS, tiles of rows), the last rows first: they see most. q half [rows][q_stride], head h at h * KEY; first half
// [positions] first_stride and heads first_head apart, second half [positions][SECOND], value likewise; out half
// [rows][HEADS * VALUE], times next_scale [HEADS * VALUE] if not null. Row m stands at position *cursor + m. scale: of scores,
// times log2(e).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attend(const u16* q, int q_stride, const u16* first, int first_stride, int first_head, const u16* second,
           const u16* value, int value_stride, int value_head, const int* cursor, float scale, const u16* next_scale, u16* out,
           int rows) {
    extern __shared__ uint4 shared[];
    u16* keys = reinterpret_cast<u16*>(shared);    // [POSITIONS][KEY_STRIDE]
    u16* values = keys + POSITIONS * KEY_STRIDE;   // [POSITIONS][VALUE_STRIDE]
    u16* queries = values + POSITIONS * VALUE_STRIDE;  // [ROWS][KEY_STRIDE]
    const int head = blockIdx.x, row0 = (gridDim.y - 1 - blockIdx.y) * ROWS, here = smaller(ROWS, rows - row0);
    const int start = *cursor, end = start + row0 + here;  // positions that the last row here sees
    const int g = lane_id() >> 2, t = lane_id() & 3;
    const Cached cached = {first + size_t(head / SHARE) * first_head, second, value + size_t(head / SHARE) * value_head,
                           first_stride, value_stride};

    copy_rows<KEY, KEY_STRIDE>(queries, q + size_t(row0) * q_stride + head * KEY, q_stride, here);
    copy_keys(keys, cached, 0, end);
    copy_commit();
    float sum[VALUE_TILES][4] = {}, peak[2] = {MINUS_INFINITY, MINUS_INFINITY}, total[2] = {0.f, 0.f};
    for (int position = 0; position < end; position += POSITIONS) {
        copy_values(values, cached, position, end);
        copy_commit();
        copy_wait<1>();
        __syncthreads();  // the keys are there
        float score[SCORE_TILES][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step += 2) {
            u32 a[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i)
                load_a(a[i], queries + warp_id() * 16 * KEY_STRIDE + (step + i) * 16, KEY_STRIDE);
#pragma unroll
            for (int tile = 0; tile < SCORE_TILES; ++tile) {
                u32 b[4];  // of both steps
                load_matrices(b, keys + (tile * 8 + (lane_id() & 7)) * KEY_STRIDE + step * 16 + (lane_id() >> 3) * 8);
                mma_16x8x16(score[tile], a[0], b[0], b[1]);
                mma_16x8x16(score[tile], a[1], b[2], b[3]);
            }
        }
        __syncthreads();  // all are done with the keys
        if (position + POSITIONS < end) copy_keys(keys, cached, position + POSITIONS, end);
        copy_commit();
        // Rows g and g + 8 of the warp; the four lanes t share a row.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int last = start + row0 + warp_id() * 16 + g + 8 * half - position;  // the last position it sees, from here
            float most = peak[half];
#pragma unroll
            for (int tile = 0; tile < SCORE_TILES; ++tile) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& s = score[tile][2 * half + i];
                    s = tile * 8 + 2 * t + i <= last ? s * scale : MINUS_INFINITY;
                    most = fmaxf(most, s);
                }
            }
            most = fmaxf(most, __shfl_xor_sync(EVERY_LANE, most, 1));
            most = fmaxf(most, __shfl_xor_sync(EVERY_LANE, most, 2));
            const float shrink = exp2f(peak[half] - most);
            peak[half] = most;
            float part = 0.f;
#pragma unroll
            for (int tile = 0; tile < SCORE_TILES; ++tile) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& s = score[tile][2 * half + i];
                    s = exp2f(s - most);
                    part += s;
                }
            }
            total[half] = total[half] * shrink + part;
#pragma unroll
            for (int tile = 0; tile < VALUE_TILES; ++tile) sum[tile][2 * half] *= shrink, sum[tile][2 * half + 1] *= shrink;
        }
        copy_wait<1>();
        __syncthreads();  // the values are there
#pragma unroll
        for (int step = 0; step < POSITIONS / 16; step += 2) {
            u32 a[2][4];  // the scores' places are those of the A operand
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&from)[4] = score[2 * step + i];
                a[i / 2][2 * (i % 2)] = floats_to_halves(from[0], from[1]);
                a[i / 2][2 * (i % 2) + 1] = floats_to_halves(from[2], from[3]);
            }
#pragma unroll
            for (int tile = 0; tile < VALUE_TILES; ++tile) {
                u32 b[4];
                load_b_transposed(b, values + step * 16 * VALUE_STRIDE + tile * 8, VALUE_STRIDE);
                mma_16x8x16(sum[tile], a[0], b[0], b[1]);
                mma_16x8x16(sum[tile], a[1], b[2], b[3]);
            }
        }
        __syncthreads();  // all are done with the values
    }
    copy_wait<0>();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float whole = total[half];
        whole += __shfl_xor_sync(EVERY_LANE, whole, 1);
        whole += __shfl_xor_sync(EVERY_LANE, whole, 2);
        const float by = 1.f / whole;
        const int row = row0 + warp_id() * 16 + g + 8 * half;
        if (row >= rows) continue;
#pragma unroll
        for (int tile = 0; tile < VALUE_TILES; ++tile) {
            const int at = head * VALUE + tile * 8 + 2 * t;
            float x = sum[tile][2 * half] * by, y = sum[tile][2 * half + 1] * by;
            if (next_scale) {
                const u32 factor = *reinterpret_cast<const u32*>(next_scale + at);
                x *= low_half(factor), y *= high_half(factor);
            }
            *reinterpret_cast<u32*>(out + size_t(row) * HEADS * VALUE + at) = floats_to_halves(x, y);
        }
    }
}
