// A MoE layer for 1 to 16 activation rows in three launches: route (the router's product, and the shared expert's first half),
// experts_up, experts_down. Every block of the last two picks the experts for itself: waiting for another block to do it would take
// longer. Rows are taken in tiles of 8; within a tile an expert's weights are read once for all its rows.
// Macros: HIDDEN, WIDTH (of an expert), EXPERTS, TOP_K, SHARED (width of the shared expert, 0: none); SIGMOID, NORMALISE,
// SCALING, BIASED: the routing; EXPERT_SCALED, SHARED_SCALED: which activations have a pre_quant_scale.
#include "int4_moe/routing.cuh"
#include "int4_linear/weights.cuh"
#include "turns.cuh"

constexpr int ROUTE_WARPS = 8;
constexpr int ROUTER_PARTS = 2, ROUTER_EXPERTS = ROUTE_WARPS / ROUTER_PARTS;  // warps that share an expert; experts a block
constexpr int ROUTER_BLOCKS = (EXPERTS + ROUTER_EXPERTS - 1) / ROUTER_EXPERTS;
constexpr int INPUT_QUADS = 64, INPUT_BLOCKS = (QUADS + INPUT_QUADS - 1) / INPUT_QUADS;  // of the experts' inputs
static_assert(WIDTH % 64 == 0, "sizes the kernels were written for");

// ---- the shared expert's first half -----------------------------------------------------------------------------

#if SHARED
constexpr int SHARED_TILES = SHARED / TILE_ROWS;
constexpr int SHARED_PAIRS = 1;  // pairs of up and gate tiles a block
constexpr int SHARED_BLOCKS = (SHARED_TILES + SHARED_PAIRS - 1) / SHARED_PAIRS;
using Shared = Slice<HIDDEN, ROUTE_WARPS>;

DEVICE void shared_up(char* own, int bytes, const float* residual, const float* square_sums, const u16* norm, float eps,
                      const u16* pre_quant_scale, const uint4* codes, const u32* scales, const u16* next_scale, u16* out,
                      int rows, const Turn& turn) {
    constexpr int TILES = 2 * SHARED_PAIRS, DEPTH = smaller(Shared::STEPS, larger(1, 16 / TILES));
    const int first = (blockIdx.x - ROUTER_BLOCKS - INPUT_BLOCKS) * SHARED_PAIRS;
    auto tile_of = [&](int r) {
        const int item = smaller(first + r % SHARED_PAIRS, SHARED_TILES - 1);
        return r < SHARED_PAIRS ? item : SHARED_TILES + item;
    };
    Int4Weight weight[DEPTH][TILES];
    auto load = [&](int step) {
        if (Shared::has(step)) {
#pragma unroll
            for (int r = 0; r < TILES; ++r)
                weight[step % DEPTH][r].load(codes, scales, tile_of(r) * Shared::GROUPS + Shared::group(step));
        }
    };
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) load(step);
    fetch_halves(norm, HIDDEN);
    if (SHARED_SCALED) fetch_halves(pre_quant_scale, HIDDEN);
    await_turn(turn);
    u16* x = reinterpret_cast<u16*>(own);
    normalise_rows<HIDDEN, ROUTE_WARPS, SHARED_SCALED != 0>(x, residual, square_sums, norm, pre_quant_scale, rows, eps);
    __syncwarp();
    const bool present = (lane_id() >> 2) < rows;
    float sum[TILES][4] = {};
#pragma unroll
    for (int step = 0; step < Shared::STEPS; ++step) {
        if (Shared::has(step)) {
            const Activation now = load_activation(x, Shared::STRIDE, step, present);
#pragma unroll
            for (int r = 0; r < TILES; ++r) weight[step % DEPTH][r].multiply(sum[r], now);
        }
        if (step + DEPTH < Shared::STEPS) load(step + DEPTH);
    }
    __syncwarp();
    float* partial = reinterpret_cast<float*>(own);
#pragma unroll
    for (int r = 0; r < TILES; ++r) store_partial(partial + r * COLUMNS * PARTIAL_COLUMN, sum[r], rows);
    __syncthreads();
    partial -= warp_id() * bytes / 4;
    for (int index = threadIdx.x; index < SHARED_PAIRS * COLUMNS * TILE_ROWS; index += 32 * ROUTE_WARPS) {
        const int pair = index / (COLUMNS * TILE_ROWS), column = (index >> 4) % COLUMNS;
        const int output = (first + pair) * TILE_ROWS + (index & 15);
        if (column >= rows || first + pair >= SHARED_TILES) continue;
        const int place = (pair * COLUMNS + column) * PARTIAL_COLUMN + (index & 15);
        const float up = sum_partials<ROUTE_WARPS>(partial + place, bytes / 4);
        const float gate =
            sum_partials<ROUTE_WARPS>(partial + place + SHARED_PAIRS * COLUMNS * PARTIAL_COLUMN, bytes / 4);
        float y = up * silu(gate);
        if (next_scale) y *= half_to_float(next_scale[output]);
        out[size_t(column) * SHARED + output] = float_to_half(y);
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
    await_turn(turn);
    if (expert < EXPERTS)
        held.multiply(residual, square_sums, eps, rows, [&](int row, float sum) { sums[row][warp_id()] = sum; });
    __syncthreads();
    const int row = threadIdx.x / ROUTER_EXPERTS, mine = threadIdx.x % ROUTER_EXPERTS;
    if (row < rows && blockIdx.x * ROUTER_EXPERTS + mine < EXPERTS)
        logits[row * EXPERTS + blockIdx.x * ROUTER_EXPERTS + mine] = sum_partials<ROUTER_PARTS>(&sums[row][mine * ROUTER_PARTS], 1);
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
// Blocks a multiprocessor has room for: with wide experts more of them, that one turn of an H200 is enough for one row.
constexpr int UP_BLOCKS = EXPERT_TILES * TOP_K > 528 ? 5 : 4;
constexpr int UP_DEPTH = smaller(Up::STEPS, UP_BLOCKS > 4 ? 2 : 3);  // steps of weights under way

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

// 16 of one expert's outputs, for its rows.
DEVICE void expert_up(const Entry& entry, const u16* inputs, const uint4* codes, const u32* scales, const u16* next_scale,
                      u16* hidden, int rows) {
    __shared__ float partials[UP_WARPS][2 * COLUMNS * PARTIAL_COLUMN];
    const size_t first = (size_t(entry.expert) * 2 * EXPERT_TILES + blockIdx.x) * Up::GROUPS;
    codes += first * 32;
    scales += first * 8;
    Int4Weight up[UP_DEPTH], gate[UP_DEPTH];
    Activation x[UP_DEPTH];
    const u16* row = inputs + size_t(smaller(lane_id() >> 2, rows - 1)) * HIDDEN;
    auto load = [&](int step) {
        if (!Up::has(step)) return;
        up[step % UP_DEPTH].load(codes, scales, Up::group(step));
        gate[step % UP_DEPTH].load(codes, scales, EXPERT_TILES * Up::GROUPS + Up::group(step));
        x[step % UP_DEPTH] = load_direct(row, Up::group(step));
    };
#pragma unroll
    for (int step = 0; step < UP_DEPTH; ++step) load(step);
    float sum[2][4] = {};
#pragma unroll
    for (int step = 0; step < Up::STEPS; ++step) {
        if (Up::has(step)) {
            up[step % UP_DEPTH].multiply(sum[0], x[step % UP_DEPTH]);
            gate[step % UP_DEPTH].multiply(sum[1], x[step % UP_DEPTH]);
        }
        if (step + UP_DEPTH < Up::STEPS) load(step + UP_DEPTH);
    }
    store_partial(partials[warp_id()], sum[0], COLUMNS);
    store_partial(partials[warp_id()] + COLUMNS * PARTIAL_COLUMN, sum[1], COLUMNS);
    __syncthreads();
    const int column = threadIdx.x >> 4, output = blockIdx.x * TILE_ROWS + (threadIdx.x & 15);  // 128 threads
    if (!(entry.rows >> column & 1)) return;
    const float* at = partials[0] + column * PARTIAL_COLUMN + (threadIdx.x & 15);
    const float gated = silu(sum_partials<UP_WARPS>(at + COLUMNS * PARTIAL_COLUMN, 2 * COLUMNS * PARTIAL_COLUMN));
    float y = sum_partials<UP_WARPS>(at, 2 * COLUMNS * PARTIAL_COLUMN) * gated;
    if (next_scale) y *= half_to_float(next_scale[output]);
    const int slot = entry.slots >> (4 * column) & 15;
    hidden[(size_t(column) * TOP_K + slot) * WIDTH + output] = float_to_half(y);
}

// Block (tile, entry, tile of rows). hidden half [rows, TOP_K, WIDTH].
extern "C" __global__ void __launch_bounds__(32 * UP_WARPS, UP_BLOCKS)
    experts_up(const u16* inputs, const float* logits, const float* bias, const uint4* codes, const u32* scales,
               const u16* next_scale, u16* hidden, int all_rows, TurnCounters* turns, int index, int before) {
    __shared__ Chosen<UP_WARPS> work;
    const Turn turn = {turns, index, before};
    const int at = blockIdx.y, row0 = blockIdx.z * COLUMNS, rows = smaller(COLUMNS, all_rows - row0);
    logits += row0 * EXPERTS;
    await_turn(turn);
    Entry entry = {0, 1, u32(at)};
    int count = TOP_K;
    if (all_rows == 1) {
        // Every warp finds its block's expert for itself, and waits for nobody.
        entry.expert = choose_experts(logits, bias, nullptr, at + 1);
    } else {
        count = work.list(logits, bias, rows);
        entry = work.entries[smaller(at, MOST_ENTRIES - 1)];
    }
    if (at < count)
        expert_up(entry, inputs + size_t(row0) * HIDDEN, codes, scales, next_scale, hidden + size_t(row0) * TOP_K * WIDTH, rows);
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
                      const float (*routed)[TOP_K][TILE_ROWS], const float (*shared_sum)[COLUMNS][TILE_ROWS], int row0, int rows) {
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
    if (row < rows) {
        residual[size_t(row0 + row) * HIDDEN + output] = y;
        if ((threadIdx.x & 15) == 0) square_sums[(row0 + row) * DOWN_TILES + tile] = square;
    }
}

// What this thread's output of the residual stream was.
DEVICE float residual_before(const float* residual, int row0, int rows) {
    const int row = threadIdx.x >> 4, output = blockIdx.x * TILE_ROWS + (threadIdx.x & 15);
    return row < smaller(rows, COLUMNS) ? residual[size_t(row0 + row) * HIDDEN + output] : 0.f;
}

// The whole of K in one warp, in order: nothing decides a result but its own row.
DEVICE void down_unit(float (&sum)[4], const DownTiles& at, const u16* row) {
    constexpr int DEPTH = smaller(DOWN_GROUPS, 11);
    Int4Weight weight[DEPTH];
    Activation x[DEPTH];
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) weight[step].load(at.codes, at.scales, at.first + step);
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) x[step] = load_direct(row, step);
#pragma unroll
    for (int step = 0; step < DOWN_GROUPS; ++step) {
        weight[step % DEPTH].multiply(sum, x[step % DEPTH]);
        if (step + DEPTH < DOWN_GROUPS) {
            weight[step % DEPTH].load(at.codes, at.scales, at.first + step + DEPTH);
            x[step % DEPTH] = load_direct(row, step + DEPTH);
        }
    }
}

// Block (tile, tile of rows): 16 values of the residual stream of up to 8 rows. Warps take units: parts of the shared expert, then
// the rows' experts.
extern "C" __global__ void __launch_bounds__(32 * DOWN_WARPS, 1)
    experts_down(const u16* hidden, const u16* shared_hidden, const float* logits, const float* bias, const uint4* codes,
                 const u32* scales, const uint4* shared_codes, const u32* shared_scales, float* residual, float* square_sums,
                 int all_rows, TurnCounters* turns, int index, int before) {
    __shared__ float routed[COLUMNS][TOP_K][TILE_ROWS], shared_sum[larger(1, SHARED_PARTS)][COLUMNS][TILE_ROWS];
    __shared__ float weights[COLUMNS][TOP_K];
    __shared__ Chosen<DOWN_WARPS> work;
    const Turn turn = {turns, index, before};
    const int row0 = blockIdx.y * COLUMNS, rows = smaller(COLUMNS, all_rows - row0);
    const int g = lane_id() >> 2, column = 2 * (lane_id() & 3), in_row = smaller(g, rows - 1);
    const float was = residual_before(residual, row0, rows);
    logits += row0 * EXPERTS;
    const int units = SHARED_PARTS + work.list(logits, bias, rows);
    for (int row = warp_id(); row < rows; row += DOWN_WARPS) weigh_experts(logits + row * EXPERTS, work.chosen[row], weights[row]);
    await_turn(turn);

    for (int unit = warp_id(); unit < units; unit += DOWN_WARPS) {
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        if (unit < SHARED_PARTS) {
            const DownTiles at = DownTiles::of(unit, 0, codes, scales, shared_codes, shared_scales);
            down_unit(sum, at, shared_hidden + size_t(row0 + in_row) * SHARED + unit * WIDTH);
#pragma unroll
            for (int i = 0; i < 4; ++i) shared_sum[unit][column + (i & 1)][g + 8 * (i >> 1)] = sum[i];
            continue;
        }
        const Entry entry = work.entries[unit - SHARED_PARTS];
        const DownTiles at = DownTiles::of(unit, entry.expert, codes, scales, shared_codes, shared_scales);
        down_unit(sum, at, hidden + (size_t(row0 + in_row) * TOP_K + (entry.slots >> (4 * in_row) & 15)) * WIDTH);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int c = column + (i & 1);
            if (entry.rows >> c & 1) routed[c][entry.slots >> (4 * c) & 15][g + 8 * (i >> 1)] = sum[i];
        }
    }
    __syncthreads();
    add_units(residual, square_sums, was, weights, routed, shared_sum, row0, rows);
    finish_turn(turn);
}

// ---- experts_down of one row --------------------------------------------------------------------------------------

// All of a unit's weights are asked for before the wait: the first groups wait in registers, the others in shared memory, each lane's
// for itself.
constexpr int HELD_GROUPS = smaller(DOWN_GROUPS, 7), LANDED_GROUPS = DOWN_GROUPS - HELD_GROUPS;
constexpr int UNIT_BYTES = LANDED_GROUPS * (512 + 32) + WIDTH * 2;  // of shared memory a warp: codes, scales, inputs

struct LandedUnit {
    Int4Weight held[HELD_GROUPS];

    DEVICE void ask(const DownTiles& at, uint4* landing) {
#pragma unroll
        for (int step = 0; step < HELD_GROUPS; ++step) held[step].load(at.codes, at.scales, at.first + step);
#pragma unroll
        for (int i = 0; i < LANDED_GROUPS; ++i) {
            const size_t tile = at.first + HELD_GROUPS + i;
            copy_async(landing + i * 32 + lane_id(), at.codes + tile * 32 + lane_id());
        }
        const u32* landed_scales = at.scales + size_t(at.first + HELD_GROUPS) * 8;
        for (int i = lane_id(); i < 2 * LANDED_GROUPS; i += 32) copy_async(landing + LANDED_GROUPS * 32 + i, landed_scales + 4 * i);
        copy_commit();
    }

    // x: the row, in shared memory. In down_unit's order.
    DEVICE void multiply(float (&sum)[4], const uint4* landing, const u16* x) const {
        const bool present = lane_id() < 4;
        const u32* scales = reinterpret_cast<const u32*>(landing + LANDED_GROUPS * 32) + (lane_id() >> 2);
#pragma unroll
        for (int step = 0; step < DOWN_GROUPS; ++step) {
            const Activation now = load_activation(x, 0, step, present);
            if (step < HELD_GROUPS) {
                held[step].multiply(sum, now);
            } else {
                const int i = step - HELD_GROUPS;
                int4_tile(sum, landing[i * 32 + lane_id()], scales[i * 8], now);
            }
        }
    }
};

// Block (tile): 16 values of the residual stream. A warp a unit.
extern "C" __global__ void __launch_bounds__(32 * DOWN_WARPS, 2)
    experts_down_row(const u16* hidden, const u16* shared_hidden, const float* logits, const float* bias, const uint4* codes,
                     const u32* scales, const uint4* shared_codes, const u32* shared_scales, float* residual, float* square_sums,
                     TurnCounters* turns, int index, int before) {
    __shared__ float routed[1][TOP_K][TILE_ROWS], shared_sum[larger(1, SHARED_PARTS)][COLUMNS][TILE_ROWS], weights[1][TOP_K];
    __shared__ int chosen[DOWN_WARPS][TOP_K];
    extern __shared__ uint4 shared[];
    uint4* landing = shared + warp_id() * (UNIT_BYTES / 16);
    u16* x = reinterpret_cast<u16*>(landing + LANDED_GROUPS * 34);
    const Turn turn = {turns, index, before};
    constexpr int UNITS = SHARED_PARTS + TOP_K;
    const float was = residual_before(residual, 0, 1);
    LandedUnit unit_weights;
    // The logits are of the launch before the last: the choice waits for nobody, and every warp makes it for itself.
    auto ask = [&](int unit) {
        const int expert = unit < SHARED_PARTS ? 0 : chosen[warp_id()][unit - SHARED_PARTS];
        unit_weights.ask(DownTiles::of(unit, expert, codes, scales, shared_codes, shared_scales), landing);
    };
    choose_experts(logits, bias, chosen[warp_id()], TOP_K);
    __syncwarp();
    if (warp_id() < UNITS) ask(warp_id());
    if (warp_id() == 0) weigh_experts(logits, chosen[0], weights[0]);
    await_turn(turn);

    for (int unit = warp_id(); unit < UNITS; unit += DOWN_WARPS) {
        if (UNITS > DOWN_WARPS && unit != warp_id()) ask(unit);
        const u16* row = unit < SHARED_PARTS ? shared_hidden + unit * WIDTH : hidden + (unit - SHARED_PARTS) * WIDTH;
        for (int i = lane_id(); i < WIDTH / 8; i += 32) copy_async(x + i * 8, row + i * 8);
        copy_commit();
        copy_wait<0>();
        __syncwarp();
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        unit_weights.multiply(sum, landing, x);
        __syncwarp();
        if ((lane_id() & 3) == 0) {  // column 0
            float* to = unit < SHARED_PARTS ? shared_sum[unit][0] : routed[0][unit - SHARED_PARTS];
            to[lane_id() >> 2] = sum[0];
            to[(lane_id() >> 2) + 8] = sum[2];
        }
    }
    __syncthreads();
    add_units(residual, square_sums, was, weights, routed, shared_sum, 0, 1);
    finish_turn(turn);
}
