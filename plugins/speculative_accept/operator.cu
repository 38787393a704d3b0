// torch.ops.trtvlm.speculative_accept in one launch of one block, and nothing read back: drafted tokens are tested against given
// uniform numbers, and the token after those that stand is drawn. Sums are float64, in an order that the sizes alone decide.
#include "common.cuh"

constexpr int WARPS = 16, UNROLL = 4;
constexpr u32 WHOLE_WARP = 0xffffffffu;
typedef long long i64;

// What is left of the target's probability at a token; `drafted` null: all of it.
DEVICE double weight_of(const float* target, const float* drafted, int token) {
    const double weight = target[token];
    if (!drafted) return weight;
    const double left = weight - double(drafted[token]);
    return left > 0.0 ? left : 0.0;
}

DEVICE double warp_total(double value) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(WHOLE_WARP, value, offset);
    return value;
}

// This warp's share of the weights: tokens [begin, end).
DEVICE double share_of(const float* target, const float* drafted, int begin, int end) {
    double sum = 0.0;
    for (int base = begin + lane_id(); base < end; base += 32 * UNROLL) {
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int token = base + 32 * i;
            if (token < end) sum += weight_of(target, drafted, token);
        }
    }
    return warp_total(sum);
}

// tokens i64 [drafted], q float [drafted, vocab], p float [drafted + 1, vocab], uniforms double [drafted + 1]; count and token
// i64 [1]. drafted at most 31.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    speculative_accept(const i64* tokens, const float* q, const float* p, const double* uniforms, int drafted, int vocab,
                       i64* count_out, i64* token_out) {
    __shared__ double shares[WARPS];
    __shared__ int counts[WARPS], lasts[WARPS];
    const int lane = lane_id(), warp = warp_id();
    // Every warp for itself: no barrier.
    bool stands = false;
    if (lane < drafted) {
        const size_t at = size_t(lane) * vocab + tokens[lane];
        stands = uniforms[lane] * double(q[at]) < double(p[at]);
    }
    const int accepted = __ffs(__ballot_sync(WHOLE_WARP, !stands)) - 1;  // lane `drafted` never stands
    const float* target = p + size_t(accepted) * vocab;
    const float* subtracted = accepted < drafted ? q + size_t(accepted) * vocab : nullptr;

    const int each = (vocab + WARPS - 1) / WARPS, begin = min(vocab, warp * each), end = min(vocab, begin + each);
    double before = 0.0, total = 0.0;
    for (int attempt = 0; attempt < 2; ++attempt) {
        const double mine = share_of(target, subtracted, begin, end);
        if (lane == 0) shares[warp] = mine;
        __syncthreads();
        before = total = 0.0;
        for (int i = 0; i < WARPS; ++i) {
            if (i == warp) before = total;
            total += shares[i];
        }
        __syncthreads();
        // Rounding may leave nothing where p equals q and the test still fell: p itself then.
        if (total > 0.0 || !subtracted) break;
        subtracted = nullptr;
    }

    // Tokens whose cumulative weight does not pass the drawn number, and the last token with any weight: the number may
    // round up to the total.
    const double drawn = uniforms[drafted] * total;
    int below = 0, last = -1;
    double sum = before;
    for (int base = begin; base < end; base += 32) {
        const int token = base + lane;
        const double weight = token < end ? weight_of(target, subtracted, token) : 0.0;
        if (weight > 0.0) last = token;
        double upto = weight;
#pragma unroll
        for (int offset = 1; offset < 32; offset <<= 1) {
            const double lower = __shfl_up_sync(WHOLE_WARP, upto, offset);
            if (lane >= offset) upto += lower;
        }
        if (token < end && sum + upto <= drawn) ++below;
        sum += __shfl_sync(WHOLE_WARP, upto, 31);
    }
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) {
        below += __shfl_xor_sync(WHOLE_WARP, below, offset);
        last = max(last, __shfl_xor_sync(WHOLE_WARP, last, offset));
    }
    if (lane == 0) counts[warp] = below, lasts[warp] = last;
    __syncthreads();
    if (threadIdx.x == 0) {
        int index = 0;
        for (int i = 0; i < WARPS; ++i) {
            index += counts[i];
            last = max(last, lasts[i]);
        }
        *count_out = accepted;
        *token_out = max(0, min(index, last));
    }
}

// One warp. choices i64 [drafted + 1]: the target's own tokens.
extern "C" __global__ void __launch_bounds__(32)
    speculative_accept_greedy(const i64* tokens, const i64* choices, int drafted, i64* count_out, i64* token_out) {
    const int lane = lane_id();
    const bool stands = lane < drafted && tokens[lane] == choices[lane];
    const int accepted = __ffs(__ballot_sync(WHOLE_WARP, !stands)) - 1;
    if (lane == 0) {
        *count_out = accepted;
        *token_out = choices[accepted];
    }
}
