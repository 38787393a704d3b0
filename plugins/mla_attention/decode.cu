// Absorbed latent attention for 1 to 16 new rows in three launches: absorb (which also appends to the caches), attend over
// chunks of positions, combine with the value half. Positions are cut in chunks from 0 on, whatever the rows.
// Macros: HEADS, NOPE, ROPE, VALUE, RANK; ATTEND_ROWS: rows that share the keys a block of `attend` has loaded; COMBINE_TILES: tiles of
// 16 values a block of `combine` takes; INT8_LATENT: latent.cuh.
#include "attention.cuh"
#include "int4_linear/slice.cuh"
#include "int4_linear/weights.cuh"
#include "mla_attention/latent.cuh"
#include "turns.cuh"

constexpr int HEAD = NOPE + ROPE;    // a head's part of q
constexpr int KEY = RANK + ROPE;     // what a position is to all heads
constexpr int NOPE_GROUPS = (NOPE + TILE_INPUTS - 1) / TILE_INPUTS;
constexpr int RANK_TILES = RANK / TILE_ROWS;
static_assert(NOPE_GROUPS * TILE_INPUTS <= HEAD, "a padded group must stay within the head's own values");
static_assert(RANK % 64 == 0 && ROPE % 16 == 0 && VALUE % 16 == 0, "sizes the kernels were written for");

// ---- absorb -------------------------------------------------------------------------------------------------------

constexpr int ABSORB_WARPS = 4;
constexpr int ABSORB_BLOCKS = (HEADS * RANK_TILES + ABSORB_WARPS - 1) / ABSORB_WARPS;

constexpr int HEAD_PAIRS = (HEADS + 1) * (ROPE / 2), PAIRS_EACH = 2;  // of values to rotate; a thread's
constexpr int APPEND_BLOCKS = 1 + (HEAD_PAIRS + 32 * ABSORB_WARPS * PAIRS_EACH - 1) / (32 * ABSORB_WARPS * PAIRS_EACH);  // a row

// A row's latent to `position` of the cache; without `norm` it is normalised already.
DEVICE void append_latent(const u16* latent, const u16* norm, size_t position, Latent* latent_cache, u16* scales) {
    constexpr int THREADS = 32 * ABSORB_WARPS;
    __shared__ float sums[ABSORB_WARPS];
    constexpr int EACH = (RANK / 2 + THREADS - 1) / THREADS;  // pairs of latent values a thread
    u32 value[EACH], factor[EACH];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int pair = i * THREADS + threadIdx.x;
        value[i] = pair < RANK / 2 ? reinterpret_cast<const u32*>(latent)[pair] : 0;
        factor[i] = norm && pair < RANK / 2 ? reinterpret_cast<const u32*>(norm)[pair] : 0;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) sum += low_half(value[i]) * low_half(value[i]) + high_half(value[i]) * high_half(value[i]);
    sum = warp_sum(sum);
    if (lane_id() == 0) sums[warp_id()] = sum;
    __syncthreads();
    sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < ABSORB_WARPS; ++warp) sum += sums[warp];
    // The official layer does not pass rms_norm_eps here: always 1e-6.
    const float rms = rsqrtf(sum * (1.f / RANK) + 1e-6f);
#pragma unroll
    for (int i = 0; i < EACH; ++i)
        if (norm)
            value[i] = floats_to_halves(low_half(value[i]) * rms * low_half(factor[i]),
                                        high_half(value[i]) * rms * high_half(factor[i]));
    store_latent<RANK, THREADS>(value, position, latent_cache, scales);
}

// Part `part` of a row's rotations: of the queries to `queries`, of the key to the cache.
DEVICE void rotate_part(const u16* q, const u16* k_pe, const float* cosines, const float* sines, u16* queries, u16* rope_cache,
                        int part) {
    constexpr int PAIRS = ROPE / 2, THREADS = 32 * ABSORB_WARPS;
    u32 both[PAIRS_EACH];
    float c[PAIRS_EACH], s[PAIRS_EACH];
    // Head HEADS stands for the key.
#pragma unroll
    for (int i = 0; i < PAIRS_EACH; ++i) {
        const int index = (part * PAIRS_EACH + i) * THREADS + threadIdx.x, head = index / PAIRS, pair = index % PAIRS;
        if (index < HEAD_PAIRS) {
            both[i] = reinterpret_cast<const u32*>(head < HEADS ? q + head * HEAD + NOPE : k_pe)[pair];
            c[i] = cosines[pair], s[i] = sines[pair];
        }
    }
#pragma unroll
    for (int i = 0; i < PAIRS_EACH; ++i) {
        const int index = (part * PAIRS_EACH + i) * THREADS + threadIdx.x, head = index / PAIRS, pair = index % PAIRS;
        if (index < HEAD_PAIRS) {
            u16* to = head < HEADS ? queries + head * KEY + RANK : rope_cache;
            const float x = low_half(both[i]), y = high_half(both[i]);
            to[pair] = float_to_half(x * c[i] - y * s[i]);
            to[pair + PAIRS] = float_to_half(y * c[i] + x * s[i]);
        }
    }
}

// A warp's 16 latent values of one head, for up to 8 rows.
DEVICE void absorb_tile(const u16* q, const uint4* keys, u16* queries, int rows, const Turn& turn) {
    constexpr int UNITS = HEADS * RANK_TILES;
    const int mine = blockIdx.x * ABSORB_WARPS + warp_id(), unit = smaller(mine, UNITS - 1);
    const int head = unit / RANK_TILES, tile = unit % RANK_TILES, g = lane_id() >> 2, t = lane_id() & 3;
    HalfWeight weight[NOPE_GROUPS];
#pragma unroll
    for (int group = 0; group < NOPE_GROUPS; ++group) weight[group].load(keys, nullptr, unit * NOPE_GROUPS + group);
    await_turn(turn);
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int group = 0; group < NOPE_GROUPS; ++group)
        weight[group].multiply(sum, load_activation(q + head * HEAD, HEADS * HEAD, group, g < rows));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = 2 * t + (i & 1), value = tile * TILE_ROWS + g + 8 * (i >> 1);
        if (row < rows && mine < UNITS) queries[(size_t(row) * HEADS + head) * KEY + value] = float_to_half(sum[i]);
    }
}

// Blocks 0 .. ABSORB_BLOCKS - 1: a warp a tile of 16 latent values of one head. After them, of each of 8 rows: one for
// its latent, the others for its rotations.
// q half [rows, HEADS * HEAD], latent half [rows, RANK] and k_pe half [rows, ROPE], their rows a stride apart, keys half tiles
// [HEADS, RANK / 16, NOPE_GROUPS], tables float [positions, ROPE / 2], queries half [rows, HEADS, KEY].
extern "C" __global__ void __launch_bounds__(32 * ABSORB_WARPS)
    absorb(const u16* q, const u16* latent, int latent_stride, const u16* k_pe, int k_pe_stride, const uint4* keys,
           const u16* norm, const float* cosines, const float* sines, const int* cursor, u16* queries, Latent* latent_cache,
           u16* latent_scales, u16* rope_cache, int all_rows, TurnCounters* turns, int index, int before) {
    const Turn turn = {turns, index, before};
    const int row0 = blockIdx.y * COLUMNS, rows = smaller(COLUMNS, all_rows - row0);
    if (blockIdx.x < ABSORB_BLOCKS) {
        absorb_tile(q + size_t(row0) * HEADS * HEAD, keys, queries + size_t(row0) * HEADS * KEY, rows, turn);
    } else {
        const int row = (blockIdx.x - ABSORB_BLOCKS) / APPEND_BLOCKS, part = (blockIdx.x - ABSORB_BLOCKS) % APPEND_BLOCKS;
        const int position = *cursor + row0 + row;
        await_turn(turn);
        if (row >= rows) {
        } else if (part == 0)
            append_latent(latent + size_t(row0 + row) * latent_stride, norm, position, latent_cache, latent_scales);
        else
            rotate_part(q + size_t(row0 + row) * HEADS * HEAD, k_pe + size_t(row0 + row) * k_pe_stride,
                        cosines + position * (ROPE / 2), sines + position * (ROPE / 2),
                        queries + size_t(row0 + row) * HEADS * KEY, rope_cache + size_t(position) * ROPE, part - 1);
    }
    finish_turn(turn);
}

// ---- attend -------------------------------------------------------------------------------------------------------

constexpr int CHUNK = 32;  // positions
constexpr int ATTEND_WARPS = 16, ATTEND_THREADS = 32 * ATTEND_WARPS;
constexpr int KEY_STRIDE = KEY + ROW_PAD;  // an odd number of 16 bytes: reads of 8 rows meet no bank twice
constexpr int SCORE_PARTS = 4, KEY_STEPS = KEY / 16, PART_STEPS = (KEY_STEPS + SCORE_PARTS - 1) / SCORE_PARTS;
constexpr bool EVEN_PARTS = KEY_STEPS % SCORE_PARTS == 0;
constexpr int SCORE_STRIDE = CHUNK + 4, WEIGHT_STRIDE = CHUNK + ROW_PAD;
constexpr int SCORE_TILES = CHUNK / 8;
static_assert(ATTEND_WARPS == SCORE_PARTS * SCORE_TILES, "four warps share the inputs of a tile of scores");
static_assert(ATTEND_WARPS == 16 && ROPE <= 256, "a warp a head; a lane a piece");
static_assert(KEY_STRIDE / 8 % 2 == 1, "padding");

// A chunk's keys to shared memory, a warp a position at a time, in pieces of 8 values: those cached before this step, or the others.
// Codes pass through registers, and all are asked for before the first is waited for.
DEVICE void load_keys(u16* keys, const Latent* latent_cache, const u16* latent_scales, const u16* rope_cache, int first, int cached,
                      bool before) {
    constexpr int POSITIONS = CHUNK / ATTEND_WARPS, PIECES = (RANK / 8 + 31) / 32;
#if INT8_LATENT
    uint2 codes[POSITIONS][PIECES];
    u32 scale[POSITIONS];
#endif
#pragma unroll
    for (int i = 0; i < POSITIONS; ++i) {
        const int at = warp_id() + i * ATTEND_WARPS;
        if ((first + at < cached) != before) continue;
        const size_t position = first + at;
        u16* to = keys + at * KEY_STRIDE;
#if INT8_LATENT
        scale[i] = load_scale(latent_scales + position);
#endif
#pragma unroll
        for (int j = 0; j < PIECES; ++j) {
            const int piece = lane_id() + 32 * j;
            if (piece >= RANK / 8) continue;
#if INT8_LATENT
            codes[i][j] = load_codes(latent_cache + position * RANK + piece * 8);
#else
            copy_async(to + piece * 8, latent_cache + position * RANK + piece * 8);
#endif
        }
        if (lane_id() < ROPE / 8) copy_async(to + RANK + lane_id() * 8, rope_cache + position * ROPE + lane_id() * 8);
    }
#if INT8_LATENT
#pragma unroll
    for (int i = 0; i < POSITIONS; ++i) {
        const int at = warp_id() + i * ATTEND_WARPS;
        if ((first + at < cached) != before) continue;
#pragma unroll
        for (int j = 0; j < PIECES; ++j) {
            const int piece = lane_id() + 32 * j;
            if (piece < RANK / 8) *reinterpret_cast<uint4*>(keys + at * KEY_STRIDE + piece * 8) = decoded(codes[i][j], scale[i]);
        }
    }
#endif
}

// What a block has in shared memory.
struct Chunk {
    u16 keys[CHUNK][KEY_STRIDE], queries[ATTEND_ROWS][16][KEY_STRIDE], weights[ATTEND_ROWS][16][WEIGHT_STRIDE];
    float scores[ATTEND_ROWS][SCORE_PARTS][16][SCORE_STRIDE];
};

// A chunk's scores under the queries of 16 heads of `rows` rows, and its share of their outputs. outputs [HEADS, RANK] and shares [HEADS] of
// the first row and this chunk, those of the next `chunks` further on; of its positions the first row sees `seen`, the next one more.
DEVICE void attend_chunk(Chunk& held, int rows, float scale, int seen, int head0, u16* outputs, Share* shares, int chunks) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
    {
        const int tile = warp_id() % SCORE_TILES, part = warp_id() / SCORE_TILES;
        float score[ATTEND_ROWS][4] = {};
        // Loads do not pass products, so they come first, a few steps at a time.
        constexpr int AT_ONCE = PART_STEPS % 3 == 0 ? 3 : PART_STEPS % 2 == 0 ? 2 : 1;
        const u16* chunk = held.keys[tile * 8] + part * PART_STEPS * 16;
#pragma unroll
        for (int from = 0; from < PART_STEPS; from += AT_ONCE) {
            u32 a[ATTEND_ROWS][AT_ONCE][4], b[AT_ONCE][2];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
#pragma unroll
                for (int r = 0; r < ATTEND_ROWS; ++r) load_a(a[r][i], held.queries[r][0] + (part * PART_STEPS + from + i) * 16, KEY_STRIDE);
                load_b(b[i][0], b[i][1], chunk + (from + i) * 16, KEY_STRIDE);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                if (!EVEN_PARTS && part * PART_STEPS + from + i >= KEY_STEPS) continue;
#pragma unroll
                for (int r = 0; r < ATTEND_ROWS; ++r) mma_16x8x16(score[r], a[r][i], b[i][0], b[i][1]);
            }
        }
#pragma unroll
        for (int r = 0; r < ATTEND_ROWS; ++r) {
            float* at = held.scores[r][part][0] + tile * 8 + 2 * t;
            at[g * SCORE_STRIDE] = score[r][0];
            at[g * SCORE_STRIDE + 1] = score[r][1];
            at[(g + 8) * SCORE_STRIDE] = score[r][2];
            at[(g + 8) * SCORE_STRIDE + 1] = score[r][3];
        }
    }
    __syncthreads();

#pragma unroll
    for (int r = 0; r < ATTEND_ROWS; ++r) {  // a warp a head, a lane a position
        const int head = warp_id();
        const float* at = held.scores[r][0][head] + lane_id();
        float score = at[0];
#pragma unroll
        for (int part = 1; part < SCORE_PARTS; ++part) score += at[part * 16 * SCORE_STRIDE];
        score = lane_id() < seen + r ? score * scale : MINUS_INFINITY;
        const float peak = warp_max(score);
        const u16 weight = float_to_half(exp2f(score - peak));
        const float sum = warp_sum(half_to_float(weight));
        held.weights[r][head][lane_id()] = weight;
        if (lane_id() == 0 && head0 + head < HEADS && r < rows) shares[size_t(r) * chunks * HEADS + head0 + head] = Share{peak, sum / CHUNK};
    }
    __syncthreads();

    constexpr int TILES = (RANK / 8 + ATTEND_WARPS - 1) / ATTEND_WARPS;
    u32 b[TILES][4];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        const int tile = warp_id() + i * ATTEND_WARPS;
        if (RANK / 8 % ATTEND_WARPS == 0 || tile < RANK / 8) load_b_transposed(b[i], held.keys[0] + tile * 8, KEY_STRIDE);
    }
#pragma unroll
    for (int r = 0; r < ATTEND_ROWS; ++r) {
        if (r >= rows) break;
        u32 a[2][4];
        load_a(a[0], held.weights[r][0], WEIGHT_STRIDE);
        load_a(a[1], held.weights[r][0] + 16, WEIGHT_STRIDE);
        u16* out = outputs + (size_t(r) * chunks * HEADS + head0) * RANK;
        auto store = [&](int head, int column, float x, float y) {
            if (head0 + head < HEADS)
                *reinterpret_cast<u32*>(out + size_t(head) * RANK + column) = floats_to_halves(x / CHUNK, y / CHUNK);
        };
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            const int tile = warp_id() + i * ATTEND_WARPS, column = tile * 8 + 2 * t;
            if (RANK / 8 % ATTEND_WARPS && tile >= RANK / 8) continue;
            float sum[4] = {0.f, 0.f, 0.f, 0.f};
            mma_16x8x16(sum, a[0], b[i][0], b[i][1]);
            mma_16x8x16(sum, a[1], b[i][2], b[i][3]);
            store(g, column, sum[0], sum[1]);
            store(g + 8, column, sum[2], sum[3]);
        }
    }
}

// Block (tile of 16 heads, ATTEND_ROWS rows, chunk), so that those past the cursor, which have nothing to do, come last and share
// multiprocessors; blocks past `room` chunks fetch ahead. outputs half [rows, chunks, HEADS, RANK],
// shares [rows, chunks, HEADS]; `chunks` is how many the workspace has room for. Scores are in units of log2(e).
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS, 1)
    attend(const u16* queries, const Latent* latent_cache, const u16* latent_scales, const u16* rope_cache, const int* cursor,
           float scale, u16* outputs, Share* shares, int chunks, int all_rows, int room, const u64* ahead, int ahead_count,
           TurnCounters* turns, int index, int before) {
    const Turn turn = {turns, index, before};
    extern __shared__ uint4 shared[];
    Chunk& held = *reinterpret_cast<Chunk*>(shared);
    const int row = blockIdx.y * ATTEND_ROWS, rows = smaller(ATTEND_ROWS, all_rows - row);
    const int chunk = blockIdx.z, head0 = blockIdx.x * 16, first = chunk * CHUNK;
    if (chunk >= room) {  // of launches that do not overlap
        const int plane = gridDim.x * gridDim.y;
        fetch_ahead(ahead, ahead_count, (chunk - room) * plane + blockIdx.y * gridDim.x + blockIdx.x, (gridDim.z - room) * plane);
        return;
    }
    const int cached = *cursor, seen = cached + row + 1 - first;  // positions the first row sees, from the chunk's first on
    const bool any = seen + rows > 1;
    load_keys(held.keys[0], latent_cache, latent_scales, rope_cache, first, cached, true);
    await_turn(turn);
    if (any) {
        const int head = head0 + warp_id();
#pragma unroll
        for (int r = 0; r < ATTEND_ROWS; ++r) {
            const u16* from = queries + (size_t(row + smaller(r, rows - 1)) * HEADS + smaller(head, HEADS - 1)) * KEY;
#pragma unroll
            for (int piece = lane_id(); piece < KEY / 8; piece += 32)
                copy_async(held.queries[r][warp_id()] + piece * 8, from + piece * 8, head < HEADS ? 16 : 0);
        }
        // What lies further on in the caches is finite, and gets no weight.
        load_keys(held.keys[0], latent_cache, latent_scales, rope_cache, first, cached, false);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    const size_t at = (size_t(row) * chunks + chunk) * HEADS;
    if (any) attend_chunk(held, rows, scale, seen, head0, outputs + at * RANK, shares + at, chunks);
    finish_turn(turn);
}

// ---- combine ------------------------------------------------------------------------------------------------------

constexpr int COMBINE_WARPS = 8;
constexpr int VALUE_TILES = VALUE / TILE_ROWS;
// Merging is most of the work, and every block of a head does it: few tiles a block (COMBINE_TILES) while there are few rows.
constexpr int COMBINE_PARTS = VALUE_TILES / COMBINE_TILES;
constexpr int MOST_CHUNKS = 128;
using Mixed = Slice<RANK, COMBINE_WARPS>;

// Block (head, part of its values), row. values half tiles [HEADS, VALUE / 16, RANK / 64]; out half [rows, HEADS * VALUE].
extern "C" __global__ void __launch_bounds__(32 * COMBINE_WARPS, RANK < 512 ? 1 : 3)
    combine(const u16* outputs, const Share* shares, const uint4* values, const int* cursor, u16* out, int chunks,
            TurnCounters* turns, int index, int before) {
    const Turn turn = {turns, index, before};
    __shared__ __align__(16) u16 mixed[COMBINE_WARPS][Mixed::STRIDE];
    __shared__ float partials[COMBINE_WARPS][COMBINE_TILES * TILE_ROWS], merging[COMBINE_WARPS][MOST_CHUNKS];
    const int head = blockIdx.x / COMBINE_PARTS, tile0 = blockIdx.x % COMBINE_PARTS * COMBINE_TILES, row = blockIdx.y;
    const int count = (*cursor + row) / CHUNK + 1;
    // Weights of few tiles are asked for at once; many would leave no registers to the merging of another block beside.
    constexpr bool EARLY = COMBINE_TILES == 1;
    // Two wait in shared memory.
    constexpr bool LANDED = COMBINE_TILES == 2 && Mixed::STEPS == 1 && RANK % (COMBINE_WARPS * TILE_INPUTS) == 0;
    __shared__ uint4 landing[LANDED ? COMBINE_WARPS : 1][LANDED ? COMBINE_TILES : 1][4][32];
    if (LANDED) {
#pragma unroll
        for (int i = 0; i < 4 * COMBINE_TILES; ++i)
            copy_async(&landing[warp_id()][i >> 2][i & 3][lane_id()],
                       values + (size_t((head * VALUE_TILES + tile0 + (i >> 2)) * Mixed::GROUPS + warp_id()) * 4 + (i & 3)) * 32 + lane_id());
        copy_commit();
    }
    HalfWeight weight[Mixed::STEPS][COMBINE_TILES];
    auto load = [&](int step) {
#pragma unroll
        for (int r = 0; r < COMBINE_TILES; ++r)
            weight[step][r].load(values, nullptr, (head * VALUE_TILES + tile0 + r) * Mixed::GROUPS + Mixed::group(step));
    };
#pragma unroll
    for (int step = 0; step < Mixed::STEPS; ++step)
        if (EARLY && Mixed::has(step)) load(step);
    await_turn(turn);
    const size_t at = size_t(row) * chunks * HEADS + head;
    float sum[COMBINE_TILES][4] = {};
#pragma unroll
    for (int step = 0; step < Mixed::STEPS; ++step) {
        if (!Mixed::has(step)) continue;
        const Merged mean = merge_chunks<MOST_CHUNKS>(
            shares + at, HEADS, outputs + at * RANK + Mixed::group(step) * TILE_INPUTS, HEADS * RANK, count, merging[warp_id()]);
        if (lane_id() < 8) *reinterpret_cast<uint4*>(mixed[warp_id()] + step * TILE_INPUTS + 8 * lane_id()) = merged_halves(mean);
        if (!EARLY && !LANDED) load(step);
        if (LANDED) copy_wait<0>();
        __syncwarp();
        if (LANDED) {
#pragma unroll
            for (int i = 0; i < 4 * COMBINE_TILES; ++i) weight[0][i >> 2].steps[i & 3] = landing[warp_id()][i >> 2][i & 3][lane_id()];
        }
        const Activation x = load_activation(mixed[warp_id()], Mixed::STRIDE, step, lane_id() < 4);
#pragma unroll
        for (int r = 0; r < COMBINE_TILES; ++r) weight[step][r].multiply(sum[r], x);
    }
    // Column 0 is the row.
    if ((lane_id() & 3) == 0) {
#pragma unroll
        for (int r = 0; r < COMBINE_TILES; ++r) {
            partials[warp_id()][r * TILE_ROWS + (lane_id() >> 2)] = sum[r][0];
            partials[warp_id()][r * TILE_ROWS + (lane_id() >> 2) + 8] = sum[r][2];
        }
    }
    __syncthreads();
    if (threadIdx.x < COMBINE_TILES * TILE_ROWS) {
        const float y = sum_partials<COMBINE_WARPS>(partials[0] + threadIdx.x, COMBINE_TILES * TILE_ROWS);
        out[size_t(row) * HEADS * VALUE + head * VALUE + tile0 * TILE_ROWS + threadIdx.x] = float_to_half(y);
    }
    finish_turn(turn);
}
