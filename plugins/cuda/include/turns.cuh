// Launches that overlap. The launches of a step take turns in two streams: launch n starts when n - 2 has ended, while n - 1
// still runs. It asks for its weights at once, and touches what n - 1 reads or writes only after `await_turn`; what n - 2 and
// earlier ones wrote is there from the start. Every block that counts itself in `finish_turn` must have waited first, so that
// whoever waits for it has waited for all before. Without counters (null) launches simply follow each other.
// Host side: trtvlm.plugins.cuda.turns.
#pragma once
#include "common.cuh"

// Of one launch: blocks that have finished, blocks that have started; and whether all have. In lines of their own.
struct TurnCounters {
    u32 finished, pad[7], started, all_started, more[6];
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

// A thread counts its block among those that have started; all blocks must.
DEVICE void start_turn(const Turn& turn) {
    if (!turn.counters || threadIdx.x != 32) return;
    TurnCounters& mine = turn.counters[turn.index];
    const u32 blocks = gridDim.x * gridDim.y * gridDim.z;
    if (atomicAdd(&mine.started, 1u) == blocks - 1) add_release(&mine.all_started, 1);
}

// All threads: until the launch before has finished, and what it wrote can be read.
DEVICE void await_turn(const Turn& turn) {
    if (!turn.counters) return;
    start_turn(turn);
    if (threadIdx.x == 0 && turn.before) {
        const u32* finished = &turn.counters[turn.index - 1].finished;
        while (load_acquire(finished) < u32(turn.before)) {}
    }
    __syncthreads();
}

// All threads: what the block wrote can be read by whoever waits. The launch ends only once all blocks of the next have found
// room, because its end starts the one after that, whose waiting blocks might else take all the room there is.
DEVICE void finish_turn(const Turn& turn) {
    if (!turn.counters) return;
    __syncthreads();
    if (threadIdx.x == 0) {
        add_release(&turn.counters[turn.index].finished, 1);
        if (blockIdx.x + blockIdx.y + blockIdx.z == 0)
            while (!load_acquire(&turn.counters[turn.index + 1].all_started)) {}
    }
}

// Asks for a vector of halves, so that reading it after the wait finds it in L2. Up to 64 halves a thread of the block.
DEVICE void fetch_halves(const u16* vector, int count) {
    if (vector && int(threadIdx.x) * 64 < count) fetch_line(reinterpret_cast<const char*>(vector + threadIdx.x * 64));
}
