// PTX instructions (PTX ISA 8.x), as functions of their operands from left to right: dots of the name are underscores,
// vectors are taken apart, addresses are pointers, or shared_address(...) for shared memory. Part of runtime.hpp.
#pragma once

namespace ptx {

using emulation::at;
using emulation::from_shared;
using emulation::meet;
using emulation::Meeting;
using emulation::to_float;
using emulation::to_half;
using half = unsigned short;

// ---- numbers ------------------------------------------------------------------------------------------------------

[[maybe_unused]] static void cvt_f32_f16(float& out, half value) { out = to_float(value); }
[[maybe_unused]] static void cvt_rn_f16_f32(half& out, float value) { out = to_half(value); }
[[maybe_unused]] static void cvt_rp_f16_f32(half& out, float value) {  // up
    out = to_half(value);
    if (to_float(out) < value) out = out & 0x8000 ? half(out - 1) : half(out + 1);
}
[[maybe_unused]] static void cvt_rn_bf16_f32(half& out, float value) {
    const unsigned bits = __float_as_uint(value);
    out = value != value ? half(0x7fff) : half((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class Of>
static unsigned both_halves(Of of) {
    return unsigned(of(0)) | unsigned(of(16)) << 16;
}
[[maybe_unused]] static void add_rn_f16x2(unsigned& out, unsigned a, unsigned b) {
    out = both_halves([=](int s) { return to_half(to_float(half(a >> s)) + to_float(half(b >> s))); });
}
[[maybe_unused]] static void sub_rn_f16x2(unsigned& out, unsigned a, unsigned b) {
    out = both_halves([=](int s) { return to_half(to_float(half(a >> s)) - to_float(half(b >> s))); });
}
[[maybe_unused]] static void mul_rn_f16x2(unsigned& out, unsigned a, unsigned b) {
    out = both_halves([=](int s) { return to_half(to_float(half(a >> s)) * to_float(half(b >> s))); });
}
[[maybe_unused]] static void fma_rn_f16x2(unsigned& out, unsigned a, unsigned b, unsigned c) {
    out = both_halves(
        [=](int s) { return to_half(double(to_float(half(a >> s))) * to_float(half(b >> s)) + to_float(half(c >> s))); });
}
[[maybe_unused]] static void max_f16x2(unsigned& out, unsigned a, unsigned b) {
    out = both_halves([=](int s) { return to_half(std::fmax(to_float(half(a >> s)), to_float(half(b >> s)))); });
}
[[maybe_unused]] static void lop3_b32(unsigned& out, unsigned a, unsigned b, unsigned c, unsigned table) {
    unsigned result = 0;
    for (unsigned row = 0; row < 8; ++row)
        if (table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    out = result;
}

// ---- memory -------------------------------------------------------------------------------------------------------

template <class T>
static const T& aligned(const void* address) {
    if (reinterpret_cast<size_t>(address) % sizeof(T))
        emulation::fail("an address that is not aligned to %zu bytes", sizeof(T));
    return *static_cast<const T*>(address);
}
static void load_words(unsigned& x, unsigned& y, unsigned& z, unsigned& w, const void* address) {
    const uint4 value = aligned<uint4>(address);
    x = value.x, y = value.y, z = value.z, w = value.w;
}
template <class... T> static void ld_global_nc_L1_no_allocate_v4_u32(T&&... all) { load_words(all...); }
template <class... T> static void ld_global_nc_v4_u32(T&&... all) { load_words(all...); }
template <class... T> static void ld_global_v4_u32(T&&... all) { load_words(all...); }
template <class... T> static void ld_global_cg_v4_u32(T&&... all) { load_words(all...); }
[[maybe_unused]] static void ld_global_cg_v2_u32(unsigned& x, unsigned& y, const void* address) {
    const uint2 value = aligned<uint2>(address);
    x = value.x, y = value.y;
}
[[maybe_unused]] static void ld_global_cg_u16(half& out, const void* address) { out = aligned<half>(address); }
[[maybe_unused]] static void ld_global_nc_u32(unsigned& out, const void* address) { out = aligned<unsigned>(address); }
[[maybe_unused]] static void ld_global_nc_L1_no_allocate_u32(unsigned& out, const void* address) {
    out = aligned<unsigned>(address);
}
[[maybe_unused]] static void prefetch_global_L2(const void*) {}

// Loads of what other blocks write: whoever waits for it lets them run.
[[maybe_unused]] static void ld_acquire_gpu_global_u32(unsigned& out, const void* address) {
    emulation::poll();
    out = aligned<unsigned>(address);
}
[[maybe_unused]] static void ld_volatile_global_u32(unsigned& out, const void* address) { ld_acquire_gpu_global_u32(out, address); }
[[maybe_unused]] static void ld_relaxed_gpu_global_u32(unsigned& out, const void* address) { ld_acquire_gpu_global_u32(out, address); }
[[maybe_unused]] static void nanosleep_u32(unsigned) { emulation::poll(); }
[[maybe_unused]] static void red_release_gpu_global_add_u32(unsigned* address, unsigned value) { atomicAdd(address, value); }
[[maybe_unused]] static void red_global_add_u32(unsigned* address, unsigned value) { atomicAdd(address, value); }
[[maybe_unused]] static void atom_add_release_gpu_global_u32(unsigned& out, unsigned* address, unsigned value) {
    out = atomicAdd(address, value);
}
[[maybe_unused]] static void atom_add_acq_rel_gpu_global_u32(unsigned& out, unsigned* address, unsigned value) {
    out = atomicAdd(address, value);
}
[[maybe_unused]] static void st_release_gpu_global_u32(unsigned* address, unsigned value) {
    ++emulation::events;
    *address = value;
}
[[maybe_unused]] static void fence_acq_rel_gpu() {}

// Asynchronous copies may happen at once or as late as they are waited for: forward order takes the one, reversed order the
// other, shuffled order both.
static void finish_copy(const emulation::Copy& copy) {
    char data[16] = {};
    memcpy(data, copy.from, copy.bytes);
    memcpy(copy.to, data, copy.size);
}
static void copy_to_shared(unsigned to, const void* from, int size, int bytes) {
    if (bytes && reinterpret_cast<size_t>(from) % size) emulation::fail("an asynchronous copy from an address not aligned to %d bytes", size);
    if (bytes < 0 || bytes > size) emulation::fail("an asynchronous copy of %d of %d bytes", bytes, size);
    emulation::Fiber& fiber = *emulation::fiber;
    fiber.copies.push_back({from_shared(to, size), static_cast<const char*>(from), size, bytes, fiber.group});
    const unsigned order = emulation::options.order;
    if (order == emulation::REVERSED || (order == emulation::SHUFFLED && emulation::random_number() & 1)) {
        emulation::Copy& copy = fiber.copies.back();
        finish_copy(copy);
        copy.size = copy.bytes = 0;  // waited for like the others
    }
}
[[maybe_unused]] static void cp_async_cg_shared_global(unsigned to, const void* from, int size, int bytes = 16) {
    copy_to_shared(to, from, size, bytes);
}
[[maybe_unused]] static void cp_async_ca_shared_global(unsigned to, const void* from, int size) { copy_to_shared(to, from, size, size); }
[[maybe_unused]] static void cp_async_ca_shared_global(unsigned to, const void* from, int size, int bytes) {
    copy_to_shared(to, from, size, bytes);
}
[[maybe_unused]] static void cp_async_commit_group() { ++emulation::fiber->group; }
[[maybe_unused]] static void cp_async_wait_group(int pending) {
    auto& copies = emulation::fiber->copies;
    size_t done = 0;
    while (done < copies.size() && copies[done].group < emulation::fiber->group - pending) finish_copy(copies[done++]);
    copies.erase(copies.begin(), copies.begin() + done);
}
[[maybe_unused]] static void cp_async_wait_all() {
    cp_async_commit_group();
    cp_async_wait_group(0);
}

// ---- warps --------------------------------------------------------------------------------------------------------

template <class Better>
static unsigned reduce(const char* what, unsigned value, unsigned mask, Better better) {
    const auto places = meet(what, mask, value);
    unsigned out = value;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) out = better(out, at<unsigned>(places, i));
    return out;
}
[[maybe_unused]] static void redux_sync_max_u32(unsigned& out, unsigned value, unsigned mask) {
    out = reduce("redux.sync.max", value, mask, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
[[maybe_unused]] static void redux_sync_min_u32(unsigned& out, unsigned value, unsigned mask) {
    out = reduce("redux.sync.min", value, mask, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
[[maybe_unused]] static void redux_sync_or_b32(unsigned& out, unsigned value, unsigned mask) {
    out = reduce("redux.sync.or", value, mask, [](unsigned a, unsigned b) { return a | b; });
}
[[maybe_unused]] static void redux_sync_add_u32(unsigned& out, unsigned value, unsigned mask) {
    const auto places = meet("redux.sync.add", mask, value);
    out = 0;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) out += at<unsigned>(places, i);
}

// Matrix m of row addresses given by lanes 8m .. 8m + 7; lane (g = lane / 4, t = lane % 4) gets row g's values 2t and 2t + 1, or,
// transposed, column g's. All is read when the last lane comes: afterwards the others may write there.
struct Matrices {
    unsigned row, out[4];
};
template <int COUNT, bool TRANSPOSED>
static void read_matrices(char (*places)[Meeting::BYTES]) {
    for (int m = 0; m < COUNT; ++m) {
        half rows[8][8];
        for (int r = 0; r < 8; ++r) memcpy(rows[r], from_shared(at<unsigned>(places, 8 * m + r), 16), 16);
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane >> 2, t = lane & 3;
            const unsigned low = TRANSPOSED ? rows[2 * t][g] : rows[g][2 * t], high = TRANSPOSED ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
            const unsigned value = low | high << 16;
            memcpy(places[lane] + offsetof(Matrices, out) + 4 * m, &value, 4);
        }
    }
}
template <int COUNT, bool TRANSPOSED, class... Out>
static void load_matrices(unsigned row, Out&... out) {
    static_assert(sizeof...(out) == COUNT);
    const char* what = TRANSPOSED ? "ldmatrix.trans" : "ldmatrix";
    const Matrices got = at<Matrices>(meet(what, ~0u, Matrices{row, {}}, read_matrices<COUNT, TRANSPOSED>), int(emulation::lane()));
    int m = 0;
    ((out = got.out[m++]), ...);
}
[[maybe_unused]] static void ldmatrix_sync_aligned_m8n8_x4_shared_b16(unsigned& a, unsigned& b, unsigned& c, unsigned& d, unsigned row) {
    load_matrices<4, false>(row, a, b, c, d);
}
[[maybe_unused]] static void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(unsigned& a, unsigned& b, unsigned& c, unsigned& d, unsigned row) {
    load_matrices<4, true>(row, a, b, c, d);
}
[[maybe_unused]] static void ldmatrix_sync_aligned_m8n8_x2_shared_b16(unsigned& a, unsigned& b, unsigned row) {
    load_matrices<2, false>(row, a, b);
}
[[maybe_unused]] static void ldmatrix_sync_aligned_m8n8_x2_trans_shared_b16(unsigned& a, unsigned& b, unsigned row) {
    load_matrices<2, true>(row, a, b);
}

struct Product {
    unsigned a[4], b[2];
    float c[4];
};

// The whole product, once for the warp: 16 products are added exactly, then to c.
static void multiply(char (*places)[Meeting::BYTES]) {
    double a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const Product p = at<Product>(places, lane);
        const int g = lane >> 2, t = lane & 3;
        for (int s = 0; s < 2; ++s) {
            for (int i = 0; i < 4; ++i) a[g + 8 * (i & 1)][2 * t + s + 8 * (i >> 1)] = to_float(half(p.a[i] >> 16 * s));
            for (int i = 0; i < 2; ++i) b[2 * t + s + 8 * i][g] = to_float(half(p.b[i] >> 16 * s));
        }
    }
    for (int m = 0; m < 16; ++m) {
        double sum[8] = {};
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) sum[n] += a[m][k] * b[k][n];
        for (int n = 0; n < 8; ++n) {
            char* place = places[(m & 7) * 4 + n / 2] + offsetof(Product, c) + 4 * ((n & 1) + 2 * (m >> 3));
            float c;
            memcpy(&c, place, 4);
            c = float(sum[n] + c);
            memcpy(place, &c, 4);
        }
    }
}

[[maybe_unused]] static void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(
    float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, float c0,
    float c1, float c2, float c3) {
    const Product mine = {{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
    const Product out = at<Product>(meet("mma.m16n8k16", ~0u, mine, multiply), int(emulation::lane()));
    d0 = out.c[0], d1 = out.c[1], d2 = out.c[2], d3 = out.c[3];
}

struct ByteProduct {
    unsigned a[4], b[2];
    int c[4];
};

static void multiply_bytes(char (*places)[Meeting::BYTES]) {
    int a[16][32], b[32][8];
    for (int lane = 0; lane < 32; ++lane) {
        const ByteProduct p = at<ByteProduct>(places, lane);
        const int g = lane >> 2, t = lane & 3;
        for (int s = 0; s < 4; ++s) {
            for (int i = 0; i < 4; ++i) a[g + 8 * (i & 1)][4 * t + s + 16 * (i >> 1)] = (signed char)(p.a[i] >> 8 * s);
            for (int i = 0; i < 2; ++i) b[4 * t + s + 16 * i][g] = (signed char)(p.b[i] >> 8 * s);
        }
    }
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 8; ++n) {
            int c;
            char* place = places[(m & 7) * 4 + n / 2] + offsetof(ByteProduct, c) + 4 * ((n & 1) + 2 * (m >> 3));
            memcpy(&c, place, 4);
            for (int k = 0; k < 32; ++k) c += a[m][k] * b[k][n];
            memcpy(place, &c, 4);
        }
}

[[maybe_unused]] static void mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32(
    int& d0, int& d1, int& d2, int& d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, int c0, int c1,
    int c2, int c3) {
    const ByteProduct mine = {{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
    const ByteProduct out = at<ByteProduct>(meet("mma.m16n8k32", ~0u, mine, multiply_bytes), int(emulation::lane()));
    d0 = out.c[0], d1 = out.c[1], d2 = out.c[2], d3 = out.c[3];
}

}  // namespace ptx
