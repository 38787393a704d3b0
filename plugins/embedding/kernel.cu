// Tokens to the residual stream, with the sums of squares that the first norm needs. One block a row.
#include "speculative_accept/choose.cuh"
#include "turns.cuh"

constexpr int ITEMS = 8;                // halves a thread, 16 bytes
constexpr int LANES = HIDDEN / ITEMS;   // threads that have any
constexpr int WARPS = LANES > 128 ? (LANES + 31) / 32 : 4;
static_assert(HIDDEN % 16 == 0 && WARPS <= 32, "a row is 16 to 8192 values");

// residual[m] = table[tokens[m]]; square_sums[m][i] = sum of squares of its values 16i .. 16i + 15. With `values` not null,
// the last row's token is first chosen from one row of the head's candidates [blocks] and written to tokens.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    embed(int* tokens, const u16* table, int vocab, float* residual, float* square_sums, const float* values,
          const int* candidates, int blocks, TurnCounters* turns, int launches) {
    const int row = blockIdx.x, at = threadIdx.x;
    // The first launch of a step: the counters of the others start at 0.
    for (int word = at; row == 0 && word < launches * int(sizeof(TurnCounters) / 16); word += blockDim.x)
        reinterpret_cast<uint4*>(turns)[word] = uint4{0, 0, 0, 0};
    int token;
    if (values && row == gridDim.x - 1) {
        token = block_best<WARPS>(values, candidates, blocks).token;
        if (at == 0) tokens[row] = token;
    } else {
        token = tokens[row];
    }
    token = min(max(token, 0), vocab - 1);  // never outside the table, whatever stands there
    float x[ITEMS], sum = 0.f;
    if (at < LANES) {
        const uint4 word = reinterpret_cast<const uint4*>(table + u64(token) * HIDDEN)[at];
        const u32 pairs[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) x[2 * i] = low_half(pairs[i]), x[2 * i + 1] = high_half(pairs[i]);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) sum += x[i] * x[i];
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if (at < LANES) {
        float4* to = reinterpret_cast<float4*>(residual + u64(row) * HIDDEN + at * ITEMS);
        to[0] = make_float4(x[0], x[1], x[2], x[3]);
        to[1] = make_float4(x[4], x[5], x[6], x[7]);
        if (at % 2 == 0) square_sums[row * (HIDDEN / 16) + at / 2] = sum;
    }
}
