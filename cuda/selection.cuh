// selection.cuh: the lowest keys of a row, exactly, by counting digits from the top.
//
// The key of rank `count`, the cut, is found with one histogram per digit over the keys that share
// the digits found before. Counts are integers, so atomic additions give the same result in any
// order. Once all keys with the digits found are among the lowest `count`, the other digits are not
// needed.
//
// Short rows, or many: a block of threads takes a row and processes all digits (8 bits each) in one
// kernel (cut_of_row). Few long rows: all blocks work on every row. For each digit (up to 13 bits)
// one kernel counts, and another, with a block per row, finds the digit. Then ties are counted by
// segment, added up, and marked (find_cuts). That reads 64-bit keys 7 times, 31-bit keys 5 times.
#pragma once

#include "common.cuh"

namespace lobs::cuda {
namespace {

using Bits = std::uint64_t;
using Count = unsigned long long;  // a type that atomicAdd takes

constexpr int kAhead = 4;  // keys that a thread loads before it uses the first

// What is known of the cut of a row: the digits found so far, and the rank of the wanted key among
// the keys that share them. Once `all` is set, all of those keys are chosen, and the remaining
// digits of the prefix are ones.
struct Cut {
    Bits prefix;
    Index rank;
    int all;
};

__device__ __forceinline__ bool shares_digits(Bits key, Bits prefix, int shift, int bits) {
    return ((key ^ prefix) >> shift) >> bits == 0;  // in two steps: their sum may be 64
}

__device__ __forceinline__ Cut next_cut(Cut cut, Index digit, Index before, Index inside,
                                        int shift) {
    cut.prefix |= static_cast<Bits>(digit) << shift;
    cut.rank -= before;
    cut.all = cut.rank + 1 == inside ? 1 : 0;
    if (cut.all != 0) cut.prefix |= (Bits{1} << shift) - 1;
    return cut;
}

// The sum of `value` over the lanes below this one; *total is that over all lanes.
template <typename T>
__device__ __forceinline__ T sum_before(T value, T* total) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    T sum = value;
    for (int by = 1; by < kWarp; by *= 2) {
        const T other = __shfl_up_sync(kAllLanes, sum, static_cast<unsigned>(by));
        if (lane >= by) sum += other;
    }
    *total = __shfl_sync(kAllLanes, sum, kWarp - 1);
    return sum - value;
}

// The same over the threads of a block. `warps` is shared memory for one sum per warp.
template <typename T>
__device__ __forceinline__ T sum_before_in_block(T value, T* warps, T* total) {
    T inside = 0;
    const T before = sum_before(value, &inside);
    const unsigned warp = threadIdx.x / kWarp, count = blockDim.x / kWarp;
    if (threadIdx.x % kWarp == 0) warps[warp] = inside;
    __syncthreads();
    T sum = 0, base = 0;
    for (unsigned w = 0; w < count; ++w) {
        if (w == warp) base = sum;
        sum += warps[w];
    }
    __syncthreads();
    *total = sum;
    return base + before;
}

// A warp calls put(column, key, whether it is chosen) for columns first .. last - 1. Chosen are all
// keys below the cut, and the first `room` equal to it.
template <typename KeyAt, typename Put>
__device__ __forceinline__ void mark(Put put, KeyAt key_at, Index first, Index last, Bits cut,
                                     Index room) {
    const Index lane = threadIdx.x % kWarp;
    for (Index i = first; i < last; i += kAhead * kWarp) {
        Bits key[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
            const Index at = i + a * kWarp + lane;
            key[a] = at < last ? key_at(at) : ~Bits{0};
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
            const Index at = i + a * kWarp + lane;
            const bool tie = at < last && key[a] == cut;
            const unsigned ties = __ballot_sync(kAllLanes, tie);
            const int before = __popc(ties & ((1u << lane) - 1));
            if (at < last) put(at, key[a], key[a] < cut || (tie && before < room));
            room -= __popc(ties);
        }
    }
}

template <typename KeyAt>
__device__ __forceinline__ Index ties(KeyAt key_at, Index first, Index last, Bits cut) {
    Index found = 0;
    for (Index i = first + threadIdx.x % kWarp; i < last; i += kWarp)
        found += key_at(i) == cut ? 1 : 0;
    Index total = 0;
    sum_before(found, &total);
    return total;
}

// ---- a block of threads for a row ---------------------------------------------------------------

constexpr unsigned kThreads = 256;
constexpr int kRowBits = 8;
static_assert(kThreads == 1u << kRowBits, "a thread for each digit");

// Shared memory of a block that takes a row.
struct RowSpace {
    unsigned* histogram;
    Index* warps;
    Cut* found;

    static constexpr Index kBytes = 4 * kThreads + 128 + 64;

    __device__ __forceinline__ void take(Carver& carve) {
        carve.take(histogram, kThreads);
        carve.take(warps, kThreads / kWarp);
        carve.take(found, 1);
    }
};

// The cut of a row of C keys with up to `top` bits, of which `count` > 0 are chosen.
template <typename KeyAt>
__device__ __forceinline__ Cut cut_of_row(KeyAt key_at, Index C, Index count, int top,
                                          const RowSpace& space) {
    const unsigned t = threadIdx.x;
    Cut cut{0, count - 1, 0};
    for (int shift = (top - 1) / kRowBits * kRowBits; shift >= 0 && cut.all == 0;
         shift -= kRowBits) {
        space.histogram[t] = 0;
        if (t == 0) *space.found = cut;
        __syncthreads();
        for (Index i = t; i < C; i += kThreads) {
            const Bits key = key_at(i);
            if (shares_digits(key, cut.prefix, shift, kRowBits))
                atomicAdd(&space.histogram[key >> shift & (kThreads - 1)], 1u);
        }
        __syncthreads();
        const Index inside = space.histogram[t];
        Index total = 0;
        const Index before = sum_before_in_block(inside, space.warps, &total);
        if (before <= cut.rank && cut.rank < before + inside)
            *space.found = next_cut(cut, t, before, inside, shift);
        __syncthreads();
        cut = *space.found;
        __syncthreads();
    }
    return cut;
}

// Calls put(column, key, whether it is chosen) for every column of a row.
template <typename KeyAt, typename Put>
__device__ __forceinline__ void mark_row(Put put, KeyAt key_at, Index C, Cut cut,
                                         const RowSpace& space) {
    // A warp takes a run of columns, and needs the number of ties before it.
    const unsigned t = threadIdx.x;
    const Index run = up((C + kThreads / kWarp - 1) / (kThreads / kWarp), kWarp);
    const Index first = least(t / kWarp * run, C), last = least(first + run, C);
    Index room = C;
    if (cut.all == 0) {
        const Index own = ties(key_at, first, last, cut.prefix);
        Index total = 0;
        const Index before =
            sum_before_in_block(t % kWarp == 0 ? own : Index{0}, space.warps, &total);
        room = cut.rank + 1 - __shfl_sync(kAllLanes, before, 0);
    }
    mark(put, key_at, first, last, cut.prefix, room);
}

// ---- all blocks for a row -----------------------------------------------------------------------

constexpr unsigned kLong = 1024;  // threads
constexpr int kLongBits = 13;
constexpr int kBins = 1 << kLongBits;
constexpr Index kSegment = 2048;  // columns whose ties a warp counts together

struct Work {
    Count* histogram;  // (rows, kBins): zero between digits
    Cut* cut;          // (rows)
    Index* room;       // (rows, segments): ties before a segment, then its room for them
    Index rows, columns, segments;
};

__global__ void __launch_bounds__(kLong) start_kernel(Work work, Index count) {
    for (Index r = blockIdx.x; r < work.rows; r += gridDim.x) {
        if (threadIdx.x == 0) work.cut[r] = {0, count - 1, 0};
        for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kLong)
            work.histogram[r * kBins + b] = 0;
    }
}

// Counts a part of row r in shared memory first. A part has fewer than 2^32 columns.
template <typename KeyAt>
__device__ __forceinline__ void tally_row(KeyAt key_at, Index r, const Work& work, int shift,
                                          int bits, unsigned* histogram) {
    const Bits mask = (Bits{1} << bits) - 1;
    const Cut cut = work.cut[r];
    if (cut.all != 0) return;
    for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kLong) histogram[b] = 0;
    __syncthreads();
    const Index step = static_cast<Index>(gridDim.x) * kLong;
    for (Index i = static_cast<Index>(blockIdx.x) * kLong + threadIdx.x; i < work.columns;
         i += kAhead * step) {
        Bits ahead[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a)
            ahead[a] = i + a * step < work.columns ? key_at(i + a * step) : 0;
#pragma unroll
        for (int a = 0; a < kAhead; ++a)
            if (i + a * step < work.columns && shares_digits(ahead[a], cut.prefix, shift, bits))
                atomicAdd(&histogram[ahead[a] >> shift & mask], 1u);
    }
    __syncthreads();
    for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kLong)
        if (histogram[b] != 0)
            atomicAdd(&work.histogram[r * kBins + b], static_cast<Count>(histogram[b]));
    __syncthreads();
}

__global__ void __launch_bounds__(kLong) digit_kernel(Work work, int shift) {
    constexpr int kEach = kBins / static_cast<int>(kLong);
    Carver carve(shared());
    Index* warps = nullptr;
    carve.take(warps, kLong / kWarp);
    for (Index r = blockIdx.x; r < work.rows; r += gridDim.x) {
        const Cut cut = work.cut[r];
        if (cut.all != 0) continue;
        Count* bin = work.histogram + r * kBins + threadIdx.x * kEach;
        Index inside[kEach], sum = 0;
        for (int b = 0; b < kEach; ++b) {
            inside[b] = static_cast<Index>(bin[b]);
            sum += inside[b];
            bin[b] = 0;
        }
        Index total = 0;
        Index before = sum_before_in_block(sum, warps, &total);  // all threads have read the cut
        for (int b = 0; b < kEach; ++b) {
            if (before <= cut.rank && cut.rank < before + inside[b])
                work.cut[r] =
                    next_cut(cut, Index{threadIdx.x} * kEach + b, before, inside[b], shift);
            before += inside[b];
        }
        __syncthreads();
    }
}

__device__ __forceinline__ Index first_segment() {
    return (static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}
__device__ __forceinline__ Index segment_step() {
    return static_cast<Index>(gridDim.x) * (blockDim.x / kWarp);
}

// Counts the ties of row r by segment.
template <typename KeyAt>
__device__ __forceinline__ void ties_of_segments(KeyAt key_at, Index r, const Work& work) {
    const Cut cut = work.cut[r];
    if (cut.all != 0) return;
    for (Index s = first_segment(); s < work.segments; s += segment_step()) {
        const Index last = least((s + 1) * kSegment, work.columns);
        const Index found = ties(key_at, s * kSegment, last, cut.prefix);
        if (threadIdx.x % kWarp == 0) work.room[r * work.segments + s] = found;
    }
}

__global__ void __launch_bounds__(kLong) room_kernel(Work work) {
    Carver carve(shared());
    Index* warps = nullptr;
    carve.take(warps, kLong / kWarp);
    for (Index r = blockIdx.x; r < work.rows; r += gridDim.x) {
        const Cut cut = work.cut[r];
        if (cut.all != 0) continue;
        Index room = cut.rank + 1;
        for (Index first = 0; first < work.segments; first += kLong) {
            const Index s = first + threadIdx.x;
            Index* place = work.room + r * work.segments + s;
            Index total = 0;
            const Index before =
                sum_before_in_block(s < work.segments ? *place : Index{0}, warps, &total);
            if (s < work.segments) *place = room - before;
            room -= total;
        }
    }
}

// Calls put(column, key, whether it is chosen) for every column of row r.
template <typename KeyAt, typename Put>
__device__ __forceinline__ void mark_segments(Put put, KeyAt key_at, Index r, const Work& work) {
    const Cut cut = work.cut[r];
    for (Index s = first_segment(); s < work.segments; s += segment_step()) {
        const Index last = least((s + 1) * kSegment, work.columns);
        const Index room = cut.all != 0 ? work.columns : work.room[r * work.segments + s];
        mark(put, key_at, s * kSegment, last, cut.prefix, room);
    }
}

// ---- launching ----------------------------------------------------------------------------------

dim3 grid_of(Index x, Index most, Index y = 1) {
    return dim3(static_cast<unsigned>(least(x, most)), static_cast<unsigned>(least(y, 65535)));
}

// How many blocks take the keys of `work`: of kLong threads that count, of kThreads by segments.
struct Grids {
    dim3 rows, tallies, segments;
};

inline Grids grids_of(const Work& work, const Context& context) {
    const Index many = processors(context), R = work.rows;
    constexpr Index kPart = Index{16} * kLong;  // fewer columns are not worth a histogram
    const Index parts = 2 * many > R ? 2 * many / R : 1;
    return {grid_of(R, 65535), grid_of((work.columns + kPart - 1) / kPart, parts, R),
            grid_of((work.segments * kWarp + kThreads - 1) / kThreads, 8 * many, R)};
}

constexpr Index kTallyBytes = kBins * Index{sizeof(unsigned)};

inline Info allocate_work(Work* work, Index R, Index C, const Context& context) {
    const Index segments = (C + kSegment - 1) / kSegment;
    *work = {allocate<Count>(context, R * kBins),
             allocate<Cut>(context, R),
             allocate<Index>(context, R * segments),
             R,
             C,
             segments};
    const bool all = work->histogram != nullptr && work->cut != nullptr && work->room != nullptr;
    return {all ? Status::ok : Status::out_of_memory, 0};
}

// Enqueues what finds the cuts of the rows of `work` and their room for ties, for mark_segments.
// tally(shift, bits) and ties() enqueue kernels that call tally_row and ties_of_segments for every
// row; keys have up to `top` bits.
template <typename Tally, typename Ties>
Info find_cuts(const Work& work, Index count, int top, const Context& context, Tally tally,
               Ties ties) {
    const Grids grids = grids_of(work, context);
    constexpr std::size_t kSums = kLong / kWarp * sizeof(Index);
    LOBS_TRY(launch(context, "selection start", start_kernel, grids.rows, kLong, 0, work, count));
    while (top > 0 && count > 0) {
        const int bits = top % kLongBits == 0 ? kLongBits : top % kLongBits;
        top -= bits;
        LOBS_TRY(tally(top, bits));
        LOBS_TRY(
            launch(context, "selection digit", digit_kernel, grids.rows, kLong, kSums, work, top));
    }
    LOBS_TRY(ties());
    return launch(context, "selection room", room_kernel, grids.rows, kLong, kSums, work);
}

}  // namespace
}  // namespace lobs::cuda
