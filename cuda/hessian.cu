// hessian.cu: contract in hessian.h.
//
// Kernels, in the order of the stream; none waits for the host:
//
//   pack     if rows are not 16-byte vectors: makes a copy of X whose rows are
//   look     reads X once: the first value that is not finite, the largest magnitude, the weights
//   decide   chooses one of the three sums below, or none if a value is not finite. All sums that
//            might be chosen are enqueued; those that are not chosen return at once
//   tensor   16-bit inputs with weights of 0 and 1: tensor cores, exact products
//   single   float32, and 16-bit inputs with other weights: float32 multiply-adds
//   wide     float64, and what float32 cannot hold
//   gather   adds the partial sums to H, if the rows were cut
//
// A block sums a tile of the lower triangle (128 x 128; wide: 64 x 64) over a segment of rows. The
// number of segments depends on N and D alone, as for a device of 132 processors with one block
// each, so that the bytes do not depend on the device. With one segment a block adds to H. With
// more it adds to float64 partial sums, and gather adds those in order.
//
// tensor and single sum 128 rows and add that to a second float32 sum. The next 128 rows start from
// the rounding error of that addition. So the error does not grow with the rows, the tensor cores'
// chains of truncated sums stay short, and no further register is needed. After 32768 rows, and at
// the end, the second sum is added in float64.
//
// Arithmetic: N * D * (D + 1) flops, plus the upper halves of the tiles on the diagonal. Bytes from
// cache: a tile reads 2 * 128 columns of X (tensor: half of that on the diagonal), 64 multiply-adds
// for each number. Tiles come in bands of 8 tile rows, column by column: 132 tiles that run
// together touch about 25 panels of 128 columns. look reads X from memory once more.
//
// Scratch: partial sums, none or at most 1056 tiles of 128 KiB; a copy of X if it is packed.
#include "common.cuh"

namespace lobs::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr Index kTile = 128;        // columns along a side of a tile
constexpr Index kWideTile = 64;     // the same in float64
constexpr Index kBand = 8;          // tile rows that are processed together
constexpr int kShortRows = 128;     // rows in the first float32 sum
constexpr Index kLongRows = 32768;  // rows in the second float32 sum
static_assert(kShortRows <= kHessianRows && kLongRows % kShortRows == 0);

// ---- values -------------------------------------------------------------------------------------

// The bits of |x|, as an unsigned integer that orders like |x|, with infinity and NaN on top.
__device__ __forceinline__ unsigned magnitude(Half x) { return x.bits & 0x7fffu; }
__device__ __forceinline__ unsigned magnitude(BFloat x) { return x.bits & 0x7fffu; }
__device__ __forceinline__ unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ __forceinline__ unsigned long long magnitude(double x) {
    return static_cast<unsigned long long>(__double_as_longlong(x)) & 0x7fffffffffffffffull;
}

__device__ __forceinline__ float to_float(Half x) {
    const unsigned sign = (x.bits & 0x8000u) << 16, size = (x.bits & 0x7fffu) << 13;
    if (size >= 0x00800000u) return __uint_as_float(sign | (size + 0x38000000u));
    const float tiny = __uint_as_float(size + 0x38800000u) - __uint_as_float(0x38800000u);
    return __uint_as_float(sign | __float_as_uint(tiny));
}
__device__ __forceinline__ float to_float(BFloat x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ double to_float(double x) { return x; }

template <typename S>
struct Format;
template <>
struct Format<Half> {
    using Bits = std::uint16_t;
    static constexpr Bits one = 0x3c00u;
    static constexpr unsigned infinite = 0x7c00u;  // magnitudes from here on are not finite
};
template <>
struct Format<BFloat> {
    using Bits = std::uint16_t;
    static constexpr Bits one = 0x3f80u;
    static constexpr unsigned infinite = 0x7f80u;
};
template <>
struct Format<float> {
    using Bits = std::uint32_t;
    static constexpr Bits one = 0x3f800000u;
    static constexpr unsigned infinite = 0x7f800000u;
};
template <>
struct Format<double> {
    using Bits = std::uint64_t;
    static constexpr Bits one = 0x3ff0000000000000ull;
    static constexpr unsigned long long infinite = 0x7ff0000000000000ull;
};

// Elements in a vector of 16 bytes; float64 is read one by one.
template <typename S>
constexpr Index kVector = sizeof(S) == 8 ? 1 : 16 / static_cast<Index>(sizeof(S));

template <typename S>
struct Rows {  // contiguous columns; rows start at multiples of kVector<S>
    const S* data;
    Index rows, columns, stride;
};

// ---- pack ---------------------------------------------------------------------------------------

constexpr int kSquare = 32;

template <typename Bits>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(Bits* out, Index width, Matrix<const Bits> X, bool ones, Bits one) {
    Bits* square = reinterpret_cast<Bits*>(shared());  // odd stride: no two lanes share a bank
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const Index across = (width + kSquare - 1) / kSquare;
    const Index squares = (X.rows + kSquare - 1) / kSquare * across;
    const bool upright = X.row_stride < X.column_stride;  // lanes walk the shorter stride
    for (Index s = blockIdx.x; s < squares; s += gridDim.x) {
        const Index n0 = s / across * kSquare, i0 = s % across * kSquare;
        for (int k = warp; k < kSquare; k += kThreads / kWarp) {
            const int row = upright ? lane : k, column = upright ? k : lane;
            const Index n = n0 + row, i = i0 + column;
            Bits value = ones && i == X.columns ? one : Bits{0};
            if (n < X.rows && i < X.columns) value = X.data[n * X.row_stride + i * X.column_stride];
            square[row * (kSquare + 1) + column] = value;
        }
        __syncthreads();
        for (int k = warp; k < kSquare; k += kThreads / kWarp)
            if (n0 + k < X.rows && i0 + lane < width)
                out[(n0 + k) * width + i0 + lane] = square[k * (kSquare + 1) + lane];
        __syncthreads();
    }
}

// ---- look and decide ----------------------------------------------------------------------------

constexpr Index kLooks = 1024;  // the most blocks of look

enum Turn : int { kNobody, kTensor, kSingle, kWide };

struct Plan {
    alignas(16) unsigned char one[16];  // source of the column of ones
    Turn turn;
};

struct Seen {
    double largest, heaviest;
    int other;  // a weight that is neither 0 nor 1
};

// The maxima over the whole block, valid in thread 0.
__device__ __forceinline__ Seen most(Seen seen) {
    Seen* of_warp = reinterpret_cast<Seen*>(shared());
    for (int by = kWarp / 2; by > 0; by /= 2) {
        seen.largest = fmax(seen.largest, __shfl_xor_sync(kAllLanes, seen.largest, by));
        seen.heaviest = fmax(seen.heaviest, __shfl_xor_sync(kAllLanes, seen.heaviest, by));
        seen.other |= __shfl_xor_sync(kAllLanes, seen.other, by);
    }
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = seen;
    __syncthreads();
    if (threadIdx.x == 0)
        for (unsigned w = 1; w < kThreads / kWarp; ++w) {
            seen.largest = fmax(seen.largest, of_warp[w].largest);
            seen.heaviest = fmax(seen.heaviest, of_warp[w].heaviest);
            seen.other |= of_warp[w].other;
        }
    return seen;
}

template <typename S>
__device__ __forceinline__ auto largest_of(const S* p) {
    decltype(magnitude(S{})) largest = 0;
    if constexpr (sizeof(S) == 8) {
        largest = magnitude(*p);
    } else {
        const uint4 v = *reinterpret_cast<const uint4*>(p);
        const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (const unsigned word : words) {
            const unsigned low = sizeof(S) == 2 ? word & 0x7fffu : word & 0x7fffffffu;
            const unsigned high = sizeof(S) == 2 ? word >> 16 & 0x7fffu : 0u;
            const unsigned here = low > high ? low : high;
            largest = here > largest ? here : largest;
        }
    }
    return largest;
}

__device__ __forceinline__ double size_of(Half, unsigned bits) {
    return static_cast<double>(to_float(Half{static_cast<std::uint16_t>(bits)}));
}
__device__ __forceinline__ double size_of(BFloat, unsigned bits) {
    return static_cast<double>(__uint_as_float(bits << 16));
}
__device__ __forceinline__ double size_of(float, unsigned bits) {
    return static_cast<double>(__uint_as_float(bits));
}
// `largest` only serves to choose a sum, and float64 is always summed in float64.
__device__ __forceinline__ double size_of(double, unsigned long long) { return 0; }

// A warp takes a row.
template <typename S>
__global__ void __launch_bounds__(kThreads)
    look_kernel(Seen* seen, Rows<S> x, const double* t, std::uint64_t* report) {
    const Index lane = threadIdx.x % kWarp;
    const Index whole = x.columns / kVector<S> * kVector<S>;
    decltype(magnitude(S{})) largest = 0;
    double heaviest = t == nullptr ? 1 : 0;
    int other = 0;
    const Index step = static_cast<Index>(gridDim.x) * (kThreads / kWarp);
    for (Index n = blockIdx.x * Index{kThreads / kWarp} + threadIdx.x / kWarp; n < x.rows;
         n += step) {
        const double weight = t == nullptr ? 1.0 : t[n];
        if (weight == 0) continue;
        heaviest = fmax(heaviest, weight);
        other |= weight != 1;
        const S* row = x.data + n * x.stride;
        decltype(magnitude(S{})) here = 0;
#pragma unroll 4
        for (Index i = lane * kVector<S>; i < whole; i += kWarp * kVector<S>) {
            const auto size = largest_of(row + i);
            here = size > here ? size : here;
        }
        for (Index i = whole + lane; i < x.columns; i += kWarp) {
            const auto size = magnitude(row[i]);
            here = size > here ? size : here;
        }
        if (__any_sync(kAllLanes, here >= Format<S>::infinite)) {
            Index i = lane;
            while (i < x.columns && magnitude(row[i]) < Format<S>::infinite) i += kWarp;
            if (i < x.columns) report_failure(report, Status::not_finite, n * x.columns + i);
        }
        largest = here > largest ? here : largest;
    }
    const Seen all = most({size_of(S{}, largest), heaviest, other});
    if (threadIdx.x == 0) seen[blockIdx.x] = all;
}

// Whether float32 holds values whose largest is this.
__device__ __forceinline__ bool fits(double largest, double limit) {
    return largest == 0 || (largest > 0x1p-100 && largest < limit);
}

template <typename S>
__global__ void __launch_bounds__(kThreads)
    decide_kernel(Plan* plan, const Seen* seen, int looks, bool ones, const std::uint64_t* report) {
    Seen own{0, 0, 0};
    for (int k = threadIdx.x; k < looks; k += kThreads) {
        own.largest = fmax(own.largest, seen[k].largest);
        own.heaviest = fmax(own.heaviest, seen[k].heaviest);
        own.other |= seen[k].other;
    }
    const Seen all = most(own);
    if (threadIdx.x != 0) return;
    const double x = all.largest, t = all.heaviest;
    // float32 has to hold x, t, t * x, and sums of kLongRows = 2^15 products.
    constexpr double kValue = 0x1p116, kProduct = 0x1p112;
    static_assert(kLongRows <= 1 << 15);
    const bool narrow = fits(x, kValue) && t < kValue && fits(t * x, kValue) &&
                        fits(t * x * x, kProduct) && (!ones || fits(t, kProduct));
    if (*report != kNothing)
        plan->turn = kNobody;
    else if (sizeof(S) == 8 || !narrow)
        plan->turn = kWide;
    else
        plan->turn = sizeof(S) == 2 && all.other == 0 ? kTensor : kSingle;
    auto* one = reinterpret_cast<typename Format<S>::Bits*>(plan->one);
    one[0] = Format<S>::one;
}

// ---- tiles --------------------------------------------------------------------------------------

struct Tile {
    Index row, column;
};

// Tile `at` of the lower triangle of tiles x tiles tiles. They come in bands of kBand rows, each
// column by column, with the band's triangle by rows at the end.
__device__ __forceinline__ Tile tile_of(Index at, Index tiles) {
    Index top = 0;
    while (top + kBand < tiles && (top + kBand) * (top + kBand + 1) / 2 <= at) top += kBand;
    at -= top * (top + 1) / 2;
    const Index height = least(kBand, tiles - top);
    if (at < top * height) return {top + at % height, at / height};
    at -= top * height;
    Index row = 0;
    while (at > row) at -= ++row;
    return {top + row, top + at};
}

// Where tiles are added: partial sums, or H if there is one segment. Partial sums are whole tiles
// of kTile x kTile, by rows of the triangle of tiles, segment after segment.
struct Sum {
    double* parts;
    void* H;
    bool single;  // H is float32
    Index size, stride;
};

// The square of a block in `out`, from entry (i0, j0) on, within one tile of kTile.
struct Corner {
    void* data;
    Index stride;
    bool single, fresh;  // fresh: it holds no sums yet
    int rows, below;     // entry (i, j) counts where i < rows and j <= i + below
};

__device__ __forceinline__ Corner corner(const Sum& out, Index i0, Index j0) {
    const int rows = static_cast<int>(least(out.size - i0, kTile));
    const int below = static_cast<int>(least(i0 - j0, kTile));
    if (out.parts == nullptr) {
        const Index at = i0 * out.stride + j0;
        void* data = out.single ? static_cast<void*>(static_cast<float*>(out.H) + at)
                                : static_cast<void*>(static_cast<double*>(out.H) + at);
        return {data, out.stride, out.single, false, rows, below};
    }
    const Index tiles = (out.size + kTile - 1) / kTile, row = i0 / kTile;
    const Index tile = blockIdx.y * (tiles * (tiles + 1) / 2) + row * (row + 1) / 2 + j0 / kTile;
    return {out.parts + (tile * kTile + i0 % kTile) * kTile + j0 % kTile,
            kTile,
            false,
            true,
            rows,
            below};
}

// Adds value(k) to entry (i, column(k)), k < kCount. All entries are read before the first is
// written, so that the reads overlap.
template <typename M, int kCount, typename Value, typename Column>
__device__ __forceinline__ void add_as(const Corner& to, int i, Value value, Column column) {
    if (i >= to.rows) return;
    M* row = static_cast<M*>(to.data) + i * to.stride;
    double old[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k)
        old[k] = !to.fresh && column(k) <= i + to.below ? static_cast<double>(row[column(k)]) : 0.0;
#pragma unroll
    for (int k = 0; k < kCount; ++k)
        if (column(k) <= i + to.below) row[column(k)] = static_cast<M>(old[k] + value(k));
}

template <int kCount, typename Value, typename Column>
__device__ __forceinline__ void add(const Corner& to, int i, Value value, Column column) {
    if (to.single)
        add_as<float, kCount>(to, i, value, column);
    else
        add_as<double, kCount>(to, i, value, column);
}

// Returns the same number, but hides it from the compiler. So values derived from it are computed
// where they are needed, once in thousands of rows, and occupy no registers in between.
__device__ __forceinline__ int late(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// total += sum. Then sum is the rounding error of that addition.
__device__ __forceinline__ void promote(float& total, float& sum) {
    const float grown = total + sum;
    sum -= grown - total;
    total = grown;
}

// ---- tensor -------------------------------------------------------------------------------------

constexpr int kDepth = 32;  // rows of a stage
constexpr int kStages = 4;
constexpr int kPitch = 136;  // 272 bytes: eight rows of a matrix lie in eight bank groups
constexpr int kPanel = kDepth * kPitch;  // one side of a tile
constexpr Index kTensorBytes = Index{kStages} * 2 * kPanel * 2;
static_assert(kShortRows % kDepth == 0);

// Warps 2 x 4, each 64 x 32 of the tile: 4 x 4 products of 16 x 8 and 16 rows.
template <Dtype kType, bool kWeighted>
__global__ void __launch_bounds__(kThreads, 1)
    tensor_kernel(Sum out, Rows<std::uint16_t> x, const double* t, bool ones, Index segment,
                  const Plan* plan) {
    if (plan->turn != kTensor) return;
    const Tile tile = tile_of(blockIdx.x, (out.size + kTile - 1) / kTile);
    const bool diagonal = tile.row == tile.column;
    const Index first = blockIdx.y * segment, last = least(first + segment, x.rows);
    const int steps = static_cast<int>((last - first + kDepth - 1) / kDepth);
    std::uint16_t* stages = reinterpret_cast<std::uint16_t*>(shared());

    // This thread copies 8 columns of each panel, in two rows of a stage.
    const int chunk = threadIdx.x % 16, row = threadIdx.x / 16;
    const std::uint16_t* source[2];
    Index step_by[2];
    int bytes[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        const Index column = (side == 0 ? tile.row : tile.column) * kTile + chunk * 8;
        if (ones && column == x.columns) {
            source[side] = reinterpret_cast<const std::uint16_t*>(plan->one);
            step_by[side] = 0;
            bytes[side] = 2;
        } else {
            const Index left = x.columns - column;
            source[side] = x.data + (left > 0 ? (first + row) * x.stride + column : 0);
            step_by[side] = left > 0 ? x.stride : 0;
            bytes[side] = static_cast<int>(left < 0 ? 0 : least(left, 8)) * 2;
        }
    }
    Index next = first + row;  // the next row to copy
    double weight[2] = {1, 1};
    const auto fetch_weights = [&] {
        if constexpr (kWeighted)
            for (int h = 0; h < 2; ++h) weight[h] = next + h * 16 < last ? t[next + h * 16] : 0;
    };
    const auto copy_stage = [&](int slot) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const bool counts = next + h * 16 < last && (!kWeighted || weight[h] != 0);
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                if (side == 1 && diagonal) continue;
                std::uint16_t* to =
                    stages + (slot * 2 + side) * kPanel + (row + h * 16) * kPitch + chunk * 8;
                copy_16(to, counts ? source[side] + h * 16 * step_by[side] : x.data,
                        counts ? bytes[side] : 0);
            }
        }
        next += kDepth;
        source[0] += kDepth * step_by[0];
        source[1] += kDepth * step_by[1];
        fetch_weights();
    };

    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int wi = warp / 4 * 64, wj = warp % 4 * 32;
    const Index i0 = tile.row * kTile + wi, j0 = tile.column * kTile + wj;
    const bool useful = i0 < out.size && j0 < i0 + 64;  // not all above the diagonal or outside
    // Where this lane's row of the four matrices is, for the left operand and the right one.
    const int left_at = (lane / 16 * 8 + lane % 8) * kPitch + wi + lane / 8 % 2 * 8;
    const int right_at = (lane / 8 % 2 * 8 + lane % 8) * kPitch + wj + lane / 16 * 8;
    float sum[4][4][4] = {}, total[4][4][4] = {};
    Corner to = corner(out, i0, j0);

    fetch_weights();
    for (int s = 0; s < kStages - 1; ++s) {
        if (s < steps) copy_stage(s);
        commit_copies();
    }
    for (int step = 0; step < steps; ++step) {
        wait_copies<kStages - 2>();
        __syncthreads();
        const std::uint16_t* left = stages + step % kStages * 2 * kPanel;
        const std::uint16_t* right = diagonal ? left : left + kPanel;
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) {
            if (useful) {
                unsigned a[4][4], b[2][4];
#pragma unroll
                for (int m = 0; m < 4; ++m)
                    load_transposed(a[m], left + left_at + k * kPitch + m * 16);
#pragma unroll
                for (int q = 0; q < 2; ++q)
                    load_transposed(b[q], right + right_at + k * kPitch + q * 16);
#pragma unroll
                for (int m = 0; m < 4; ++m)
#pragma unroll
                    for (int q = 0; q < 4; ++q)
                        multiply_16<kType>(sum[m][q], a[m], b[q / 2][q % 2 * 2],
                                           b[q / 2][q % 2 * 2 + 1]);
            }
            if (k != 0) continue;
            // The next copies start while the tensor cores are busy.
            if (step + kStages - 1 < steps) copy_stage((step + kStages - 1) % kStages);
            commit_copies();
        }
        if (!useful) continue;
        const bool end = step + 1 == steps;
        if (!end && (step + 1) % (kShortRows / kDepth) != 0) continue;
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int q = 0; q < 4; ++q)
#pragma unroll
                for (int r = 0; r < 4; ++r) promote(total[m][q][r], sum[m][q][r]);
        if (!end && (step + 1) % (kLongRows / kDepth) != 0) continue;
        const int at = late(lane);
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                add<8>(
                    to, m * 16 + h * 8 + at / 4,
                    [&](int k) {
                        return static_cast<double>(total[m][k / 2][h * 2 + k % 2]) +
                               static_cast<double>(sum[m][k / 2][h * 2 + k % 2]);
                    },
                    [&](int k) { return k / 2 * 8 + at % 4 * 2 + k % 2; });
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int k = 0; k < 16; ++k) sum[m][k / 4][k % 4] = total[m][k / 4][k % 4] = 0;
        to.fresh = false;
    }
}

// ---- single -------------------------------------------------------------------------------------

constexpr int kSingleDepth = 16;
constexpr Index kSingleBytes = 2 * kSingleDepth * 2 * kTile * static_cast<Index>(sizeof(float));
static_assert(kShortRows % kSingleDepth == 0);

// Four columns of a row as floats; only `width` of them exist.
template <typename S>
__device__ __forceinline__ float4 four(const S* p, int width) {
    float4 v = make_float4(0, 0, 0, 0);
    if (width == 4) {
        if constexpr (sizeof(S) == 4) {
            v = *reinterpret_cast<const float4*>(p);
        } else {
            const int2 pairs = *reinterpret_cast<const int2*>(p);
            const auto half = [](int pair, int which) {
                return to_float(
                    S{static_cast<std::uint16_t>(static_cast<unsigned>(pair) >> 16 * which)});
            };
            v = make_float4(half(pairs.x, 0), half(pairs.x, 1), half(pairs.y, 0), half(pairs.y, 1));
        }
    } else {
        if (width > 0) v.x = to_float(p[0]);
        if (width > 1) v.y = to_float(p[1]);
        if (width > 2) v.z = to_float(p[2]);
    }
    return v;
}

// Warps 4 x 2, each 32 x 64 of the tile; lanes 4 x 8, each 8 x 8 in four squares of 4 x 4.
template <typename S>
__global__ void __launch_bounds__(kThreads, 1)
    single_kernel(Sum out, Rows<S> x, const double* t, bool ones, Index segment, const Plan* plan) {
    if (plan->turn != kSingle) return;
    const Tile tile = tile_of(blockIdx.x, (out.size + kTile - 1) / kTile);
    const Index first = blockIdx.y * segment, last = least(first + segment, x.rows);
    const int steps = static_cast<int>((last - first + kSingleDepth - 1) / kSingleDepth);
    float* stages = reinterpret_cast<float*>(shared());  // [2][kSingleDepth][side][kTile]

    // This thread loads 4 columns of one side, in four rows of a stage.
    const int chunk = threadIdx.x % kWarp, side = threadIdx.x / kWarp % 2, row = threadIdx.x / 64;
    const Index column = (side == 0 ? tile.row : tile.column) * kTile + chunk * 4;
    const bool is_one = ones && column == x.columns;
    const Index there = x.columns - column;
    const int width = is_one ? 1 : static_cast<int>(there < 0 ? 0 : least(there, 4));
    const S* source = is_one ? reinterpret_cast<const S*>(plan->one)
                             : x.data + (width > 0 ? (first + row) * x.stride + column : 0);
    const Index step_by = is_one || width == 0 ? 0 : x.stride;
    Index next = first + row;
    float4 value[4];
    double weight[4];
    const auto fetch = [&] {
#pragma unroll
        for (int h = 0; h < 4; ++h) {
            const bool there = next + h * 4 < last;
            value[h] = four(source + h * 4 * step_by, there ? width : 0);
            weight[h] = t == nullptr ? 1.0 : there ? t[next + h * 4] : 0.0;
        }
        next += kSingleDepth;
        source += kSingleDepth * step_by;
    };
    const auto put = [&](int slot) {
#pragma unroll
        for (int h = 0; h < 4; ++h) {
            float4 v = value[h];
            if (weight[h] == 0) {  // a row of weight 0 may hold anything
                v = make_float4(0, 0, 0, 0);
            } else if (side == 0) {
                const float by = static_cast<float>(weight[h]);
                v = make_float4(v.x * by, v.y * by, v.z * by, v.w * by);
            }
            float* to = stages + ((slot * kSingleDepth + row + h * 4) * 2 + side) * kTile;
            *reinterpret_cast<float4*>(to + chunk * 4) = v;
        }
    };

    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int wi = warp / 2 * 32, wj = warp % 2 * 64;
    const Index i0 = tile.row * kTile + wi, j0 = tile.column * kTile + wj;
    const bool useful = i0 < out.size && j0 < i0 + 32;
    const int left_at = wi + lane / 8 * 4, right_at = static_cast<int>(kTile) + wj + lane % 8 * 4;
    float sum[8][8] = {}, total[8][8] = {};
    Corner to = corner(out, i0, j0);

    fetch();
    put(0);
    __syncthreads();
    for (int step = 0; step < steps; ++step) {
        const bool end = step + 1 == steps;
        if (!end) fetch();
        if (useful) {
            const float* stage = stages + step % 2 * (kSingleDepth * 2 * kTile);
#pragma unroll
            for (int k = 0; k < kSingleDepth; ++k) {
                float a[8], b[8];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float4 l =
                        *reinterpret_cast<const float4*>(stage + left_at + h * 16 + k * 2 * kTile);
                    const float4 r =
                        *reinterpret_cast<const float4*>(stage + right_at + h * 32 + k * 2 * kTile);
                    a[h * 4] = l.x, a[h * 4 + 1] = l.y, a[h * 4 + 2] = l.z, a[h * 4 + 3] = l.w;
                    b[h * 4] = r.x, b[h * 4 + 1] = r.y, b[h * 4 + 2] = r.z, b[h * 4 + 3] = r.w;
                }
#pragma unroll
                for (int i = 0; i < 8; ++i)
#pragma unroll
                    for (int j = 0; j < 8; ++j) sum[i][j] = fused(a[i], b[j], sum[i][j]);
            }
            if (end || (step + 1) % (kShortRows / kSingleDepth) == 0) {
#pragma unroll
                for (int i = 0; i < 8; ++i)
#pragma unroll
                    for (int j = 0; j < 8; ++j) promote(total[i][j], sum[i][j]);
            }
            if (end || (step + 1) % (kLongRows / kSingleDepth) == 0) {
                const int at = late(lane);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    add<8>(
                        to, at / 8 * 4 + i / 4 * 16 + i % 4,
                        [&](int k) {
                            return static_cast<double>(total[i][k]) +
                                   static_cast<double>(sum[i][k]);
                        },
                        [&](int k) { return at % 8 * 4 + k / 4 * 32 + k % 4; });
#pragma unroll
                    for (int k = 0; k < 8; ++k) sum[i][k] = total[i][k] = 0;
                }
                to.fresh = false;
            }
        }
        if (!end) put((step + 1) % 2);
        __syncthreads();
    }
}

// ---- wide ---------------------------------------------------------------------------------------

constexpr int kWideDepth = 16;
constexpr Index kWideBytes = 2 * kWideDepth * 2 * kWideTile * static_cast<Index>(sizeof(double));
static_assert(kLongRows % kWideDepth == 0);

// Warps 4 x 2, each 16 x 32 of the tile; lanes 4 x 8, each 4 x 4 in four squares of 2 x 2.
template <typename S>
__global__ void __launch_bounds__(kThreads, 2)
    wide_kernel(Sum out, Rows<S> x, const double* t, bool ones, Index segment, const Plan* plan) {
    if (plan->turn != kWide) return;
    const Tile tile = tile_of(blockIdx.x, (out.size + kWideTile - 1) / kWideTile);
    const Index first = blockIdx.y * segment, last = least(first + segment, x.rows);
    const int steps = static_cast<int>((last - first + kWideDepth - 1) / kWideDepth);
    double* stages = reinterpret_cast<double*>(shared());  // [2][kWideDepth][2 * kWideTile]

    // This thread loads one column of one side, in eight rows of a stage.
    constexpr int kAcross = 2 * static_cast<int>(kWideTile);
    const int place = static_cast<int>(threadIdx.x) % kAcross;
    const int row = static_cast<int>(threadIdx.x) / kAcross;
    const bool left_side = place < kWideTile;
    const Index column = (left_side ? tile.row : tile.column) * kWideTile + place % kWideTile;
    const bool is_one = ones && column == x.columns;
    Index next = first + row;
    double value[8], weight[8];
    const auto fetch = [&] {
#pragma unroll
        for (int h = 0; h < 8; ++h) {
            const Index n = next + h * 2;
            value[h] = is_one ? 1.0 : 0.0;
            if (n < last && column < x.columns)
                value[h] = static_cast<double>(to_float(x.data[n * x.stride + column]));
            weight[h] = n >= last ? 0.0 : t == nullptr ? 1.0 : t[n];
        }
        next += kWideDepth;
    };
    const auto put = [&](int slot) {
#pragma unroll
        for (int h = 0; h < 8; ++h)
            stages[(slot * kWideDepth + row + h * 2) * 2 * kWideTile + place] =
                weight[h] == 0 ? 0.0
                : left_side    ? weight[h] * value[h]
                               : value[h];
    };

    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int wi = warp / 2 * 16, wj = warp % 2 * 32;
    const Index i0 = tile.row * kWideTile + wi, j0 = tile.column * kWideTile + wj;
    const bool useful = i0 < out.size && j0 < i0 + 16;
    const int left_at = wi + lane / 8 * 2,
              right_at = static_cast<int>(kWideTile) + wj + lane % 8 * 2;
    double sum[4][4] = {};
    Corner to = corner(out, i0, j0);

    fetch();
    put(0);
    __syncthreads();
    for (int step = 0; step < steps; ++step) {
        const bool end = step + 1 == steps;
        if (!end) fetch();
        if (useful) {
            const double* stage = stages + step % 2 * (kWideDepth * 2 * kWideTile);
#pragma unroll
            for (int k = 0; k < kWideDepth; ++k) {
                double a[4], b[4];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const double2 l = *reinterpret_cast<const double2*>(stage + left_at + h * 8 +
                                                                        k * 2 * kWideTile);
                    const double2 r = *reinterpret_cast<const double2*>(stage + right_at + h * 16 +
                                                                        k * 2 * kWideTile);
                    a[h * 2] = l.x, a[h * 2 + 1] = l.y;
                    b[h * 2] = r.x, b[h * 2 + 1] = r.y;
                }
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) sum[i][j] = fused(a[i], b[j], sum[i][j]);
            }
            if (end || (step + 1) % (kLongRows / kWideDepth) == 0) {
                const int at = late(lane);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    add<4>(
                        to, at / 8 * 2 + i / 2 * 8 + i % 2, [&](int k) { return sum[i][k]; },
                        [&](int k) { return at % 8 * 2 + k / 2 * 16 + k % 2; });
#pragma unroll
                    for (int k = 0; k < 4; ++k) sum[i][k] = 0;
                }
                to.fresh = false;
            }
        }
        if (!end) put((step + 1) % 2);
        __syncthreads();
    }
}

// ---- gather -------------------------------------------------------------------------------------

template <typename M>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(M* H, Index stride, Index size, const double* parts, int segments,
                  const Plan* plan) {
    if (plan->turn == kNobody) return;
    const Index tiles = (size + kTile - 1) / kTile, apart = tiles * (tiles + 1) / 2 * kTile * kTile;
    for (Index i = blockIdx.x; i < size; i += gridDim.x) {
        const Index row = i / kTile;
        for (Index j = threadIdx.x; j <= i; j += kThreads) {
            const Index tile = row * (row + 1) / 2 + j / kTile;
            const double* part = parts + (tile * kTile + i % kTile) * kTile + j % kTile;
            double sum = 0;
#pragma unroll 8
            for (int s = 0; s < segments; ++s) sum += part[s * apart];
            M& h = H[i * stride + j];
            h = static_cast<M>(static_cast<double>(h) + sum);
        }
    }
}

// ---- launchers ----------------------------------------------------------------------------------

constexpr Index kProcessors = 132;   // of the device for which segments are chosen
constexpr Index kMostBlocks = 1056;  // when rows are cut; bounds the partial sums
constexpr Index kBlockRows = 512;    // overhead of a block, in rows

Index tiles_of(Index size, Index tile) {
    const Index side = (size + tile - 1) / tile;
    return side * (side + 1) / 2;
}

// The number of rows of a segment for which all blocks together take the least time.
Index segment_of(Index rows, Index size) {
    const Index tiles = tiles_of(size, kTile);
    Index best = up(rows, kHessianRows), lowest = -1;
    for (Index count = 1;
         count == 1 || (count * tiles <= kMostBlocks && count <= rows / kHessianRows); ++count) {
        const Index segment = up((rows + count - 1) / count, kHessianRows);
        const Index blocks = (rows + segment - 1) / segment * tiles;
        const Index time = (blocks + kProcessors - 1) / kProcessors * (segment + kBlockRows);
        if (lowest < 0 || time < lowest) best = segment, lowest = time;
    }
    return best;
}

// Rows that the kernels can read: X, or a copy. *ones becomes false if the copy has the ones.
template <typename S>
Info rows_of(Rows<S>& x, Matrix<const S> X, bool& ones, const Context& context) {
    const bool vectors = kVector<S> == 1 || (X.row_stride % kVector<S> == 0 &&
                                             reinterpret_cast<std::uintptr_t>(X.data) % 16 == 0 &&
                                             (!ones || X.columns % kVector<S> == 0));
    x = {X.data, X.rows, X.columns, X.row_stride};
    if (X.column_stride == 1 && vectors) return {Status::ok, 0};
    using Bits = typename Format<S>::Bits;
    const Index columns = X.columns + (ones ? 1 : 0), width = up(columns, kVector<S>);
    Bits* copy = allocate<Bits>(context, X.rows * width);
    if (copy == nullptr) return {Status::out_of_memory, 0};
    const Matrix<const Bits> from{reinterpret_cast<const Bits*>(X.data), X.rows, X.columns,
                                  X.row_stride, X.column_stride};
    const Index squares = (X.rows + kSquare - 1) / kSquare * ((width + kSquare - 1) / kSquare);
    LOBS_TRY(launch(context, "hessian pack", pack_kernel<Bits>,
                    dim3(static_cast<unsigned>(least(squares, 4096))), kThreads,
                    kSquare * (kSquare + 1) * sizeof(Bits), copy, width, from, ones,
                    Format<S>::one));
    x = {reinterpret_cast<const S*>(copy), X.rows, columns, width};
    ones = false;
    return {Status::ok, 0};
}

template <typename S>
Info run(AnyMatrix H, AnyMatrix X, const double* t, bool ones, const Context& context) {
    const Matrix<const S> input{static_cast<const S*>(X.data), X.rows, X.columns, X.row_stride,
                                X.column_stride};
    const Index segment = segment_of(X.rows, H.rows);
    const Index segments = (X.rows + segment - 1) / segment;
    const Index looks = least((X.rows + kThreads / kWarp - 1) / (kThreads / kWarp), kLooks);
    Plan* plan = allocate<Plan>(context, 1);
    Seen* seen = allocate<Seen>(context, looks);
    if (plan == nullptr || seen == nullptr) return {Status::out_of_memory, 0};
    Sum out{nullptr, H.data, H.dtype == Dtype::f32, H.rows, H.row_stride};
    if (segments > 1) {
        out.parts = allocate<double>(context, segments * tiles_of(H.rows, kTile) * kTile * kTile);
        if (out.parts == nullptr) return {Status::out_of_memory, 0};
    }
    Rows<S> x;
    bool appended = ones;
    LOBS_TRY(rows_of(x, input, appended, context));

    Rows<S> given = x;
    given.columns = X.columns;
    LOBS_TRY(launch(context, "hessian look", look_kernel<S>, dim3(static_cast<unsigned>(looks)),
                    kThreads, kThreads / kWarp * sizeof(Seen), seen, given, t,
                    context.device->report));
    LOBS_TRY(launch(context, "hessian decide", decide_kernel<S>, dim3(1), kThreads,
                    kThreads / kWarp * sizeof(Seen), plan, seen, static_cast<int>(looks), ones,
                    context.device->report));
    const auto grid = [&](Index tile) {
        return dim3(static_cast<unsigned>(tiles_of(H.rows, tile)), static_cast<unsigned>(segments));
    };
    if constexpr (sizeof(S) == 2) {
        constexpr Dtype kType = Format<S>::infinite == 0x7c00u ? Dtype::f16 : Dtype::bf16;
        const Rows<std::uint16_t> bits{reinterpret_cast<const std::uint16_t*>(x.data), x.rows,
                                       x.columns, x.stride};
        LOBS_TRY(launch(context, "hessian tensor",
                        t == nullptr ? tensor_kernel<kType, false> : tensor_kernel<kType, true>,
                        grid(kTile), kThreads, kTensorBytes, out, bits, t, appended, segment,
                        plan));
    }
    if constexpr (sizeof(S) < 8)
        if (sizeof(S) == 4 || t != nullptr)
            LOBS_TRY(launch(context, "hessian single", single_kernel<S>, grid(kTile), kThreads,
                            kSingleBytes, out, x, t, appended, segment, plan));
    LOBS_TRY(launch(context, "hessian wide", wide_kernel<S>, grid(kWideTile), kThreads, kWideBytes,
                    out, x, t, appended, segment, plan));
    if (segments == 1) return {Status::ok, 0};
    const dim3 blocks(static_cast<unsigned>(least(H.rows, 65535)));
    if (H.dtype == Dtype::f32)
        return launch(context, "hessian gather", gather_kernel<float>, blocks, kThreads, 0,
                      static_cast<float*>(H.data), H.row_stride, H.rows, out.parts,
                      static_cast<int>(segments), plan);
    return launch(context, "hessian gather", gather_kernel<double>, blocks, kThreads, 0,
                  static_cast<double*>(H.data), H.row_stride, H.rows, out.parts,
                  static_cast<int>(segments), plan);
}

}  // namespace

Info hessian_accumulate(AnyMatrix H, AnyMatrix X, const double* t, bool ones,
                        const Context& context) {
    if (H.dtype != Dtype::f64 && H.dtype != Dtype::f32) return {Status::unsupported, 0};
    if (X.rows == 0 || H.rows == 0) return {Status::ok, 0};
    switch (X.dtype) {
        case Dtype::f64:
            return run<double>(H, X, t, ones, context);
        case Dtype::f32:
            return run<float>(H, X, t, ones, context);
        case Dtype::f16:
            return run<Half>(H, X, t, ones, context);
        case Dtype::bf16:
            return run<BFloat>(H, X, t, ones, context);
    }
    return {Status::unsupported, 0};
}

}  // namespace lobs::cuda
