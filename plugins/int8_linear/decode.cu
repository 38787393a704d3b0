// The LM head for 1 to 16 rows: final norm, product with an INT8, half or INT4 weight, and of each block the best token.
// A warp takes a tile of 16 tokens with all its inputs, then the next; loads run ahead over the tiles' ends.
// Macros: HIDDEN, VOCAB, HEAD_WARPS, HEAD_KIND (0 INT8, 1 half, 2 INT4).
#include "int4_linear/slice.cuh"
#include "int4_linear/weights.cuh"
#include "speculative_accept/choose.cuh"
#include "turns.cuh"

// 16 outputs x 64 inputs of INT8 codes, stored + 128: step j of a lane is 4 codes of row g, then 4 of row g + 8
// (trtvlm.plugins.int8_linear.tiles).
struct Int8Weight {
    uint4 codes[2];

    DEVICE void load(const uint4* all, const u32*, size_t tile) {
        codes[0] = load_stream(all + tile * 64 + lane_id());
        codes[1] = load_stream(all + tile * 64 + 32 + lane_id());
    }
    // Codes as exact halves: byte u under 0x64 is 1024 + u.
    DEVICE static u32 halves(u32 word, u32 selector) {
        constexpr u32 minus_1152 = 0x64806480;  // 1024 + 128
        return half2_sub(__byte_perm(word, 0x64646464, selector), minus_1152);
    }
    DEVICE void multiply(float (&sum)[4], const Activation& x) const {
        const u32 words[8] = {codes[0].x, codes[0].y, codes[0].z, codes[0].w, codes[1].x, codes[1].y, codes[1].z, codes[1].w};
        const u32 b[8] = {x.first.x, x.first.y, x.first.z, x.first.w, x.second.x, x.second.y, x.second.z, x.second.w};
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const u32 upper = words[2 * step], lower = words[2 * step + 1];
            const u32 a[4] = {halves(upper, 0x4140), halves(lower, 0x4140), halves(upper, 0x4342), halves(lower, 0x4342)};
            mma_16x8x16(sum, a, b[2 * step], b[2 * step + 1]);
        }
    }
};

template <int KIND>
struct HeadWeight;
template <>
struct HeadWeight<0> {
    using type = Int8Weight;
};
template <>
struct HeadWeight<1> {
    using type = HalfWeight;
};
template <>
struct HeadWeight<2> {
    using type = Int4Weight;
};
using Weight = HeadWeight<HEAD_KIND>::type;

constexpr int GROUPS = HIDDEN / TILE_INPUTS, TILES = VOCAB / TILE_ROWS;
// Loads a warp has under way; a divisor of the groups, so that a register always has the same place in a tile.
constexpr int MOST = HEAD_KIND == 1 ? 5 : 10;  // half tiles take more registers
constexpr int DEPTH = MOST > 8 && GROUPS % 8 == 0    ? 8
                      : MOST > 8 && GROUPS % 10 == 0 ? 10
                      : GROUPS % 4 == 0              ? 4
                      : GROUPS % 2 == 0              ? 2
                                                     : 1;
constexpr int STRIDE = HIDDEN + ROW_PAD;
static_assert(HIDDEN % 64 == 0 && VOCAB % 16 == 0, "sizes the kernel was written for");

// Grid (blocks, tiles of rows). row_scales float [VOCAB] (INT8 only), group_scales (INT4 only); logits float [rows, VOCAB] or
// null; best_values and best_tokens [rows, blocks].
extern "C" __global__ void __launch_bounds__(32 * HEAD_WARPS)
    head(const float* residual, const float* square_sums, const u16* norm, float eps, const uint4* weights,
         const u32* group_scales, const float* row_scales, float* logits, float* best_values, int* best_tokens, int all_rows,
         TurnCounters* turns, int index, int before) {
    const Turn turn = {turns, index, before};
    extern __shared__ uint4 shared[];
    __shared__ Candidate found[HEAD_WARPS][COLUMNS];
    u16* x = reinterpret_cast<u16*>(shared);
    const int row0 = blockIdx.y * COLUMNS, rows = min(COLUMNS, all_rows - row0);
    const int stride = gridDim.x * HEAD_WARPS;
    int tile = warp_id() * gridDim.x + blockIdx.x;

    Weight weight[DEPTH];
    if (tile < TILES) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) weight[i].load(weights, group_scales, tile * GROUPS + i);
    }
    fetch_halves(norm, HIDDEN);
    await_turn(turn);  // the last launch of a step: nobody waits for it
    const float rms = reciprocal_rms<HIDDEN>(square_sums + row0 * (HIDDEN / 16), rows, eps);
    for (int row = 0; row < rows; ++row) {
        const float r = __shfl_sync(0xffffffffu, rms, 4 * row);
        for (int quad = threadIdx.x; quad < HIDDEN / 4; quad += 32 * HEAD_WARPS) {
            const float4 value = reinterpret_cast<const float4*>(residual + size_t(row0 + row) * HIDDEN)[quad];
            const uint2 factor = reinterpret_cast<const uint2*>(norm)[quad];
            uint2 out;
            out.x = floats_to_halves(value.x * r * low_half(factor.x), value.y * r * high_half(factor.x));
            out.y = floats_to_halves(value.z * r * low_half(factor.y), value.w * r * high_half(factor.y));
            *reinterpret_cast<uint2*>(x + row * STRIDE + 4 * quad) = out;
        }
    }
    __syncthreads();

    const int g = lane_id() >> 2, t = lane_id() & 3;
    const bool present = g < rows;
    Candidate best[2] = {{-3.4e38f, 0}, {-3.4e38f, 0}};
    while (tile < TILES) {
        const int next = tile + stride;
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            weight[group % DEPTH].multiply(sum, load_activation(x, STRIDE, group, present));
            const int ahead = group + DEPTH;
            if (ahead < GROUPS) {
                weight[group % DEPTH].load(weights, group_scales, tile * GROUPS + ahead);
            } else if (next < TILES) {
                weight[group % DEPTH].load(weights, group_scales, next * GROUPS + ahead - GROUPS);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = 2 * t + (i & 1), token = tile * TILE_ROWS + g + 8 * (i >> 1);
            const float value = HEAD_KIND == 0 ? sum[i] * row_scales[token] : sum[i];
            if (logits && row < rows) logits[size_t(row0 + row) * VOCAB + token] = value;
            best[i & 1] = better(best[i & 1], Candidate{value, token});
        }
        tile = next;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int offset = 16; offset >= 4; offset >>= 1) {
            const float value = __shfl_xor_sync(0xffffffffu, best[i].value, offset);
            const int token = __shfl_xor_sync(0xffffffffu, best[i].token, offset);
            best[i] = better(best[i], Candidate{value, token});
        }
        if (g == 0) found[warp_id()][2 * t + i] = best[i];
    }
    __syncthreads();
    if (threadIdx.x < rows) {
        Candidate mine = found[0][threadIdx.x];
        for (int warp = 1; warp < HEAD_WARPS; ++warp) mine = better(mine, found[warp][threadIdx.x]);
        best_values[(row0 + threadIdx.x) * gridDim.x + blockIdx.x] = mine.value;
        best_tokens[(row0 + threadIdx.x) * gridDim.x + blockIdx.x] = mine.token;
    }
}
