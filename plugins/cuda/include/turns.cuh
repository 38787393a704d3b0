// Launches that overlap. The launches of a step take turns in two queues: launch n starts when n - 2 has ended, while n - 1
// still runs. It asks for its weights at once, and touches what n - 1 reads or writes only after `await_turn`; what n - 2 and
// earlier ones wrote is there from the start. Every block that counts itself in `finish_turn` must have waited first, so that
// whoever waits for it has waited for all before. Without counters (null) launches simply follow each other.
// Host side, and why blocks that wait never keep out those they wait for: trtvlm.plugins.cuda.turns.
#pragma once
#include "common.cuh"

// Of one launch: blocks that have finished. In a sector of L2 of its own.
struct TurnCounters {
    u32 finished, pad[7];
};

// What a kernel is told: the counters of all launches of the step, which of them it is, and how many blocks of the launch before
// count themselves (0: it has ended already).
struct Turn {
    TurnCounters* counters;
    int index, before;
};

DEVICE void add_release(u32* counter, u32 value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

DEVICE u32 load_acquire(const u32* counter) {
    u32 out;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(out) : "l"(counter) : "memory");
    return out;
}

// All threads: until `blocks` blocks have counted themselves in `done`; what they wrote can be read then.
DEVICE void await_count(const u32* done, int blocks) {
    if (threadIdx.x == 0)
        while (load_acquire(done) < u32(blocks)) {}
    __syncthreads();
}

// All threads: what the block wrote can be read by whoever waits.
DEVICE void count_done(u32* done) {
    __syncthreads();
    if (threadIdx.x == 0) add_release(done, 1);
}

// All threads: until the launch before has finished, and what it wrote can be read.
DEVICE void await_turn(const Turn& turn) {
    if (!turn.counters) return;
    if (turn.before) await_count(&turn.counters[turn.index - 1].finished, turn.before);
    else __syncthreads();
}

// All threads: whoever waits for this launch need not wait for this block. Not for the last one of a step: nobody waits for it.
DEVICE void finish_turn(const Turn& turn) {
    if (turn.counters) count_done(&turn.counters[turn.index].finished);
}

// Asks for a vector of halves, so that reading it after the wait finds it in L2. Up to 64 halves a thread of the block.
DEVICE void fetch_halves(const u16* vector, int count) {
    if (vector && int(threadIdx.x) * 64 < count) fetch_line(reinterpret_cast<const char*>(vector + threadIdx.x * 64));
}
