// A MoE layer for 1 to 16 activation rows in three launches: route (the router's product, and the experts' inputs), experts_up (which
// also does the shared expert's first half), experts_down. Every block of the last two picks the experts for itself: waiting for
// another block to do it would take longer. Rows are taken in tiles of 8; within a tile an expert's weights are read once for all.
// Macros: HIDDEN, WIDTH (of an expert), EXPERTS, TOP_K, SHARED (width of the shared expert, 0: none); SIGMOID, NORMALISE,
// SCALING, BIASED: the routing; EXPERT_SCALED, SHARED_SCALED: which activations have a pre_quant_scale.
#include "int4_moe/routing.cuh"
#include "int4_linear/weights.cuh"
#include "turns.cuh"

constexpr int ROUTE_WARPS = 8;
constexpr int ROUTER_PARTS = 4, ROUTER_EXPERTS = ROUTE_WARPS / ROUTER_PARTS;  // warps that share an expert; experts a block
constexpr int ROUTER_BLOCKS = (EXPERTS + ROUTER_EXPERTS - 1) / ROUTER_EXPERTS;
constexpr int INPUT_QUADS = 64, INPUT_BLOCKS = (QUADS + INPUT_QUADS - 1) / INPUT_QUADS;  // of the experts' inputs
static_assert(WIDTH % 64 == 0, "sizes the kernels were written for");

// ---- route --------------------------------------------------------------------------------------------------------

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

// Blocks 0 .. ROUTER_BLOCKS - 1 multiply with the router, the others write what the experts read.
extern "C" __global__ void __launch_bounds__(32 * ROUTE_WARPS, 2)
    route(const float* residual, const float* square_sums, const u16* norm, float eps, const float* router,
          const u16* expert_scale, float* logits, u16* inputs, int all_rows, TurnCounters* turns, int index, int before) {
    const Turn turn = {turns, index, before};
    const int row0 = blockIdx.y * COLUMNS, rows = smaller(COLUMNS, all_rows - row0);
    residual += size_t(row0) * HIDDEN;
    square_sums += row0 * (HIDDEN / 16);
    if (blockIdx.x < ROUTER_BLOCKS)
        router_logits(residual, square_sums, norm, eps, router, logits + row0 * EXPERTS, rows, turn);
    else
        expert_inputs(residual, square_sums, norm, eps, expert_scale, inputs + size_t(row0) * HIDDEN, rows, turn);
    finish_turn(turn);
}

// ---- experts ------------------------------------------------------------------------------------------------------

constexpr int UP_WARPS = 4;
constexpr int EXPERT_TILES = WIDTH / TILE_ROWS;
using Up = Slice<HIDDEN, UP_WARPS>;
constexpr int UP_DEPTH = smaller(Up::STEPS, 3);  // steps of weights under way

constexpr int SHARED_PARTS = SHARED / WIDTH;  // the shared expert, as parts of an expert's width
static_assert(SHARED % WIDTH == 0, "the shared expert is as wide as several experts");

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

// A warp's part of a tile of up weights and one of gate weights, GATES tiles further on.
template <int GATES>
struct UpTiles {
    const uint4* codes;  // this lane's, of the first group of this warp
    const u32* scales;
    Int4Weight up[UP_DEPTH], gate[UP_DEPTH];

    DEVICE void ask(int step) {
        if (!Up::has(step)) return;
        up[step % UP_DEPTH].load_further(codes, scales, step * UP_WARPS);
        gate[step % UP_DEPTH].load_further(codes, scales, GATES * Up::GROUPS + step * UP_WARPS);
    }
    DEVICE void ask(const uint4* all_codes, const u32* all_scales, int tile) {
        const size_t first = size_t(tile) * Up::GROUPS + warp_id();
        codes = all_codes + first * 32 + lane_id();
        scales = all_scales + first * 8 + (lane_id() >> 2);
#pragma unroll
        for (int step = 0; step < UP_DEPTH; ++step) ask(step);
    }

    // x: this warp's slice of the activations. `store(column, output, y)` gets the block's gated outputs.
    template <class Store>
    DEVICE void multiply(const u16* x, bool present, float (*partials)[2 * COLUMNS * PARTIAL_COLUMN], Store store) {
        float sum[2][4] = {};
#pragma unroll
        for (int step = 0; step < Up::STEPS; ++step) {
            if (Up::has(step)) {
                const Activation now = load_activation(x, Up::STRIDE, step, present);
                up[step % UP_DEPTH].multiply(sum[0], now);
                gate[step % UP_DEPTH].multiply(sum[1], now);
            }
            if (step + UP_DEPTH < Up::STEPS) ask(step + UP_DEPTH);
        }
        store_partial(partials[warp_id()], sum[0], COLUMNS);
        store_partial(partials[warp_id()] + COLUMNS * PARTIAL_COLUMN, sum[1], COLUMNS);
        __syncthreads();
        const int column = threadIdx.x >> 4, output = threadIdx.x & 15;  // 128 threads
        const float* at = partials[0] + column * PARTIAL_COLUMN + output;
        const float gated = silu(sum_partials<UP_WARPS>(at + COLUMNS * PARTIAL_COLUMN, 2 * COLUMNS * PARTIAL_COLUMN));
        store(column, output, sum_partials<UP_WARPS>(at, 2 * COLUMNS * PARTIAL_COLUMN) * gated);
    }
};

// What the shared expert's first half reads and writes; codes null: it is done elsewhere.
struct SharedUp {
    const float *residual, *square_sums;
    const u16* norm;
    float eps;
    const u16* pre_quant_scale;
    const uint4* codes;
    const u32* scales;
    const u16* next_scale;
    u16* out;
};

// The residual stream is of the launch before the last: the shared expert waits for nobody.
DEVICE void shared_up(const SharedUp& a, u16* x, float (*partials)[2 * COLUMNS * PARTIAL_COLUMN], int row0, int rows) {
    const int tile = blockIdx.y * EXPERT_TILES + blockIdx.x;
    UpTiles<SHARED / TILE_ROWS> tiles;
    tiles.ask(a.codes, a.scales, tile);
    normalise_rows<HIDDEN, UP_WARPS, SHARED_SCALED != 0, 1>(x, a.residual + size_t(row0) * HIDDEN, a.square_sums + row0 * (HIDDEN / 16),
                                                         a.norm, a.pre_quant_scale, rows, a.eps);
    __syncwarp();
    tiles.multiply(x, (lane_id() >> 2) < rows, partials, [&](int column, int at, float y) {
        if (column >= rows) return;
        const int output = tile * TILE_ROWS + at;
        if (a.next_scale) y *= half_to_float(a.next_scale[output]);
        a.out[size_t(row0 + column) * SHARED + output] = float_to_half(y);
    });
}

// Block (tile, entry, tile of rows): 16 of an expert's outputs; entries 0 .. shared_parts - 1 are the shared expert's.
// hidden half [rows, TOP_K, WIDTH]. Dynamic shared memory: the rows' activations, a slice a warp.
extern "C" __global__ void __launch_bounds__(32 * UP_WARPS, 6)
    experts_up(const u16* inputs, const float* logits, const float* bias, const uint4* codes, const u32* scales,
               const u16* next_scale, u16* hidden, const float* residual, const float* square_sums, const u16* norm, float eps,
               const u16* shared_scale, const uint4* shared_codes, const u32* shared_scales, const u16* shared_next, u16* shared_out,
               int shared_parts, int all_rows, TurnCounters* turns, int index, int before) {
    __shared__ float partials[UP_WARPS][2 * COLUMNS * PARTIAL_COLUMN];
    __shared__ Chosen<UP_WARPS> work;
    extern __shared__ uint4 shared[];
    const Turn turn = {turns, index, before};
    const int row0 = blockIdx.z * COLUMNS, rows = smaller(COLUMNS, all_rows - row0), at = int(blockIdx.y) - shared_parts;
    u16* x = reinterpret_cast<u16*>(shared) + warp_id() * smaller(COLUMNS, all_rows) * Up::STRIDE;
    if (at < 0) {
        shared_up({residual, square_sums, norm, eps, shared_scale, shared_codes, shared_scales, shared_next, shared_out}, x, partials,
                  row0, rows);
        await_turn(turn);
        finish_turn(turn);
        return;
    }
    await_turn(turn);
    inputs += size_t(row0) * HIDDEN;
    for (int index = lane_id(); index < rows * Up::STEPS * 8; index += 32) {
        const int row = index / (Up::STEPS * 8), step = index / 8 % Up::STEPS, piece = index % 8 * 8;
        if (Up::has(step))
            copy_async(x + row * Up::STRIDE + step * TILE_INPUTS + piece,
                       inputs + size_t(row) * HIDDEN + Up::group(step) * TILE_INPUTS + piece);
    }
    copy_commit();
    logits += row0 * EXPERTS;
    Entry entry = {0, 1, u32(at)};
    int count = TOP_K;
    if (all_rows == 1) {
        // Every warp finds its block's expert for itself, and waits for nobody.
        entry.expert = choose_experts(logits, bias, nullptr, at + 1);
    } else {
        count = work.list(logits, bias, rows);
        entry = work.entries[smaller(at, MOST_ENTRIES - 1)];
    }
    if (at < count) {
        UpTiles<EXPERT_TILES> tiles;
        tiles.ask(codes, scales, entry.expert * 2 * EXPERT_TILES + int(blockIdx.x));
        copy_wait<0>();
        __syncwarp();
        tiles.multiply(x, entry.rows >> (lane_id() >> 2) & 1, partials, [&](int column, int at, float y) {
            if (!(entry.rows >> column & 1)) return;
            const int output = blockIdx.x * TILE_ROWS + at, slot = entry.slots >> (4 * column) & 15;
            if (next_scale) y *= half_to_float(next_scale[output]);
            hidden[(size_t(row0 + column) * TOP_K + slot) * WIDTH + output] = float_to_half(y);
        });
    }
    copy_wait<0>();
    finish_turn(turn);
}

constexpr int DOWN_WARPS = 8;
constexpr int DOWN_GROUPS = WIDTH / TILE_INPUTS, DOWN_TILES = HIDDEN / TILE_ROWS;
// The sum over K of a unit (an expert, or a part of the shared one) is that of its first groups, in order, and that of the others:
// nothing decides a row's result but that row.
constexpr int FIRST_GROUPS = (DOWN_GROUPS + 1) / 2;

// Where a unit's tiles of weights start: part `unit` of the shared expert, or expert `expert`.
struct DownTiles {
    const uint4* codes;
    const u32* scales;

    DEVICE static DownTiles of(int unit, int expert, const uint4* codes, const u32* scales, const uint4* shared_codes,
                               const u32* shared_scales) {
        const int tile = blockIdx.x;
        const size_t first = unit < SHARED_PARTS ? tile * (SHARED / TILE_INPUTS) + unit * DOWN_GROUPS
                                                 : (size_t(expert) * DOWN_TILES + tile) * DOWN_GROUPS;
        return DownTiles{(unit < SHARED_PARTS ? shared_codes : codes) + first * 32, (unit < SHARED_PARTS ? shared_scales : scales) + first * 8};
    }
};

// What this thread's output of the residual stream was.
DEVICE float residual_before(const float* residual, int row0, int rows) {
    const int row = threadIdx.x >> 4, output = blockIdx.x * TILE_ROWS + (threadIdx.x & 15);
    return row < smaller(rows, COLUMNS) ? residual[size_t(row0 + row) * HIDDEN + output] : 0.f;
}

// The end of a block: `routed(row, slot, output)` and `shared(row, part, output)` to the residual stream, which was `before`.
template <class Routed, class SharedSum>
DEVICE void add_units(float* residual, float* square_sums, float before, const float (*weights)[TOP_K], int row0, int rows,
                      Routed routed, SharedSum shared) {
    if (threadIdx.x >= COLUMNS * TILE_ROWS) return;  // whole warps
    const int row = threadIdx.x >> 4, at = threadIdx.x & 15, tile = blockIdx.x;
    float y = 0.f;
    if (row < rows) {
#pragma unroll
        for (int slot = 0; slot < TOP_K; ++slot) y += weights[row][slot] * routed(row, slot, at);
#pragma unroll
        for (int part = 0; part < SHARED_PARTS; ++part) y += shared(row, part, at);
        y += before;
    }
    float square = y * y;
    // 16 neighbouring lanes hold 16 neighbouring outputs of one row.
#pragma unroll
    for (int offset = 8; offset; offset >>= 1) square += __shfl_xor_sync(ALL, square, offset);
    if (row < rows) {
        residual[size_t(row0 + row) * HIDDEN + tile * TILE_ROWS + at] = y;
        if (at == 0) square_sums[(row0 + row) * DOWN_TILES + tile] = square;
    }
}

// What a row that takes no part gives is never used, so it is any row that is there.
DEVICE Activation load_direct(const u16* row, int group) {
    const uint4* at = reinterpret_cast<const uint4*>(row + group * TILE_INPUTS + 16 * (lane_id() & 3));
    return Activation{at[0], at[1]};
}

// A unit, one warp.
DEVICE void down_unit(float (&sum)[4], const DownTiles& at, const u16* row) {
    constexpr int DEPTH = smaller(DOWN_GROUPS, 10);
    Int4Weight weight[DEPTH];
    Activation x[DEPTH];
    float rest[4] = {0.f, 0.f, 0.f, 0.f};
    const uint4* codes = at.codes + lane_id();
    const u32* scales = at.scales + (lane_id() >> 2);
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) weight[step].load_further(codes, scales, step);
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) x[step] = load_direct(row, step);
#pragma unroll
    for (int step = 0; step < DOWN_GROUPS; ++step) {
        weight[step % DEPTH].multiply(step < FIRST_GROUPS ? sum : rest, x[step % DEPTH]);
        if (step + DEPTH < DOWN_GROUPS) {
            weight[step % DEPTH].load_further(codes, scales, step + DEPTH);
            x[step % DEPTH] = load_direct(row, step + DEPTH);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += rest[i];
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
    // The logits are of the launch before the last: the choice waits for nobody.
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
    add_units(
        residual, square_sums, was, weights, row0, rows, [&](int row, int slot, int at) { return routed[row][slot][at]; },
        [&](int row, int part, int at) { return shared_sum[part][row][at]; });
    finish_turn(turn);
}

// ---- experts_down of one row --------------------------------------------------------------------------------------

// Two warps a unit. All of their weights are asked for before the wait: the first groups wait in registers, the others in shared
// memory, each lane's for itself.
constexpr int ROW_WARPS = 16;
constexpr int LANDED_GROUPS = smaller(FIRST_GROUPS, 8), HELD_GROUPS = FIRST_GROUPS - LANDED_GROUPS;
constexpr int HALF_BYTES = LANDED_GROUPS * (512 + 32) + FIRST_GROUPS * TILE_INPUTS * 2;  // a warp: codes, scales, inputs

// Half of a unit: `count` groups of FIRST_GROUPS.
struct HalfUnit {
    Int4Weight held[larger(1, HELD_GROUPS)];
    int count;

    DEVICE void ask(const DownTiles& at, int first, uint4* landing) {
        count = first ? DOWN_GROUPS - FIRST_GROUPS : FIRST_GROUPS;
#pragma unroll
        for (int i = 0; i < LANDED_GROUPS; ++i)
            if (i < count) copy_async(landing + i * 32 + lane_id(), at.codes + first * 32 + lane_id() + i * 32);
        const u32* scales = at.scales + first * 8;
        for (int i = lane_id(); i < 2 * smaller(count, LANDED_GROUPS); i += 32) copy_async(landing + LANDED_GROUPS * 32 + i, scales + 4 * i);
        copy_commit();
#pragma unroll
        for (int i = 0; i < HELD_GROUPS; ++i)
            if (LANDED_GROUPS + i < count)
                held[i].load_further(at.codes + first * 32 + lane_id(), scales + (lane_id() >> 2), LANDED_GROUPS + i);
    }

    // x: the half of the row, in shared memory.
    DEVICE void multiply(float (&sum)[4], const uint4* landing, const u16* x) const {
        const bool present = lane_id() < 4;
        const u32* scales = reinterpret_cast<const u32*>(landing + LANDED_GROUPS * 32) + (lane_id() >> 2);
#pragma unroll 4
        for (int i = 0; i < LANDED_GROUPS; ++i)
            if (i < count) int4_tile(sum, landing[i * 32 + lane_id()], scales[i * 8], load_activation(x, 0, i, present));
#pragma unroll
        for (int i = 0; i < HELD_GROUPS; ++i)
            if (LANDED_GROUPS + i < count) held[i].multiply(sum, load_activation(x, 0, LANDED_GROUPS + i, present));
    }
};

// Block (tile): 16 values of the residual stream.
extern "C" __global__ void __launch_bounds__(32 * ROW_WARPS, 2)
    experts_down_row(const u16* hidden, const u16* shared_hidden, const float* logits, const float* bias, const uint4* codes,
                     const u32* scales, const uint4* shared_codes, const u32* shared_scales, float* residual, float* square_sums,
                     TurnCounters* turns, int index, int before) {
    constexpr int UNITS = SHARED_PARTS + TOP_K;
    __shared__ float sums[UNITS][2][TILE_ROWS], weights[1][TOP_K];
    __shared__ int chosen[ROW_WARPS][TOP_K];
    extern __shared__ uint4 shared[];
    uint4* landing = shared + warp_id() * (HALF_BYTES / 16);
    u16* x = reinterpret_cast<u16*>(landing + LANDED_GROUPS * 34);
    const Turn turn = {turns, index, before};
    const float was = residual_before(residual, 0, 1);
    const int half = warp_id() & 1, first = half ? FIRST_GROUPS : 0, mine = warp_id() >> 1;
    HalfUnit part;
    // The logits are of the launch before the last: the choice waits for nobody, and every warp makes it for itself.
    auto ask = [&](int unit) {
        const int expert = unit < SHARED_PARTS ? 0 : chosen[warp_id()][unit - SHARED_PARTS];
        part.ask(DownTiles::of(unit, expert, codes, scales, shared_codes, shared_scales), first, landing);
    };
    choose_experts(logits, bias, chosen[warp_id()], TOP_K);
    __syncwarp();
    if (mine < UNITS) ask(mine);
    if (warp_id() == 0) weigh_experts(logits, chosen[0], weights[0]);
    await_turn(turn);

    for (int unit = mine; unit < UNITS; unit += ROW_WARPS / 2) {
        if (UNITS > ROW_WARPS / 2 && unit != mine) ask(unit);
        const u16* row = (unit < SHARED_PARTS ? shared_hidden + unit * WIDTH : hidden + (unit - SHARED_PARTS) * WIDTH) + first * TILE_INPUTS;
        for (int i = lane_id(); i < part.count * (TILE_INPUTS / 8); i += 32) copy_async(x + i * 8, row + i * 8);
        copy_commit();
        copy_wait<0>();
        __syncwarp();
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        part.multiply(sum, landing, x);
        __syncwarp();
        if ((lane_id() & 3) == 0) {  // column 0
            sums[unit][half][lane_id() >> 2] = sum[0];
            sums[unit][half][(lane_id() >> 2) + 8] = sum[2];
        }
    }
    __syncthreads();
    auto unit_sum = [&](int unit, int at) { return sums[unit][0][at] + sums[unit][1][at]; };
    add_units(
        residual, square_sums, was, weights, 0, 1, [&](int, int slot, int at) { return unit_sum(SHARED_PARTS + slot, at); },
        [&](int, int part, int at) { return unit_sum(part, at); });
    finish_turn(turn);
}
