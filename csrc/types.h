// types.h: views of memory that the caller owns, and the few types that all operations share.
//
// Strides count elements, sizes are int64, and nothing here allocates or throws. Files compiled for
// different instruction sets include this header. So everything in it is a plain aggregate or
// force-inlined: the linker must never keep a weak symbol that was compiled for AVX-512.
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

// The enums of this header and of errors.h are Python's as well: _core.Dtype, _core.WeightState.
enum class Dtype : int { f64 = 0, f32 = 1, f16 = 2, bf16 = 3 };

// What may happen to a weight: the entries of `state` in exact.h and, on entry, of `gone` in
// sweep.h.
enum class WeightState : unsigned char {
    may_go = 0,
    goes_first = 1,  // is removed before all that may go, whatever it costs
    stays = 2,       // is never removed, but updated
};

// 16 bits. Dtype tells which type they encode.
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

// A matrix whose element type is known only at run time.
struct AnyMatrix {
    void* data;
    Dtype dtype;
    Index rows, columns;
    Index row_stride, column_stride;
};

// Where an operation of a device runs. It never waits for the device: it enqueues kernels and
// returns. Failures that the kernels find are in *report when the stream has run them.
struct Device {
    int ordinal;
    void* stream;
    // Device memory that outlives the kernels of the call; null if none is left.
    void* (*allocate)(void* owner, Index bytes);
    void* owner;
    std::uint64_t* report;  // on the device: kNothing on entry, the lowest `reported` on exit
};

constexpr std::uint64_t kNothing = ~std::uint64_t{0};

// How a call runs. The calling thread, and no other, asks `interrupted` about ten times a second.
// Once that returns true, the operation stops at the next item of work and returns
// Status::interrupted. Operations of a device do not ask.
struct Context {
    int threads;                     // on a device: rows that exact removal has in flight, at most
    bool (*interrupted)();           // may be null
    const Device* device = nullptr;  // null for backends that run on the host
    // When it was asked last, in ms of a steady clock; 0 before the first loop of the call. It is
    // kept here because a call may be many loops that are short.
    mutable std::int64_t asked = 0;
};

LOBS_HD LOBS_INLINE Index least(Index a, Index b) { return a < b ? a : b; }
// The lowest multiple of `to` that is not below `a`.
LOBS_HD LOBS_INLINE Index up(Index a, Index to) { return (a + to - 1) / to * to; }

// Divides scratch memory into pieces that each begin on a cache line.
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
