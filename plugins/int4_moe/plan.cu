// Before and after the experts' products (grouped.cu): which rows go to which expert, and the weighted sum of what comes
// back. Macros: EXPERTS; TOP_K; BLOCK_ROWS: the rows a block of the products takes.
#include "common.cuh"

constexpr int WARPS = 32;
constexpr u32 ALL = 0xffffffffu;

// One block of 1,024 threads. index [slots]: the expert of each (row, slot); order [slots]: the slots, sorted by expert and
// in their own order within one (each warp counts and then places a stretch of slots of its own, so nothing is left to
// chance); plan [entries]: expert, first place in the order, rows; zeros past the last.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    plan_groups(const long long* index, int* order, int4* plan, int slots, int entries) {
    // How many slots of each expert a warp has; then the place where its first of them goes.
    __shared__ int place[WARPS][EXPERTS], total[EXPERTS], used;
    constexpr int BATCH = 8;  // loads under way at once
    const int stretch = (slots + 32 * WARPS - 1) / (32 * WARPS) * 32;
    const int begin = min(slots, warp_id() * stretch), end = min(slots, begin + stretch);
    int* mine = place[warp_id()];
    for (int i = threadIdx.x; i < WARPS * EXPERTS; i += 32 * WARPS) (&place[0][0])[i] = 0;
    __syncthreads();
#pragma unroll 4
    for (int slot = begin + lane_id(); slot < end; slot += 32) atomicAdd(mine + int(index[slot]), 1);
    __syncthreads();
    for (int expert = threadIdx.x; expert < EXPERTS; expert += 32 * WARPS) {
        int sum = 0;
        for (int warp = 0; warp < WARPS; ++warp) {
            const int count = place[warp][expert];
            place[warp][expert] = sum;
            sum += count;
        }
        total[expert] = sum;
    }
    __syncthreads();
    for (int expert = threadIdx.x; expert < EXPERTS; expert += 32 * WARPS) {
        int first = 0, entry = 0;
        for (int before = 0; before < expert; ++before) {
            first += total[before];
            entry += (total[before] + BLOCK_ROWS - 1) / BLOCK_ROWS;
        }
        for (int warp = 0; warp < WARPS; ++warp) place[warp][expert] += first;
        for (int row = 0; row < total[expert]; row += BLOCK_ROWS)
            plan[entry++] = make_int4(expert, first + row, min(BLOCK_ROWS, total[expert] - row), 0);
        if (expert == EXPERTS - 1) used = entry;
    }
    __syncthreads();
    for (int entry = used + threadIdx.x; entry < entries; entry += 32 * WARPS) plan[entry] = make_int4(0, 0, 0, 0);
    for (int start = begin; start < end; start += 32 * BATCH) {
        int expert[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const int slot = start + 32 * b + lane_id();
            expert[b] = slot < end ? int(index[slot]) : -1;
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const u32 peers = __match_any_sync(ALL, expert[b]), before = peers & ((1u << lane_id()) - 1);
            int at = 0;
            if (expert[b] >= 0) at = mine[expert[b]] + __popc(before);
            __syncwarp();
            if (expert[b] >= 0) {
                order[at] = start + 32 * b + lane_id();
                if (before == 0) mine[expert[b]] += __popc(peers);
            }
            __syncwarp();
        }
    }
}

// out[row] = sum over slots, in their order, of weight[row][slot] * results[row][slot]; a thread takes eight outputs.
// out float [rows][8 * words], weight float [rows][TOP_K], results half [rows][TOP_K][8 * words].
extern "C" __global__ void __launch_bounds__(256)
    combine(const uint4* results, const float* weight, float4* out, int words, int count) {
    const int at = blockIdx.x * 256 + threadIdx.x;
    if (at >= count) return;
    const int row = at / words, word = at % words;
    uint4 result[TOP_K];
#pragma unroll
    for (int slot = 0; slot < TOP_K; ++slot) result[slot] = results[(size_t(row) * TOP_K + slot) * words + word];
    float4 first = {0.f, 0.f, 0.f, 0.f}, second = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int slot = 0; slot < TOP_K; ++slot) {
        const float w = weight[row * TOP_K + slot];
        first.x += w * low_half(result[slot].x), first.y += w * high_half(result[slot].x);
        first.z += w * low_half(result[slot].y), first.w += w * high_half(result[slot].y);
        second.x += w * low_half(result[slot].z), second.y += w * high_half(result[slot].z);
        second.z += w * low_half(result[slot].w), second.w += w * high_half(result[slot].w);
    }
    out[size_t(at) * 2] = first;
    out[size_t(at) * 2 + 1] = second;
}
