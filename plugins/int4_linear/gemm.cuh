// y = x @ W^T for many activation rows: a block makes a tile of outputs x rows, one group of 64 inputs a stage, and both
// operands pass through shared memory, several stages ahead of the tensor cores.
//
// The weight is the A operand. Its codes become halves in registers, times the scale rounded to half (as the reference has
// them, and one multiplication a register; scaling float32 sums instead takes a second set of sums, 128 registers here),
// and each register so made serves all row tiles of the warp. An output's sum is one float32 chain over the inputs in
// order: no tile shape and no neighbouring row changes its bits.
//
// Macros: OUT_WARPS x ROW_WARPS warps a block; OUT_TILES weight tiles (16 outputs) and ROW_TILES row tiles (8 rows) a warp;
// STEP: row tiles by which a block with fewer rows gets smaller; STAGES; BLOCKS a multiprocessor should hold; GATED: the weight is [up; gate], out = up * silu(gate) * next_scale.
#pragma once
#include "tiles.cuh"

constexpr int THREADS = 32 * OUT_WARPS * ROW_WARPS;
constexpr int BLOCK_TILES = OUT_WARPS * OUT_TILES;             // weight tiles of a block
constexpr int PAIR = GATED ? 2 : 1;                            // weight tiles behind one tile of outputs
constexpr int WARP_OUT = OUT_TILES / PAIR;                     // tiles of outputs of a warp
constexpr int BLOCK_OUT = BLOCK_TILES / PAIR;                  // and of a block
constexpr int BLOCK_ROWS = ROW_WARPS * ROW_TILES * COLUMNS;
constexpr int WORDS = 8;                                       // 16-byte words of one row and group
constexpr int OUT_STRIDE = BLOCK_OUT * TILE_ROWS + ROW_PAD;    // halves between rows of the finished tile
static_assert(OUT_TILES % PAIR == 0, "a warp holds the gate of each of its up tiles");
static_assert(THREADS / WORDS <= ROW_WARPS * COLUMNS, "all threads copy rows");

struct Stage {
    uint4 x[BLOCK_ROWS * WORDS];  // word w of row r is at r * WORDS + (w ^ (r & 1)): 16-byte reads without bank conflicts
    uint4 codes[BLOCK_TILES * 32];
    u32 scales[BLOCK_TILES * 8];
};

struct Shared {
    Stage stages[STAGES];
    int source[BLOCK_ROWS];  // where a row's activations begin, in 16-byte words; -1: no such row
    int target[BLOCK_ROWS];  // which row of `out` it becomes
};
static_assert(sizeof(u16) * BLOCK_ROWS * OUT_STRIDE <= sizeof(Stage) * STAGES, "the finished tile takes the stages' place");

// All of what a block needs, beside the rows' tables in shared memory.
struct Product {
    const uint4* x;
    const uint4* codes;   // [weight tiles][groups][32]
    const uint4* scales;  // [weight tiles][groups][2]
    u16* out;             // [rows][16 * count]
    const u16* next_scale;
    int groups;
    int count;  // tiles of outputs; a gated weight has twice as many
    int first;  // this block's first one
    int rows;   // this block's, at most BLOCK_ROWS
};

// The weight tile in place i of the block; past the end the last one again, which is not written.
DEVICE int weight_tile(const Product& p, int i) {
    const int tile = min(p.first + i / OUT_TILES * WARP_OUT + i % WARP_OUT, p.count - 1);
    return i % OUT_TILES < WARP_OUT ? tile : p.count + tile;
}

// Copies one group after another into the stages.
template <int ROWS>
struct Copier {
    static constexpr int CODE_PASSES = BLOCK_TILES * 32 / THREADS, ROW_PASS = THREADS / WORDS;
    static_assert(BLOCK_TILES * 32 % THREADS == 0 && ROWS % ROW_PASS == 0 && BLOCK_TILES * 2 <= THREADS, "whole passes");
    int code_at[CODE_PASSES], scale_at;

    DEVICE explicit Copier(const Product& p) {
#pragma unroll
        for (int pass = 0; pass < CODE_PASSES; ++pass)
            code_at[pass] = weight_tile(p, (threadIdx.x + pass * THREADS) >> 5) * p.groups * 32 + lane_id();
        scale_at = weight_tile(p, (threadIdx.x >> 1) % BLOCK_TILES) * p.groups * 2 + (threadIdx.x & 1);
    }

    DEVICE void copy(const Product& p, Shared& shared, Stage& stage, int group) const {
#pragma unroll
        for (int pass = 0; pass < CODE_PASSES; ++pass)
            copy_async(stage.codes + threadIdx.x + pass * THREADS, p.codes + code_at[pass] + group * 32);
        if (threadIdx.x < BLOCK_TILES * 2)
            copy_async(reinterpret_cast<uint4*>(stage.scales) + threadIdx.x, p.scales + scale_at + group * 2);
        const int word = threadIdx.x % WORDS;
#pragma unroll
        for (int pass = 0; pass < ROWS / ROW_PASS; ++pass) {
            const int row = threadIdx.x / WORDS + pass * ROW_PASS, source = shared.source[row];
            copy_async(stage.x + row * WORDS + (word ^ (row & 1)), p.x + max(source, 0) + group * WORDS + word,
                       source < 0 ? 0 : 16);
        }
    }
};

// Eight codes -> one A fragment of weights; `upper` and `lower` hold the scales of rows g and g + 8, twice each.
DEVICE void scaled_weights(u32 (&a)[4], u32 codes, u32 upper, u32 lower) {
    int4_to_halves(a, codes);
    a[0] = half2_mul(a[0], upper);
    a[1] = half2_mul(a[1], lower);
    a[2] = half2_mul(a[2], upper);
    a[3] = half2_mul(a[3], lower);
}

DEVICE int out_warp() { return warp_id() % OUT_WARPS; }
// The block's row that lane part g of row tile n of this warp is: tiles alternate between warps, so all have as many.
DEVICE int block_row(int n, int g) { return (n * ROW_WARPS + warp_id() / OUT_WARPS) * COLUMNS + g; }

// sum += one group's products of this warp's OUT_TILES x N tiles.
template <int N>
DEVICE void multiply(float (&sum)[OUT_TILES][N][4], const Stage& stage) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
    uint4 codes[OUT_TILES];
    u32 scale[OUT_TILES];
#pragma unroll
    for (int m = 0; m < OUT_TILES; ++m) {
        const int tile = out_warp() * OUT_TILES + m;
        codes[m] = stage.codes[tile * 32 + lane_id()];
        scale[m] = stage.scales[tile * 8 + g];
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {  // 8 of the lane's 16 inputs: two steps of the tensor core
        uint4 x[N];
#pragma unroll
        for (int n = 0; n < N; ++n) x[n] = stage.x[block_row(n, g) * WORDS + ((2 * t + part) ^ (g & 1))];
#pragma unroll
        for (int m = 0; m < OUT_TILES; ++m) {
            const u32 upper = __byte_perm(scale[m], 0, 0x1010), lower = __byte_perm(scale[m], 0, 0x3232);
            u32 a[4];
            scaled_weights(a, part ? codes[m].z : codes[m].x, upper, lower);
#pragma unroll
            for (int n = 0; n < N; ++n) mma_16x8x16(sum[m][n], a, x[n].x, x[n].y);
            scaled_weights(a, part ? codes[m].w : codes[m].y, upper, lower);
#pragma unroll
            for (int n = 0; n < N; ++n) mma_16x8x16(sum[m][n], a, x[n].z, x[n].w);
        }
    }
}

// Turns the sums into halves in shared memory, row after row, so that they leave in whole 16-byte words.
template <int N>
DEVICE void write(const Product& p, Shared& shared, const float (&sum)[OUT_TILES][N][4]) {
    u16* tile = reinterpret_cast<u16*>(shared.stages);
    const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
    for (int m = 0; m < WARP_OUT; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int out = (out_warp() * WARP_OUT + m) * TILE_ROWS + g + 8 * (i >> 1);
            float factor = 1.f;
            if (GATED && p.next_scale && p.first * TILE_ROWS + out < p.count * TILE_ROWS)
                factor = half_to_float(p.next_scale[p.first * TILE_ROWS + out]);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                float y = sum[m][n][i];
                if (GATED) y = y * silu(sum[m + OUT_TILES - WARP_OUT][n][i]) * factor;
                tile[block_row(n, 2 * t + (i & 1)) * OUT_STRIDE + out] = float_to_half(y);
            }
        }
    }
    __syncthreads();
    constexpr int ROW_WORDS = BLOCK_OUT * TILE_ROWS / 8;
    for (int index = threadIdx.x; index < N * ROW_WARPS * COLUMNS * ROW_WORDS; index += THREADS) {
        const int row = index / ROW_WORDS, word = index % ROW_WORDS, target = shared.target[row];
        if (target >= 0 && p.first + word / 2 < p.count) {
            u16* to = p.out + size_t(target) * p.count * TILE_ROWS + p.first * TILE_ROWS + word * 8;
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(tile + row * OUT_STRIDE + word * 8);
        }
    }
}

// With N row tiles a warp; the tables of rows must be visible to the block.
template <int N>
DEVICE void run(const Product& p, Shared& shared) {
    const Copier<N * ROW_WARPS * COLUMNS> copier(p);
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (stage < p.groups) copier.copy(p, shared, shared.stages[stage], stage);
        copy_commit();
    }
    float sum[OUT_TILES][N][4] = {};
    int read = 0, write_to = STAGES - 1;
#pragma unroll 1
    for (int group = 0; group < p.groups; ++group) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // this group is there for all, and all have left the stage that is written next
        if (group + STAGES - 1 < p.groups) copier.copy(p, shared, shared.stages[write_to], group + STAGES - 1);
        copy_commit();
        multiply<N>(sum, shared.stages[read]);
        read = read == STAGES - 1 ? 0 : read + 1;
        write_to = write_to == STAGES - 1 ? 0 : write_to + 1;
    }
    copy_wait<0>();
    __syncthreads();
    write<N>(p, shared, sum);
}

// Only as many row tiles as the block's rows need, to a multiple of STEP.
template <int N = ROW_TILES>
DEVICE void run_needed(const Product& p, Shared& shared) {
    if constexpr (N > STEP) {
        if (p.rows <= (N - STEP) * ROW_WARPS * COLUMNS) return run_needed<N - STEP>(p, shared);
    }
    run<N>(p, shared);
}
