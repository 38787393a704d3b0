// y = x @ W^T for 1 to 16 activation rows. A block takes a few row tiles of the weight and all inputs; its warps share the
// inputs (slice.cuh). Macros: IN_FEATURES, BLOCK_WARPS; row tiles of each kind and how many a block takes: INT4_TILES, HALF_TILES,
// INT4_BLOCK, HALF_BLOCK (with GATED_OUT pairs of tiles: up and gate); NORMALISED: x is the residual stream, to be
// normalised; PRE_SCALED: INT4 inputs are multiplied by pre_quant_scale; EPILOGUE: what becomes of y.
#include "int4_linear/ring.cuh"
#include "int4_linear/slice.cuh"
#include "int4_linear/weights.cuh"
#include "turns.cuh"

constexpr int INPUTS = IN_FEATURES, WARPS = BLOCK_WARPS;
constexpr bool SCALED = PRE_SCALED;

constexpr int HALF_OUT = 0;   // out = y
constexpr int RESIDUAL = 1;   // residual += y, and the sums of 16 squares of it
constexpr int GATED_OUT = 2;  // out = silu(gate) * up * next_scale; the gate's row tiles follow all the up tiles

constexpr int THREADS = 32 * WARPS;
constexpr int PAIR = EPILOGUE == GATED_OUT ? 2 : 1;
constexpr int INT4_COUNT = INT4_TILES / PAIR, HALF_COUNT = HALF_TILES / PAIR;  // tiles, or pairs of tiles
constexpr int HALF_BLOCKS = (HALF_COUNT + HALF_BLOCK - 1) / HALF_BLOCK;
using Part = Slice<INPUTS, WARPS>;
constexpr bool STAGED = NORMALISED || WARPS <= 8;  // activations pass through shared memory; of very wide layers they would not fit

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

// What a block asks for before it waits, and multiplies with then: COUNT row tiles, or pairs of them, from `first` of `count` on.
// In shared memory at `own`; a block past the end takes the last tile again.
template <int COUNT>
struct Int4Tiles {
    static constexpr int TILES = PAIR * COUNT, DEPTH = smaller(Part::STEPS, TILES > 2 ? 4 : 8);
    using Ring = WeightRing<TILES, DEPTH>;
    static constexpr int BYTES = Ring::BYTES;
    Ring ring;
    const uint4* codes;
    const u32* scales;
    int first, count;

    DEVICE void ask(int step, int slot) const {
        if (step < Part::STEPS && Part::has(step)) {
            ring.ask(slot, codes, scales, [&](int k) {
                const int item = smaller(first + k % COUNT, count - 1);
                return (k < COUNT ? item : count + item) * Part::GROUPS + Part::group(step);
            });
        } else {
            copy_commit();
        }
    }
    DEVICE void ask() const {
#pragma unroll 1
        for (int step = 0; step < DEPTH; ++step) ask(step, step);
    }
    // `input(step)`: the activations of a step of this warp, asked for a step ahead.
    template <class Input>
    DEVICE void multiply(float (&sum)[TILES][4], Input input) const {
        Activation next = input(0);
#pragma unroll 1
        for (int step = 0, slot = 0; step < Part::STEPS; ++step, slot = slot + 1 < DEPTH ? slot + 1 : 0) {
            const Activation now = next;
            if (step + 1 < Part::STEPS) next = input(step + 1);
            Ring::await_oldest();
            if (Part::has(step)) {
#pragma unroll
                for (int r = 0; r < TILES; ++r) ring.multiply(sum[r], slot, r, now);
            }
            __syncwarp();
            ask(step + DEPTH, slot);
        }
    }
};

// Half tiles are few: they wait in registers, as many steps as there is room for.
template <int COUNT>
struct HalfTiles {
    static constexpr int TILES = PAIR * COUNT, DEPTH = smaller(Part::STEPS, larger(1, 64 / (16 * TILES))), BYTES = 0;
    const uint4* halves;
    int first, count;
    HalfWeight weight[DEPTH][TILES];

    DEVICE void ask(int step) {
        if (!Part::has(step)) return;
#pragma unroll
        for (int r = 0; r < TILES; ++r) {
            const int item = smaller(first + r % COUNT, count - 1), tile = r < COUNT ? item : count + item;
            weight[step % DEPTH][r].load(halves, nullptr, tile * Part::GROUPS + Part::group(step));
        }
    }
    DEVICE void ask() {
#pragma unroll
        for (int step = 0; step < DEPTH; ++step) ask(step);
    }
    template <class Input>
    DEVICE void multiply(float (&sum)[TILES][4], Input input) {
#pragma unroll
        for (int step = 0; step < Part::STEPS; ++step) {
            if (!Part::has(step)) continue;
            const Activation now = input(step);
#pragma unroll
            for (int r = 0; r < TILES; ++r) weight[step % DEPTH][r].multiply(sum[r], now);
            if (step + DEPTH < Part::STEPS) ask(step + DEPTH);
        }
    }
};

DEVICE void scale_by(uint4& x, const uint4& scale) {
    x.x = half2_mul(x.x, scale.x), x.y = half2_mul(x.y, scale.y);
    x.z = half2_mul(x.z, scale.z), x.w = half2_mul(x.w, scale.w);
}

// This warp's slice of the half activations, times `scale` unless it is null, to its own shared memory: 16 bytes a lane.
DEVICE void stage_rows(u16* to, const u16* x, const u16* scale, int rows) {
    for (int index = lane_id(); index < rows * Part::STEPS * 8; index += 32) {
        const int row = index / (Part::STEPS * 8), step = index / 8 % Part::STEPS;
        const int input = Part::group(step) * TILE_INPUTS + index % 8 * 8;
        if (Part::group(step) >= Part::GROUPS) continue;
        uint4 value = *reinterpret_cast<const uint4*>(x + size_t(row) * INPUTS + input);
        if (scale) {
            scale_by(value, *reinterpret_cast<const uint4*>(scale + input));
        }
        *reinterpret_cast<uint4*>(to + row * Part::STRIDE + step * TILE_INPUTS + index % 8 * 8) = value;
    }
}

// This lane's part of one group of the half activations, straight from global memory.
DEVICE Activation load_direct(const u16* x, const u16* scale, int group, bool present) {
    const int input = group * TILE_INPUTS + 16 * (lane_id() & 3);
    Activation out = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    if (!present) return out;
    const uint4* at = reinterpret_cast<const uint4*>(x + size_t(lane_id() >> 2) * INPUTS + input);
    out.first = at[0], out.second = at[1];
    if (scale) {
        const uint4* by = reinterpret_cast<const uint4*>(scale + input);
        scale_by(out.first, by[0]);
        scale_by(out.second, by[1]);
    }
    return out;
}

// `own`: `bytes` of shared memory a warp, for weights, then activations; and for its sums at the end.
template <class Tiles, int COUNT, bool SCALE>
DEVICE void work(Tiles& tiles, const Arguments& a, char* own, int bytes, int first, int count, int all_rows, const Turn& turn) {
    constexpr int TILES = Tiles::TILES;
    const int row0 = blockIdx.y * COLUMNS, rows = smaller(COLUMNS, all_rows - row0);
    u16* x = reinterpret_cast<u16*>(own + Tiles::BYTES);
    const bool present = (lane_id() >> 2) < rows;
    tiles.ask();
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
    if (NORMALISED) fetch_halves(a.norm, INPUTS);
    if (SCALE) fetch_halves(a.pre_quant_scale, INPUTS);
    await_turn(turn);
    if (NORMALISED) {
        const float* residual = static_cast<const float*>(a.x) + size_t(row0) * INPUTS;
        normalise_rows<INPUTS, WARPS, SCALE>(x, residual, a.square_sums + row0 * (INPUTS / 16), a.norm, a.pre_quant_scale, rows,
                                             a.eps);
    } else if (STAGED) {
        stage_rows(x, static_cast<const u16*>(a.x) + size_t(row0) * INPUTS, SCALE ? a.pre_quant_scale : nullptr, rows);
    }
    __syncwarp();
    float sum[TILES][4] = {};
    if (STAGED) {
        tiles.multiply(sum, [&](int step) { return load_activation(x, Part::STRIDE, step, present); });
    } else {
        const u16* from = static_cast<const u16*>(a.x) + size_t(row0) * INPUTS;
        tiles.multiply(sum, [&](int step) {
            return load_direct(from, SCALE ? a.pre_quant_scale : nullptr, Part::has(step) ? Part::group(step) : 0, present);
        });
    }

    __syncwarp();  // the warp's activations were read; its sums take their place
#pragma unroll
    for (int r = 0; r < TILES; ++r)
        store_partial(reinterpret_cast<float*>(own) + r * COLUMNS * PARTIAL_COLUMN, sum[r], rows);
    __syncthreads();

    const float* partial = reinterpret_cast<const float*>(own - warp_id() * bytes);
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
// `bytes` of dynamic shared memory a warp.
extern "C" __global__ void __launch_bounds__(THREADS, WARPS > 8 ? 1 : 2)
    linear(const void* x, const float* square_sums, const u16* norm, float eps, const u16* pre_quant_scale, const uint4* codes,
           const u32* scales, const uint4* halves, u16* out, int stride, u16* half_out, int half_stride, float* residual,
           float* square_sums_out, const u16* next_scale, int rows, int bytes, TurnCounters* turns, int index, int before) {
    extern __shared__ uint4 shared[];
    const Turn turn = {turns, index, before};
    Arguments a = {x, square_sums, norm, eps, pre_quant_scale, out, stride, residual, square_sums_out, next_scale};
    char* own = reinterpret_cast<char*>(shared) + warp_id() * bytes;
    const int block = blockIdx.x;
    if (HALF_TILES && (!INT4_TILES || block < HALF_BLOCKS)) {
        a.out = half_out;
        a.stride = half_stride;
        HalfTiles<HALF_BLOCK> tiles = {halves, block * HALF_BLOCK, HALF_COUNT};
        work<HalfTiles<HALF_BLOCK>, HALF_BLOCK, false>(tiles, a, own, bytes, tiles.first, HALF_COUNT, rows, turn);
    } else if (INT4_TILES) {
        Int4Tiles<INT4_BLOCK> tiles = {{own}, codes, scales, (block - HALF_BLOCKS) * INT4_BLOCK, INT4_COUNT};
        work<Int4Tiles<INT4_BLOCK>, INT4_BLOCK, SCALED>(tiles, a, own, bytes, tiles.first, INT4_COUNT, rows, turn);
    }
    finish_turn(turn);
}
