// types.h: views over memory that somebody else owns, and the few types every operation shares.
//
// Strides count elements, sizes are int64, nothing here allocates or throws. This header is
// included by files compiled for different instruction sets, so everything in it is either a plain
// aggregate or force-inlined: a weak symbol built for AVX-512 must never be the one the linker
// keeps.
#pragma once

#include <cstddef>
#include <cstdint>

#define LOBS_INLINE inline __attribute__((always_inline))

#if defined(__CUDACC__)
#define LOBS_HD __host__ __device__
#else
#define LOBS_HD
#endif

namespace lobs {

using Index = std::int64_t;

// Codes shared with python/lobs_native/ops.py.
enum class Dtype : int { f64 = 0, f32 = 1, f16 = 2, bf16 = 3 };

// What may happen to a weight: an entry of `state` in exact.h, of `gone` in sweep.h on entry.
enum class WeightState : unsigned char {
    may_go = 0,
    goes_first = 1,  // before all that may go, whatever it costs
    stays = 2,       // is never removed, but updated
};

// A 16-bit pattern: the type of the elements is in Dtype.
struct Half {
    std::uint16_t bits;
};
struct BFloat {
    std::uint16_t bits;
};

template <typename T>
struct Matrix {
    T* data;
    Index rows, columns;
    Index row_stride, column_stride;
};

// A matrix whose element type is known at run time only.
struct AnyMatrix {
    void* data;
    Dtype dtype;
    Index rows, columns;
    Index row_stride, column_stride;
};

// Where a device's row puts its work. Such a row checks nothing that lies on the device and waits for
// nothing: it enqueues kernels and returns. What they find is in *report once the stream gets there.
struct Device {
    int ordinal;
    void* stream;
    void* (*allocate)(void* owner, Index bytes);  // device memory that outlives the call's kernels;
    void* owner;                                  // null where there is none left
    std::uint64_t* report;  // on the device; kNothing on entry, the lowest `reported` on exit
};

constexpr std::uint64_t kNothing = ~std::uint64_t{0};

// How a call is to run. `interrupted` is asked about ten times a second, on the calling thread
// only; once it answers true the operation stops at the next item of work and returns
// Status::interrupted. A device's row does not ask it.
struct Context {
    int threads;                     // on a device: most rows that exact removal has in flight
    bool (*interrupted)();           // may be null
    const Device* device = nullptr;  // null for rows that run on the host
};

LOBS_HD LOBS_INLINE Index least(Index a, Index b) { return a < b ? a : b; }
LOBS_HD LOBS_INLINE Index up(Index a, Index to) {
    return (a + to - 1) / to * to;
}  // a multiple of `to`

// Hands out scratch memory piece by piece, each on a cache line of its own.
class Carver {
   public:
    LOBS_HD LOBS_INLINE explicit Carver(unsigned char* memory) : at_(memory) {}

    template <typename T>
    LOBS_HD LOBS_INLINE void take(T*& piece, Index count) {
        piece = reinterpret_cast<T*>(at_);
        at_ += up(count * static_cast<Index>(sizeof(T)), 64);
    }

   private:
    unsigned char* at_;
};

}  // namespace lobs
