// A MoE layer for one activation row in three launches that overlap well: few registers a block, and all that a later launch reads in
// any case asked for early. route_row (the router's product, the experts' inputs), experts_up_row (the shared expert beside it, the
// chosen ones after it), experts_down_row. Every sum is in the order of decode.cu, so that the bits are those of a row among others.
// Macros: as decode.cu's.
#include "int4_moe/router.cuh"
#include "int4_linear/weights.cuh"

// Blocks 0 .. ROUTER_BLOCKS - 1 multiply with the router, the others write what the experts read.
extern "C" __global__ void __launch_bounds__(32 * ROUTE_WARPS, 4)
    route_row(const float* residual, const float* square_sums, const u16* norm, float eps, const float* router,
              const u16* expert_scale, float* logits, char* inputs, float* input_scales, TurnCounters* turns, int index, int before) {
    const Turn turn = {turns, index, before};
    if (blockIdx.x < ROUTER_BLOCKS) router_logits(residual, square_sums, norm, eps, router, logits, 1, turn);
    else expert_inputs(residual, square_sums, norm, eps, expert_scale, inputs, input_scales, 1, turn);
    finish_turn(turn);
}

// ---- gate and up products -----------------------------------------------------------------------------------------

constexpr int UP_DEPTH = Up::STEPS < 2 ? 1 : 2;  // steps of weights under way; an even number, for SPLIT
constexpr int MOST_SPLIT = ROUTE_WARPS / UP_WARPS;  // decode.cu shares the shared expert's inputs among ROUTE_WARPS

// 16 outputs of gate and up: up weights of row tile `tile`, gate weights GATES tiles further on. decode.cu shares the inputs among
// SPLIT * UP_WARPS warps; here every warp has the sums of SPLIT of them. x: this warp's slice of the inputs.
template <int GATES, int SPLIT>
struct UpTiles {
    const uint4* codes;
    const u32* scales;
    Int4Weight up[UP_DEPTH], gate[UP_DEPTH];

    DEVICE void ask(int place, int step) {
        if (!Up::has(step)) return;
        up[place].load(codes, scales, Up::group(step));
        gate[place].load(codes, scales, GATES * Up::GROUPS + Up::group(step));
    }
    DEVICE void ask(const uint4* all_codes, const u32* all_scales, int tile) {
        codes = all_codes + size_t(tile) * Up::GROUPS * 32;
        scales = all_scales + size_t(tile) * Up::GROUPS * 8;
#pragma unroll
        for (int step = 0; step < UP_DEPTH; ++step) ask(step, step);
    }
    // The gated products, in the first 16 threads of the block.
    DEVICE float multiply(const char* x, const float* x_scales, float (*partials)[2][TILE_ROWS]) {
        float sum[SPLIT][2][2] = {};
        // A loop, or else the inputs of all steps would be read first, into registers that are not there.
#pragma unroll 1
        for (int first = 0; first < Up::STEPS; first += UP_DEPTH) {
#pragma unroll
            for (int i = 0; i < UP_DEPTH; ++i) {
                const int step = first + i;
                if (Up::STEPS % UP_DEPTH && step >= Up::STEPS) break;
                if (Up::has(step)) {
                    const uint4 now = load_fixed_row(x + step * GROUP_BYTES);
                    fixed_row_tile(sum[i % SPLIT][0], up[i].codes, up[i].scale, now, x_scales[step]);
                    fixed_row_tile(sum[i % SPLIT][1], gate[i].codes, gate[i].scale, now, x_scales[step]);
                }
                if (step + UP_DEPTH < Up::STEPS) ask(i, step + UP_DEPTH);
            }
        }
        if ((lane_id() & 3) == 0) {  // column 0
#pragma unroll
            for (int i = 0; i < 2 * SPLIT; ++i) {
                float* to = partials[warp_id() + i / 2 * UP_WARPS][i & 1];
                to[lane_id() >> 2] = sum[i / 2][i & 1][0];
                to[(lane_id() >> 2) + 8] = sum[i / 2][i & 1][1];
            }
        }
        __syncthreads();
        const float* at = partials[0][0] + (threadIdx.x & 15);
        const float gated = silu(sum_partials<SPLIT * UP_WARPS>(at + TILE_ROWS, 2 * TILE_ROWS));
        return sum_partials<SPLIT * UP_WARPS>(at, 2 * TILE_ROWS) * gated;
    }
};

// Block (tile, entry): 16 outputs of a part of the shared expert, or of a chosen one. hidden half [TOP_K, WIDTH].
extern "C" __global__ void __launch_bounds__(32 * UP_WARPS, 7)
    experts_up_row(const float* residual, const float* square_sums, const u16* norm, float eps, const char* inputs,
                   const float* input_scales, const float* logits, const float* bias, const uint4* codes, const u32* scales,
                   const u16* next_scale, u16* hidden, const u16* shared_scale, const uint4* shared_codes, const u32* shared_scales,
                   const u16* shared_next, u16* shared_out, TurnCounters* turns, int index, int before) {
    __shared__ float partials[MOST_SPLIT * UP_WARPS][2][TILE_ROWS], scales_of[UP_WARPS][Up::STEPS];
    __shared__ __align__(16) char slices[UP_WARPS][Up::STEPS * GROUP_BYTES];
    __shared__ int chosen;
    const Turn turn = {turns, index, before};
    char* x = slices[warp_id()];
    float* x_scales = scales_of[warp_id()];
    const int slot = int(blockIdx.y) - SHARED_PARTS, at = blockIdx.x * TILE_ROWS + (threadIdx.x & 15);
    if (slot < 0) {
        // The residual stream is of the launch before the last: the shared expert waits for nobody.
        UpTiles<SHARED / TILE_ROWS, MOST_SPLIT> tiles;
        tiles.ask(shared_codes, shared_scales, blockIdx.y * EXPERT_TILES + blockIdx.x);
        u16* halves = reinterpret_cast<u16*>(x);
        normalise_slice<HIDDEN, UP_WARPS, SHARED_SCALED != 0, 1>(halves, residual, square_sums, norm, shared_scale, 1, eps);
        __syncwarp();
        fix_groups<Up::STEPS>(x, x_scales, Up::count());
        __syncwarp();
        float y = tiles.multiply(x, x_scales, partials);
        if (threadIdx.x < TILE_ROWS) {
            const int output = blockIdx.y * WIDTH + at;
            if (shared_next) y *= half_to_float(shared_next[output]);
            shared_out[output] = float_to_half(y);
        }
        await_turn(turn);
    } else {
        await_turn(turn);
        for (int i = lane_id(); i < Up::STEPS * 8; i += 32)
            if (Up::has(i >> 3)) copy_async(x + i * 16, inputs + Up::group(i >> 3) * GROUP_BYTES + (i & 7) * 16);
        copy_commit();
        const bool scaling = lane_id() < Up::STEPS && Up::has(lane_id());
        const float x_scale = scaling ? input_scales[Up::group(lane_id()) * COLUMNS] : 0.f;
        if (warp_id() == 0) {
            const int expert = choose_experts(logits, bias, nullptr, slot + 1);
            if (lane_id() == 0) chosen = expert;
        }
        __syncthreads();
        UpTiles<EXPERT_TILES, 1> tiles;
        tiles.ask(codes, scales, chosen * 2 * EXPERT_TILES + blockIdx.x);
        if (scaling) x_scales[lane_id()] = x_scale;
        copy_wait<0>();
        __syncwarp();
        float y = tiles.multiply(x, x_scales, partials);
        if (threadIdx.x < TILE_ROWS) {
            if (next_scale) y *= half_to_float(next_scale[at]);
            hidden[slot * WIDTH + at] = float_to_half(y);
        }
    }
    finish_turn(turn);
}

// ---- down products ------------------------------------------------------------------------------------------------

// Two warps a unit (an expert, or a part of the shared one), each with half of its inputs. All of their weights are asked for before
// the wait: the first groups' codes wait in shared memory, each lane's for itself, the others' in registers.
constexpr int DOWN_WARPS = 16;
constexpr int SECOND_GROUPS = DOWN_GROUPS - FIRST_GROUPS, DOWN_TILES = HIDDEN / TILE_ROWS;
constexpr int LANDED_GROUPS = smaller(FIRST_GROUPS, 8), HELD_GROUPS = FIRST_GROUPS - LANDED_GROUPS;
constexpr int X_AT = LANDED_GROUPS * 512 + FIRST_GROUPS * 32, X_SCALES_AT = X_AT + FIRST_GROUPS * GROUP_BYTES;
constexpr int HALF_BYTES = X_SCALES_AT + (FIRST_GROUPS * 4 + 15) / 16 * 16;  // a warp: codes, scales, inputs, their scales
constexpr int UNITS = SHARED_PARTS + TOP_K;

struct HalfUnit {
    uint4 held[larger(1, HELD_GROUPS)];

    // codes and scales of its `count` groups.
    DEVICE void ask(const uint4* codes, const u32* scales, int count, uint4* landing) {
#pragma unroll
        for (int i = 0; i < LANDED_GROUPS; ++i)
            if (i < SECOND_GROUPS || i < count) copy_async(landing + i * 32 + lane_id(), codes + i * 32 + lane_id());
        for (int i = lane_id(); i < 2 * count; i += 32) copy_async(landing + LANDED_GROUPS * 32 + i, scales + 4 * i);
        copy_commit();
#pragma unroll
        for (int i = 0; i < HELD_GROUPS; ++i)
            if (LANDED_GROUPS + i < SECOND_GROUPS || LANDED_GROUPS + i < count)
                held[i] = load_stream(codes + (LANDED_GROUPS + i) * 32 + lane_id());
    }

    DEVICE void multiply(float (&sum)[2], int count, const uint4* landing, const char* x, const float* x_scales) const {
        const u32* scales = reinterpret_cast<const u32*>(landing + LANDED_GROUPS * 32) + (lane_id() >> 2);
#pragma unroll 1
        for (int i = 0; i < LANDED_GROUPS; ++i)
            if (i < SECOND_GROUPS || i < count)
                fixed_row_tile(sum, landing[i * 32 + lane_id()], scales[i * 8], load_fixed_row(x + i * GROUP_BYTES), x_scales[i]);
#pragma unroll
        for (int i = LANDED_GROUPS; i < FIRST_GROUPS; ++i)
            if (i < SECOND_GROUPS || i < count)
                fixed_row_tile(sum, held[i - LANDED_GROUPS], scales[i * 8], load_fixed_row(x + i * GROUP_BYTES), x_scales[i]);
    }
};

// Block (tile): 16 values of the residual stream.
extern "C" __global__ void __launch_bounds__(32 * DOWN_WARPS, 2)
    experts_down_row(const u16* hidden, const u16* shared_hidden, const float* logits, const float* bias, const uint4* codes,
                     const u32* scales, const uint4* shared_codes, const u32* shared_scales, float* residual, float* square_sums,
                     TurnCounters* turns, int index, int before) {
    __shared__ float sums[UNITS][2][TILE_ROWS], weights[TOP_K];
    __shared__ int chosen[TOP_K];
    extern __shared__ uint4 shared[];
    uint4* landing = shared + warp_id() * (HALF_BYTES / 16);
    char* x = reinterpret_cast<char*>(landing) + X_AT;
    float* x_scales = reinterpret_cast<float*>(reinterpret_cast<char*>(landing) + X_SCALES_AT);
    const Turn turn = {turns, index, before};
    const int tile = blockIdx.x, output = tile * TILE_ROWS + (threadIdx.x & 15);
    const int half = warp_id() & 1, first = half ? FIRST_GROUPS : 0, count = half ? SECOND_GROUPS : FIRST_GROUPS;
    HalfUnit part;
    auto ask = [&](int unit, int expert) {
        const bool routed = unit >= SHARED_PARTS;
        const size_t at = first + (routed ? (size_t(expert) * DOWN_TILES + tile) * DOWN_GROUPS
                                          : tile * (SHARED / TILE_INPUTS) + unit * DOWN_GROUPS);
        part.ask((routed ? codes : shared_codes) + at * 32, (routed ? scales : shared_scales) + at * 8, count, landing);
    };
    // The logits are of the launch before the last: every warp makes its choice for itself, and waits for nobody.
    const int mine = warp_id() >> 1;
    if (mine < SHARED_PARTS) ask(mine, 0);
    else if (mine < UNITS) ask(mine, choose_experts(logits, bias, nullptr, mine - SHARED_PARTS + 1));
    if (warp_id() == 0) {
        choose_experts(logits, bias, chosen, TOP_K);
        __syncwarp();
        weigh_experts(logits, chosen, weights);
    }
    if (UNITS > DOWN_WARPS / 2) __syncthreads();
    await_turn(turn);
    for (int unit = mine; unit < UNITS; unit += DOWN_WARPS / 2) {
        if (UNITS > DOWN_WARPS / 2 && unit != mine) ask(unit, unit < SHARED_PARTS ? 0 : chosen[unit - SHARED_PARTS]);
        const u16* row = (unit < SHARED_PARTS ? shared_hidden + unit * WIDTH : hidden + (unit - SHARED_PARTS) * WIDTH) +
                         first * TILE_INPUTS;
        for (int i = lane_id(); i < count * (TILE_INPUTS / 8); i += 32) copy_async(x + i * 16, row + i * 8);
        copy_commit();
        copy_wait<0>();
        __syncwarp();
        fix_groups<FIRST_GROUPS>(x, x_scales, count);
        __syncwarp();
        float sum[2] = {0.f, 0.f};
        part.multiply(sum, count, landing, x, x_scales);
        __syncwarp();
        if ((lane_id() & 3) == 0) {  // column 0
            sums[unit][half][lane_id() >> 2] = sum[0];
            sums[unit][half][(lane_id() >> 2) + 8] = sum[1];
        }
    }
    const float was = residual[output];
    __syncthreads();
    if (warp_id() == 0) {
        const int at = threadIdx.x & 15;
        float y = 0.f;
#pragma unroll
        for (int slot = 0; slot < TOP_K; ++slot) y += weights[slot] * (sums[SHARED_PARTS + slot][0][at] + sums[SHARED_PARTS + slot][1][at]);
#pragma unroll
        for (int unit = 0; unit < SHARED_PARTS; ++unit) y += sums[unit][0][at] + sums[unit][1][at];
        y += was;
        float square = y * y;
#pragma unroll
        for (int offset = 8; offset; offset >>= 1) square += __shfl_xor_sync(ALL, square, offset);
        if (threadIdx.x < TILE_ROWS) residual[output] = y;
        if (threadIdx.x == 0) square_sums[tile] = square;
    }
    finish_turn(turn);
}
