// Temperature and top-p over a whole vocabulary, exactly, without sorting, and a draw from what is left. reference.py says the
// same in numpy.
//
// A token's weight is exp((logit - peak) / temperature) in units of 2^-44. Top-p is a radix selection on the bits of the
// exponential (floats >= 0 are ordered as their bits): three histograms of weights, 10 bits each, find the smallest one that
// is kept and how much weight is above it; of several equal ones, the smaller tokens are kept.
#include "sampling/philox.cuh"
#include "sampling/slices.cuh"
#include "speculative_accept/choose.cuh"
#include "speculative_accept/state.cuh"

constexpr float WEIGHT_ONE = 17592186044416.f;  // 2^44: the weights of a vocabulary fit 64 bits
constexpr int LEVELS = 3, BUCKETS = 1024;
constexpr int NO_BUCKET = BUCKETS;  // above all bits: nothing is selected, everything is kept

// What one launch tells the next about a row.
struct Selected {
    float peak;  // the largest logit
    int peak_token;
    u64 total;
    int bucket[LEVELS];
    u64 above;   // weight of all buckets above those
    u64 wanted;  // weight still wanted of the last bucket
};

// Workspace of a row.
struct Row {
    u64 histogram[LEVELS][BUCKETS];  // all zero between calls, but the last one
    u64 sums[SLICES];
    Selected selected[LEVELS];
    u32 counter, unused;
};
static_assert(sizeof(Row) == 8 * (LEVELS * BUCKETS + SLICES + LEVELS * 6 + 1), "what sampling/cuda.py allocates");

DEVICE int shift_of(int level) { return 20 - 10 * level; }
DEVICE int bucket_of(u32 bits, int level) { return int(bits >> shift_of(level)) & (BUCKETS - 1); }

struct Weights {
    float relative[SLICE_ITEMS];  // exp((logit - peak) / temperature), 0 to 1
};

DEVICE Weights weights_of(const float* logits, int slice, float peak, int peak_token, const int* state) {
    const float temperature = __int_as_float(state[TEMPERATURE]);
    Weights out;
    load_slice(out.relative, logits, slice, 0.f);
    const int first = first_token(slice);
#pragma unroll
    for (int i = 0; i < SLICE_ITEMS; ++i) {
        // The largest logit is taken off before the division: no temperature, however small, overflows.
        float weight = temperature > 0.f ? expf((out.relative[i] - peak) / temperature) : 0.f;
        weight = weight > 0.f && first < VOCAB ? fminf(weight, 1.f) : 0.f;  // 0 also for not-a-number
        out.relative[i] = first + i == peak_token ? 1.f : weight;
    }
    return out;
}

// Whether a weight lies in the buckets selected at the levels before LEVEL.
template <int LEVEL>
DEVICE bool selects(const Selected& selected, u32 bits) {
    bool inside = true;
#pragma unroll
    for (int level = 0; level < LEVEL; ++level) inside = inside && bucket_of(bits, level) == selected.bucket[level];
    return inside;
}

// histogram (global) += the weights of this slice that lie in the selected buckets of the levels before.
template <int LEVEL>
DEVICE void count(u64* histogram, const Weights& weights, const Selected& selected) {
    __shared__ u64 local[BUCKETS];
    for (int i = threadIdx.x; i < BUCKETS; i += SLICE_THREADS) local[i] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SLICE_ITEMS; ++i) {
        const u32 bits = __float_as_uint(weights.relative[i]);
        const u64 weight = to_fixed(weights.relative[i], WEIGHT_ONE);
        // Integers: the order of additions changes nothing.
        if (weight && selects<LEVEL>(selected, bits)) atomicAdd(&local[bucket_of(bits, LEVEL)], weight);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < BUCKETS; i += SLICE_THREADS)
        if (local[i]) atomicAdd(histogram + i, local[i]);
}

// Adds a level to `selected`: the bucket in which the weight of the larger ones reaches what is wanted.
template <int LEVEL>
DEVICE void select(Selected& selected, const u64* histogram, float top_p) {
    static_assert(BUCKETS == 2 * SLICE_THREADS, "two buckets a thread, from the top down");
    __shared__ int bucket;
    __shared__ u64 above;
    const int upper = BUCKETS - 1 - 2 * int(threadIdx.x);
    const u64 mine[2] = {__ldcg(histogram + upper), __ldcg(histogram + upper - 1)};
    const Scan scan = block_scan(mine[0] + mine[1]);
    if (LEVEL == 0) {
        selected.total = scan.total;
        selected.above = 0;
        // Kept are tokens of which the larger ones cover less than top_p. At least the first.
        selected.wanted = max(1ull, __double2ull_ru(double(top_p) * double(scan.total)));
    }
    if (top_p >= 1.f) {
        selected.bucket[LEVEL] = NO_BUCKET;
        return;
    }
    if (threadIdx.x == 0) bucket = BUCKETS - 1, above = 0;
    __syncthreads();
    u64 before = scan.before;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (before < selected.wanted && selected.wanted - before <= mine[i]) bucket = upper - i, above = before;
        before += mine[i];
    }
    __syncthreads();
    selected.bucket[LEVEL] = bucket;
    selected.above += above;
    selected.wanted -= above;
}

DEVICE void clear(u64* histogram) {
    for (int i = threadIdx.x; i < BUCKETS; i += SLICE_THREADS) histogram[i] = 0;
}

// Grid of all: (SLICES, rows). logits float [rows, VOCAB]; the head's candidates [rows, blocks] give the peak.
extern "C" __global__ void __launch_bounds__(SLICE_THREADS)
    weigh(const float* logits, const float* values, const int* tokens, int blocks, const int* state, Row* rows) {
    const int row = blockIdx.y;
    const Candidate peak = block_best<SLICE_WARPS>(values + row * blocks, tokens + row * blocks, blocks);
    Selected selected = {};
    selected.peak = peak.value;
    selected.peak_token = peak.token;
    const Weights weights = weights_of(logits + row * VOCAB, blockIdx.x, peak.value, peak.token, state);
    count<0>(rows[row].histogram[0], weights, selected);
    if (blockIdx.x == 0) {
        clear(rows[row].histogram[2]);  // its last reader was the call before
        if (threadIdx.x == 0) rows[row].selected[0] = selected;
    }
}

// Selects in the histogram of the level before and fills the one of this level.
template <int LEVEL>
DEVICE void refine_level(const float* logits, const int* state, Row& row) {
    const float top_p = __int_as_float(state[TOP_P]);
    Selected selected = row.selected[LEVEL - 1];
    select<LEVEL - 1>(selected, row.histogram[LEVEL - 1], top_p);
    if (blockIdx.x == 0) {
        if (LEVEL == 2) clear(row.histogram[0]);
        if (threadIdx.x == 0) row.selected[LEVEL] = selected;
    }
    if (top_p >= 1.f) return;
    const Weights weights = weights_of(logits + blockIdx.y * VOCAB, blockIdx.x, selected.peak, selected.peak_token, state);
    count<LEVEL>(row.histogram[LEVEL], weights, selected);
}

extern "C" __global__ void __launch_bounds__(SLICE_THREADS) refine_1(const float* logits, const int* state, Row* rows) {
    refine_level<1>(logits, state, rows[blockIdx.y]);
}

extern "C" __global__ void __launch_bounds__(SLICE_THREADS) refine_2(const float* logits, const int* state, Row* rows) {
    refine_level<2>(logits, state, rows[blockIdx.y]);
}

// What is kept of a row: everything above `bits`, and the first `equals` tokens (of `all_equals`) at it.
struct Kept {
    u32 bits;
    u64 equals, all_equals, total;
};

// The kept weights of a slice; the others become 0.
DEVICE void keep(Weights& weights, const Kept& kept, const Selected& selected, const float* logits, int slice,
                 const int* state) {
    u64 rank = 0;
    if (kept.equals < kept.all_equals) {
        // Equal tokens on the border, which is rare: count those of the slices before.
        u64 before = 0;
        for (int earlier = 0; earlier < slice; ++earlier) {
            const Weights others = weights_of(logits, earlier, selected.peak, selected.peak_token, state);
#pragma unroll
            for (int i = 0; i < SLICE_ITEMS; ++i) before += __float_as_uint(others.relative[i]) == kept.bits;
        }
        u64 mine = 0;
#pragma unroll
        for (int i = 0; i < SLICE_ITEMS; ++i) mine += __float_as_uint(weights.relative[i]) == kept.bits;
        rank = block_sum(before);
        rank += block_scan(mine).before;
    }
#pragma unroll
    for (int i = 0; i < SLICE_ITEMS; ++i) {
        const u32 bits = __float_as_uint(weights.relative[i]);
        bool stays = bits > kept.bits;
        if (bits == kept.bits) stays = rank++ < kept.equals;
        if (!stays || to_fixed(weights.relative[i], WEIGHT_ONE) == 0) weights.relative[i] = 0.f;
    }
}

DEVICE u64 kept_sum(const Weights& weights, u64 (&fixed)[SLICE_ITEMS]) {
#pragma unroll
    for (int i = 0; i < SLICE_ITEMS; ++i) fixed[i] = to_fixed(weights.relative[i], WEIGHT_ONE);
    return thread_sum(fixed);
}

// probs float [rows, VOCAB]. With `token` not null, the last block of row m draws token[m] with random number which + m.
extern "C" __global__ void __launch_bounds__(SLICE_THREADS)
    finish(const float* all_logits, const int* state, Row* rows, float* probs, int* token, int which) {
    Row& row = rows[blockIdx.y];
    const float* logits = all_logits + blockIdx.y * VOCAB;
    const float top_p = __int_as_float(state[TOP_P]);
    Selected selected = row.selected[2];
    Kept kept = {0, 0, 0, selected.total};
    if (top_p < 1.f) {
        select<2>(selected, row.histogram[2], top_p);
        const int bucket = selected.bucket[2];
        kept.bits = u32(selected.bucket[0]) << 20 | u32(selected.bucket[1]) << 10 | u32(bucket);
        const u64 weight = max(1ull, to_fixed(__uint_as_float(kept.bits), WEIGHT_ONE));  // of each in the bucket
        kept.equals = (selected.wanted + weight - 1) / weight;
        kept.all_equals = __ldcg(row.histogram[2] + bucket) / weight;
        kept.total = selected.above + kept.equals * weight;
    }
    if (blockIdx.x == 0) clear(row.histogram[1]);

    Weights weights = weights_of(logits, blockIdx.x, selected.peak, selected.peak_token, state);
    keep(weights, kept, selected, logits, blockIdx.x, state);
    const int first = first_token(blockIdx.x);
    if (first < VOCAB) {
        const float total = float(double(kept.total) * (1.0 / double(WEIGHT_ONE)));
        float out[SLICE_ITEMS];
#pragma unroll
        for (int i = 0; i < SLICE_ITEMS; ++i) out[i] = weights.relative[i] / total;
        float4* to = reinterpret_cast<float4*>(probs + blockIdx.y * VOCAB + first);
        to[0] = make_float4(out[0], out[1], out[2], out[3]);
        to[1] = make_float4(out[4], out[5], out[6], out[7]);
    }
    if (!token) return;

    u64 fixed[SLICE_ITEMS];
    const u64 sum = block_sum(kept_sum(weights, fixed));
    if (threadIdx.x == 0) row.sums[blockIdx.x] = sum;
    if (!last_block(&row.counter)) return;
    const Place place = find_slice(row.sums, __umul64hi(kept.total, random_fraction(state, which + blockIdx.y)));
    if (place.index != blockIdx.x) {
        weights = weights_of(logits, place.index, selected.peak, selected.peak_token, state);
        keep(weights, kept, selected, logits, place.index, state);
        kept_sum(weights, fixed);
    }
    const int drawn = find_token(fixed, place);
    if (threadIdx.x == 0) token[blockIdx.y] = drawn;
}
