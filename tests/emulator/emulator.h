// emulator.h: runs the CUDA kernels on the host, one block after another, to test their indices,
// barriers and arithmetic without a GPU. cuda/common.cuh includes it instead of cuda_runtime.h when
// LOBS_EMULATE is defined.
//
// Every thread of a block is a fiber with its own stack. A fiber runs until it waits at a barrier
// of the block or at an exchange of its warp; then the next one runs. This finds errors that a GPU
// might not show:
//
//   a barrier that not all threads reach    the program aborts and names the kernel
//   a missing barrier                       LOBS_EMULATOR_ORDER sets the order of the fibers
//                                           (forward, backward, or a number, which shuffles them at
//                                           every barrier): results must not depend on it
//   a read of unwritten shared memory       it is filled with NaN before each block
//   a late wait for an asynchronous copy    copies happen at the wait, not before
//   an access outside a buffer              AddressSanitizer sees it: shared memory is a heap block
//                                           of exactly the right size
//
// It does not model speed, memory ordering or the rounding of tensor cores: products of fragments
// are summed in float32 from left to right. Blocks are one-dimensional. All 32 lanes take part in
// every warp operation.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __noinline__ __attribute__((noinline))

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

namespace emulator {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 256 << 10;  // bytes of a fiber's stack

// ---- switching between stacks -------------------------------------------------------------------

#if defined(__x86_64__)
// Saves the registers that a call must preserve on the old stack, and continues on the new one.
extern "C" void lobs_emulator_switch(void** save, void* load);
__asm__(
    ".pushsection .text.lobs_emulator_switch,\"axG\",@progbits,lobs_emulator_switch,comdat\n"
    ".weak lobs_emulator_switch\n.hidden lobs_emulator_switch\n.type "
    "lobs_emulator_switch,@function\n"
    "lobs_emulator_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
    ".popsection\n");
#endif

enum class State { runs, at_block, at_warp, done };

struct Copy {
    void* to;
    const void* from;
    std::size_t bytes;  // bytes to read; the rest of `whole` becomes zero
    std::size_t whole;
    int group;
};

struct Fiber {
    State state = State::runs;
    unsigned thread = 0;
    int warp_phase = 0;
    std::vector<Copy> copies;  // asynchronous copies that nobody has waited for yet
    int open_group = 0;
    std::vector<char> stack;
#if defined(__x86_64__)
    void* at = nullptr;
#else
    ucontext_t context;
#endif
};

struct Lanes {  // values that the lanes of a warp exchange
    alignas(16) unsigned char value[2][kWarp][64];
};

struct Machine {
    std::mutex mutex;
    std::vector<Fiber> fibers;
    std::vector<Lanes> lanes;
    Fiber* current = nullptr;
#if defined(__x86_64__)
    void* scheduler = nullptr;
#else
    ucontext_t scheduler;
#endif
    const void* bottom = nullptr;  // of the scheduler's stack, for the sanitizer
    std::size_t size = 0;
    std::function<void()> body;
    std::unique_ptr<unsigned char[]> shared;
    const char* kernel = "";
    dim3 grid, block_index;
    unsigned threads = 0;
    int votes[2] = {0, 0};
    long blocks_run = 0;
};

inline Machine& machine() {
    static Machine it;
    return it;
}

[[noreturn]] inline void fail(const char* what) {
    Machine& m = machine();
    std::fprintf(stderr, "emulator: %s in %s, block (%u, %u, %u), thread %u of %u\n", what,
                 m.kernel, m.block_index.x, m.block_index.y, m.block_index.z,
                 m.current != nullptr ? m.current->thread : 0, m.threads);
    std::abort();
}

inline void start_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* bottom,
                         [[maybe_unused]] std::size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake, bottom, size);
#endif
}
inline void finish_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** bottom,
                          [[maybe_unused]] std::size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, bottom, size);
#endif
}

inline void yield() {  // from a fiber to the scheduler
    Machine& m = machine();
    Fiber& f = *m.current;
    void* fake = nullptr;
    start_switch(f.state == State::done ? nullptr : &fake, m.bottom, m.size);
#if defined(__x86_64__)
    lobs_emulator_switch(&f.at, m.scheduler);
#else
    swapcontext(&f.context, &m.scheduler);
#endif
    finish_switch(fake, &m.bottom, &m.size);
}

inline void fiber_main() {
    Machine& m = machine();
    finish_switch(nullptr, &m.bottom, &m.size);
    m.body();
    if (!m.current->copies.empty()) fail("an asynchronous copy was never waited for");
    m.current->state = State::done;
    yield();
    fail("a finished thread ran on");
}

inline void resume(Fiber& f) {
    Machine& m = machine();
    m.current = &f;
    void* fake = nullptr;
    start_switch(&fake, f.stack.data(), f.stack.size());
#if defined(__x86_64__)
    lobs_emulator_switch(&m.scheduler, f.at);
#else
    swapcontext(&m.scheduler, &f.context);
#endif
    finish_switch(fake, nullptr, nullptr);
}

inline void prepare(Fiber& f, unsigned thread) {
    if (f.stack.empty()) f.stack.resize(kStack);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(f.stack.data(),
                                  f.stack.size());  // its last thread never returned
#endif
    f.state = State::runs;
    f.thread = thread;
    f.warp_phase = 0;
    f.copies.clear();
    f.open_group = 0;
#if defined(__x86_64__)
    auto top =
        reinterpret_cast<std::uintptr_t>(f.stack.data() + f.stack.size()) & ~std::uintptr_t{63};
    auto* slot = reinterpret_cast<void**>(top) - 2;  // at entry the stack pointer is 8 modulo 16
    *slot = reinterpret_cast<void*>(&fiber_main);
    f.at = slot - 6;
    std::fill(slot - 6, slot, nullptr);
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, reinterpret_cast<void (*)()>(&fiber_main), 0);
#endif
}

class Order {  // the order in which the threads of a block run between two barriers
   public:
    explicit Order(unsigned n) : at_(n) {
        for (unsigned i = 0; i < n; ++i) at_[i] = i;
        const char* asked = std::getenv("LOBS_EMULATOR_ORDER");
        const std::string order = asked != nullptr ? asked : "forward";
        if (order == "backward") std::reverse(at_.begin(), at_.end());
        shuffled_ = order != "backward" && order != "forward";
        if (shuffled_)
            random_.seed(static_cast<unsigned>(std::strtoul(order.c_str(), nullptr, 10)) + n);
    }
    const std::vector<unsigned>& next() {
        if (shuffled_) std::shuffle(at_.begin(), at_.end(), random_);
        return at_;
    }

   private:
    std::vector<unsigned> at_;
    std::mt19937 random_;
    bool shuffled_;
};

inline void run_block(std::size_t shared_bytes) {
    Machine& m = machine();
    m.shared.reset(new unsigned char[shared_bytes]);
    std::memset(m.shared.get(), 0xff, shared_bytes);
    m.votes[0] = m.votes[1] = 0;
    ++m.blocks_run;
    if (m.fibers.size() < m.threads) m.fibers.resize(m.threads);
    m.lanes.assign((m.threads + kWarp - 1) / kWarp, Lanes{});
    for (unsigned t = 0; t < m.threads; ++t) prepare(m.fibers[t], t);
    Order order(m.threads);
    unsigned done = 0;
    while (done < m.threads) {
        bool moved = false;
        for (const unsigned t : order.next()) {
            Fiber& f = m.fibers[t];
            if (f.state != State::runs) continue;
            moved = true;
            resume(f);
            if (f.state == State::done) ++done;
        }
        unsigned at_block = 0;
        for (unsigned first = 0; first < m.threads; first += kWarp) {
            const unsigned last = std::min(first + kWarp, m.threads);
            unsigned waiting = 0;
            for (unsigned t = first; t < last; ++t) {
                waiting += m.fibers[t].state == State::at_warp;
                at_block += m.fibers[t].state == State::at_block;
            }
            if (waiting == 0) continue;
            if (waiting < last - first) {
                bool running = false;
                for (unsigned t = first; t < last; ++t)
                    running = running || m.fibers[t].state == State::runs;
                if (!running) fail("a warp's lanes parted at a warp operation");
                continue;
            }
            for (unsigned t = first; t < last; ++t) m.fibers[t].state = State::runs;
            moved = true;
        }
        if (at_block == m.threads) {
            for (unsigned t = 0; t < m.threads; ++t) m.fibers[t].state = State::runs;
            moved = true;
        }
        if (!moved && done < m.threads) fail("a barrier was not reached by all threads");
    }
    m.shared.reset();
}

inline void wait_block() {
    machine().current->state = State::at_block;
    yield();
}

inline void wait_warp() {
    machine().current->state = State::at_warp;
    yield();
}

// Passes `value` to the other lanes. Returns the address of each lane's value, valid until the
// exchange after the next one.
template <typename T>
auto exchanged(const T& value) {
    static_assert(sizeof(T) <= 64 && std::is_trivially_copyable<T>::value, "");
    Machine& m = machine();
    const unsigned warp = m.current->thread / kWarp, lane = m.current->thread % kWarp;
    const int phase = m.current->warp_phase;
    m.current->warp_phase ^= 1;
    std::memcpy(m.lanes[warp].value[phase][lane], &value, sizeof value);
    wait_warp();
    return [warp, phase](int l) {
        T out;
        std::memcpy(&out, machine().lanes[warp].value[phase][l], sizeof out);
        return out;
    };
}

struct ThreadIndex {
    operator dim3() const { return dim3(machine().current->thread, 0, 0); }
    struct X {
        operator unsigned() const { return machine().current->thread; }
    } x;
};
struct BlockIndex {
    struct X {
        operator unsigned() const { return machine().block_index.x; }
    } x;
    struct Y {
        operator unsigned() const { return machine().block_index.y; }
    } y;
    struct Z {
        operator unsigned() const { return machine().block_index.z; }
    } z;
};
struct BlockSize {
    struct X {
        operator unsigned() const { return machine().threads; }
    } x;
};
struct GridSize {
    struct X {
        operator unsigned() const { return machine().grid.x; }
    } x;
    struct Y {
        operator unsigned() const { return machine().grid.y; }
    } y;
    struct Z {
        operator unsigned() const { return machine().grid.z; }
    } z;
};

template <typename... Parameters, typename... Arguments>
void run(void (*kernel)(Parameters...), const char* name, dim3 grid, unsigned threads,
         std::size_t shared_bytes, Arguments... arguments) {
    Machine& m = machine();
    std::lock_guard<std::mutex> held(m.mutex);
    m.kernel = name;
    m.grid = grid;
    m.threads = threads;
    const char* asked = std::getenv("LOBS_EMULATOR_ORDER");
    const bool backward = asked != nullptr && std::strcmp(asked, "forward") != 0;
    m.body = [=] { kernel(static_cast<Parameters>(arguments)...); };
    const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
    for (std::uint64_t i = 0; i < blocks; ++i) {
        const std::uint64_t b = backward ? blocks - 1 - i : i;
        m.block_index =
            dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                 static_cast<unsigned>(b / grid.x / grid.y));
        run_block(shared_bytes);
    }
    m.body = nullptr;
    m.current = nullptr;
}

inline unsigned char* shared_memory() { return machine().shared.get(); }

}  // namespace emulator

inline constexpr emulator::ThreadIndex threadIdx{};
inline constexpr emulator::BlockIndex blockIdx{};
inline constexpr emulator::BlockSize blockDim{};
inline constexpr emulator::GridSize gridDim{};

// ---- what kernels call --------------------------------------------------------------------------

inline void __syncthreads() { emulator::wait_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::wait_warp(); }
inline void __threadfence() {}
inline int __syncthreads_or(int vote) {
    emulator::Machine& m = emulator::machine();
    emulator::wait_block();
    if (m.current->thread == 0) m.votes[0] = 0;
    emulator::wait_block();
    m.votes[0] |= vote != 0;
    emulator::wait_block();
    return m.votes[0];
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulator::exchanged(value)(lane & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    const int lane = static_cast<int>(threadIdx.x % 32u);
    return emulator::exchanged(value)(lane ^ mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned by) {
    const int lane = static_cast<int>(threadIdx.x % 32u), from = lane + static_cast<int>(by);
    return emulator::exchanged(value)(from < 32 ? from : lane);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned by) {
    const int lane = static_cast<int>(threadIdx.x % 32u), from = lane - static_cast<int>(by);
    return emulator::exchanged(value)(from >= 0 ? from : lane);
}
inline unsigned __ballot_sync(unsigned, int vote) {
    const auto all = emulator::exchanged(vote);
    unsigned bits = 0;
    for (int l = 0; l < 32; ++l) bits |= static_cast<unsigned>(all(l) != 0) << l;
    return bits;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }
template <typename T>
T __ldg(const T* p) {
    return *p;
}
template <typename T>
T atomicAdd(T* p, T by) {
    static_assert(!std::is_floating_point<T>::value, "float atomics would not be deterministic");
    const T old = *p;
    *p = old + by;
    return old;
}
template <typename T>
T atomicMin(T* p, T with) {
    const T old = *p;
    *p = with < old ? with : old;
    return old;
}
template <typename T>
T atomicMax(T* p, T with) {
    const T old = *p;
    *p = with > old ? with : old;
    return old;
}
template <typename T>
T atomicOr(T* p, T with) {
    const T old = *p;
    *p = old | with;
    return old;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __float_as_uint(float x) {
    unsigned u;
    std::memcpy(&u, &x, 4);
    return u;
}
inline float __uint_as_float(unsigned u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}
inline long long __double_as_longlong(double x) {
    long long u;
    std::memcpy(&u, &x, 8);
    return u;
}

// ---- what launchers call ------------------------------------------------------------------------

inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t) {
    std::memset(p, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, int,
                                   cudaStream_t) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
constexpr int cudaMemcpyDeviceToDevice = 3;

// ---- wrapped instructions (cuda/common.cuh) -----------------------------------------------------

namespace emulator {

inline void land_copies(int left) {
    Fiber& f = *machine().current;
    std::vector<Copy> rest;
    for (const Copy& c : f.copies) {
        if (c.group >= f.open_group - left) {
            rest.push_back(c);
            continue;
        }
        if ((reinterpret_cast<std::uintptr_t>(c.to) | reinterpret_cast<std::uintptr_t>(c.from)) %
                16 !=
            0)
            fail("an asynchronous copy is not aligned to 16 bytes");
        std::memcpy(c.to, c.from, c.bytes);
        std::memset(static_cast<char*>(c.to) + c.bytes, 0, c.whole - c.bytes);
    }
    f.copies = std::move(rest);
}

struct Address {
    const unsigned char* row;
};

inline void load_transposed(unsigned (&r)[4], const void* row) {
    if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0)
        fail("a matrix row is not aligned to 16 bytes");
    const auto all = exchanged(Address{static_cast<const unsigned char*>(row)});
    const int lane = static_cast<int>(machine().current->thread % 32);
    for (int i = 0; i < 4; ++i) {
        unsigned pair = 0;
        for (int k = 0; k < 2; ++k) {
            std::uint16_t half;
            std::memcpy(&half, all(i * 8 + 2 * (lane % 4) + k).row + 2 * (lane / 4), 2);
            pair |= static_cast<unsigned>(half) << 16 * k;
        }
        r[i] = pair;
    }
}

inline float half_value(unsigned bits, bool bfloat) {
    if (bfloat) return __uint_as_float(bits << 16);
    const unsigned sign = (bits & 0x8000u) << 16, size = bits & 0x7fffu;
    const float tiny = static_cast<float>(size) * 0x1p-24f;  // a denormal
    const unsigned value = size < 0x400u    ? __float_as_uint(tiny)
                           : size < 0x7c00u ? (size << 13) + 0x38000000u
                                            : (size << 13) + 0x70000000u;
    return __uint_as_float(sign | value);
}

struct Fragments {
    unsigned a[4], b[2];
};

inline void multiply_16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                        bool bfloat) {
    const auto all = exchanged(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const int lane = static_cast<int>(machine().current->thread % 32), g = lane / 4, tig = lane % 4;
    for (int k = 0; k < 16; ++k) {
        const int owner = k % 8 / 2, high = k / 8, shift = 16 * (k % 2);
        for (int i = 0; i < 4; ++i) {
            const int row_half = i / 2, column = tig * 2 + i % 2;
            const unsigned left = all(g * 4 + owner).a[row_half + 2 * high] >> shift & 0xffffu;
            const unsigned right = all(column * 4 + owner).b[high] >> shift & 0xffffu;
            d[i] += half_value(left, bfloat) * half_value(right, bfloat);
        }
    }
}

}  // namespace emulator
