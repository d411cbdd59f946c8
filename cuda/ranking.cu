// ranking.cu: contract in ranking.h. rank_rows has no entry here: torch sorts on a device.
//
// Each score becomes an unsigned key that orders like it. The key of rank `count`, the cut, is
// found digit by digit from the top, with one histogram per digit over the keys that share the
// digits found before. Counts are integers, so atomic additions give the same result in any order.
// Once all keys with the digits found are among the lowest `count`, the other digits are not
// needed.
//
// Short rows, or many: a block of threads takes a row, keeps its keys in shared memory if they fit,
// so that scores are read once, and processes all digits (8 bits each) in one kernel. Few long
// rows: all blocks work on every row. For each of 5 digits (12 bits, then 13 each) one kernel
// counts, and another, with a block per row, finds the digit. Then ties are counted by segment,
// added up, and marked. That reads the scores 7 times.
#include "common.cuh"

namespace lobs::cuda {
namespace {

using Bits = std::uint64_t;
using Count = unsigned long long;  // a type that atomicAdd takes

constexpr int kAhead = 4;  // scores that a thread loads before it uses the first

__device__ __forceinline__ Bits key_of(double score) {
    const double canonical = score + 0.0;  // -0 becomes +0
    const Bits bits = static_cast<Bits>(__double_as_longlong(canonical));
    return bits >> 63 != 0 ? ~bits : bits | Bits{1} << 63;
}

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

// A warp marks columns first .. last - 1: all keys below the cut, and the first `room` equal to it.
template <typename KeyAt>
__device__ __forceinline__ void mark(unsigned char* chosen, KeyAt key_at, Index first, Index last,
                                     Bits cut, Index room) {
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
            if (at < last) chosen[at] = key[a] < cut || (tie && before < room) ? 1 : 0;
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

template <bool kShared>
__global__ void __launch_bounds__(kThreads)
    row_kernel(unsigned char* all_chosen, const double* all_scores, Index R, Index C, Index count) {
    Carver carve(shared());
    Bits* keys = nullptr;
    unsigned* histogram = nullptr;
    Index* warps = nullptr;
    Cut* found = nullptr;
    carve.take(histogram, kThreads);
    carve.take(warps, kThreads / kWarp);
    carve.take(found, 1);
    if constexpr (kShared) carve.take(keys, C);
    const unsigned t = threadIdx.x;
    for (Index r = blockIdx.x; r < R; r += gridDim.x) {
        const double* score = all_scores + r * C;
        const auto key_at = [=](Index i) {
            if constexpr (kShared)
                return keys[i];
            else
                return key_of(score[i]);
        };
        if constexpr (kShared)
            for (Index i = t; i < C; i += kThreads) keys[i] = key_of(score[i]);
        Cut cut{0, count - 1, 0};
        for (int shift = 64 - kRowBits; shift >= 0 && cut.all == 0; shift -= kRowBits) {
            histogram[t] = 0;
            __syncthreads();
            for (Index i = t; i < C; i += kThreads) {
                const Bits key = key_at(i);
                if (shares_digits(key, cut.prefix, shift, kRowBits))
                    atomicAdd(&histogram[key >> shift & (kThreads - 1)], 1u);
            }
            __syncthreads();
            const Index inside = histogram[t];
            Index total = 0;
            const Index before = sum_before_in_block(inside, warps, &total);
            if (before <= cut.rank && cut.rank < before + inside)
                *found = next_cut(cut, t, before, inside, shift);
            __syncthreads();
            cut = *found;
        }
        // A warp takes a run of columns, and needs the number of ties before it.
        const Index run = up((C + kThreads / kWarp - 1) / (kThreads / kWarp), kWarp);
        const Index first = least(t / kWarp * run, C), last = least(first + run, C);
        Index room = C;
        if (cut.all == 0) {
            const Index own = ties(key_at, first, last, cut.prefix);
            Index total = 0;
            const Index before =
                sum_before_in_block(t % kWarp == 0 ? own : Index{0}, warps, &total);
            room = cut.rank + 1 - __shfl_sync(kAllLanes, before, 0);
        }
        mark(all_chosen + r * C, key_at, first, last, cut.prefix, room);
        __syncthreads();
    }
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

// Counts its part of each row in shared memory first. A part has fewer than 2^32 columns.
__global__ void __launch_bounds__(kLong)
    tally_kernel(const double* all_scores, Work work, int shift, int bits) {
    Carver carve(shared());
    unsigned* histogram = nullptr;
    carve.take(histogram, kBins);
    const Bits mask = (Bits{1} << bits) - 1;
    for (Index r = blockIdx.y; r < work.rows; r += gridDim.y) {
        const Cut cut = work.cut[r];
        if (cut.all != 0) continue;
        for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kLong) histogram[b] = 0;
        __syncthreads();
        const double* score = all_scores + r * work.columns;
        const Index step = static_cast<Index>(gridDim.x) * kLong;
        for (Index i = static_cast<Index>(blockIdx.x) * kLong + threadIdx.x; i < work.columns;
             i += kAhead * step) {
            double ahead[kAhead];
#pragma unroll
            for (int a = 0; a < kAhead; ++a)
                ahead[a] = i + a * step < work.columns ? score[i + a * step] : 0;
#pragma unroll
            for (int a = 0; a < kAhead; ++a) {
                const Bits key = key_of(ahead[a]);
                if (i + a * step < work.columns && shares_digits(key, cut.prefix, shift, bits))
                    atomicAdd(&histogram[key >> shift & mask], 1u);
            }
        }
        __syncthreads();
        for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kLong)
            if (histogram[b] != 0)
                atomicAdd(&work.histogram[r * kBins + b], static_cast<Count>(histogram[b]));
        __syncthreads();
    }
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

__global__ void __launch_bounds__(kThreads, 4) ties_kernel(const double* all_scores, Work work) {
    for (Index r = blockIdx.y; r < work.rows; r += gridDim.y) {
        const Cut cut = work.cut[r];
        if (cut.all != 0) continue;
        const double* score = all_scores + r * work.columns;
        const auto key_at = [=](Index i) { return key_of(score[i]); };
        for (Index s = first_segment(); s < work.segments; s += segment_step()) {
            const Index last = least((s + 1) * kSegment, work.columns);
            const Index found = ties(key_at, s * kSegment, last, cut.prefix);
            if (threadIdx.x % kWarp == 0) work.room[r * work.segments + s] = found;
        }
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

__global__ void __launch_bounds__(kThreads)
    mark_kernel(unsigned char* all_chosen, const double* all_scores, Work work) {
    for (Index r = blockIdx.y; r < work.rows; r += gridDim.y) {
        const Cut cut = work.cut[r];
        const double* score = all_scores + r * work.columns;
        const auto key_at = [=](Index i) { return key_of(score[i]); };
        for (Index s = first_segment(); s < work.segments; s += segment_step()) {
            const Index last = least((s + 1) * kSegment, work.columns);
            const Index room = cut.all != 0 ? work.columns : work.room[r * work.segments + s];
            mark(all_chosen + r * work.columns, key_at, s * kSegment, last, cut.prefix, room);
        }
    }
}

__global__ void __launch_bounds__(kThreads) fill_kernel(unsigned char* p, Index count, int value) {
    const Index step = static_cast<Index>(gridDim.x) * kThreads;
    for (Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step)
        p[i] = static_cast<unsigned char>(value);
}

// ---- launching ----------------------------------------------------------------------------------

dim3 grid_of(Index x, Index most, Index y = 1) {
    return dim3(static_cast<unsigned>(least(x, most)), static_cast<unsigned>(least(y, 65535)));
}

Info long_rows(unsigned char* chosen, const double* score, Index R, Index C, Index count,
               const Context& context) {
    const Index segments = (C + kSegment - 1) / kSegment, many = processors(context);
    const Work work{allocate<Count>(context, R * kBins),
                    allocate<Cut>(context, R),
                    allocate<Index>(context, R * segments),
                    R,
                    C,
                    segments};
    if (work.histogram == nullptr || work.cut == nullptr || work.room == nullptr)
        return {Status::out_of_memory, 0};
    const dim3 rows = grid_of(R, 65535);
    constexpr Index kPart = Index{16} * kLong;  // fewer columns are not worth a histogram
    const Index parts = 2 * many > R ? 2 * many / R : 1;
    const dim3 tallies = grid_of((C + kPart - 1) / kPart, parts, R);
    const dim3 warps = grid_of((segments * kWarp + kThreads - 1) / kThreads, 8 * many, R);
    const auto add = [&](const char* name, auto kernel, dim3 grid, unsigned threads, Index bytes,
                         auto... arguments) {
        return launch(context, name, kernel, grid, threads, static_cast<std::size_t>(bytes),
                      arguments...);
    };
    constexpr Index kSums = kLong / kWarp * sizeof(Index);
    LOBS_TRY(add("rank start", start_kernel, rows, kLong, 0, work, count));
    for (int top = 64; top > 0;) {
        const int bits = top % kLongBits == 0 ? kLongBits : top % kLongBits;  // 12, then 13s
        top -= bits;
        LOBS_TRY(add("rank tally", tally_kernel, tallies, kLong, kBins * Index{sizeof(unsigned)},
                     score, work, top, bits));
        LOBS_TRY(add("rank digit", digit_kernel, rows, kLong, kSums, work, top));
    }
    LOBS_TRY(add("rank ties", ties_kernel, warps, kThreads, 0, score, work));
    LOBS_TRY(add("rank room", room_kernel, rows, kLong, kSums, work));
    return add("rank mark", mark_kernel, warps, kThreads, 0, chosen, score, work);
}

}  // namespace

Info rank_lowest(unsigned char* chosen, const double* score, Index R, Index C, Index count,
                 const Context& context) {
    if (R == 0 || C == 0) return {Status::ok, 0};
    const Index many = processors(context);
    if (count == 0 || count == C)
        return launch(context, "rank fill", fill_kernel,
                      grid_of((R * C + kThreads - 1) / kThreads, 16 * many), kThreads, 0, chosen,
                      R * C, count == 0 ? 0 : 1);
    // One block takes a whole row if it is short, or if there are enough rows for all processors;
    // its counts have 32 bits.
    constexpr Index kShort = Index{1} << 14, kMost = Index{1} << 31;
    if (C > kShort && (R < 4 * many || C > kMost))
        return long_rows(chosen, score, R, C, count, context);
    const Index plain = 4 * kThreads + 128 + 64;
    const Index bytes = plain + C * Index{sizeof(Bits)};
    const bool fits = bytes <= shared_limit(context);
    return launch(context, "rank rows", fits ? row_kernel<true> : row_kernel<false>,
                  grid_of(R, 16 * many), kThreads, static_cast<std::size_t>(fits ? bytes : plain),
                  chosen, score, R, C, count);
}

}  // namespace lobs::cuda
