// A MoE layer for 1 to 16 activation rows in three launches: route (the router's product, the experts' inputs, and the shared
// expert's first half), experts_up (every block picks the experts for itself: waiting for another block to do it would take longer),
// experts_down. Rows are taken in tiles of 8; within a tile an expert's weights are read once for all its rows. A row alone has
// kernels of its own (row.cu), with the same sums in the same order.
// Macros: HIDDEN, WIDTH (of an expert), EXPERTS, TOP_K, SHARED (width of the shared expert, 0: none); SIGMOID, NORMALISE,
// SCALING, BIASED: the routing; EXPERT_SCALED, SHARED_SCALED: which activations have a pre_quant_scale.
#include "int4_moe/router.cuh"
#include "int4_moe/sums.cuh"
#include "int4_linear/weights.cuh"

// The work list of a tile of rows, int32: how many entries; then of each its expert, its rows as 8 bits, and the slot each
// row has it in, 4 bits a row.
constexpr int WORK_EXPERT = 1, WORK_ROWS = 1 + MOST_ENTRIES, WORK_SLOTS = 1 + 2 * MOST_ENTRIES;
constexpr int WORK_SIZE = 1 + 3 * MOST_ENTRIES;

static_assert(WIDTH % 64 == 0, "sizes the kernels were written for");

// ---- the shared expert's first half -----------------------------------------------------------------------------

#if SHARED
constexpr int SHARED_BLOCKS = SHARED / TILE_ROWS;  // a block a tile of up weights, and its gates
using Shared = Slice<HIDDEN, ROUTE_WARPS>;

DEVICE void shared_up(char* own, int bytes, const float* residual, const float* square_sums, const u16* norm, float eps,
                      const u16* pre_quant_scale, const uint4* codes, const u32* scales, const u16* next_scale, u16* out,
                      int rows, const Turn& turn) {
    constexpr int TILES = 2, DEPTH = smaller(Shared::STEPS, 8);
    const int tile = blockIdx.x - ROUTER_BLOCKS - INPUT_BLOCKS;
    Int4Weight weight[DEPTH][TILES];
    auto load = [&](int step) {
        if (Shared::has(step)) {
#pragma unroll
            for (int r = 0; r < TILES; ++r)
                weight[step % DEPTH][r].load(codes, scales, (tile + r * SHARED_BLOCKS) * Shared::GROUPS + Shared::group(step));
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
    const int column = threadIdx.x >> 4, output = tile * TILE_ROWS + (threadIdx.x & 15);
    if (column >= rows) return;
    const float* at = partial + column * PARTIAL_COLUMN + (threadIdx.x & 15);
    float y = sum_partials<ROUTE_WARPS>(at, bytes / 4);
    y *= silu(sum_partials<ROUTE_WARPS>(at + COLUMNS * PARTIAL_COLUMN, bytes / 4));
    if (next_scale) y *= half_to_float(next_scale[output]);
    out[size_t(column) * SHARED + output] = float_to_half(y);
}
#else
constexpr int SHARED_BLOCKS = 0;
#endif

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

// Blocks a multiprocessor has room for: with wide experts more of them, that one turn of an H200 is enough for one row.
constexpr int UP_BLOCKS = EXPERT_TILES * TOP_K > 528 ? 5 : 4;

// What a row that takes no part gives is never used, so it is any row that is there.
DEVICE Activation load_direct(const u16* row, int group) {
    const uint4* at = reinterpret_cast<const uint4*>(row + group * TILE_INPUTS + 16 * (lane_id() & 3));
    return Activation{at[0], at[1]};
}

// One block: the work list and the experts' weights [rows, TOP_K] for experts_down.
DEVICE void tell(const float* logits, const float* bias, float* weights, int* work, int (*chosen)[TOP_K], Entry* entries,
                 int* counts, int rows) {
    for (int row = warp_id(); row < rows; row += UP_WARPS) choose_experts(logits + row * EXPERTS, bias, chosen[row], TOP_K);
    __syncthreads();
    const int count = list_work<UP_WARPS>(chosen, rows, entries, counts);
    if (threadIdx.x == 0) work[0] = count;
    for (int i = threadIdx.x; i < count; i += 32 * UP_WARPS) {
        work[WORK_EXPERT + i] = entries[i].expert;
        work[WORK_ROWS + i] = int(entries[i].rows);
        work[WORK_SLOTS + i] = int(entries[i].slots);
    }
    for (int row = warp_id(); row < rows; row += UP_WARPS) weigh_experts(logits + row * EXPERTS, chosen[row], weights + row * TOP_K);
}

// 16 of one expert's outputs, for its rows.
DEVICE void expert_up(int tile, const Entry& entry, const u16* inputs, const uint4* codes, const u32* scales, const u16* next_scale,
                      u16* hidden, int rows) {
    __shared__ float partials[UP_WARPS][2 * COLUMNS * PARTIAL_COLUMN];
    constexpr int DEPTH = smaller(Up::STEPS, UP_BLOCKS > 4 ? 2 : 3), GROUPS = Up::GROUPS;
    const size_t first = size_t(entry.expert) * 2 * EXPERT_TILES;
    codes += (first + tile) * GROUPS * 32;
    scales += (first + tile) * GROUPS * 8;
    Int4Weight weight[DEPTH][2];
    Activation x[DEPTH];
    const u16* row = inputs + size_t(smaller(lane_id() >> 2, rows - 1)) * HIDDEN;
    auto load = [&](int step) {
        if (Up::has(step)) {
            weight[step % DEPTH][0].load(codes, scales, Up::group(step));
            weight[step % DEPTH][1].load(codes, scales, EXPERT_TILES * GROUPS + Up::group(step));
            x[step % DEPTH] = load_direct(row, Up::group(step));
        }
    };
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) load(step);
    float sum[2][4] = {};
#pragma unroll
    for (int step = 0; step < Up::STEPS; ++step) {
        if (Up::has(step)) {
            weight[step % DEPTH][0].multiply(sum[0], x[step % DEPTH]);
            weight[step % DEPTH][1].multiply(sum[1], x[step % DEPTH]);
        }
        if (step + DEPTH < Up::STEPS) load(step + DEPTH);
    }
    store_partial(partials[warp_id()], sum[0], COLUMNS);
    store_partial(partials[warp_id()] + COLUMNS * PARTIAL_COLUMN, sum[1], COLUMNS);
    __syncthreads();
    const int column = threadIdx.x >> 4, output = tile * TILE_ROWS + (threadIdx.x & 15);  // 128 threads
    if (!(entry.rows >> column & 1)) return;
    const float* at = partials[0] + column * PARTIAL_COLUMN + (threadIdx.x & 15);
    const float up = sum_partials<UP_WARPS>(at, 2 * COLUMNS * PARTIAL_COLUMN);
    const float gate = sum_partials<UP_WARPS>(at + COLUMNS * PARTIAL_COLUMN, 2 * COLUMNS * PARTIAL_COLUMN);
    float y = up * silu(gate);
    if (next_scale) y *= half_to_float(next_scale[output]);
    const int slot = entry.slots >> (4 * column) & 15;
    hidden[(size_t(column) * TOP_K + slot) * WIDTH + output] = float_to_half(y);
}

// Block (1 + tile, entry, tile of rows): 16 outputs of one expert for its rows. hidden half [rows, TOP_K, WIDTH]. Block (0, 0)
// of each tile of rows tells what there is to do.
extern "C" __global__ void __launch_bounds__(32 * UP_WARPS, UP_BLOCKS)
    experts_up(const u16* inputs, const float* logits, const float* bias, float* weights, int* work, const uint4* codes,
               const u32* scales, const u16* next_scale, u16* hidden, int all_rows, TurnCounters* turns, int index, int before) {
    __shared__ int chosen[COLUMNS][TOP_K], counts[UP_WARPS];
    __shared__ Entry entries[MOST_ENTRIES];
    const Turn turn = {turns, index, before};
    static_assert(EXPERTS <= 32 * UP_WARPS, "a thread an expert");
    const int at = blockIdx.y, tile = int(blockIdx.x) - 1, row0 = blockIdx.z * COLUMNS, rows = smaller(COLUMNS, all_rows - row0);
    logits += row0 * EXPERTS;
    await_turn(turn);
    if (tile < 0) {
        if (at == 0) tell(logits, bias, weights + row0 * TOP_K, work + blockIdx.z * WORK_SIZE, chosen, entries, counts, rows);
    } else {
        Entry entry = {0, 1, u32(at)};
        int count = TOP_K;
        if (all_rows == 1) {
            // Every warp finds its block's expert for itself, and waits for nobody.
            entry.expert = choose_experts(logits, bias, nullptr, at + 1);
        } else {
            for (int row = warp_id(); row < rows; row += UP_WARPS) choose_experts(logits + row * EXPERTS, bias, chosen[row], TOP_K);
            __syncthreads();
            count = list_work<UP_WARPS>(chosen, rows, entries, counts);
            entry = entries[smaller(at, MOST_ENTRIES - 1)];
        }
        if (at < count)
            expert_up(tile, entry, inputs + size_t(row0) * HIDDEN, codes, scales, next_scale, hidden + size_t(row0) * TOP_K * WIDTH, rows);
    }
    finish_turn(turn);
}

constexpr int DOWN_WARPS = 8;

// The whole of K in one warp, in order: nothing decides a result but its own row.
DEVICE void down_unit(float (&sum)[4], const uint4* codes, const u32* scales, int first_group, const u16* row) {
    constexpr int DEPTH = smaller(DOWN_GROUPS, 11);
    Int4Weight weight[DEPTH];
    Activation x[DEPTH];
    float rest[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) weight[step].load(codes, scales, first_group + step);
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) x[step] = load_direct(row, step);
#pragma unroll
    for (int step = 0; step < DOWN_GROUPS; ++step) {
        weight[step % DEPTH].multiply(step < FIRST_GROUPS ? sum : rest, x[step % DEPTH]);
        if (step + DEPTH < DOWN_GROUPS) {
            weight[step % DEPTH].load(codes, scales, first_group + step + DEPTH);
            x[step % DEPTH] = load_direct(row, step + DEPTH);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += rest[i];
}

// Block (tile, tile of rows): 16 values of the residual stream of up to 8 rows. Warps take units: an entry of the work list,
// or a part of the shared expert.
extern "C" __global__ void __launch_bounds__(32 * DOWN_WARPS, 1)
    experts_down(const u16* hidden, const u16* shared_hidden, const int* work, const float* weights, const uint4* codes,
                 const u32* scales, const uint4* shared_codes, const u32* shared_scales, float* residual, float* square_sums,
                 int all_rows, TurnCounters* turns, int index, int before_blocks) {
    const Turn turn = {turns, index, before_blocks};
    __shared__ float routed[COLUMNS][TOP_K][TILE_ROWS], shared_sum[larger(1, SHARED_PARTS)][COLUMNS][TILE_ROWS];
    constexpr int TILES = HIDDEN / TILE_ROWS, OUTPUTS = COLUMNS * TILE_ROWS;
    const int tile = blockIdx.x, row0 = blockIdx.y * COLUMNS, rows = smaller(COLUMNS, all_rows - row0);
    work += blockIdx.y * WORK_SIZE;
    const int g = lane_id() >> 2, column = 2 * (lane_id() & 3), in_row = smaller(g, rows - 1);
    const int out_row = threadIdx.x >> 4, output = tile * TILE_ROWS + (threadIdx.x & 15);
    float before = 0.f;
    if (threadIdx.x < OUTPUTS && out_row < rows) before = residual[size_t(row0 + out_row) * HIDDEN + output];

    await_turn(turn);
    // Asked for at once: how much there is, and this warp's first entry (what lies past the count is not used).
    const int count = work[0], units = SHARED_PARTS + count;
    const int mine = smaller(larger(warp_id() - SHARED_PARTS, 0), MOST_ENTRIES - 1);
    int expert = work[WORK_EXPERT + mine];
    u32 mask = u32(work[WORK_ROWS + mine]), slots = u32(work[WORK_SLOTS + mine]);
    for (int unit = warp_id(); unit < units; unit += DOWN_WARPS) {
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        if (unit < SHARED_PARTS) {
            const u16* row = shared_hidden + size_t(row0 + in_row) * SHARED + unit * WIDTH;
            constexpr int GROUPS = SHARED / TILE_INPUTS;
            down_unit(sum, shared_codes, shared_scales, tile * GROUPS + unit * DOWN_GROUPS, row);
#pragma unroll
            for (int i = 0; i < 4; ++i) shared_sum[unit][column + (i & 1)][g + 8 * (i >> 1)] = sum[i];
            continue;
        }
        const int entry = unit - SHARED_PARTS;
        if (entry != mine) {
            expert = work[WORK_EXPERT + entry];
            mask = u32(work[WORK_ROWS + entry]), slots = u32(work[WORK_SLOTS + entry]);
        }
        const u16* row = hidden + (size_t(row0 + in_row) * TOP_K + (slots >> (4 * in_row) & 15)) * WIDTH;
        down_unit(sum, codes, scales, (expert * TILES + tile) * DOWN_GROUPS, row);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int c = column + (i & 1);
            if (mask >> c & 1) routed[c][slots >> (4 * c) & 15][g + 8 * (i >> 1)] = sum[i];
        }
    }
    __syncthreads();
    float y = 0.f;
    if (threadIdx.x < OUTPUTS && out_row < rows) {
        const float* weight = weights + (row0 + out_row) * TOP_K;
#pragma unroll
        for (int slot = 0; slot < TOP_K; ++slot) y += weight[slot] * routed[out_row][slot][threadIdx.x & 15];
#pragma unroll
        for (int part = 0; part < SHARED_PARTS; ++part) y += shared_sum[part][out_row][threadIdx.x & 15];
        y += before;
    }
    float square = y * y;
    // 16 neighbouring lanes hold 16 neighbouring outputs of one row.
#pragma unroll
    for (int offset = 8; offset; offset >>= 1) square += __shfl_xor_sync(ALL, square, offset);
    if (threadIdx.x < OUTPUTS && out_row < rows) {
        residual[size_t(row0 + out_row) * HIDDEN + output] = y;
        if ((threadIdx.x & 15) == 0) square_sums[(row0 + out_row) * TILES + tile] = square;
    }
    finish_turn(turn);
}
