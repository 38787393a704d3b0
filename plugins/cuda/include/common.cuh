// What every kernel uses: fixed-width types, half arithmetic on packed registers, tensor-core products, warp reductions.
// Written with SM 8.0 instructions only, and without CUDA's headers, so that NVRTC alone compiles it.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;  // one half
typedef unsigned int u32;    // two halves, the first one in the low bits
typedef unsigned long long u64;
typedef signed char i8;

#define DEVICE __device__ __forceinline__

DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }
DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }

DEVICE int lane_id() { return threadIdx.x & 31; }
DEVICE int warp_id() { return threadIdx.x >> 5; }

// ---- halves -------------------------------------------------------------------------------------------------------

DEVICE float half_to_float(u16 value) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value));
    return out;
}

DEVICE u16 float_to_half(float value) {
    u16 out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
}

DEVICE u32 pack_halves(u16 low, u16 high) { return u32(low) | u32(high) << 16; }
DEVICE u32 floats_to_halves(float low, float high) { return pack_halves(float_to_half(low), float_to_half(high)); }
DEVICE float low_half(u32 pair) { return half_to_float(u16(pair)); }
DEVICE float high_half(u32 pair) { return half_to_float(u16(pair >> 16)); }

DEVICE u32 half2_sub(u32 a, u32 b) {
    u32 out;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

DEVICE u32 half2_mul(u32 a, u32 b) {
    u32 out;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

// Eight halves times eight others.
DEVICE void half2_scale(uint4& x, const uint4& by) {
    x.x = half2_mul(x.x, by.x), x.y = half2_mul(x.y, by.y);
    x.z = half2_mul(x.z, by.z), x.w = half2_mul(x.w, by.w);
}

DEVICE u32 half2_fma(u32 a, u32 b, u32 c) {
    u32 out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

// (a & mask) | bits and (a & mask) ^ bits, in one instruction: `table` has their bit for each of a, mask and bits (PTX ISA, lop3).
template <u32 mask, u32 bits, u32 table>
DEVICE u32 masked(u32 a) {
    u32 out;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(out) : "r"(a), "n"(mask), "n"(bits), "n"(table));
    return out;
}
template <u32 mask, u32 bits>
DEVICE u32 and_or(u32 a) { return masked<mask, bits, 0xea>(a); }
template <u32 mask, u32 bits>
DEVICE u32 and_xor(u32 a) { return masked<mask, bits, 0x6a>(a); }

// ---- memory -------------------------------------------------------------------------------------------------------

// Weights are read once: past L1, and first out of L2.
DEVICE uint4 load_stream(const uint4* address) {
    uint4 out;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                 : "l"(address));
    return out;
}

DEVICE u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

// 16 bytes from global to shared memory without passing through registers; `bytes` 0 writes zeros instead.
DEVICE void copy_async(void* to, const void* from, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;"); }
template <int pending>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending));
}

DEVICE void fetch_line(const char* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Weights that later launches will read, brought into L2 while this one leaves the memory idle: `pieces` of a start and a number
// of bytes each. Part `part` of `parts` blocks; a line of 128 bytes a thread at a time.
DEVICE void fetch_ahead(const u64* pieces, int count, int part, int parts) {
    for (int i = 0; i < count; ++i) {
        const char* start = reinterpret_cast<const char*>(pieces[2 * i]);
        const int bytes = int(pieces[2 * i + 1]);
        for (int at = (part * blockDim.x + threadIdx.x) * 128; at < bytes; at += parts * blockDim.x * 128) fetch_line(start + at);
    }
}

// ---- tensor cores -------------------------------------------------------------------------------------------------

// c += a * b for a tile of 16 x 8 x 16, halves in, floats out (PTX ISA, mma.m16n8k16). With g = lane / 4, t = lane % 4:
// a[0] = A[g][2t, 2t+1], a[1] = A[g+8][2t, 2t+1], a[2] = A[g][2t+8, 2t+9], a[3] = A[g+8][2t+8, 2t+9];
// b[0] = B[2t, 2t+1][g], b[1] = B[2t+8, 2t+9][g];
// c[0] = C[g][2t], c[1] = C[g][2t+1], c[2] = C[g+8][2t], c[3] = C[g+8][2t+1].
// Every column of C depends on its own column of B only, and always in the same order: that is what makes a row's
// result independent of its neighbours.
DEVICE void mma_16x8x16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of halves; lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void load_matrices(u32 (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row)));
}

DEVICE void load_matrices_transposed(u32 (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row)));
}

// ---- reductions ---------------------------------------------------------------------------------------------------

// Sum over the warp, the same in every lane; the order is fixed.
DEVICE float warp_sum(float value) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

DEVICE float warp_max(float value) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
    return value;
}

DEVICE u32 warp_largest(u32 value) {
    u32 out;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(out) : "r"(value));
    return out;
}

// Divisions without the detour for denormal divisors, which is a subroutine call and takes registers.
DEVICE float sigmoid(float x) { return __fdividef(1.f, 1.f + expf(-x)); }
DEVICE float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }
