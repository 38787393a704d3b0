// A MoE layer for 1 to 16 activation rows in three launches: route (the router's product, the experts' inputs, and the shared
// expert's first half), experts_up (every block picks the experts for itself: waiting for another block to do it would take longer),
// experts_down. Rows are taken in tiles of 8; within a tile an expert's weights are read once for all its rows. A row alone has
// kernels of its own from o_proj on (dense_row.cu, experts_row.cu), and so have the experts of up to 8 rows (rows.cu), with the same sums in the
// same order.
// Macros: HIDDEN, WIDTH (of an expert), EXPERTS, TOP_K, SHARED (width of the shared expert, 0: none); SIGMOID, NORMALISE,
// SCALING, BIASED: the routing; EXPERT_SCALED, SHARED_SCALED: which activations have a pre_quant_scale; SHARED_PAIRS: of tiles, a block
// of `route`; DOWN_BLOCK_WARPS: of experts_down.
#include "int4_moe/router.cuh"
#include "int4_linear/weights.cuh"

// ---- the shared expert's first half -----------------------------------------------------------------------------

#if SHARED
// A block has SHARED_PAIRS tiles of up weights, and their gates.
constexpr int PAIRS = SHARED_PAIRS, SHARED_TILES = SHARED / TILE_ROWS, SHARED_BLOCKS = SHARED_TILES / PAIRS;
static_assert(SHARED_TILES % PAIRS == 0, "sizes the kernels were written for");
using Shared = Slice<HIDDEN, ROUTE_WARPS>;

DEVICE void shared_up(char* own, int bytes, const float* residual, const float* square_sums, const u16* norm, float eps,
                      const u16* pre_quant_scale, const uint4* codes, const u32* scales, const u16* next_scale, u16* out,
                      int rows, const Turn& turn) {
    constexpr int TILES = 2 * PAIRS, DEPTH = smaller(Shared::STEPS, PAIRS == 1 ? 8 : 2);  // steps of weights in registers
    // With two pairs the others go by way of shared memory, so that all are under way from the start.
    constexpr int LANDED = PAIRS == 1 ? 0 : Shared::STEPS - DEPTH;
    __shared__ __align__(16) char landing[ROUTE_WARPS][larger(1, LANDED)][TILES][Int4Weight::BYTES];
    const int tile = (blockIdx.x - ROUTER_BLOCKS - INPUT_BLOCKS) * PAIRS;
    Int4Weight weight[Shared::STEPS][TILES];
    auto place_of = [&](int r, int step) { return (tile + r % PAIRS + r / PAIRS * SHARED_TILES) * Shared::GROUPS + Shared::group(step); };
    auto load = [&](int step) {
        if (!Shared::has(step)) return;
#pragma unroll
        for (int r = 0; r < TILES; ++r) {
            if (LANDED && step >= DEPTH) weight[step][r].take(landing[warp_id()][step - DEPTH][r]);
            else weight[step][r].load(codes, scales, place_of(r, step));
        }
    };
    u16* x = reinterpret_cast<u16*>(own);
    const NormSlice<Shared, SHARED_SCALED != 0> by = {x + rows * Shared::STRIDE};
    by.ask(norm, pre_quant_scale);
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) load(step);
#pragma unroll
    for (int step = DEPTH; step < DEPTH + LANDED; ++step) {
        if (!Shared::has(step)) continue;
#pragma unroll
        for (int r = 0; r < TILES; ++r) Int4Weight::land(landing[warp_id()][step - DEPTH][r], codes, scales, place_of(r, step));
    }
    copy_commit();
    await_turn(turn);
    __shared__ float x_scales[ROUTE_WARPS][Shared::STEPS][COLUMNS];
    const AsFixedHalves<Shared::STRIDE, COLUMNS> fixed = {x, x_scales[warp_id()][0]};
    copy_wait<1>();
    __syncwarp();
    normalise_rows<HIDDEN, ROUTE_WARPS, SHARED_SCALED != 0>(fixed, residual, square_sums, by, rows, eps);
    copy_wait<0>();
    __syncwarp();
    const int in_row = smaller(lane_id() >> 2, rows - 1);  // what a row that is not there gives is never used
    float sum[TILES][4] = {};
#pragma unroll
    for (int step = 0; step < Shared::STEPS; ++step) {
        if (Shared::has(step)) {
            const FixedActivation now = load_fixed(x + in_row * Shared::STRIDE + step * TILE_INPUTS);
            const float2 scale = *reinterpret_cast<const float2*>(x_scales[warp_id()][step] + 2 * (lane_id() & 3));
#pragma unroll
            for (int r = 0; r < TILES; ++r) {
                const Int4Weight& w = weight[step][r];
                fixed_tile(sum[r], w.codes, w.scale, now, scale);
            }
        }
        if (step + DEPTH < Shared::STEPS) load(step + DEPTH);
    }
    __syncwarp();
    float* partial = reinterpret_cast<float*>(own);
#pragma unroll
    for (int r = 0; r < TILES; ++r) store_partial(partial + r * COLUMNS * PARTIAL_COLUMN, sum[r], rows);
    __syncthreads();
    partial -= warp_id() * bytes / 4;
    const int column = threadIdx.x / (PAIRS * TILE_ROWS), pair = threadIdx.x / TILE_ROWS % PAIRS, at_tile = threadIdx.x % TILE_ROWS;
    const int output = (tile + pair) * TILE_ROWS + at_tile;
    if (column >= rows) return;
    const float* at = partial + (pair * COLUMNS + column) * PARTIAL_COLUMN + at_tile;
    float y = sum_partials<ROUTE_WARPS>(at, bytes / 4);
    y *= silu(sum_partials<ROUTE_WARPS>(at + PAIRS * COLUMNS * PARTIAL_COLUMN, bytes / 4));
    if (next_scale) y *= half_to_float(next_scale[output]);
    out[size_t(column) * SHARED + output] = float_to_half(y);
}
#else
constexpr int SHARED_BLOCKS = 0;
#endif

// The part of this block's tile of rows.
DEVICE char* inputs_of(char* inputs) { return inputs + size_t(blockIdx.y) * COLUMNS * Up::GROUPS * GROUP_BYTES; }
DEVICE float* scales_of(float* scales) { return scales + blockIdx.y * Up::GROUPS * COLUMNS; }

// Blocks 0 .. ROUTER_BLOCKS - 1 multiply with the router, the next INPUT_BLOCKS write what the experts read; the others are
// the shared expert's.
extern "C" __global__ void __launch_bounds__(32 * ROUTE_WARPS, 2)
    route(const float* residual, const float* square_sums, const u16* norm, float eps, const float* router,
          const u16* expert_scale, float* logits, char* inputs, float* input_scales, const u16* shared_scale,
          const uint4* shared_codes, const u32* shared_scales, const u16* shared_next, u16* shared_out, int all_rows, int bytes,
          TurnCounters* turns, int index, int before) {
    const Turn turn = {turns, index, before};
    extern __shared__ uint4 shared[];
    const int row0 = blockIdx.y * COLUMNS, rows = smaller(COLUMNS, all_rows - row0);
    residual += size_t(row0) * HIDDEN;
    square_sums += row0 * (HIDDEN / 16);
    if (blockIdx.x < ROUTER_BLOCKS) {
        router_logits(residual, square_sums, norm, eps, router, logits + row0 * EXPERTS, rows, turn);
    } else if (blockIdx.x < ROUTER_BLOCKS + INPUT_BLOCKS) {
        expert_inputs(residual, square_sums, norm, eps, expert_scale, inputs_of(inputs), scales_of(input_scales), rows, turn);
    } else {
#if SHARED
        shared_up(reinterpret_cast<char*>(shared) + warp_id() * bytes, bytes, residual, square_sums, norm, eps, shared_scale,
                  shared_codes, shared_scales, shared_next, shared_out + size_t(row0) * SHARED, rows, turn);
#endif
    }
    finish_turn(turn);
}

// What the experts read, of halves x [rows, HIDDEN] that are normalised already, for callers that have no use for `route`.
extern "C" __global__ void __launch_bounds__(32 * ROUTE_WARPS)
    fix_inputs(const u16* x, const u16* scale, char* inputs, float* input_scales, int all_rows) {
    const int row0 = blockIdx.y * COLUMNS, rows = smaller(COLUMNS, all_rows - row0);
    for (int base = warp_id() * 32; base < rows * INPUT_QUADS; base += 32 * ROUTE_WARPS) {
        const int row = (base + lane_id()) / INPUT_QUADS, quad = blockIdx.x * INPUT_QUADS + (base + lane_id()) % INPUT_QUADS;
        float4 value = {0.f, 0.f, 0.f, 0.f};
        if (quad < QUADS) {
            const uint2 halves = reinterpret_cast<const uint2*>(x + size_t(row0 + row) * HIDDEN)[quad];
            value = quad_of(halves.x, halves.y);
            if (EXPERT_SCALED) scale_quad(value, reinterpret_cast<const uint2*>(scale)[quad]);
        }
        store_inputs(value, row, quad, inputs_of(inputs), scales_of(input_scales));
    }
}

// ---- experts ------------------------------------------------------------------------------------------------------

// A block has 64 outputs, a group of what experts_down reads: two warps to each slice of the inputs, two tiles to each warp.
constexpr int BLOCK_TILES = 4, BLOCK_WARPS = 2 * UP_WARPS, WARP_TILES = 2;
static_assert(EXPERTS <= 32 * BLOCK_WARPS, "a thread an expert");

// One block: the work list and the experts' weights [rows, TOP_K] for experts_down.
DEVICE void tell(const float* logits, const float* bias, float* weights, int* work, int (*chosen)[TOP_K], Entry* entries,
                 int* counts, int rows) {
    const int count = list_work<BLOCK_WARPS>(logits, bias, rows, chosen, entries, counts);
    write_work<BLOCK_WARPS>(work, entries, count);
    for (int row = warp_id(); row < rows; row += BLOCK_WARPS) weigh_experts(logits + row * EXPERTS, chosen[row], weights + row * TOP_K);
}

// 64 of one expert's outputs, for its rows.
DEVICE void expert_up(int part, const Entry& entry, const char* inputs, const float* input_scales, const uint4* codes, const u32* scales,
                      const u16* next_scale, char* hidden, float* hidden_scales, int rows) {
    constexpr int DEPTH = smaller(Up::STEPS, 2), GROUPS = Up::GROUPS, TILE_FLOATS = COLUMNS * PARTIAL_COLUMN;
    constexpr int ROW_BYTES = GROUPS * GROUP_BYTES + 64;  // reads of two rows meet no bank twice
    extern __shared__ uint4 shared[];                     // the rows' inputs, then the warps' partial sums
    __shared__ __align__(16) float x_scales[GROUPS * COLUMNS];
    __shared__ Entry kept;  // until the end; registers are scarce
    const int slice = warp_id() % UP_WARPS, tile0 = part * BLOCK_TILES + warp_id() / UP_WARPS * WARP_TILES;
    const size_t first = size_t(entry.expert) * 2 * EXPERT_TILES + tile0;
    codes += first * GROUPS * 32;
    scales += first * GROUPS * 8;
    char* rows_inputs = reinterpret_cast<char*>(shared);
    const char* x = rows_inputs + (lane_id() >> 2) * ROW_BYTES;  // what a row that is not there gives is never used
    Int4Weight weight[DEPTH][WARP_TILES][2];
    auto load = [&](int place, int step) {
        if (!Up::has(step, slice)) return;
#pragma unroll
        for (int i = 0; i < 2 * WARP_TILES; ++i)
            weight[place][i / 2][i & 1].load(codes, scales, (i / 2 + (i & 1) * EXPERT_TILES) * GROUPS + Up::group(step, slice));
    };
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) load(step, step);
    if (threadIdx.x == 0) kept = entry;
    for (int row = 0; row < rows; ++row) {
        if (!(entry.rows >> row & 1)) continue;
        for (int i = threadIdx.x; i < GROUPS * (GROUP_BYTES / 16); i += 32 * BLOCK_WARPS)
            copy_async(rows_inputs + row * ROW_BYTES + i * 16, inputs + (size_t(row) * GROUPS * GROUP_BYTES + i * 16));
    }
    for (int i = threadIdx.x; i < GROUPS * COLUMNS / 4; i += 32 * BLOCK_WARPS) copy_async(x_scales + 4 * i, input_scales + 4 * i);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    float sum[WARP_TILES][2][4] = {};
    // A loop, or else the inputs of all steps would be read first, into registers that are not there.
#pragma unroll 1
    for (int first = 0; first < Up::STEPS; first += DEPTH) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const int step = first + i;
            if (step >= Up::STEPS || !Up::has(step, slice)) break;
            const int group = Up::group(step, slice);
            const FixedActivation now = load_fixed(x + group * GROUP_BYTES);
            const float2 scale = *reinterpret_cast<const float2*>(x_scales + group * COLUMNS + 2 * (lane_id() & 3));
#pragma unroll
            for (int j = 0; j < 2 * WARP_TILES; ++j) {
                const Int4Weight& w = weight[i][j / 2][j & 1];
                fixed_tile(sum[j / 2][j & 1], w.codes, w.scale, now, scale);
            }
            if (step + DEPTH < Up::STEPS) load(i, step + DEPTH);
        }
    }
    __syncthreads();  // all inputs were read; the sums take their place
    auto partials = reinterpret_cast<float(*)[WARP_TILES][2][TILE_FLOATS]>(shared);
#pragma unroll
    for (int i = 0; i < 2 * WARP_TILES; ++i) store_partial(partials[warp_id()][i / 2][i & 1], sum[i / 2][i & 1], COLUMNS);
    __syncthreads();
    const int column = warp_id();  // a warp a row
    if (!(kept.rows >> column & 1)) return;
    const int slot = kept.slots >> (4 * column) & 15, at = 4 * (lane_id() >> 1) + (lane_id() & 1);
    float y[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int output = at + 2 * i, tile = output / TILE_ROWS;
        const float* from = partials[tile / WARP_TILES * UP_WARPS][tile % WARP_TILES][0] + column * PARTIAL_COLUMN + output % TILE_ROWS;
        constexpr int stride = 2 * WARP_TILES * TILE_FLOATS;
        const float up = sum_partials<UP_WARPS>(from, stride);
        y[i] = up * silu(sum_partials<UP_WARPS>(from + TILE_FLOATS, stride));
        if (next_scale) y[i] *= half_to_float(next_scale[part * TILE_INPUTS + output]);
    }
    const size_t to = (size_t(column) * TOP_K + slot) * DOWN_GROUPS + part;
    store_hidden(y, at, hidden + to * GROUP_BYTES, hidden_scales + to);
}

// Block (1 + part, entry, tile of rows): 64 outputs of one expert for its rows, to hidden, fixed point [rows, TOP_K, WIDTH]. Blocks
// (0, ...) make fixed point of the shared expert's, in their place; the first of them tells what there is to do.
extern "C" __global__ void __launch_bounds__(32 * BLOCK_WARPS, 2)
    experts_up(const char* inputs, const float* input_scales, const float* logits, const float* bias, float* weights, int* work,
               const uint4* codes, const u32* scales, const u16* next_scale, char* hidden, float* hidden_scales, char* shared_hidden,
               float* shared_hidden_scales, int all_rows, TurnCounters* turns, int index, int before) {
    __shared__ int chosen[COLUMNS][TOP_K], counts[BLOCK_WARPS];
    __shared__ Entry entries[MOST_ENTRIES];
    const Turn turn = {turns, index, before};
    const int at = blockIdx.y, part = int(blockIdx.x) - 1, row0 = blockIdx.z * COLUMNS, rows = smaller(COLUMNS, all_rows - row0);
    logits += row0 * EXPERTS;
    await_turn(turn);
    if (part < 0) {
        if (at == 0) tell(logits, bias, weights + row0 * TOP_K, work + blockIdx.z * WORK_SIZE, chosen, entries, counts, rows);
        const int groups = rows * (SHARED / TILE_INPUTS), before_this = row0 * (SHARED / TILE_INPUTS);
        for (int first = 4 * (at * BLOCK_WARPS + warp_id()); first < groups; first += 4 * BLOCK_WARPS * gridDim.y)
            fix_groups<4>(shared_hidden + size_t(before_this + first) * GROUP_BYTES, shared_hidden_scales + before_this + first,
                          smaller(4, groups - first));
    } else {
        Entry entry = {0, 1, u32(at)};
        int count = TOP_K;
        if (all_rows == 1) {
            // Every warp finds its block's expert for itself, and waits for nobody.
            entry.expert = choose_experts(logits, bias, nullptr, at + 1);
        } else {
            count = list_work<BLOCK_WARPS>(logits, bias, rows, chosen, entries, counts);
            entry = entries[smaller(at, MOST_ENTRIES - 1)];
        }
        if (at < count)
            expert_up(part, entry, inputs + size_t(row0) * Up::GROUPS * GROUP_BYTES, input_scales + blockIdx.z * Up::GROUPS * COLUMNS, codes,
                      scales, next_scale, hidden + size_t(row0) * TOP_K * DOWN_GROUPS * GROUP_BYTES,
                      hidden_scales + row0 * TOP_K * DOWN_GROUPS, rows);
    }
    finish_turn(turn);
}

// The whole of K in one warp, in order: nothing decides a result but its own row. row: this lane's activations; x_scales: of the
// rows of columns 2t and 2t + 1.
DEVICE void down_unit(float (&sum)[4], const uint4* codes, const u32* scales, int first_group, const char* row,
                      const float* (&x_scales)[2]) {
    constexpr int DEPTH = smaller(DOWN_GROUPS, 4);
    Int4Weight weight[DEPTH];
    FixedActivation x[DEPTH];
    float2 x_scale[DEPTH];
    float before[4] = {0.f, 0.f, 0.f, 0.f};  // of the first groups
    auto load_inputs = [&](int place, int step) {
        x[place] = load_fixed(row + step * GROUP_BYTES);
        x_scale[place] = float2{x_scales[0][step], x_scales[1][step]};
    };
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) weight[step].load(codes, scales, first_group + step);
#pragma unroll
    for (int step = 0; step < DEPTH; ++step) load_inputs(step, step);
    // A loop, or else loads of many steps would be in registers at once.
#pragma unroll 1
    for (int first = 0; first < DOWN_GROUPS; first += DEPTH) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const int step = first + i;
            if (DOWN_GROUPS % DEPTH && step >= DOWN_GROUPS) break;
            if (step == FIRST_GROUPS) {
#pragma unroll
                for (int j = 0; j < 4; ++j) before[j] = sum[j], sum[j] = 0.f;
            }
            fixed_tile<true>(sum, weight[i].codes, weight[i].scale, x[i], x_scale[i]);
            if (step + DEPTH < DOWN_GROUPS) {
                weight[i].load(codes, scales, first_group + step + DEPTH);
                load_inputs(i, step + DEPTH);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = before[i] + sum[i];
}

// Block (tile, tile of rows): 16 values of the residual stream of up to 8 rows. Warps take units: an entry of the work list,
// or a part of the shared expert.
extern "C" __global__ void __launch_bounds__(32 * DOWN_BLOCK_WARPS, 16 / DOWN_BLOCK_WARPS)
    experts_down(const char* hidden, const float* hidden_scales, const char* shared_hidden, const float* shared_hidden_scales,
                 const int* work, const float* weights, const uint4* codes, const u32* scales, const uint4* shared_codes,
                 const u32* shared_scales, float* residual, float* square_sums, int all_rows, TurnCounters* turns, int index,
                 int before_blocks) {
    const Turn turn = {turns, index, before_blocks};
    __shared__ float routed[COLUMNS][TOP_K][TILE_ROWS], shared_sum[larger(1, SHARED_PARTS)][COLUMNS][TILE_ROWS];
    constexpr int TILES = HIDDEN / TILE_ROWS, OUTPUTS = COLUMNS * TILE_ROWS;
    const int tile = blockIdx.x, row0 = blockIdx.y * COLUMNS, rows = smaller(COLUMNS, all_rows - row0);
    work += blockIdx.y * WORK_SIZE;
    const int g = lane_id() >> 2, column = 2 * (lane_id() & 3), in_row = smaller(g, rows - 1);
    const int columns[2] = {smaller(column, rows - 1), smaller(column + 1, rows - 1)};
    const int out_row = threadIdx.x >> 4, output = tile * TILE_ROWS + (threadIdx.x & 15);
    float before = 0.f;
    if (threadIdx.x < OUTPUTS && out_row < rows) before = residual[size_t(row0 + out_row) * HIDDEN + output];

    await_turn(turn);
    // Asked for at once: how much there is, and this warp's first entry (what lies past the count is not used).
    const int count = work[0], units = SHARED_PARTS + count;
    const int mine = smaller(larger(warp_id() - SHARED_PARTS, 0), MOST_ENTRIES - 1);
    Entry entry = read_work(work, mine);
    for (int unit = warp_id(); unit < units; unit += DOWN_BLOCK_WARPS) {
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        if (unit < SHARED_PARTS) {
            constexpr int GROUPS = SHARED / TILE_INPUTS;
            auto group_of = [&](int row) { return (row0 + row) * GROUPS + unit * DOWN_GROUPS; };
            const float* x_scales[2] = {shared_hidden_scales + group_of(columns[0]), shared_hidden_scales + group_of(columns[1])};
            down_unit(sum, shared_codes, shared_scales, tile * GROUPS + unit * DOWN_GROUPS,
                      shared_hidden + size_t(group_of(in_row)) * GROUP_BYTES, x_scales);
#pragma unroll
            for (int i = 0; i < 4; ++i) shared_sum[unit][column + (i & 1)][g + 8 * (i >> 1)] = sum[i];
            continue;
        }
        if (unit - SHARED_PARTS != mine) entry = read_work(work, unit - SHARED_PARTS);
        auto group_of = [&](int row) { return ((row0 + row) * TOP_K + int(entry.slots >> (4 * row) & 15)) * DOWN_GROUPS; };
        const float* x_scales[2] = {hidden_scales + group_of(columns[0]), hidden_scales + group_of(columns[1])};
        down_unit(sum, codes, scales, (entry.expert * TILES + tile) * DOWN_GROUPS, hidden + size_t(group_of(in_row)) * GROUP_BYTES, x_scales);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int c = column + (i & 1);
            if (entry.rows >> c & 1) routed[c][entry.slots >> (4 * c) & 15][g + 8 * (i >> 1)] = sum[i];
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
