// CUDA's built-in functions, as far as the kernels use them. Part of runtime.hpp.
#pragma once

[[maybe_unused]] static void __syncthreads() { emulation::barrier(); }
[[maybe_unused]] static void __syncwarp(unsigned mask = ~0u) { emulation::meet("__syncwarp", mask, 0); }
[[maybe_unused]] static void __threadfence() {}
[[maybe_unused]] static void __threadfence_block() {}
[[maybe_unused]] static void __threadfence_system() {}
[[maybe_unused]] static void __nanosleep(unsigned) { emulation::poll(); }
[[maybe_unused]] static size_t __cvta_generic_to_shared(const void* pointer) { return emulation::to_shared(pointer); }

// ---- warps --------------------------------------------------------------------------------------------------------

template <class T>
static T emulated_shuffle(const char* what, unsigned mask, T value, int from) {
    const auto places = emulation::meet(what, mask, value);
    return emulation::at<T>(places, mask >> from & 1 ? from : int(emulation::lane()));
}

template <class T>
static T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    const int lane = int(emulation::lane());
    return emulated_shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) | (from & (width - 1)));
}

template <class T>
static T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int lane = int(emulation::lane()), from = lane ^ bits;
    return emulated_shuffle("__shfl_xor_sync", mask, value, from / width > lane / width ? lane : from);
}

template <class T>
static T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = int(emulation::lane()), from = lane - int(delta);
    return emulated_shuffle("__shfl_up_sync", mask, value, from < lane / width * width ? lane : from);
}

template <class T>
static T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = int(emulation::lane()), from = lane + int(delta);
    return emulated_shuffle("__shfl_down_sync", mask, value, from >= (lane / width + 1) * width ? lane : from);
}

// What `of` says of each lane of the mask, a bit a lane.
template <class T, class Of>
static unsigned emulated_vote(const char* what, unsigned mask, T value, Of of) {
    const auto places = emulation::meet(what, mask, value);
    unsigned out = 0;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1 && of(emulation::at<T>(places, i))) out |= 1u << i;
    return out;
}

[[maybe_unused]] static unsigned __ballot_sync(unsigned mask, int predicate) {
    return emulated_vote("__ballot_sync", mask, predicate, [](int p) { return p != 0; });
}
[[maybe_unused]] static int __any_sync(unsigned mask, int predicate) {
    return emulated_vote("__any_sync", mask, predicate, [](int p) { return p != 0; }) != 0;
}
[[maybe_unused]] static int __all_sync(unsigned mask, int predicate) {
    return emulated_vote("__all_sync", mask, predicate, [](int p) { return p != 0; }) == mask;
}
template <class T>
static unsigned __match_any_sync(unsigned mask, T value) {
    return emulated_vote("__match_any_sync", mask, value, [=](T other) { return other == value; });
}

// ---- memory -------------------------------------------------------------------------------------------------------

template <class T> static T __ldcg(const T* address) { return *address; }
template <class T> static T __ldca(const T* address) { return *address; }
template <class T> static T __ldg(const T* address) { return *address; }
template <class T> static T __ldcs(const T* address) { return *address; }
template <class T> static void __stcg(T* address, T value) { *address = value; }

template <class T, class V>
static T atomicAdd(T* address, V value) {
    ++emulation::events;
    const T before = *address;
    *address = T(before + T(value));
    return before;
}
template <class T, class V>
static T atomicMax(T* address, V value) {
    ++emulation::events;
    const T before = *address;
    if (T(value) > before) *address = T(value);
    return before;
}
template <class T, class V>
static T atomicMin(T* address, V value) {
    ++emulation::events;
    const T before = *address;
    if (T(value) < before) *address = T(value);
    return before;
}
template <class T, class V>
static T atomicOr(T* address, V value) {
    ++emulation::events;
    const T before = *address;
    *address = T(before | T(value));
    return before;
}
// What may be a part of a loop that waits lets others run.
template <class T, class V>
static T atomicExch(T* address, V value) {
    emulation::poll();
    const T before = *address;
    emulation::events += before != T(value);
    *address = T(value);
    return before;
}
template <class T, class C, class V>
static T atomicCAS(T* address, C expected, V value) {
    emulation::poll();
    const T before = *address;
    if (before == T(expected)) *address = T(value), ++emulation::events;
    return before;
}

// ---- numbers ------------------------------------------------------------------------------------------------------

[[maybe_unused]] static float2 make_float2(float x, float y) { return {x, y}; }
[[maybe_unused]] static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
[[maybe_unused]] static int2 make_int2(int x, int y) { return {x, y}; }
[[maybe_unused]] static int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
[[maybe_unused]] static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
[[maybe_unused]] static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class To, class From>
static To emulated_bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To out;
    memcpy(&out, &value, sizeof out);
    return out;
}
[[maybe_unused]] static float __uint_as_float(unsigned value) { return emulated_bits<float>(value); }
[[maybe_unused]] static float __int_as_float(int value) { return emulated_bits<float>(value); }
[[maybe_unused]] static unsigned __float_as_uint(float value) { return emulated_bits<unsigned>(value); }
[[maybe_unused]] static int __float_as_int(float value) { return emulated_bits<int>(value); }
[[maybe_unused]] static int __popc(unsigned value) { return __builtin_popcount(value); }
[[maybe_unused]] static int __ffs(int value) { return __builtin_ffs(value); }
[[maybe_unused]] static int __clz(int value) { return value ? __builtin_clz(unsigned(value)) : 32; }
[[maybe_unused]] static unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
[[maybe_unused]] static unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)high << 32 | low;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned choice = selector >> 4 * i & 15, byte = unsigned(bytes >> 8 * (choice & 7)) & 255;
        out |= (choice & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return out;
}
// Of out-of-range values, as the conversions of the device: the nearest there is; nothing of NaN.
template <class To, class From>
static To emulated_truncate(From value) {
    if (value != value) return 0;
    constexpr To LEAST = To(1) << (8 * sizeof(To) - 1), MOST = To(-1) > To(0) ? To(-1) : To(~LEAST);
    if (value >= From(MOST)) return MOST;
    if (To(-1) > To(0) ? value <= From(0) : value <= From(LEAST)) return To(-1) > To(0) ? To(0) : LEAST;
    return To(value);
}
[[maybe_unused]] static unsigned long long __float2ull_rz(float value) { return emulated_truncate<unsigned long long>(value); }
[[maybe_unused]] static unsigned long long __double2ull_rz(double value) { return emulated_truncate<unsigned long long>(value); }
[[maybe_unused]] static unsigned long long __double2ull_ru(double value) {
    return emulated_truncate<unsigned long long>(std::ceil(value));
}
[[maybe_unused]] static int __float2int_rn(float value) { return emulated_truncate<int>(std::nearbyint(value)); }
[[maybe_unused]] static int __float2int_rz(float value) { return emulated_truncate<int>(value); }
[[maybe_unused]] static long long __float2ll_rn(float value) { return emulated_truncate<long long>(std::nearbyint(value)); }
[[maybe_unused]] static float __ll2float_rn(long long value) { return float(value); }
[[maybe_unused]] static float __ull2float_rn(unsigned long long value) { return float(value); }
[[maybe_unused]] static double __ull2double_rn(unsigned long long value) { return double(value); }
[[maybe_unused]] static float __fmul_rn(float a, float b) { return a * b; }
[[maybe_unused]] static float __fadd_rn(float a, float b) { return a + b; }
[[maybe_unused]] static double __dmul_rn(double a, double b) { return a * b; }
[[maybe_unused]] static double __dadd_rn(double a, double b) { return a + b; }
[[maybe_unused]] static unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
template <class A, class B> static std::common_type_t<A, B> min(A a, B b) {
    const std::common_type_t<A, B> x = a, y = b;
    return y < x ? y : x;
}
template <class A, class B> static std::common_type_t<A, B> max(A a, B b) {
    const std::common_type_t<A, B> x = a, y = b;
    return x < y ? y : x;
}
// The C library has names like these of its own.
static inline float emulated_rsqrt(float x) { return 1.f / std::sqrt(x); }
static inline float emulated_exp(float x) { return std::exp(x); }
static inline float emulated_log(float x) { return std::log(x); }
#define rsqrtf emulated_rsqrt
#define __expf emulated_exp
#define __logf emulated_log
[[maybe_unused]] static float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
[[maybe_unused]] static float __fdividef(float a, float b) { return a / b; }
