// CUDA's execution model on one CPU thread, for kernels whose PTX instructions were rewritten into calls of ptx::...
// (trtvlm.plugins.cuda.emulation.translate). Every CUDA thread is a fiber. A fiber runs until it must wait for others: at a
// barrier, at an instruction that its warp executes together, or while it polls a counter. Blocks start one after the
// other; when all that are there only poll, one more is let in, so that blocks which wait for each other meet.
#pragma once
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstddef>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <link.h>
#include <sys/mman.h>
#include <type_traits>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __global__
#define __align__(n) __attribute__((aligned(n)))
// Static shared memory is this thread's own: that puts all of it in one place, which can be found and exchanged when another
// block has its turn. (A section of its own would do if GCC minded it in templates.)
#define __shared__ static thread_local

struct uint3 { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };

static uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

static thread_local __attribute__((aligned(128))) char emulated_shared_is_there[128];

namespace emulation {

enum Order { FORWARD, REVERSED, SHUFFLED };

struct Options {
    unsigned order, seed;
    int resident;   // blocks that may be there at once
    int together;   // whether they start at once, not one when the others wait
    int stack;      // bytes of a fiber's stack
};

// ---- failures -----------------------------------------------------------------------------------------------------

static sigjmp_buf escape;
static char message[512];

[[noreturn]] static void leave() { siglongjmp(escape, 1); }

[[noreturn]] __attribute__((format(printf, 1, 2))) static void fail(const char* format, ...) {
    char what[256];
    va_list values;
    va_start(values, format);
    vsnprintf(what, sizeof what, format, values);
    va_end(values);
    snprintf(message, sizeof message, "%s, in block (%u, %u, %u), thread %u", what, blockIdx.x, blockIdx.y, blockIdx.z,
             threadIdx.x);
    leave();
}

static void on_signal(int number, siginfo_t* info, void*) {
    if (number == SIGILL) fail("an address that is not aligned to what is read or written there");
    if (number == SIGFPE) fail("a division by zero");
    fail("an access outside of the tensors and the shared memory given (address %p)", info->si_addr);
}

// ---- fibers -------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
extern "C" __attribute__((visibility("hidden"))) void emulated_switch(void** from, void* to);
asm(R"(
.text
.hidden emulated_switch
.type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
struct Context {
    void* stack_pointer;
    void begin(char* stack, size_t size, void (*entry)()) {
        void** top = reinterpret_cast<void**>((reinterpret_cast<size_t>(stack) + size) & ~size_t(15));
        *--top = nullptr;  // where entry would return to
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        stack_pointer = top;
    }
    static void change(Context& from, Context& to) { emulated_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
    ucontext_t context;
    void begin(char* stack, size_t size, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = size;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

struct Copy {
    char* to;
    const char* from;
    int size, bytes;
    long group;
};

struct Fiber {
    Context context;
    char* stack = nullptr;
    bool done = false, polls = false, seen_polling = false;
    const long* watched = nullptr;  // waits until *watched is no longer `generation`
    long generation = 0;
    std::vector<Copy> copies;
    long group = 0;

    bool ready() const { return !done && !polls && !(watched && *watched == generation); }
};

// An instruction that lanes of a warp execute together. Lanes bring their operands; two sets of places take turns, so that
// nobody overwrites what a slow lane still reads.
struct Meeting {
    static constexpr int BYTES = 64;
    unsigned mask;
    int arrived = 0;
    const char* what = nullptr;
    long generation = 0;
    alignas(16) char places[2][32][BYTES];
};

struct Block {
    uint3 index;
    std::vector<Fiber> fibers;
    std::vector<std::vector<Meeting*>> meetings;  // of each warp, by mask
    long barrier = 0;
    int arrived = 0, alive = 0;
    std::vector<char> statics;
    char* dynamic = nullptr;
};

static Context scheduler;
static Block* block;
static Fiber* fiber;
static Options options;
static unsigned long long random_state;
static long events;  // what shows that a fiber did not only poll
static int dynamic_bytes;
static void (*body)(void**);
static void** arguments;

static unsigned random_number() {  // xorshift64* (Vigna, arXiv 1402.6246)
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return unsigned(random_state * 2685821657736338717ull >> 32);
}

__attribute__((noinline)) static void pause_fiber() {
    asm volatile("" ::: "memory");
    Context::change(fiber->context, scheduler);
    asm volatile("" ::: "memory");
}

static void wait_while(const long& watched) {
    fiber->watched = &watched;
    fiber->generation = watched;
    pause_fiber();
    fiber->watched = nullptr;
}

static void poll() {
    fiber->polls = true;
    pause_fiber();
}

static void release_barrier() {
    block->arrived = 0;
    ++block->barrier;
}

__attribute__((noinline)) static void barrier() {
    ++events;
    if (++block->arrived == block->alive) release_barrier();
    else wait_while(block->barrier);
    asm volatile("" ::: "memory");
}

static unsigned lane() { return threadIdx.x & 31; }

// This lane brings `value`, and gets everybody's. The last to come calls `finish`.
template <class T>
static const char (*meet(const char* what, unsigned mask, const T& value, void (*finish)(char (*)[Meeting::BYTES]) = nullptr))[Meeting::BYTES] {
    static_assert(sizeof(T) <= Meeting::BYTES);
    ++events;
    if (!(mask >> lane() & 1)) fail("%s with a mask (%08x) that lacks the lane itself", what, mask);
    Meeting* meeting = nullptr;
    for (Meeting* one : block->meetings[threadIdx.x / 32])
        if (one->mask == mask) meeting = one;
    if (!meeting) {
        meeting = new Meeting;
        meeting->mask = mask;
        block->meetings[threadIdx.x / 32].push_back(meeting);
    }
    if (meeting->arrived && meeting->what != what && strcmp(meeting->what, what))
        fail("lanes of a warp meet at different instructions, %s and %s", meeting->what, what);
    meeting->what = what;
    char(*places)[Meeting::BYTES] = meeting->places[meeting->generation & 1];
    memcpy(places[lane()], &value, sizeof value);
    if (++meeting->arrived == __builtin_popcount(mask)) {
        if (finish) finish(places);
        meeting->arrived = 0;
        ++meeting->generation;
    } else {
        wait_while(meeting->generation);
    }
    asm volatile("" ::: "memory");
    return places;
}

template <class T>
static T at(const char (*places)[Meeting::BYTES], int from, int offset = 0) {
    T value;
    memcpy(&value, places[from] + offset, sizeof value);
    return value;
}

// ---- shared memory ------------------------------------------------------------------------------------------------

constexpr unsigned STATIC = 0x01000000, DYNAMIC = 0x02000000;
constexpr int MOST_DYNAMIC = 227 * 1024;

static char* statics_begin;
static size_t statics_size;

// The thread-local memory of this library, which holds nothing else.
static void find_statics() {
    asm volatile("" ::"r"(emulated_shared_is_there) : "memory");  // there once it was asked for
    statics_begin = nullptr;
    dl_iterate_phdr(
        [](dl_phdr_info* library, size_t, void*) {
            for (int i = 0; i < library->dlpi_phnum; ++i) {
                const auto& header = library->dlpi_phdr[i];
                char* start = static_cast<char*>(library->dlpi_tls_data);
                if (header.p_type != PT_TLS || !start) continue;
                if (emulated_shared_is_there < start || emulated_shared_is_there >= start + header.p_memsz) continue;
                statics_begin = start;
                statics_size = header.p_memsz;
            }
            return 0;
        },
        nullptr);
    if (!statics_begin) fail("static shared memory was not found");
}

static unsigned to_shared(const void* pointer) {
    const char* p = static_cast<const char*>(pointer);
    if (p >= block->dynamic && p <= block->dynamic + dynamic_bytes) return DYNAMIC + unsigned(p - block->dynamic);
    if (p >= statics_begin && p <= statics_begin + statics_size) return STATIC + unsigned(p - statics_begin);
    fail("an address that should be of shared memory is not (%p)", pointer);
}

static char* from_shared(unsigned address, int size) {
    const bool dynamic = address >= DYNAMIC;
    const unsigned offset = address - (dynamic ? DYNAMIC : STATIC);
    if (offset + size > (dynamic ? unsigned(dynamic_bytes) : unsigned(statics_size)))
        fail("%d bytes at %u of %s shared memory, beyond its end", size, offset, dynamic ? "dynamic" : "static");
    char* out = (dynamic ? block->dynamic : statics_begin) + offset;
    if (reinterpret_cast<size_t>(out) % size) fail("shared memory address %u is not aligned to %d bytes", offset, size);
    return out;
}

// ---- scheduling ---------------------------------------------------------------------------------------------------

static std::vector<char*> free_stacks, free_dynamic;
static size_t stack_room;
static std::vector<std::pair<void*, size_t>> mapped;
constexpr unsigned long long CANARY = 0x5ca1ab1e0ddba11;

static char* map(size_t size) {
    void* out = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (out == MAP_FAILED) fail("no memory for %zu bytes", size);
    mapped.emplace_back(out, size);
    return static_cast<char*>(out);
}

// Dynamic shared memory ends where no page is.
static char* new_dynamic() {
    const size_t page = 4096, size = (size_t(dynamic_bytes) + page - 1) / page * page;
    if (free_dynamic.empty()) {
        char* start = map(size + 2 * page);
        mprotect(start, page, PROT_NONE);
        mprotect(start + page + size, page, PROT_NONE);
        free_dynamic.push_back(start + page + (size - size_t(dynamic_bytes)) / 16 * 16);
    }
    char* out = free_dynamic.back();
    free_dynamic.pop_back();
    memset(out, 0xff, dynamic_bytes);
    return out;
}

static char* new_stack() {
    if (free_stacks.empty()) {
        constexpr int MANY = 64;
        char* start = map(MANY * stack_room);
        for (int i = 0; i < MANY; ++i) free_stacks.push_back(start + i * stack_room);
    }
    char* out = free_stacks.back();
    free_stacks.pop_back();
    memcpy(out, &CANARY, sizeof CANARY);
    return out;
}

static void entry() {
    body(arguments);
    if (!fiber->copies.empty()) fail("a thread left with asynchronous copies that it did not wait for");
    ++events;
    fiber->done = true;
    if (--block->alive && block->arrived == block->alive) release_barrier();
    pause_fiber();
    __builtin_trap();
}

static Block* start(unsigned number) {
    Block* b = new Block;
    b->index = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
    b->fibers.resize(blockDim.x);
    b->meetings.resize((blockDim.x + 31) / 32);
    b->alive = int(blockDim.x);
    b->statics.assign(statics_size, char(0xff));
    b->dynamic = new_dynamic();
    for (Fiber& f : b->fibers) {
        f.stack = new_stack();
        f.context.begin(f.stack, stack_room, entry);
    }
    return b;
}

static void retire(Block* b) {
    for (Fiber& f : b->fibers) {
        if (memcmp(f.stack, &CANARY, sizeof CANARY)) fail("a thread's stack overflowed: give `stack` more bytes");
        free_stacks.push_back(f.stack);
    }
    free_dynamic.push_back(b->dynamic);
    for (auto& warp : b->meetings)
        for (Meeting* meeting : warp) delete meeting;
    delete b;
}

template <class T>
static void arrange(std::vector<T>& order) {
    if (options.order == SHUFFLED)
        for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
}

static std::vector<unsigned> places(unsigned count) {
    std::vector<unsigned> out(count);
    for (unsigned i = 0; i < count; ++i) out[i] = options.order == REVERSED ? count - 1 - i : i;
    return out;
}

// Lets one fiber run until it waits; whether it did anything but poll again.
static bool resume(Block* b, unsigned thread) {
    fiber = &b->fibers[thread];
    threadIdx = {thread, 0, 0};
    const bool polled = fiber->seen_polling;
    const long before = events;
    fiber->seen_polling = false;
    Context::change(scheduler, fiber->context);
    fiber->seen_polling = fiber->polls;
    return !(polled && fiber->polls && events == before);
}

// Lets a block run until all its threads wait; whether they did anything. Warps run ahead of each other as far as they
// can (shuffled: for a while), which shows where a barrier is missing.
static bool turn(Block* b) {
    block = b;
    blockIdx = b->index;
    memcpy(statics_begin, b->statics.data(), b->statics.size());
    const unsigned threads = unsigned(b->fibers.size());
    std::vector<unsigned> warps = places((threads + 31) / 32), lanes = places(32);
    bool did = false;
    // Blocks that are there together take turns in the midst of their work.
    int bursts = options.together && options.order == SHUFFLED ? 1 + int(random_number() % 8) : 1 << 30;
    for (Fiber& f : b->fibers) f.polls = false;
    for (bool moved = true; moved && bursts > 0;) {
        moved = false;
        arrange(warps);
        for (unsigned warp : warps) {
            if (bursts <= 0) break;
            bool burst = false;
            int left = options.order == SHUFFLED ? 1 + int(random_number() % 48) : 1 << 30;
            if ((left & 7) == 0) arrange(lanes);
            for (bool stepped = true; stepped && left--;) {
                stepped = false;
                for (unsigned l : lanes) {
                    const unsigned thread = warp * 32 + l;
                    if (thread >= threads || !b->fibers[thread].ready()) continue;
                    did |= resume(b, thread);
                    stepped = moved = burst = true;
                }
            }
            bursts -= burst;
        }
    }
    memcpy(b->statics.data(), statics_begin, b->statics.size());
    return did;
}

[[noreturn]] static void stuck(Block* b) {
    int at_barrier = 0, in_warp = 0, poll = 0;
    const char* what = "";
    block = b;
    blockIdx = b->index;
    threadIdx = {0, 0, 0};
    for (unsigned i = 0; i < b->fibers.size(); ++i) {
        const Fiber& f = b->fibers[i];
        if (f.done) continue;
        if (f.watched == &b->barrier) ++at_barrier;
        else if (f.watched) ++in_warp;
        else ++poll;
        if (f.watched != &b->barrier) threadIdx.x = i;
    }
    for (auto& warp : b->meetings)
        for (Meeting* meeting : warp)
            if (meeting->arrived) what = meeting->what;
    fail("deadlock: of %d threads %d wait at a barrier, %d for lanes of their warp%s%s, %d poll", b->alive, at_barrier, in_warp,
         *what ? " at " : "", what, poll);
}

static void run_grid() {
    std::vector<unsigned> pending = places(gridDim.x * gridDim.y * gridDim.z);
    arrange(pending);
    std::vector<Block*> there;
    size_t next = 0;
    auto let_in = [&] { there.push_back(start(pending[next++])); };
    for (int idle = 0; next < pending.size() || !there.empty();) {
        bool did = false;
        while (options.together && next < pending.size() && there.size() < size_t(options.resident)) let_in();
        arrange(there);
        for (size_t i = 0; i < there.size(); ++i) {
            did |= turn(there[i]);
            if (there[i]->alive == 0) {
                retire(there[i]);
                there.erase(there.begin() + i--);
            }
        }
        if (did) {
            idle = 0;
        } else if (next < pending.size() && there.size() < size_t(options.resident)) {
            let_in();
        } else if (!there.empty()) {
            bool polls = false;
            for (Block* b : there)
                for (const Fiber& f : b->fibers) polls |= !f.done && f.seen_polling;
            if (!polls || ++idle > 1000) stuck(there.front());
        }
    }
}

static void unmap() {
    for (auto& [start, size] : mapped) munmap(start, size);
    mapped.clear();
    free_stacks.clear();
    free_dynamic.clear();
}

template <class... Parameters, size_t... I>
static void call(void (*kernel)(Parameters...), void** values, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<Parameters>*>(values[I])...);
}

// One letter a parameter: p a pointer, f a float, i an int.
template <class... Parameters>
static const char* kinds_of(void (*)(Parameters...)) {
    static const char out[] = {(std::is_pointer_v<Parameters> ? 'p'
                                : std::is_same_v<std::remove_const_t<Parameters>, float> ? 'f'
                                : std::is_integral_v<Parameters> && sizeof(Parameters) == 4 ? 'i'
                                                                                             : '?')..., 0};
    return out;
}

constexpr int first_of(int first, int = 0) { return first; }

// The answer: null, or what went wrong.
static const char* launch(void (*kernel)(void**), unsigned gx, unsigned gy, unsigned gz, unsigned threads, int bounds, int shared,
                          const Options* given, void** values) {
    options = *given;
    random_state = 0x9e3779b97f4a7c15ull * (options.seed + 1ull);
    gridDim = {gx, gy, gz};
    blockDim = {threads, 1, 1};
    blockIdx = threadIdx = {0, 0, 0};
    dynamic_bytes = shared;
    stack_room = size_t(options.stack);
    body = kernel;
    arguments = values;
    events = 0;
    constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    struct sigaction before[4], action = {};
    static char signal_stack[64 * 1024];
    stack_t mine = {}, old_stack;
    mine.ss_sp = signal_stack;
    mine.ss_size = sizeof signal_stack;
    sigaltstack(&mine, &old_stack);
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; ++i) sigaction(SIGNALS[i], &action, &before[i]);
    const char* result = nullptr;
    if (sigsetjmp(escape, 1) == 0) {
        if (!threads || int(threads) > bounds) fail("%u threads a block, the kernel was made for %d", threads, bounds);
        if (shared < 0 || shared > MOST_DYNAMIC) fail("%d bytes of shared memory", shared);
        find_statics();
        run_grid();
    } else {
        result = message;  // blocks that were under way are lost: this is for tests
    }
    unmap();
    for (int i = 0; i < 4; ++i) sigaction(SIGNALS[i], &before[i], nullptr);
    sigaltstack(&old_stack, nullptr);
    return result;
}

static float to_float(unsigned short value) {
    _Float16 half;
    memcpy(&half, &value, 2);
    return float(half);
}

template <class T>
static unsigned short to_half(T value) {
    const _Float16 half = _Float16(value);
    unsigned short out;
    memcpy(&out, &half, 2);
    return out;
}

}  // namespace emulation

#include "builtins.hpp"
#include "ptx.hpp"
