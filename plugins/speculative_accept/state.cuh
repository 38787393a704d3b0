// The state of a speculative step and the ring of emitted tokens: where things stand is told in state.py, how they move in
// reference.py (`advance`).
#pragma once
#include "common.cuh"

constexpr int DONE = 0, EMITTED = 1, LIMIT = 2, EOS = 3, TARGET_CURSOR = 4, STEP = 5, SEED = 6, TEMPERATURE = 8, TOP_P = 9;
constexpr int DRAFTED = 10, ACCEPTED = 11, DRAFT_CURSORS = 16, INPUTS = 32;
constexpr int MAX_DRAFTED = 15;

constexpr int RING_COUNT = 0, RING_DONE = 1, RING_STEPS = 2, RING_DRAFTED = 3, RING_ACCEPTED = 4, RING_HEADER = 16;

constexpr int DRAFT_DRAW = 0, ACCEPT_TEST = 16, TARGET_DRAW = 32, FIRST_DRAW = 48;

constexpr u32 WHOLE_WARP = 0xffffffffu;

// One warp: of `drafted` tokens the first `accepted` stand, and `own` (the same in every lane) follows them. Emits them up
// to the end of the answer and moves everything on.
DEVICE void advance(int* state, int* ring, int capacity, int drafted, int accepted, int own) {
    if (state[DONE]) return;
    const int lane = lane_id();
    const int emitted = state[EMITTED], limit = state[LIMIT], newest = state[INPUTS + 1];
    const int token = lane < accepted ? state[INPUTS + 2 + lane] : own;
    const int offered = min(accepted + 1, limit - emitted);
    const u32 ends = __ballot_sync(WHOLE_WARP, lane < offered && token == state[EOS]);
    const int kept = ends ? __ffs(ends) : offered;  // at least 1: DONE would be set otherwise
    const int last = __shfl_sync(WHOLE_WARP, token, kept - 1);
    const int before = __shfl_sync(WHOLE_WARP, token, kept > 1 ? kept - 2 : 0);
    const int count = emitted + kept, cursor = state[TARGET_CURSOR] + kept, step = state[STEP] + 1;
    const int all_drafted = state[DRAFTED] + drafted, all_accepted = state[ACCEPTED] + min(accepted, kept);
    const int done = ends || count >= limit;
    __syncwarp();  // every lane has read what is overwritten now

    volatile int* out = ring;
    if (lane < kept) out[RING_HEADER + (emitted + lane) % capacity] = token;
    if (lane < MAX_DRAFTED) state[DRAFT_CURSORS + lane] = lane ? cursor + lane : cursor - 1;
    if (lane == 0) {
        state[INPUTS] = kept > 1 ? before : newest;
        state[INPUTS + 1] = last;
        state[TARGET_CURSOR] = cursor;
        state[EMITTED] = count;
        state[STEP] = step;
        state[DRAFTED] = all_drafted;
        state[ACCEPTED] = all_accepted;
        state[DONE] = done;
        out[RING_DONE] = done;
        out[RING_STEPS] = step;
        out[RING_DRAFTED] = all_drafted;
        out[RING_ACCEPTED] = all_accepted;
    }
    // The host sees the count only after everything that it counts.
    __threadfence_system();
    __syncwarp();
    if (lane == 0) out[RING_COUNT] = count;
}
