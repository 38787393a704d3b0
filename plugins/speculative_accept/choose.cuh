// The most likely token out of the LM head's candidates: the best value of each of its blocks, and the token it is of.
#pragma once
#include "common.cuh"

struct Candidate {
    float value;
    int token;
};

// Equal values go to the smaller token, so the best one does not depend on the order of comparison.
DEVICE Candidate better(Candidate a, Candidate b) {
    return b.value > a.value || (b.value == a.value && b.token < a.token) ? b : a;
}

DEVICE Candidate warp_best(Candidate best) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) {
        const float value = __shfl_xor_sync(0xffffffffu, best.value, offset);
        const int token = __shfl_xor_sync(0xffffffffu, best.token, offset);
        best = better(best, Candidate{value, token});
    }
    return best;
}

// Over candidates first, first + stride, ... of one row; where nothing compares (not-a-number everywhere), token 0.
DEVICE Candidate best_of(const float* values, const int* tokens, int blocks, int first, int stride) {
    Candidate best = {__int_as_float(int(0xff800000u)), 0};  // minus infinity
#pragma unroll 8
    for (int i = first; i < blocks; i += stride) best = better(best, Candidate{values[i], tokens[i]});
    return warp_best(best);
}

// By a whole block of WARPS warps; every thread gets the answer.
template <int WARPS>
DEVICE Candidate block_best(const float* values, const int* tokens, int blocks) {
    __shared__ Candidate found[WARPS];
    const Candidate mine = best_of(values, tokens, blocks, threadIdx.x, 32 * WARPS);
    __syncthreads();  // an earlier call may still be read
    if (lane_id() == 0) found[warp_id()] = mine;
    __syncthreads();
    Candidate best = found[0];
#pragma unroll
    for (int i = 1; i < WARPS; ++i) best = better(best, found[i]);
    return best;
}
