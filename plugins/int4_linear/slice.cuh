// A block's warps share the inputs: warp w takes groups w, w + WARPS, w + 2 WARPS ... of every weight tile of the block, and
// of the activations it needs just those; so nothing is waited for but its own loads until the sums are put together.
// Which warp takes what depends on the number of inputs alone, never on how many activation rows there are.
#pragma once
#include "fixed.cuh"

template <int INPUTS, int WARPS>
struct Slice {
    static constexpr int GROUPS = INPUTS / TILE_INPUTS;
    static constexpr int STEPS = (GROUPS + WARPS - 1) / WARPS;  // groups of a warp, the last one perhaps missing
    static constexpr int STRIDE = STEPS * TILE_INPUTS + ROW_PAD;  // halves between rows of a warp's activations

    // `slice`: of the inputs; a block of more warps has several to a slice.
    DEVICE static int group(int step, int slice = warp_id()) { return slice + step * WARPS; }
    DEVICE static int count() { return STEPS - int(!has(STEPS - 1)); }
    DEVICE static bool has(int step, int slice = warp_id()) { return (step + 1) * WARPS <= GROUPS || group(step, slice) < GROUPS; }
};

// A warp's slice of a lone row of halves, in pieces of 8, times a scale.
template <class Part, bool SCALED>
struct RowPieces {
    static constexpr int COUNT = (Part::STEPS * 8 + 31) / 32;
    uint4 factor[COUNT], piece[COUNT];

    DEVICE static int piece_of(int n) { return lane_id() + 32 * n; }
    DEVICE static int input_of(int n) { return Part::group(piece_of(n) >> 3) * TILE_INPUTS + 8 * (piece_of(n) & 7); }
    DEVICE static bool has(int n) { return piece_of(n) < Part::STEPS * 8 && Part::has(piece_of(n) >> 3); }

    DEVICE void load_scales(const u16* scales) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n)
            if (SCALED && has(n)) factor[n] = *reinterpret_cast<const uint4*>(scales + input_of(n));
    }
    // The row, to `own`; the caller waits with __syncwarp.
    DEVICE void stage(u16* own, const u16* row) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n)
            if (has(n)) piece[n] = *reinterpret_cast<const uint4*>(row + input_of(n));
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            if (!has(n)) continue;
            if (SCALED) half2_scale(piece[n], factor[n]);
            *reinterpret_cast<uint4*>(own + 8 * piece_of(n)) = piece[n];
        }
    }
};

// Partial sums of one tile in shared memory: a float at column * PARTIAL_COLUMN + output. 20 keeps stores free of conflicts.
constexpr int PARTIAL_COLUMN = 20;

DEVICE void store_partial(float* tile, const float (&sum)[4], int columns) {
    const int g = lane_id() >> 2, column = 2 * (lane_id() & 3);
    if (column < columns) {
        tile[column * PARTIAL_COLUMN + g] = sum[0];
        tile[column * PARTIAL_COLUMN + g + 8] = sum[2];
    }
    if (column + 1 < columns) {
        tile[(column + 1) * PARTIAL_COLUMN + g] = sum[1];
        tile[(column + 1) * PARTIAL_COLUMN + g + 8] = sum[3];
    }
}

// The sum of all warps' partial sums, warp 0 first; `stride` floats between warps.
template <int WARPS>
DEVICE float sum_partials(const float* partial, int stride) {
    float total = partial[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) total += partial[warp * stride];
    return total;
}

// 1 / sqrt(mean of squares + eps) of row g in lanes 4g .. 4g + 3, from the sums of 16 squares each.
template <int INPUTS>
DEVICE float reciprocal_rms(const float* square_sums, int rows, float eps) {
    constexpr int quads = INPUTS / 64;
    const int g = lane_id() >> 2, t = lane_id() & 3;
    float sum = 0.f;
    if (g < rows) {
        const float4* row = reinterpret_cast<const float4*>(square_sums + g * (INPUTS / 16));
        float4 part = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int quad = 0; quad < quads; quad += 4) {
            if (quad + t < quads) {
                const float4 more = row[quad + t];
                part.x += more.x, part.y += more.y, part.z += more.z, part.w += more.w;
            }
        }
        sum = (part.x + part.y) + (part.z + part.w);
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    return rsqrtf(sum * (1.0f / INPUTS) + eps);
}

// Four values times four halves.
DEVICE void scale_quad(float4& x, const uint2& by) {
    x.x *= low_half(by.x), x.y *= high_half(by.x), x.z *= low_half(by.y), x.w *= high_half(by.y);
}

// x * rms * norm.
DEVICE void normalise_quad(float4& x, const uint2& norm, float rms) {
    x.x *= rms * low_half(norm.x), x.y *= rms * high_half(norm.x);
    x.z *= rms * low_half(norm.y), x.w *= rms * high_half(norm.y);
}

// What becomes of a quad of a row's normalised inputs, sixteen lanes a group. A row's slice is STRIDE halves long.
template <int STRIDE>
struct AsHalves {
    static constexpr bool EVERY_LANE = false;  // has a say in what the others store
    u16* to;

    DEVICE void operator()(const float4& x, int row, int step, int quad, bool) const {
        const uint2 halves = {floats_to_halves(x.x, x.y), floats_to_halves(x.z, x.w)};
        *reinterpret_cast<uint2*>(to + row * STRIDE + step * TILE_INPUTS + 4 * quad) = halves;
    }
};

// As fixed point in the room of halves; the scales of a group stand side by side for ROWS rows.
template <int STRIDE, int ROWS>
struct AsFixed {
    static constexpr bool EVERY_LANE = true;
    u16* to;
    float* scales;

    DEVICE void operator()(const float4& x, int row, int step, int quad, bool there) const {
        store_fixed(x, there, to + row * STRIDE + step * TILE_INPUTS, quad, scales + step * ROWS + row);
    }
};

// One warp: its slice of x * rms * weight * scale, to `store`; the caller waits with __syncwarp.
// residual [rows][INPUTS], square_sums [rows][INPUTS / 16].
// LOADS: how many a lane has under way at once; 4 are a row's whole slice up to 4,096 inputs on 8 warps.
template <int INPUTS, int WARPS, bool SCALED, int LOADS, class Store>
DEVICE void normalise_slice(const Store& store, const float* residual, const float* square_sums, const u16* weight,
                            const u16* pre_quant_scale, int rows, float eps) {
    using Part = Slice<INPUTS, WARPS>;
    float4 value[LOADS];
    uint2 factor[LOADS], scale[LOADS];
    const int slots = rows * Part::STEPS, quad = lane_id() & 15;  // a slot is one group of one row: 16 lanes of 4 inputs
    auto there = [&](int slot, int step) { return slot < slots && Part::group(step) < Part::GROUPS; };

    auto load = [&](int base) {
#pragma unroll
        for (int c = 0; c < LOADS; ++c) {
            const int slot = base + 2 * c + (lane_id() >> 4), row = slot / Part::STEPS, step = slot - row * Part::STEPS;
            if (Store::EVERY_LANE) value[c] = {0.f, 0.f, 0.f, 0.f};
            if (!there(slot, step)) continue;
            const int input = Part::group(step) * TILE_INPUTS + 4 * quad;
            value[c] = *reinterpret_cast<const float4*>(residual + size_t(row) * INPUTS + input);
            factor[c] = *reinterpret_cast<const uint2*>(weight + input);
            if (SCALED) scale[c] = *reinterpret_cast<const uint2*>(pre_quant_scale + input);
        }
    };

    load(0);
    const float rms = reciprocal_rms<INPUTS>(square_sums, rows, eps);
    for (int base = 0; base < slots; base += 2 * LOADS) {
#pragma unroll
        for (int c = 0; c < LOADS; ++c) {
            const int slot = base + 2 * c + (lane_id() >> 4), row = slot / Part::STEPS, step = slot - row * Part::STEPS;
            const float row_rms = __shfl_sync(0xffffffffu, rms, 4 * (row & 7));
            const bool mine = there(slot, step);
            if (mine) {
                normalise_quad(value[c], factor[c], row_rms);
                if (SCALED) scale_quad(value[c], scale[c]);
            }
            if (mine || Store::EVERY_LANE) store(value[c], row, step, quad, mine);
        }
        load(base + 2 * LOADS);
    }
}

// The same with as many loads under way as the rows are worth.
template <int INPUTS, int WARPS, bool SCALED, class Store>
DEVICE void normalise_rows(const Store& store, const float* residual, const float* square_sums, const u16* weight,
                           const u16* pre_quant_scale, int rows, float eps) {
    if (rows <= 2) normalise_slice<INPUTS, WARPS, SCALED, 1>(store, residual, square_sums, weight, pre_quant_scale, rows, eps);
    else normalise_slice<INPUTS, WARPS, SCALED, 4>(store, residual, square_sums, weight, pre_quant_scale, rows, eps);
}
