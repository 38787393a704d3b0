// Random numbers that are a function of (seed, step, which): Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3", SC 2011). A step computed again gives the same tokens, and no generator's state has to be kept.
#pragma once
#include "common.cuh"
#include "speculative_accept/state.cuh"

struct Words {
    u32 a, b, c, d;
};

DEVICE Words philox(Words counter, u32 key_low, u32 key_high) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u64 first = u64(0xD2511F53u) * counter.a, second = u64(0xCD9E8D57u) * counter.c;
        counter = Words{u32(second >> 32) ^ counter.b ^ key_low, u32(second), u32(first >> 32) ^ counter.d ^ key_high,
                        u32(first)};
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
    return counter;
}

// Random number `which` of the current step, in units of 2^-64.
DEVICE u64 random_fraction(const int* state, u32 which) {
    const Words words = philox(Words{u32(state[STEP]), which, 0, 0}, u32(state[SEED]), u32(state[SEED + 1]));
    return u64(words.b) << 32 | words.a;
}

// The same as a number in [0, 1): its first 53 bits, exactly.
DEVICE double unit(u64 fraction) { return double(fraction >> 11) * (1.0 / 9007199254740992.0); }
