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
    u16* x = reinterpret_cast<u16*>(own + SharedRing::BYTES);
    auto ask = [&](int step, int slot) {
        if (step < Shared::STEPS && Shared::has(step))
            ring.ask(slot, codes, scales, [&](int k) { return (tile + k * SHARED_BLOCKS) * Shared::GROUPS + Shared::group(step); });
        else copy_commit();
    };
#pragma unroll 1
    for (int step = 0; step < DEPTH; ++step) ask(step, step);
    fetch_halves(norm, HIDDEN);
    if (SHARED_SCALED) fetch_halves(pre_quant_scale, HIDDEN);
    await_turn(turn);
    normalise_rows<HIDDEN, ROUTE_WARPS, SHARED_SCALED != 0>(x, residual, square_sums, norm, pre_quant_scale, rows, eps);
    __syncwarp();
    const bool present = (lane_id() >> 2) < rows;
    float up[4] = {}, gate[4] = {};
#pragma unroll 1
    for (int step = 0, slot = 0; step < Shared::STEPS; ++step, slot = slot + 1 < DEPTH ? slot + 1 : 0) {
        SharedRing::await_oldest();
        if (Shared::has(step)) {
            const Activation now = load_activation(x, Shared::STRIDE, step, present);
            ring.multiply(up, slot, 0, now);
            ring.multiply(gate, slot, 1, now);
        }
        __syncwarp();
        ask(step + DEPTH, slot);
    }
    float* partial = reinterpret_cast<float*>(own);
    store_partial(partial, up, rows);
    store_partial(partial + COLUMNS * PARTIAL_COLUMN, gate, rows);
    __syncthreads();
    partial -= warp_id() * bytes / 4;
    const int column = threadIdx.x >> 4, output = tile * TILE_ROWS + (threadIdx.x & 15);
    if (column >= rows) return;
    const float* at = partial + column * PARTIAL_COLUMN + (threadIdx.x & 15);
    float y = sum_partials<ROUTE_WARPS>(at, bytes / 4) * silu(sum_partials<ROUTE_WARPS>(at + COLUMNS * PARTIAL_COLUMN, bytes / 4));
    if (next_scale) y *= half_to_float(next_scale[output]);
    out[size_t(column) * SHARED + output] = float_to_half(y);
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
constexpr int UP_DEPTH = smaller(Up::STEPS, 8);
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

// 16 of one expert's outputs, for its rows.
DEVICE void expert_up(const Entry& entry, const u16* inputs, const uint4* codes, const u32* scales, const u16* next_scale,
                      u16* hidden, int rows, char* shared) {
    constexpr int OWN = larger(UpRing::BYTES, 2 * COLUMNS * PARTIAL_COLUMN * 4);
    char* own = shared + warp_id() * OWN;
    const UpRing ring = {own};
    const int first = entry.expert * 2 * EXPERT_TILES + blockIdx.x;
    auto ask = [&](int step, int slot) {
        if (step < Up::STEPS && Up::has(step))
            ring.ask(slot, codes, scales, [&](int k) { return (first + k * EXPERT_TILES) * Up::GROUPS + Up::group(step); });
        else copy_commit();
    };
#pragma unroll 1
    for (int step = 0; step < UP_DEPTH; ++step) ask(step, step);
    const u16* row = inputs + size_t(smaller(lane_id() >> 2, rows - 1)) * HIDDEN;
    auto load = [&](int step) { return load_direct(row, Up::has(step) ? Up::group(step) : 0); };
    Activation next = load(0);
    float up[4] = {}, gate[4] = {};
#pragma unroll 1
    for (int step = 0, slot = 0; step < Up::STEPS; ++step, slot = slot + 1 < UP_DEPTH ? slot + 1 : 0) {
        const Activation now = next;
        if (step + 1 < Up::STEPS) next = load(step + 1);
        UpRing::await_oldest();
        if (Up::has(step)) {
            ring.multiply(up, slot, 0, now);
            ring.multiply(gate, slot, 1, now);
        }
        __syncwarp();
        ask(step + UP_DEPTH, slot);
    }
    store_partial(reinterpret_cast<float*>(own), up, COLUMNS);
    store_partial(reinterpret_cast<float*>(own) + COLUMNS * PARTIAL_COLUMN, gate, COLUMNS);
    __syncthreads();
    const int column = threadIdx.x >> 4, output = blockIdx.x * TILE_ROWS + (threadIdx.x & 15);  // 128 threads
    if (!(entry.rows >> column & 1)) return;
    const float* at = reinterpret_cast<const float*>(shared) + column * PARTIAL_COLUMN + (threadIdx.x & 15);
    float y = sum_partials<UP_WARPS>(at, OWN / 4) * silu(sum_partials<UP_WARPS>(at + COLUMNS * PARTIAL_COLUMN, OWN / 4));
    if (next_scale) y *= half_to_float(next_scale[output]);
    const int slot = entry.slots >> (4 * column) & 15;
    hidden[(size_t(column) * TOP_K + slot) * WIDTH + output] = float_to_half(y);
}

// Block (tile, entry, tile of rows). hidden half [rows, TOP_K, WIDTH].
extern "C" __global__ void __launch_bounds__(32 * UP_WARPS, 7)
    experts_up(const u16* inputs, const float* logits, const float* bias, const uint4* codes, const u32* scales,
               const u16* next_scale, u16* hidden, int all_rows, TurnCounters* turns, int index, int before) {
    __shared__ Chosen<UP_WARPS> work;
    extern __shared__ uint4 shared[];
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
        expert_up(entry, inputs + size_t(row0) * HIDDEN, codes, scales, next_scale, hidden + size_t(row0) * TOP_K * WIDTH, rows,
                  reinterpret_cast<char*>(shared));
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

// A warp's weights come two groups at a time, and units follow each other in the ring. The whole of K is one warp's, in order, so
// that nothing decides a row's result but that row.
constexpr int DOWN_PAIRS = (DOWN_GROUPS + 1) / 2, DOWN_DEPTH = 8;
using DownRing = WeightRing<2, DOWN_DEPTH>;

// Block (tile, tile of rows): 16 values of the residual stream of up to 8 rows. Warps take units: parts of the shared expert, then
// the rows' experts.
extern "C" __global__ void __launch_bounds__(32 * DOWN_WARPS, 2)
    experts_down(const u16* hidden, const u16* shared_hidden, const float* logits, const float* bias, const uint4* codes,
                 const u32* scales, const uint4* shared_codes, const u32* shared_scales, float* residual, float* square_sums,
                 int all_rows, TurnCounters* turns, int index, int before) {
    __shared__ float routed[COLUMNS][TOP_K][TILE_ROWS], shared_sum[larger(1, SHARED_PARTS)][COLUMNS][TILE_ROWS];
    __shared__ float weights[COLUMNS][TOP_K];
    __shared__ Chosen<DOWN_WARPS> work;
    __shared__ int own_choice[DOWN_WARPS][TOP_K];
    extern __shared__ uint4 shared[];
    const Turn turn = {turns, index, before};
    const DownRing ring = {reinterpret_cast<char*>(shared) + warp_id() * DownRing::BYTES};
    const int row0 = blockIdx.y * COLUMNS, rows = smaller(COLUMNS, all_rows - row0);
    const int g = lane_id() >> 2, column = 2 * (lane_id() & 3), in_row = smaller(g, rows - 1);
    const float was = residual_before(residual, row0, rows);
    logits += row0 * EXPERTS;

    // The logits are of the launch before the last: the choice, and the first weights, wait for nobody.
    int units = SHARED_PARTS + TOP_K;
    if (all_rows == 1) {  // every warp chooses for itself
        choose_experts(logits, bias, own_choice[warp_id()], TOP_K);
        __syncwarp();
    } else {
        units = SHARED_PARTS + work.list(logits, bias, rows);
    }
    auto entry_of = [&](int unit) {
        const int at = unit - SHARED_PARTS;
        if (at < 0) return Entry{0, (1u << rows) - 1, 0};
        return all_rows == 1 ? Entry{own_choice[warp_id()][at], 1, u32(at)} : work.entries[at];
    };
    int asked = warp_id(), asked_pair = 0;  // the next to ask for
    DownTiles from;
    auto ask = [&](int slot) {
        if (asked < units) {
            if (asked_pair == 0) from = DownTiles::of(asked, entry_of(asked).expert, codes, scales, shared_codes, shared_scales);
            // The last pair may be one group, twice.
            ring.ask(slot, from.codes, from.scales, [&](int k) { return from.first + smaller(2 * asked_pair + k, DOWN_GROUPS - 1); });
            if (++asked_pair == DOWN_PAIRS) asked_pair = 0, asked += DOWN_WARPS;
        } else {
            copy_commit();
        }
    };
#pragma unroll 1
    for (int slot = 0; slot < DOWN_DEPTH; ++slot) ask(slot);
    for (int row = warp_id(); row < rows; row += DOWN_WARPS)
        weigh_experts(logits + row * EXPERTS, all_rows == 1 ? own_choice[0] : work.chosen[row], weights[row]);
    await_turn(turn);

    int slot = 0;
    for (int unit = warp_id(); unit < units; unit += DOWN_WARPS) {
        const Entry entry = entry_of(unit);
        const u16* row = unit < SHARED_PARTS
                             ? shared_hidden + size_t(row0 + in_row) * SHARED + unit * WIDTH
                             : hidden + (size_t(row0 + in_row) * TOP_K + (entry.slots >> (4 * in_row) & 15)) * WIDTH;
        auto load = [&](int group) { return load_direct(row, smaller(group, DOWN_GROUPS - 1)); };
        Activation next[2] = {load(0), load(1)};
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
        for (int pair = 0; pair < DOWN_PAIRS; ++pair, slot = (slot + 1) % DOWN_DEPTH) {
            const Activation now[2] = {next[0], next[1]};
            next[0] = load(2 * pair + 2), next[1] = load(2 * pair + 3);
            DownRing::await_oldest();
            ring.multiply(sum, slot, 0, now[0]);
            if (2 * pair + 1 < DOWN_GROUPS) ring.multiply(sum, slot, 1, now[1]);
            __syncwarp();
            ask(slot);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int c = column + (i & 1), output = g + 8 * (i >> 1);
            if (unit < SHARED_PARTS) shared_sum[unit][c][output] = sum[i];
            else if (entry.rows >> c & 1) routed[c][entry.slots >> (4 * c) & 15][output] = sum[i];
        }
    }
    __syncthreads();
    add_units(residual, square_sums, was, weights, routed, shared_sum, row0, rows);
    finish_turn(turn);
}
