// A MoE layer for 1 to 16 activation rows in three launches: route (the router's product, and the shared expert's first half),
// experts_up, experts_down. Every block of the last two picks the experts for itself: waiting for another block to do it would take
// longer. Rows are taken in tiles of 8; within a tile an expert's weights are read once for all its rows.
// Macros: HIDDEN, WIDTH (of an expert), EXPERTS, TOP_K, SHARED (width of the shared expert, 0: none); SIGMOID, NORMALISE,
// SCALING, BIASED: the routing; EXPERT_SCALED, SHARED_SCALED: which activations have a pre_quant_scale.
#include "int4_moe/routing.cuh"
#include "int4_linear/ring.cuh"
#include "turns.cuh"

constexpr int ROUTE_WARPS = 8;
constexpr int ROUTER_PARTS = 2, ROUTER_EXPERTS = ROUTE_WARPS / ROUTER_PARTS;  // warps that share an expert; experts a block
constexpr int ROUTER_BLOCKS = (EXPERTS + ROUTER_EXPERTS - 1) / ROUTER_EXPERTS;
constexpr int INPUT_QUADS = 64, INPUT_BLOCKS = (QUADS + INPUT_QUADS - 1) / INPUT_QUADS;  // of the experts' inputs
static_assert(WIDTH % 64 == 0, "sizes the kernels were written for");

// ---- the shared expert's first half -----------------------------------------------------------------------------

#if SHARED
constexpr int SHARED_BLOCKS = SHARED / TILE_ROWS;  // a block a tile, and its gate
using Shared = Slice<HIDDEN, ROUTE_WARPS>;
using SharedRing = WeightRing<2, smaller(Shared::STEPS, 8)>;

DEVICE void shared_up(char* own, int bytes, const float* residual, const float* square_sums, const u16* norm, float eps,
                      const u16* pre_quant_scale, const uint4* codes, const u32* scales, const u16* next_scale, u16* out,
                      int rows, const Turn& turn) {
    constexpr int DEPTH = smaller(Shared::STEPS, 8);
    const int tile = blockIdx.x - ROUTER_BLOCKS - INPUT_BLOCKS;
    const SharedRing ring = {own};
    float* sums = reinterpret_cast<float*>(own + SharedRing::BYTES);
    u16* x = reinterpret_cast<u16*>(sums + 2 * COLUMNS * PARTIAL_COLUMN);
    auto ask = [&](int step, int slot) {
        if (step < Shared::STEPS && Shared::has(step))
            ring.ask(slot, codes, scales, [&](int k) { return (tile + k * SHARED_BLOCKS) * Shared::GROUPS + Shared::group(step); });
        else copy_commit();
    };
#pragma unroll 1
    for (int step = 0; step < DEPTH; ++step) ask(step, step);
    fetch_halves(norm, HIDDEN);
    if (SHARED_SCALED) fetch_halves(pre_quant_scale, HIDDEN);
    const bool present = (lane_id() >> 2) < rows;
#pragma unroll 1
    for (int pass = first_pass(turn); pass < 2; ++pass) {
        const bool real = pass == 1;
        if (real) await_turn(turn);
        normalise_rows<HIDDEN, ROUTE_WARPS, SHARED_SCALED != 0>(x, residual, square_sums, norm, pre_quant_scale, rows, eps);
        __syncwarp();
        float up[4] = {}, gate[4] = {};
#pragma unroll 1
        for (int step = 0, slot = 0; step < (real ? Shared::STEPS : 1); ++step, slot = slot + 1 < DEPTH ? slot + 1 : 0) {
            if (real) SharedRing::await_oldest();
            if (Shared::has(step)) {
                const Activation now = load_activation(x, Shared::STRIDE, step, present);
                ring.multiply(up, slot, 0, now);
                ring.multiply(gate, slot, 1, now);
            }
            __syncwarp();
            if (real) ask(step + DEPTH, slot);
        }
        store_partial(sums, up, rows);
        store_partial(sums + COLUMNS * PARTIAL_COLUMN, gate, rows);
        __syncthreads();
        const int column = threadIdx.x >> 4, output = tile * TILE_ROWS + (threadIdx.x & 15);
        if (column < rows) {
            const float* at = sums - warp_id() * (bytes / 4) + column * PARTIAL_COLUMN + (threadIdx.x & 15);
            const float gated = silu(sum_partials<ROUTE_WARPS>(at + COLUMNS * PARTIAL_COLUMN, bytes / 4));
            float y = sum_partials<ROUTE_WARPS>(at, bytes / 4) * gated;
            if (next_scale) y *= half_to_float(next_scale[output]);
            if (real) out[size_t(column) * SHARED + output] = float_to_half(y);
        }
    }
}
#else
constexpr int SHARED_BLOCKS = 0;
#endif

// A block of the router: its experts' logits [all rows, EXPERTS].
DEVICE void router_logits(const float* residual, const float* square_sums, const u16* norm, float eps, const float* router,
                          float* logits, int rows, const Turn& turn) {
    __shared__ float sums[COLUMNS][ROUTE_WARPS];
    const int expert = blockIdx.x * ROUTER_EXPERTS + warp_id() / ROUTER_PARTS;
    RouterRow<ROUTER_PARTS> held;
    if (expert < EXPERTS) held.load(router, norm, expert, warp_id() % ROUTER_PARTS);
#pragma unroll 1
    for (int pass = first_pass(turn); pass < 2; ++pass) {
        if (pass == 1) await_turn(turn);
        if (expert < EXPERTS)
            held.multiply(residual, square_sums, eps, rows, [&](int row, float sum) { sums[row][warp_id()] = sum; });
        __syncthreads();
        const int row = threadIdx.x / ROUTER_EXPERTS, mine = threadIdx.x % ROUTER_EXPERTS;
        if (row < rows && blockIdx.x * ROUTER_EXPERTS + mine < EXPERTS) {
            const float logit = sum_partials<ROUTER_PARTS>(&sums[row][mine * ROUTER_PARTS], 1);
            if (pass == 1) logits[row * EXPERTS + blockIdx.x * ROUTER_EXPERTS + mine] = logit;
        }
    }
}

// A block's part of what the experts read: half(x * rms * norm * scale).
DEVICE void expert_inputs(const float* residual, const float* square_sums, const u16* norm, float eps, const u16* scale, u16* inputs,
                          int rows, const Turn& turn) {
    fetch_halves(norm, HIDDEN);
    if (EXPERT_SCALED) fetch_halves(scale, HIDDEN);
    await_turn(turn);
    const float rms = reciprocal_rms<HIDDEN>(square_sums, rows, eps);
    for (int base = warp_id() * 32; base < rows * INPUT_QUADS; base += 32 * ROUTE_WARPS) {  // whole warps, for the shuffle
        const int row = (base + lane_id()) / INPUT_QUADS;
        const int quad = (blockIdx.x - ROUTER_BLOCKS) * INPUT_QUADS + (base + lane_id()) % INPUT_QUADS;
        const float r = __shfl_sync(ALL, rms, 4 * row);
        if (quad < QUADS)
            reinterpret_cast<uint2*>(inputs + size_t(row) * HIDDEN)[quad] =
                normalised_quad(residual + size_t(row) * HIDDEN, norm, EXPERT_SCALED ? scale : nullptr, quad, r);
    }
}

// Blocks 0 .. ROUTER_BLOCKS - 1 multiply with the router, the next INPUT_BLOCKS write what the experts read; the others are
// the shared expert's.
extern "C" __global__ void __launch_bounds__(32 * ROUTE_WARPS, 2)
    route(const float* residual, const float* square_sums, const u16* norm, float eps, const float* router,
          const u16* expert_scale, float* logits, u16* inputs, const u16* shared_scale, const uint4* shared_codes,
          const u32* shared_scales, const u16* shared_next, u16* shared_out, int all_rows, int bytes, TurnCounters* turns, int index,
          int before) {
    const Turn turn = {turns, index, before};
    extern __shared__ uint4 shared[];
    const int row0 = blockIdx.y * COLUMNS, rows = smaller(COLUMNS, all_rows - row0);
    residual += size_t(row0) * HIDDEN;
    square_sums += row0 * (HIDDEN / 16);
    if (blockIdx.x < ROUTER_BLOCKS) {
        router_logits(residual, square_sums, norm, eps, router, logits + row0 * EXPERTS, rows, turn);
    } else if (blockIdx.x < ROUTER_BLOCKS + INPUT_BLOCKS) {
        expert_inputs(residual, square_sums, norm, eps, expert_scale, inputs + size_t(row0) * HIDDEN, rows, turn);
    } else {
#if SHARED
        shared_up(reinterpret_cast<char*>(shared) + warp_id() * bytes, bytes, residual, square_sums, norm, eps, shared_scale,
                  shared_codes, shared_scales, shared_next, shared_out + size_t(row0) * SHARED, rows, turn);
#endif
    }
    finish_turn(turn);
}

// ---- experts ------------------------------------------------------------------------------------------------------

constexpr int UP_WARPS = 4;
constexpr int EXPERT_TILES = WIDTH / TILE_ROWS;
using Up = Slice<HIDDEN, UP_WARPS>;
constexpr int UP_DEPTH = smaller(Up::STEPS, 4);
using UpRing = WeightRing<2, UP_DEPTH>;

// What a row that takes no part gives is never used, so it is any row that is there.
DEVICE Activation load_direct(const u16* row, int group) {
    const uint4* at = reinterpret_cast<const uint4*>(row + group * TILE_INPUTS + 16 * (lane_id() & 3));
    return Activation{at[0], at[1]};
}

// The whole block: the experts that the rows of a tile chose.
template <int WARPS>
struct Chosen {
    int chosen[COLUMNS][TOP_K], counts[WARPS];
    Entry entries[MOST_ENTRIES];

    DEVICE int list(const float* logits, const float* bias, int rows) {
        static_assert(EXPERTS <= 32 * WARPS, "a thread an expert");
        for (int row = warp_id(); row < rows; row += WARPS) choose_experts(logits + row * EXPERTS, bias, chosen[row], TOP_K);
        __syncthreads();
        return list_work<WARPS>(chosen, rows, entries, counts);
    }
};

// 16 of one expert's outputs, for its rows. `own`: `bytes` of shared memory a warp, for weights, sums and activations.
DEVICE void expert_up(const Entry& entry, const u16* inputs, const uint4* codes, const u32* scales, const u16* next_scale,
                      u16* hidden, int rows, char* own, int bytes, bool real) {
    const UpRing ring = {own};
    float* sums = reinterpret_cast<float*>(own + UpRing::BYTES);
    u16* x = reinterpret_cast<u16*>(sums + 2 * COLUMNS * PARTIAL_COLUMN);
    const int first = entry.expert * 2 * EXPERT_TILES + blockIdx.x;
    auto ask = [&](int step, int slot) {
        if (step < Up::STEPS && Up::has(step))
            ring.ask(slot, codes, scales, [&](int k) { return (first + k * EXPERT_TILES) * Up::GROUPS + Up::group(step); });
        else copy_commit();
    };
    if (real) {
#pragma unroll 1
        for (int index = lane_id(); index < rows * Up::STEPS * 8; index += 32) {
            const int row = index / (Up::STEPS * 8), step = index / 8 % Up::STEPS;
            if ((entry.rows >> row & 1) && Up::has(step))
                copy_async(x + row * Up::STRIDE + step * TILE_INPUTS + index % 8 * 8,
                           inputs + size_t(row) * HIDDEN + Up::group(step) * TILE_INPUTS + index % 8 * 8);
        }
#pragma unroll 1
        for (int step = 0; step < UP_DEPTH; ++step) ask(step, step);
    }
    const bool present = entry.rows >> (lane_id() >> 2) & 1;
    float up[4] = {}, gate[4] = {};
#pragma unroll 1
    for (int step = 0, slot = 0; step < (real ? Up::STEPS : 1); ++step, slot = slot + 1 < UP_DEPTH ? slot + 1 : 0) {
        if (real) UpRing::await_oldest();
        if (Up::has(step)) {
            const Activation now = load_activation(x, Up::STRIDE, step, present);
            ring.multiply(up, slot, 0, now);
            ring.multiply(gate, slot, 1, now);
        }
        __syncwarp();
        if (real) ask(step + UP_DEPTH, slot);
    }
    store_partial(sums, up, COLUMNS);
    store_partial(sums + COLUMNS * PARTIAL_COLUMN, gate, COLUMNS);
    __syncthreads();
    const int column = threadIdx.x >> 4, output = blockIdx.x * TILE_ROWS + (threadIdx.x & 15);  // 128 threads
    if (!(entry.rows >> column & 1)) return;
    const float* at = sums - warp_id() * (bytes / 4) + column * PARTIAL_COLUMN + (threadIdx.x & 15);
    const float gated = silu(sum_partials<UP_WARPS>(at + COLUMNS * PARTIAL_COLUMN, bytes / 4));
    float y = sum_partials<UP_WARPS>(at, bytes / 4) * gated;
    if (next_scale) y *= half_to_float(next_scale[output]);
    const int slot = entry.slots >> (4 * column) & 15;
    if (real) hidden[(size_t(column) * TOP_K + slot) * WIDTH + output] = float_to_half(y);
}

// Block (tile, entry, tile of rows). hidden half [rows, TOP_K, WIDTH]. `bytes` of dynamic shared memory a warp.
extern "C" __global__ void __launch_bounds__(32 * UP_WARPS, 7)
    experts_up(const u16* inputs, const float* logits, const float* bias, const uint4* codes, const u32* scales,
               const u16* next_scale, u16* hidden, int all_rows, int bytes, TurnCounters* turns, int index, int before) {
    __shared__ Chosen<UP_WARPS> work;
    extern __shared__ uint4 shared[];
    char* own = reinterpret_cast<char*>(shared) + warp_id() * bytes;
    const Turn turn = {turns, index, before};
    const int at = blockIdx.y, row0 = blockIdx.z * COLUMNS, rows = smaller(COLUMNS, all_rows - row0);
    logits += row0 * EXPERTS;
    inputs += size_t(row0) * HIDDEN;
    hidden += size_t(row0) * TOP_K * WIDTH;
#pragma unroll 1
    for (int pass = first_pass(turn); pass < 2; ++pass) {
        const bool real = pass == 1;
        if (real) await_turn(turn);
        Entry entry = {0, 1, u32(at)};
        int count = TOP_K;
        if (all_rows == 1) {
            // Every warp finds its block's expert for itself, and waits for nobody.
            entry.expert = choose_experts(logits, bias, nullptr, at + 1);
        } else if (real) {
            count = work.list(logits, bias, rows);
            entry = work.entries[smaller(at, MOST_ENTRIES - 1)];
        }
        if (at < count) expert_up(entry, inputs, codes, scales, next_scale, hidden, rows, own, bytes, real);
    }
    finish_turn(turn);
}

constexpr int DOWN_WARPS = 8;
constexpr int DOWN_GROUPS = WIDTH / TILE_INPUTS, DOWN_TILES = HIDDEN / TILE_ROWS;
constexpr int SHARED_PARTS = SHARED / WIDTH;  // the shared expert, as parts of an expert's width
static_assert(SHARED % WIDTH == 0, "the shared expert is as wide as several experts");

// Where a unit's tiles of weights start: part `unit` of the shared expert, or expert `expert`.
struct DownTiles {
    const uint4* codes;
    const u32* scales;
    int first;

    DEVICE static DownTiles of(int unit, int expert, const uint4* codes, const u32* scales, const uint4* shared_codes,
                               const u32* shared_scales) {
        const int tile = blockIdx.x;
        if (unit < SHARED_PARTS)
            return DownTiles{shared_codes, shared_scales, tile * (SHARED / TILE_INPUTS) + unit * DOWN_GROUPS};
        return DownTiles{codes, scales, (expert * DOWN_TILES + tile) * DOWN_GROUPS};
    }
};

// What the end of a block adds to the residual stream: before[0] of this thread's row and output, and the units' sums.
DEVICE void add_units(float* residual, float* square_sums, float before, const float (*weights)[TOP_K],
                      const float (*routed)[TOP_K][TILE_ROWS], const float (*shared_sum)[COLUMNS][TILE_ROWS], int row0, int rows,
                      bool real) {
    constexpr int OUTPUTS = COLUMNS * TILE_ROWS;
    if (threadIdx.x >= OUTPUTS) return;  // whole warps
    const int row = threadIdx.x >> 4, tile = blockIdx.x, output = tile * TILE_ROWS + (threadIdx.x & 15);
    float y = 0.f;
    if (row < rows) {
#pragma unroll
        for (int slot = 0; slot < TOP_K; ++slot) y += weights[row][slot] * routed[row][slot][threadIdx.x & 15];
#pragma unroll
        for (int part = 0; part < SHARED_PARTS; ++part) y += shared_sum[part][row][threadIdx.x & 15];
        y += before;
    }
    float square = y * y;
    // 16 neighbouring lanes hold 16 neighbouring outputs of one row.
#pragma unroll
    for (int offset = 8; offset; offset >>= 1) square += __shfl_xor_sync(ALL, square, offset);
    if (row < rows && real) {
        residual[size_t(row0 + row) * HIDDEN + output] = y;
        if ((threadIdx.x & 15) == 0) square_sums[(row0 + row) * DOWN_TILES + tile] = square;
    }
}

// What this thread's output of the residual stream was.
DEVICE float residual_before(const float* residual, int row0, int rows) {
    const int row = threadIdx.x >> 4, output = blockIdx.x * TILE_ROWS + (threadIdx.x & 15);
    return row < smaller(rows, COLUMNS) ? residual[size_t(row0 + row) * HIDDEN + output] : 0.f;
}

// A warp's weights and activations come two groups at a time, and units follow each other in the ring. The whole of K is one warp's,
// in order, so that nothing decides a row's result but that row.
constexpr int DOWN_PAIRS = (DOWN_GROUPS + 1) / 2;
constexpr int PAIR_STRIDE = 2 * TILE_INPUTS + ROW_PAD;  // halves between two rows of a slot's activations

// How far a warp has come: a unit, and a pair of its groups.
struct DownPlace {
    int unit, pair;

    DEVICE void next() {
        if (++pair == DOWN_PAIRS) pair = 0, unit += DOWN_WARPS;
    }
};

struct DownArguments {
    const u16 *hidden, *shared_hidden;
    const float *logits, *bias;
    const uint4* codes;
    const u32* scales;
    const uint4* shared_codes;
    const u32* shared_scales;
    float *residual, *square_sums;
};

// Shared memory: of each warp DEPTH slots of weights, then of activations.
template <int DEPTH>
DEVICE void down(DownArguments a, char* shared, int all_rows, const Turn& turn) {
    __shared__ float routed[COLUMNS][TOP_K][TILE_ROWS], shared_sum[larger(1, SHARED_PARTS)][COLUMNS][TILE_ROWS];
    __shared__ float weights[COLUMNS][TOP_K];
    __shared__ Chosen<DOWN_WARPS> work;
    __shared__ int own_choice[DOWN_WARPS][TOP_K];
    using Ring = WeightRing<2, DEPTH>;
    const int row0 = blockIdx.y * COLUMNS, rows = smaller(COLUMNS, all_rows - row0);
    char* own = shared + warp_id() * (Ring::BYTES + DEPTH * smaller(COLUMNS, all_rows) * PAIR_STRIDE * 2);
    const Ring ring = {own};
    u16* x = reinterpret_cast<u16*>(own + Ring::BYTES);
    const int g = lane_id() >> 2, column = 2 * (lane_id() & 3);
    const float was = residual_before(a.residual, row0, rows);
    const float* logits = a.logits + row0 * EXPERTS;

    // The logits are of the launch before the last: the choice, and the first weights, wait for nobody.
    int units = SHARED_PARTS + TOP_K;
    if (all_rows == 1) {  // every warp chooses for itself
        choose_experts(logits, a.bias, own_choice[warp_id()], TOP_K);
        __syncwarp();
    } else {
        units = SHARED_PARTS + work.list(logits, a.bias, rows);
    }
    auto entry_of = [&](int unit) {
        const int at = unit - SHARED_PARTS;
        if (at < 0) return Entry{0, (1u << rows) - 1, 0};
        return all_rows == 1 ? Entry{own_choice[warp_id()][at], 1, u32(at)} : work.entries[at];
    };
    // The last pair may be one group, twice.
    auto ask_weights = [&](int slot, const DownPlace& place) {
        const DownTiles from =
            DownTiles::of(place.unit, entry_of(place.unit).expert, a.codes, a.scales, a.shared_codes, a.shared_scales);
        ring.ask(slot, from.codes, from.scales, [&](int k) { return from.first + smaller(2 * place.pair + k, DOWN_GROUPS - 1); });
    };
    auto ask_inputs = [&](int slot, const DownPlace& place) {
        const Entry entry = entry_of(place.unit);
        const int count = smaller(2, DOWN_GROUPS - 2 * place.pair) * (TILE_INPUTS / 8);
        for (int index = lane_id(); index < rows * 16; index += 32) {
            const int row = index >> 4, piece = index & 15;
            if (!(entry.rows >> row & 1) || piece >= count) continue;
            const u16* from = place.unit < SHARED_PARTS
                                  ? a.shared_hidden + size_t(row0 + row) * SHARED + place.unit * WIDTH
                                  : a.hidden + (size_t(row0 + row) * TOP_K + (entry.slots >> (4 * row) & 15)) * WIDTH;
            copy_async(x + (slot * rows + row) * PAIR_STRIDE + piece * 8, from + place.pair * 2 * TILE_INPUTS + piece * 8);
        }
    };
    DownPlace asked = {warp_id(), 0};
#pragma unroll 1
    for (int slot = 0; slot < DEPTH && asked.unit < units; ++slot, asked.next()) ask_weights(slot, asked);
    for (int row = warp_id(); row < rows; row += DOWN_WARPS)
        weigh_experts(logits + row * EXPERTS, all_rows == 1 ? own_choice[0] : work.chosen[row], weights[row]);

#pragma unroll 1
    for (int pass = first_pass(turn); pass < 2; ++pass) {
        const bool real = pass == 1;
        if (real) {
            await_turn(turn);
            DownPlace late = {warp_id(), 0};
#pragma unroll 1
            for (int slot = 0; slot < DEPTH && late.unit < units; ++slot, late.next()) ask_inputs(slot, late);
            copy_commit();
            copy_wait<0>();
        }
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        int slot = 0;
#pragma unroll 1
        for (DownPlace place = {warp_id(), 0}; place.unit < (real ? units : DOWN_WARPS); place.next()) {
            if (real) Ring::await_oldest();
            const Entry entry = entry_of(place.unit < units ? place.unit : 0);
            const u16* from = x + slot * rows * PAIR_STRIDE;
            const bool present = entry.rows >> g & 1;
            ring.multiply(sum, slot, 0, load_activation(from, PAIR_STRIDE, 0, present));
            if (2 * place.pair + 1 < DOWN_GROUPS) ring.multiply(sum, slot, 1, load_activation(from, PAIR_STRIDE, 1, present));
            __syncwarp();
            if (real && asked.unit < units) {
                ask_inputs(slot, asked);
                ask_weights(slot, asked);  // commits both
                asked.next();
            } else {
                copy_commit();
            }
            slot = slot + 1 < DEPTH ? slot + 1 : 0;
            if (real && place.pair < DOWN_PAIRS - 1) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int c = column + (i & 1), output = g + 8 * (i >> 1);
                if (place.unit < SHARED_PARTS) shared_sum[place.unit][c][output] = sum[i];
                else if (entry.rows >> c & 1) routed[c][entry.slots >> (4 * c) & 15][output] = sum[i];
                sum[i] = 0.f;
            }
            if (!real) break;
        }
        __syncthreads();
        add_units(a.residual, a.square_sums, was, weights, routed, shared_sum, row0, rows, real);
    }
    finish_turn(turn);
}

// Block (tile, tile of rows): 16 values of the residual stream of up to 8 rows. Warps take units: parts of the shared expert, then
// the rows' experts.
extern "C" __global__ void __launch_bounds__(32 * DOWN_WARPS, 2)
    experts_down(const u16* hidden, const u16* shared_hidden, const float* logits, const float* bias, const uint4* codes,
                 const u32* scales, const uint4* shared_codes, const u32* shared_scales, float* residual, float* square_sums,
                 int all_rows, TurnCounters* turns, int index, int before) {
    extern __shared__ uint4 shared[];
    const DownArguments a = {hidden, shared_hidden, logits, bias, codes, scales, shared_codes, shared_scales, residual, square_sums};
    down<3>(a, reinterpret_cast<char*>(shared), all_rows, Turn{turns, index, before});
}

// The same of one row, which leaves more room for weights under way.
extern "C" __global__ void __launch_bounds__(32 * DOWN_WARPS, 2)
    experts_down_row(const u16* hidden, const u16* shared_hidden, const float* logits, const float* bias, const uint4* codes,
                     const u32* scales, const uint4* shared_codes, const u32* shared_scales, float* residual, float* square_sums,
                     int all_rows, TurnCounters* turns, int index, int before) {
    extern __shared__ uint4 shared[];
    const DownArguments a = {hidden, shared_hidden, logits, bias, codes, scales, shared_codes, shared_scales, residual, square_sums};
    down<8>(a, reinterpret_cast<char*>(shared), all_rows, Turn{turns, index, before});
}
