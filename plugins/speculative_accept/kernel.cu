// The end of a speculative step: which drafted tokens stand, the token after them, and everything made ready for the next.
#include "sampling/philox.cuh"
#include "sampling/slices.cuh"
#include "speculative_accept/choose.cuh"
#include "speculative_accept/state.cuh"

constexpr int CHOOSE_WARPS = 8;
constexpr int ACCEPT_WARPS = 16;

// Block m: tokens_out[m] = the most likely token of row m.
extern "C" __global__ void __launch_bounds__(32 * CHOOSE_WARPS)
    choose(const float* values, const int* tokens, int blocks, int* tokens_out) {
    const Candidate best = block_best<CHOOSE_WARPS>(values + blockIdx.x * blocks, tokens + blockIdx.x * blocks, blocks);
    if (threadIdx.x == 0) tokens_out[blockIdx.x] = best.token;
}

// One block. The target's choices [drafted + 1] are given, or found here from its candidates (values not null) and written.
extern "C" __global__ void __launch_bounds__(32 * ACCEPT_WARPS)
    accept_greedy(int* state, int* ring, int capacity, int drafted, int* choices, const float* values, const int* tokens,
                  int blocks) {
    __shared__ Candidate found[ACCEPT_WARPS];
    const int rows = drafted + 1, parts = ACCEPT_WARPS / rows, lane = lane_id();
    if (values) {
        const int row = warp_id() / parts, part = warp_id() % parts;
        if (row < rows) {
            const Candidate best =
                best_of(values + row * blocks, tokens + row * blocks, blocks, 32 * part + lane, 32 * parts);
            if (lane == 0) found[warp_id()] = best;
        }
        __syncthreads();
    }
    if (warp_id()) return;
    int choice = -1;
    if (lane < rows) {
        if (values) {
            Candidate best = found[lane * parts];
            for (int part = 1; part < parts; ++part) best = better(best, found[lane * parts + part]);
            choice = best.token;
            if (choices) choices[lane] = choice;
        } else {
            choice = choices[lane];
        }
    }
    const u32 falls = __ballot_sync(WHOLE_WARP, lane >= drafted || state[INPUTS + 2 + lane] != choice);
    const int accepted = __ffs(falls) - 1;
    advance(state, ring, capacity, drafted, accepted, __shfl_sync(WHOLE_WARP, choice, accepted));
}

#ifdef VOCAB
// What the token after the accepted ones is drawn from, in units of 2^-60: max(0, p - q) (p where q
// is null), and p itself.
DEVICE void residual_of(u64 (&residual)[SLICE_ITEMS], u64 (&whole)[SLICE_ITEMS], const float* p, const float* q, int slice) {
    float target[SLICE_ITEMS], draft[SLICE_ITEMS];
    load_slice(target, p, slice, 0.f);
    if (q) load_slice(draft, q, slice, 0.f);
#pragma unroll
    for (int i = 0; i < SLICE_ITEMS; ++i) {
        whole[i] = to_fixed(target[i], PROBABILITY_ONE);
        residual[i] = q ? to_fixed(fmaxf(target[i] - draft[i], 0.f), PROBABILITY_ONE) : whole[i];
    }
}

// Grid: SLICES. p float [drafted + 1, VOCAB], q float [drafted, VOCAB]; sums u64 [2, SLICES] and counter u32 [1] are
// workspace, the counter 0 before and after. Every block tests the drafted tokens, sums its slice of the residual, and the
// last one to finish draws and advances.
extern "C" __global__ void __launch_bounds__(SLICE_THREADS)
    accept_sampled(int* state, int* ring, int capacity, int drafted, const float* q, const float* p, u64* sums,
                   u32* counter) {
    const int lane = lane_id();
    // Every warp for itself: no barrier.
    bool stands = false;
    if (lane < drafted) {
        const int token = state[INPUTS + 2 + lane];
        // u < p / q without the division.
        stands = unit(random_fraction(state, ACCEPT_TEST + lane)) * double(q[lane * VOCAB + token]) <
                 double(p[lane * VOCAB + token]);
    }
    const int accepted = __ffs(__ballot_sync(WHOLE_WARP, !stands)) - 1;  // lane `drafted` never stands
    const float* row = p + accepted * VOCAB;
    const float* subtracted = accepted < drafted ? q + accepted * VOCAB : nullptr;

    u64 residual[SLICE_ITEMS], whole[SLICE_ITEMS];
    residual_of(residual, whole, row, subtracted, blockIdx.x);
    const u64 residual_sum = block_sum(thread_sum(residual)), whole_sum = block_sum(thread_sum(whole));
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = residual_sum;
        sums[SLICES + blockIdx.x] = whole_sum;
    }
    if (!last_block(counter)) return;

    // Rounding may leave nothing where p equals q and the test still fell: p itself then.
    u64 total = sum_of(sums);
    const bool use_whole = total == 0;
    if (use_whole) total = sum_of(sums + SLICES);
    const u64 fraction = random_fraction(state, TARGET_DRAW);
    const Place place = find_slice(sums + (use_whole ? SLICES : 0), __umul64hi(total, fraction));
    residual_of(residual, whole, row, use_whole ? nullptr : subtracted, place.index);
    const int own = find_token(residual, place);
    if (warp_id() == 0) advance(state, ring, capacity, drafted, accepted, own);
}
#endif
