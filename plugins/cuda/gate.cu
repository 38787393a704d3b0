// Waits until all blocks of launch `index` have found room: one warp, between two launches that become ready at once.
#include "turns.cuh"

extern "C" __global__ void __launch_bounds__(32) gate(TurnCounters* counters, int index) {
    if (threadIdx.x == 0)
        while (!load_acquire(&counters[index].all_started)) {}
}
