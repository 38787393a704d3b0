// Attention over cached keys and values for 1 to 16 new rows in two launches: attend over chunks of positions (which also
// rotates, and appends to the caches), combine. Positions are cut in chunks from 0 on, whatever the rows.
// Macros: HEADS, KV_HEADS, WIDTH (of a head).
#include "attention.cuh"
#include "turns.cuh"

constexpr int GROUP = HEADS / KV_HEADS;  // query heads that share a key head
constexpr int ROWS = 8;                  // rows of the step a block takes
constexpr int CHUNK = 64;                // positions
constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int STRIDE = WIDTH + 8;
constexpr int WEIGHT_STRIDE = CHUNK + 8, SCORE_STRIDE = CHUNK + 4;
constexpr int PAIRS = WIDTH / 2;
constexpr int MOST_CHUNKS = 64;
static_assert(HEADS % KV_HEADS == 0 && GROUP * ROWS <= 16 && WIDTH % 16 == 0 && WIDTH <= 128, "sizes the kernels were written for");
static_assert(WARPS * 8 == CHUNK && STRIDE / 8 % 2 == 1, "a warp a tile of scores; padding");

// A head of WIDTH halves, rotated in half-split pairs, to `to` (and `too`, if not null): one warp.
DEVICE void rotate(const u16* from, const float* cosines, const float* sines, int position, u16* to, u16* too) {
#pragma unroll
    for (int pair = lane_id(); pair < PAIRS; pair += 32) {
        const float x = half_to_float(from[pair]), y = half_to_float(from[pair + PAIRS]);
        const float c = cosines[position * PAIRS + pair], s = sines[position * PAIRS + pair];
        const u16 low = float_to_half(x * c - y * s), high = float_to_half(y * c + x * s);
        to[pair] = low;
        to[pair + PAIRS] = high;
        if (too) too[pair] = low, too[pair + PAIRS] = high;
    }
}

// A chunk's scores under the queries of a key head and 8 rows (`mine`, whose place the weights take), and its share of their outputs.
DEVICE void attend_chunk(const u16* keys, const u16* values, u16* mine, float* scores, float scale, int start, int row0, int rows,
                         int chunks, u16* outputs, Share* shares) {
    const int chunk = blockIdx.x, kv_head = blockIdx.y, first = chunk * CHUNK;
    const int g = lane_id() >> 2, t = lane_id() & 3;
    float score[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int step = 0; step < WIDTH / 16; ++step) {
        u32 a[4], b0, b1;
        load_a(a, mine + step * 16, STRIDE);
        load_b(b0, b1, keys + warp_id() * 8 * STRIDE + step * 16, STRIDE);
        mma_16x8x16(score, a, b0, b1);
    }
    float* at = scores + warp_id() * 8 + 2 * t;
    at[g * SCORE_STRIDE] = score[0];
    at[g * SCORE_STRIDE + 1] = score[1];
    at[(g + 8) * SCORE_STRIDE] = score[2];
    at[(g + 8) * SCORE_STRIDE + 1] = score[3];
    __syncthreads();

    u16* weights = mine;
#pragma unroll
    for (int i = 0; i < 16 / WARPS; ++i) {
        const int m = warp_id() * (16 / WARPS) + i, row = row0 + m / GROUP, seen = start + row + 1;
        float score[2], peak = MINUS_INFINITY, sum = 0.f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int position = lane_id() + 32 * half;
            score[half] = first + position < seen ? scores[m * SCORE_STRIDE + position] * scale : MINUS_INFINITY;
            peak = fmaxf(peak, score[half]);
        }
        peak = warp_max(peak);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u16 weight = float_to_half(exp2f(score[half] - peak));
            weights[m * WEIGHT_STRIDE + lane_id() + 32 * half] = weight;
            sum += half_to_float(weight);
        }
        sum = warp_sum(sum);
        if (lane_id() == 0 && m < rows * GROUP)
            shares[(size_t(row) * chunks + chunk) * HEADS + kv_head * GROUP + m % GROUP] = Share{peak, sum / CHUNK};
    }
    __syncthreads();

    u32 a[CHUNK / 16][4];
#pragma unroll
    for (int step = 0; step < CHUNK / 16; ++step) load_a(a[step], weights + step * 16, WEIGHT_STRIDE);
#pragma unroll
    for (int tile = warp_id(); tile < WIDTH / 8; tile += WARPS) {
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int part = 0; part < CHUNK / 32; ++part) {
            u32 b[4];
            load_b_transposed(b, values + part * 32 * STRIDE + tile * 8, STRIDE);
            mma_16x8x16(sum, a[2 * part], b[0], b[1]);
            mma_16x8x16(sum, a[2 * part + 1], b[2], b[3]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int m = g + 8 * half;
            if (m < rows * GROUP) {
                const int row = row0 + m / GROUP, head = kv_head * GROUP + m % GROUP;
                u16* to = outputs + ((size_t(row) * chunks + chunk) * HEADS + head) * WIDTH + tile * 8 + 2 * t;
                *reinterpret_cast<u32*>(to) = floats_to_halves(sum[2 * half] / CHUNK, sum[2 * half + 1] / CHUNK);
            }
        }
    }
}

// Block (chunk, key head, tile of rows); a plane of blocks past the rows' fetches ahead. q half [rows,
// HEADS * WIDTH], k and v half [rows, KV_HEADS * WIDTH], their rows a stride apart, caches half [KV_HEADS, span, WIDTH],
// tables float [positions, WIDTH / 2]; outputs half [rows, chunks, HEADS, WIDTH], shares [rows, chunks, HEADS].
extern "C" __global__ void __launch_bounds__(THREADS)
    attend(const u16* q, int q_stride, const u16* k, const u16* v, int kv_stride, const float* cosines,
           const float* sines, const int* cursor, float scale, u16* key_cache,
           u16* value_cache, int span, u16* outputs, Share* shares, int chunks, int all_rows, const u64* ahead,
           int ahead_count, TurnCounters* turns, int index, int before) {
    const Turn turn = {turns, index, before};
    const int row0 = blockIdx.z * ROWS;
    if (row0 >= all_rows) {  // of launches that do not overlap
        fetch_ahead(ahead, ahead_count, blockIdx.y * gridDim.x + blockIdx.x, gridDim.x * gridDim.y);
        return;
    }
    __shared__ __align__(16) u16 keys[CHUNK * STRIDE], values[CHUNK * STRIDE];
    // The queries are done with when the weights come.
    __shared__ __align__(16) u16 mine[16 * (STRIDE > WEIGHT_STRIDE ? STRIDE : WEIGHT_STRIDE)];
    __shared__ float scores[16 * SCORE_STRIDE];
    const int chunk = blockIdx.x, kv_head = blockIdx.y, first = chunk * CHUNK;
    const int rows = smaller(ROWS, all_rows - row0), start = *cursor;
    const bool any = first < start + row0 + rows;  // positions to attend to
    // What was cached before; the new positions come out of k and v, as nobody waits for who writes them to the cache.
    constexpr int PIECES = WIDTH / 8;
    for (int i = threadIdx.x; any && i < CHUNK * PIECES; i += THREADS) {
        const int at = i / PIECES, piece = i % PIECES, position = first + at;
        if (position >= start && position < start + all_rows) continue;
        const size_t from = (size_t(kv_head) * span + position) * WIDTH + piece * 8;
        const int bytes = position < start ? 16 : 0;
        copy_async(keys + at * STRIDE + piece * 8, key_cache + from, bytes);
        copy_async(values + at * STRIDE + piece * 8, value_cache + from, bytes);
    }
    copy_commit();
    await_turn(turn);
    for (int m = warp_id(); any && m < 16; m += WARPS) {
        const int row = row0 + m / GROUP;
        if (m < rows * GROUP) {
            const u16* from = q + size_t(row) * q_stride + (kv_head * GROUP + m % GROUP) * WIDTH;
            rotate(from, cosines, sines, start + row, mine + m * STRIDE, nullptr);
        } else {
            for (int i = lane_id(); i < WIDTH; i += 32) mine[m * STRIDE + i] = 0;
        }
    }
    for (int row = warp_id(); any && row < all_rows; row += WARPS) {
        const int position = start + row, at = position - first;
        if (at < 0 || at >= CHUNK) continue;
        const u16* key = k + size_t(row) * kv_stride + kv_head * WIDTH;
        const u16* value = v + size_t(row) * kv_stride + kv_head * WIDTH;
        const size_t to = (size_t(kv_head) * span + position) * WIDTH;
        // The tile a row belongs to has a block in this chunk; the first tile may have none.
        const bool writes = row / ROWS == blockIdx.z;
        rotate(key, cosines, sines, position, keys + at * STRIDE, writes ? key_cache + to : nullptr);
        for (int i = lane_id(); i < WIDTH; i += 32) {
            values[at * STRIDE + i] = value[i];
            if (writes) value_cache[to + i] = value[i];
        }
    }
    copy_wait<0>();
    __syncthreads();
    if (any) attend_chunk(keys, values, mine, scores, scale, start, row0, rows, chunks, outputs, shares);
    finish_turn(turn);
}

constexpr int COMBINE_WARPS = 4;
constexpr int PIECE = WIDTH < 64 ? WIDTH : 64;  // columns a warp puts together
constexpr int PARTS = (WIDTH + PIECE - 1) / PIECE;

// A warp a row, head and piece of its columns. out half [rows, HEADS * WIDTH].
extern "C" __global__ void __launch_bounds__(32 * COMBINE_WARPS)
    combine(const u16* outputs, const Share* shares, const int* cursor, u16* out, int chunks, int rows,
            TurnCounters* turns, int index, int before) {
    const Turn turn = {turns, index, before};
    __shared__ float merging[COMBINE_WARPS][MOST_CHUNKS];
    const int most = rows * HEADS * PARTS, mine = blockIdx.x * COMBINE_WARPS + warp_id(), unit = smaller(mine, most - 1);
    const int head = unit / PARTS % HEADS, row = unit / (PARTS * HEADS), lane = lane_id() & 7;
    const int count = (*cursor + row) / CHUNK + 1;
    const size_t at = size_t(row) * chunks * HEADS + head;
    // The last columns again where a piece ends early.
    const int column = unit % PARTS * PIECE + 8 * lane, last = WIDTH - 8;
    const int back = column > last ? column - last : 0;
    await_turn(turn);
    const Merged mean =
        merge_chunks<MOST_CHUNKS>(shares + at, HEADS, outputs + at * WIDTH + column - 8 * lane - back, HEADS * WIDTH, count, merging[warp_id()]);
    if (mine < most && lane_id() < 8 && !back)
        *reinterpret_cast<uint4*>(out + size_t(row) * HEADS * WIDTH + head * WIDTH + column) = merged_halves(mean);
    finish_turn(turn);
}
