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

// 1 / sqrt(mean of squares + eps) of row g in lanes 4g .. 4g + 3, from the sums of 16 squares each. AT_ONCE: loads of a lane under way.
template <int INPUTS, int AT_ONCE = 64>
DEVICE float reciprocal_rms(const float* square_sums, int rows, float eps) {
    constexpr int quads = INPUTS / 64;
    const int g = lane_id() >> 2, t = lane_id() & 3;
    float sum = 0.f;
    if (g < rows) {
        const float4* row = reinterpret_cast<const float4*>(square_sums + g * (INPUTS / 16));
        float4 part = {0.f, 0.f, 0.f, 0.f};
#pragma unroll AT_ONCE
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

// As fixed point of what they are as halves.
template <int STRIDE, int ROWS>
struct AsFixedHalves : AsFixed<STRIDE, ROWS> {
    DEVICE void operator()(const float4& x, int row, int step, int quad, bool there) const {
        AsFixed<STRIDE, ROWS>::operator()(quad_of(floats_to_halves(x.x, x.y), floats_to_halves(x.z, x.w)), row, step, quad, there);
    }
};

// One warp: its slice of x * rms * weight * scale, to `store`; the caller waits with __syncwarp.
// residual [rows][INPUTS], square_sums [rows][INPUTS / 16].
// Of one row, with LOADS under way at once in a lane.
template <int INPUTS, int WARPS, bool SCALED, int LOADS, class Store>
DEVICE void normalise_row(const Store& store, const float* residual, const float* square_sums, const u16* weight,
                          const u16* pre_quant_scale, float eps) {
    using Part = Slice<INPUTS, WARPS>;
    float4 value[LOADS];
    uint2 factor[LOADS], scale[LOADS];
    const int quad = lane_id() & 15;  // 16 lanes of 4 inputs a group
    auto step_of = [&](int base, int c) { return base + 2 * c + (lane_id() >> 4); };
    auto there = [&](int step) { return step < Part::STEPS && Part::group(step) < Part::GROUPS; };
    auto load = [&](int base) {
#pragma unroll
        for (int c = 0; c < LOADS; ++c) {
            const int step = step_of(base, c);
            if (Store::EVERY_LANE) value[c] = {0.f, 0.f, 0.f, 0.f};
            if (!there(step)) continue;
            const int input = Part::group(step) * TILE_INPUTS + 4 * quad;
            value[c] = *reinterpret_cast<const float4*>(residual + input);
            factor[c] = *reinterpret_cast<const uint2*>(weight + input);
            if (SCALED) scale[c] = *reinterpret_cast<const uint2*>(pre_quant_scale + input);
        }
    };
    load(0);
    const float rms = __shfl_sync(0xffffffffu, reciprocal_rms<INPUTS>(square_sums, 1, eps), 0);
    for (int base = 0; base < Part::STEPS; base += 2 * LOADS) {
#pragma unroll
        for (int c = 0; c < LOADS; ++c) {
            const int step = step_of(base, c);
            const bool mine = there(step);
            if (mine) {
                normalise_quad(value[c], factor[c], rms);
                if (SCALED) scale_quad(value[c], scale[c]);
            }
            if (mine || Store::EVERY_LANE) store(value[c], 0, step, quad, mine);
        }
        if (base + 2 * LOADS < Part::STEPS) load(base + 2 * LOADS);
    }
}

// What several rows are multiplied with, of a warp's slice of the inputs, in shared memory: a norm's weight, then a scale.
template <class Part, bool SCALED>
struct NormSlice {
    static constexpr int HALVES = Part::STEPS * TILE_INPUTS;
    u16* weight;  // [HALVES], and another [HALVES] if SCALED

    // One warp; the caller waits.
    DEVICE void ask(const u16* weights, const u16* scales) const {
#pragma unroll 1
        for (int i = lane_id(); i < Part::STEPS * 8; i += 32) {
            if (!Part::has(i >> 3)) continue;
            const int input = Part::group(i >> 3) * TILE_INPUTS + 8 * (i & 7);
            copy_async(weight + 8 * i, weights + input);
            if (SCALED) copy_async(weight + HALVES + 8 * i, scales + input);
        }
        copy_commit();
    }
};

// Of several rows, two at a time: half a warp has a row's group, and asks for the one after the next when it takes it.
template <int INPUTS, int WARPS, bool SCALED, class Store>
DEVICE void normalise_rows(const Store& store, const float* residual, const float* square_sums,
                           const NormSlice<Slice<INPUTS, WARPS>, SCALED>& by, int rows, float eps) {
    using Part = Slice<INPUTS, WARPS>;
    float4 value[Part::STEPS];
    const int quad = lane_id() & 15;
    int row = lane_id() >> 4;
    int from = row * INPUTS + Part::group(0) * TILE_INPUTS + 4 * quad;
    auto load = [&](int step) { value[step] = *reinterpret_cast<const float4*>(residual + from + step * WARPS * TILE_INPUTS); };
#pragma unroll
    for (int step = 0; step < Part::STEPS; ++step) {
        value[step] = {0.f, 0.f, 0.f, 0.f};
        if (Part::has(step) && row < rows) load(step);
    }
    const float rms = reciprocal_rms<INPUTS, Part::STEPS <= 4 ? 64 : 5>(square_sums, rows, eps);  // registers are few with more steps
#pragma unroll 1
    for (int first = 0; first < rows; first += 2, row += 2) {
        const float row_rms = __shfl_sync(0xffffffffu, rms, 4 * (row & 7));
        const bool mine = row < rows, more = row < rows - 2;
        from += 2 * INPUTS;
#pragma unroll
        for (int step = 0; step < Part::STEPS; ++step) {
            if (!Part::has(step)) continue;
            float4 x = value[step];
            if (more) load(step);
            const uint2* factor = reinterpret_cast<const uint2*>(by.weight) + step * (TILE_INPUTS / 4) + quad;
            normalise_quad(x, factor[0], row_rms);
            if (SCALED) scale_quad(x, factor[by.HALVES / 4]);
            if (mine || Store::EVERY_LANE) store(x, row, step, quad, mine);
        }
    }
}
