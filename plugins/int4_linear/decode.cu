// y = x @ W^T for 1 to 16 activation rows. A block takes a few row tiles of the weight and all inputs; its warps share the
// inputs (slice.cuh). Macros: IN_FEATURES, BLOCK_WARPS; row tiles of each kind and how many a block takes: INT4_TILES, HALF_TILES,
// INT4_BLOCK, HALF_BLOCK (with GATED_OUT pairs of tiles: up and gate); NORMALISED: x is the residual stream, to be
// normalised; PRE_SCALED: INT4 inputs are multiplied by pre_quant_scale; EPILOGUE: what becomes of y;
// ONE_ROW: there is no other row.
#include "int4_linear/slice.cuh"
#include "int4_linear/weights.cuh"
#include "turns.cuh"

constexpr int INPUTS = IN_FEATURES, WARPS = BLOCK_WARPS;
constexpr bool SCALED = PRE_SCALED;

constexpr int HALF_OUT = 0;   // out = y
constexpr int RESIDUAL = 1;   // residual += y, and the sums of 16 squares of it
constexpr int GATED_OUT = 2;  // out = silu(gate) * up * next_scale; the gate's row tiles follow all the up tiles

constexpr int THREADS = 32 * WARPS, LANDING = 36 << 10;  // bytes of shared memory for weights
constexpr int PAIR = EPILOGUE == GATED_OUT ? 2 : 1;
constexpr int INT4_COUNT = INT4_TILES / PAIR, HALF_COUNT = HALF_TILES / PAIR;  // tiles, or pairs of tiles
constexpr int HALF_BLOCKS = (HALF_COUNT + HALF_BLOCK - 1) / HALF_BLOCK;
using Part = Slice<INPUTS, WARPS>;
// Whether a warp has its slice of the rows in shared memory.
constexpr bool STAGED = NORMALISED || ONE_ROW;

struct Arguments {
    const void* x;             // half [rows, INPUTS], or float when NORMALISED
    const float* square_sums;  // [rows, INPUTS / 16]
    const u16* norm;           // [INPUTS]
    float eps;
    const u16* pre_quant_scale;  // [INPUTS]
    u16* out;                    // GATED_OUT: [rows, tiles / 2 * 16]
    int stride;                  // halves between rows of out
    float* residual;             // [rows, tiles * 16]
    float* square_sums_out;      // [rows, tiles]
    const u16* next_scale;       // [tiles / 2 * 16] or null
};

// Bytes of shared memory a warp has, for its activations and what they are multiplied with first, and for its partial sums then.
DEVICE int activation_bytes(int rows) { return STAGED ? rows * Part::STRIDE * 2 : 0; }
DEVICE int warp_bytes(int rows) {
    constexpr int tiles = PAIR * larger(INT4_TILES ? INT4_BLOCK : 0, HALF_TILES ? HALF_BLOCK : 0);
    constexpr int factors = NORMALISED && !ONE_ROW ? (1 + SCALED) * NormSlice<Part, SCALED>::HALVES * 2 : 0;
    return larger(tiles * COLUMNS * PARTIAL_COLUMN * 4, activation_bytes(rows) + factors);
}

// This lane's part of one group of the half activations, straight from global memory.
DEVICE Activation load_direct(const u16* x, int group, bool present) {
    Activation out = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    if (present) {
        const u16* at = x + (lane_id() >> 2) * INPUTS + group * TILE_INPUTS + 16 * (lane_id() & 3);
        out.first = *reinterpret_cast<const uint4*>(at);
        out.second = *reinterpret_cast<const uint4*>(at + 8);
    }
    return out;
}

// sum += a step of INT4 tiles times rows that are fixed point (fixed.cuh): a warp's slice of them, and its scales.
constexpr int SCALE_ROWS = ONE_ROW ? 1 : COLUMNS;  // scales of a group, side by side
template <int TILES>
DEVICE void multiply_fixed(float (&sum)[TILES][4], const Int4Weight (&weight)[TILES], const u16* rows_x, const float* scales, int rows) {
    if (ONE_ROW) {
        const uint4 x = load_fixed_row(rows_x);
#pragma unroll
        for (int r = 0; r < TILES; ++r) {
            float one[2] = {sum[r][0], sum[r][2]};
            fixed_row_tile(one, weight[r].codes, weight[r].scale, x, scales[0]);
            sum[r][0] = one[0], sum[r][2] = one[1];
        }
        return;
    }
    // What a row that is not there gives is never used.
    const FixedActivation x = load_fixed(rows_x + smaller(lane_id() >> 2, rows - 1) * Part::STRIDE);
    const int column = 2 * (lane_id() & 3);
    const float2 by = {scales[column], scales[column + 1]};
#pragma unroll
    for (int r = 0; r < TILES; ++r) fixed_tile(sum[r], weight[r].codes, weight[r].scale, x, by);
}
template <int TILES>
DEVICE void multiply_fixed(float (&)[TILES][4], const HalfWeight (&)[TILES], const u16*, const float*, int) {}  // never called

template <bool SCALE, class Store>
DEVICE void normalise(const Store& store, const Arguments& a, const float* residual, const float* square_sums,
                      const NormSlice<Part, SCALE>& by, int rows) {
    if (ONE_ROW) normalise_row<INPUTS, WARPS, SCALE, 1>(store, residual, square_sums, a.norm, a.pre_quant_scale, a.eps);
    else normalise_rows<INPUTS, WARPS, SCALE>(store, residual, square_sums, by, rows, a.eps);
}

// The tiles, or pairs of tiles, first .. first + COUNT - 1 of `count`.
template <class Weight, int COUNT, bool SCALE>
DEVICE void work(const Arguments& a, const uint4* weights, const u32* scales, int first, int count, int all_rows,
                 const Turn& turn) {
    extern __shared__ uint4 shared[];
    constexpr int TILES = PAIR * COUNT, GROUPS = Part::GROUPS, STEPS = Part::STEPS;
    // Normalised rows become fixed point at once, where they are long enough to be worth it.
    constexpr bool FIXED = NORMALISED && Weight::FIXED && STEPS > 4;
    // Registers a step needs: as many steps are under way as fit beside the rest.
    constexpr int WEIGHT = Weight::REGISTERS * TILES;
    constexpr int STEP = STAGED ? WEIGHT : WEIGHT + (SCALE ? 16 : 8);
    constexpr int FOR_INT4 = FIXED && !ONE_ROW ? 40 : 72, FOR_HALVES = ONE_ROW || STEPS <= 4 ? 80 : 64;
    constexpr int ROOM = !STAGED ? (WARPS > 8 ? 72 : 88) : Weight::BYTES ? FOR_INT4 : FOR_HALVES;
    constexpr int DEPTH = smaller(STEPS, larger(1, ROOM / STEP));

    // Of the others, as many as fit go by way of shared memory.
    constexpr int STEP_BYTES = TILES * Weight::BYTES;
    constexpr int LANDED = STEP_BYTES && WARPS <= 8 ? smaller(STEPS - DEPTH, LANDING / (WARPS * larger(1, STEP_BYTES))) : 0;
    __shared__ __align__(16) char landing[larger(16, WARPS * LANDED * STEP_BYTES)];
    auto landed = [&](int place, int r) { return landing + (warp_id() * LANDED + place) * STEP_BYTES + r * Weight::BYTES; };

    // A lone row has code of its own, half as long: a step's kernels together should stay in the instruction cache.
    const int row0 = ONE_ROW ? 0 : blockIdx.y * COLUMNS, rows = ONE_ROW ? 1 : smaller(COLUMNS, all_rows - row0);
    const int bytes = warp_bytes(ONE_ROW ? 1 : smaller(COLUMNS, all_rows));
    char* own = reinterpret_cast<char*>(shared) + warp_id() * bytes;
    u16* own_x = reinterpret_cast<u16*>(own);
    __shared__ float all_scales[FIXED ? WARPS : 1][STEPS][SCALE_ROWS];
    float* x_scales = all_scales[FIXED ? warp_id() : 0][0];

    // A block past the end computes the last tile again, and does not write it.
    auto tile_of = [&](int r) {
        const int item = smaller(first + r % COUNT, count - 1);
        return r < COUNT ? item : count + item;
    };
    Weight weight[STEPS][TILES];
    auto load_weights = [&](int step) {
        if (!Part::has(step)) return;
#pragma unroll
        for (int r = 0; r < TILES; ++r) weight[step][r].load(weights, scales, tile_of(r) * GROUPS + Part::group(step));
    };
    auto in_landing = [&](int step) { return step >= DEPTH && step < DEPTH + LANDED; };
    auto take_weights = [&](int step) {
        if (!Part::has(step)) return;
#pragma unroll
        for (int r = 0; r < TILES; ++r) weight[step][r].take(landed(step - DEPTH, r));
    };
    const bool present = (lane_id() >> 2) < rows;
    const u16* halves = static_cast<const u16*>(a.x) + size_t(row0) * INPUTS;
    Activation x[DEPTH];
    Activation scale[DEPTH];
    auto load_scales = [&](int step) {
        if (!STAGED && SCALE && Part::has(step))
            scale[step % DEPTH] = load_activation(a.pre_quant_scale, 0, Part::group(step), true);
    };
    auto load_inputs = [&](int step) {
        if (!STAGED && Part::has(step)) x[step % DEPTH] = load_direct(halves, Part::group(step), present);
    };

    const NormSlice<Part, SCALE> by = {own_x + activation_bytes(smaller(COLUMNS, all_rows)) / 2};
    if (NORMALISED && !ONE_ROW) by.ask(a.norm, a.pre_quant_scale);
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) load_weights(step);
#pragma unroll
    for (int place = 0; place < LANDED; ++place) {
        if (!Part::has(DEPTH + place)) continue;
#pragma unroll
        for (int r = 0; r < TILES; ++r)
            Weight::land(landed(place, r), weights, scales, tile_of(r) * GROUPS + Part::group(DEPTH + place));
    }
    if (LANDED) copy_commit();
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) load_scales(step);
    // A lone row of halves goes by way of shared memory, too.
    constexpr bool PIECES = STAGED && !NORMALISED;
    RowPieces<Part, SCALE> pieces;
    if (PIECES) pieces.load_scales(a.pre_quant_scale);
    // What the residual was, for the end: this thread's outputs.
    constexpr int OUTPUTS = (COUNT * TILE_ROWS * COLUMNS + THREADS - 1) / THREADS;
    float before[OUTPUTS];
    if (EPILOGUE == RESIDUAL) {
#pragma unroll
        for (int n = 0; n < OUTPUTS; ++n) {
            const int index = threadIdx.x + n * THREADS, at = index >> 4;
            const int column = at / COUNT, item = first + at % COUNT;
            before[n] = 0.f;
            if (column < rows && item < count)
                before[n] = a.residual[size_t(row0 + column) * count * TILE_ROWS + item * TILE_ROWS + (index & 15)];
        }
    }
    if (NORMALISED && ONE_ROW) {
        fetch_halves(a.norm, INPUTS);
        if (SCALE) fetch_halves(a.pre_quant_scale, INPUTS);
    }
    await_turn(turn);
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) load_inputs(step);
    if (NORMALISED) {
        const float* residual = static_cast<const float*>(a.x) + size_t(row0) * INPUTS;
        const float* square_sums = a.square_sums + row0 * (INPUTS / 16);
        const AsFixed<Part::STRIDE, SCALE_ROWS> fixed = {own_x, x_scales};
        const AsHalves<Part::STRIDE> as_halves = {own_x};
        if (!ONE_ROW) {
            copy_wait<LANDED ? 1 : 0>();
            __syncwarp();
        }
        if (FIXED) normalise<SCALE>(fixed, a, residual, square_sums, by, rows);
        else normalise<SCALE>(as_halves, a, residual, square_sums, by, rows);
    }
    if (PIECES) pieces.stage(own_x, halves);
    if (LANDED) copy_wait<0>();
    if (LANDED || STAGED) __syncwarp();

    float sum[TILES][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        if (FIXED) {
            if (Part::has(step)) multiply_fixed(sum, weight[step], own_x + step * TILE_INPUTS, x_scales + step * SCALE_ROWS, rows);
        } else if (Part::has(step)) {
            Activation now = x[step % DEPTH];
            if (STAGED) {
                now = load_activation(own_x, Part::STRIDE, step, present);
            } else if (SCALE) {
                half2_scale(now.first, scale[step % DEPTH].first);
                half2_scale(now.second, scale[step % DEPTH].second);
            }
#pragma unroll
            for (int r = 0; r < TILES; ++r) weight[step][r].multiply(sum[r], now);
        }
        // What comes next of those that are not in `landing`.
        const int next = step < DEPTH ? step + DEPTH + LANDED : step + DEPTH;
        if (!in_landing(step) && next < STEPS) load_weights(next);
        if (in_landing(step + DEPTH)) take_weights(step + DEPTH);
        if (step + DEPTH < STEPS) {
            load_scales(step + DEPTH);
            load_inputs(step + DEPTH);
        }
    }

    __syncwarp();  // the warp's activations were read; its sums take their place
#pragma unroll
    for (int r = 0; r < TILES; ++r)
        store_partial(reinterpret_cast<float*>(own) + r * COLUMNS * PARTIAL_COLUMN, sum[r], rows);
    __syncthreads();

    const float* partial = reinterpret_cast<const float*>(shared);
#pragma unroll
    for (int n = 0; n < OUTPUTS; ++n) {
        const int index = threadIdx.x + n * THREADS, at = index >> 4;
        const int column = at / COUNT, r = at % COUNT, item = first + r, output = item * TILE_ROWS + (index & 15);
        const bool mine = column < rows && item < count;
        const int row = row0 + column, place = (r * COLUMNS + column) * PARTIAL_COLUMN + (index & 15);
        float y = mine ? sum_partials<WARPS>(partial + place, bytes / 4) : 0.f;
        if (EPILOGUE == RESIDUAL) {
            y += before[n];
            float square = y * y;
            // 16 neighbouring lanes hold 16 neighbouring outputs of one row.
#pragma unroll
            for (int offset = 8; offset; offset >>= 1) square += __shfl_xor_sync(0xffffffffu, square, offset);
            if (mine) {
                a.residual[size_t(row) * count * TILE_ROWS + output] = y;
                if ((index & 15) == 0) a.square_sums_out[row * count + item] = square;
            }
        } else if (mine) {
            if (EPILOGUE == GATED_OUT) {
                const float gate = sum_partials<WARPS>(partial + place + COUNT * COLUMNS * PARTIAL_COLUMN, bytes / 4);
                y *= silu(gate);
                if (a.next_scale) y *= half_to_float(a.next_scale[output]);
            }
            a.out[size_t(row) * a.stride + output] = float_to_half(y);
        }
    }
}

// Blocks of half tiles come first: they have the most to read. grid (blocks of both kinds, rows / 8), THREADS a block.
extern "C" __global__ void __launch_bounds__(THREADS, WARPS > 8 ? 1 : 2)
    linear(const void* x, const float* square_sums, const u16* norm, float eps, const u16* pre_quant_scale, const uint4* codes,
           const u32* scales, const uint4* halves, u16* out, int stride, u16* half_out, int half_stride, float* residual,
           float* square_sums_out, const u16* next_scale, int rows, TurnCounters* turns, int index, int before) {
    const Turn turn = {turns, index, before};
    Arguments a = {x, square_sums, norm, eps, pre_quant_scale, out, stride, residual, square_sums_out, next_scale};
    const int block = blockIdx.x;
    if (HALF_TILES && (!INT4_TILES || block < HALF_BLOCKS)) {
        a.out = half_out;
        a.stride = half_stride;
        work<HalfWeight, HALF_BLOCK, false>(a, halves, nullptr, block * HALF_BLOCK, HALF_COUNT, rows, turn);
    } else if (INT4_TILES) {
        work<Int4Weight, INT4_BLOCK, SCALED != 0>(a, codes, scales, (block - HALF_BLOCKS) * INT4_BLOCK, INT4_COUNT, rows, turn);
    }
    finish_turn(turn);
}
