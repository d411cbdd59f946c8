// static_order.cu: contract in static_order.h.
//
// A block of threads takes a row, whose weights stay in shared memory meanwhile. Eight removals are
// done together: their coefficients need only the 36 entries of A among themselves, which are in
// registers of the first warp by the time they are needed. Then one pass applies all eight, so that
// w is read and written once for eight rows of A, and every thread has eight loads in flight. The
// time is bound by reading A: k C elements per row, from the cache or memory that holds A. Rows too
// long for shared memory are updated in place.
#include "common.cuh"

namespace lobs::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr int kGroup = 8;

template <typename T, int kWide>
struct alignas(sizeof(T) * kWide) Pack {
    T at[kWide];
};

// ---- the check ----------------------------------------------------------------------------------

// Finds where each column of a row occurs first. `first` (C entries per block of threads) is
// written only at the columns of the row. A row longer than C fails within its first C + 1
// removals.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    check_kernel(const T* A, Index C, const std::int32_t* order, const Index* start, Index rows,
                 int* scratch, std::uint64_t* report) {
    Carver carve(shared());
    int* first = nullptr;
    if (scratch != nullptr)
        first = scratch + blockIdx.x * C;
    else
        carve.take(first, C);
    for (Index r = blockIdx.x; r < rows; r += gridDim.x) {
        const Index begin = start[r];
        const int count = static_cast<int>(least(start[r + 1] - begin, C + 1));
        for (int p = static_cast<int>(threadIdx.x); p < count; p += kThreads) {
            const Index q = order[begin + p];
            if (q >= 0 && q < C) first[q] = count;
        }
        __syncthreads();
        for (int p = static_cast<int>(threadIdx.x); p < count; p += kThreads) {
            const Index q = order[begin + p];
            if (q >= 0 && q < C) atomicMin(&first[q], p);
        }
        __syncthreads();
        for (int p = static_cast<int>(threadIdx.x); p < count; p += kThreads) {
            const Index q = order[begin + p];
            if (q < 0 || q >= C || first[q] != p)
                report_failure(report, Status::bad_order, begin + p);
            else if (!(A[q * C + q] > 0))
                report_failure(report, Status::not_positive, begin + p);
        }
        __syncthreads();
    }
}

// ---- the removals -------------------------------------------------------------------------------

// The columns of one group of removals. Beyond the last one the first one is repeated, to be added
// zero times.
struct Group {
    const std::int32_t* order;
    int size;

    __device__ __forceinline__ Group(const std::int32_t* from, Index left)
        : order(from), size(static_cast<int>(least(left, kGroup))) {}
    __device__ __forceinline__ Index column(int g) const { return order[g < size ? g : 0]; }
};

// The entries of A for the coefficients of a group, in the first warp: lane 8 g + h holds A[q_g,
// q_h] and A[q_(g + 4), q_h].
template <typename T>
struct Corner {
    T low, high;

    __device__ __forceinline__ void load(const T* A, Index C, const Group& group) {
        const int lane = static_cast<int>(threadIdx.x % kWarp);
        const Index q = group.column(lane % kGroup);
        low = A[group.column(lane / kGroup) * C + q];
        high = A[group.column(lane / kGroup + kGroup / 2) * C + q];
    }

    // c_g = -(w_g + c_0 A[q_0, q_g] + ... ) / A[q_g, q_g], zero beyond the group. Lane h < 8
    // returns c_h.
    __device__ __forceinline__ T solve(T w, int size) const {
        const int lane = static_cast<int>(threadIdx.x % kWarp), h = lane % kGroup;
        T coefficient = 0;
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
            const T line =
                __shfl_sync(kAllLanes, g < kGroup / 2 ? low : high, g % (kGroup / 2) * kGroup + h);
            const T own = g < size ? -w / line : T(0);  // correct in lane g
            const T c = __shfl_sync(kAllLanes, own, g);
            if (h == g) coefficient = c;
            w = fused(c, line, w);
        }
        return coefficient;
    }
};

template <typename T, int kWide>
__device__ __forceinline__ void apply(T* w, const T* A, Index C, const Group& group, const T* c) {
    using Piece = Pack<T, kWide>;
    const T* line[kGroup];
    T factor[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) line[g] = A + group.column(g) * C, factor[g] = c[g];
    for (Index j = Index{threadIdx.x} * kWide; j < C; j += Index{kWide} * blockDim.x) {
        Piece a[kGroup];
#pragma unroll
        for (int g = 0; g < kGroup; ++g) a[g] = *reinterpret_cast<const Piece*>(line[g] + j);
        Piece sum = *reinterpret_cast<const Piece*>(w + j);
#pragma unroll
        for (int g = 0; g < kGroup; ++g)
#pragma unroll
            for (int i = 0; i < kWide; ++i) sum.at[i] = fused(factor[g], a[g].at[i], sum.at[i]);
        *reinterpret_cast<Piece*>(w + j) = sum;
    }
}

template <typename T, int kWide, bool kShared>
__global__ void __launch_bounds__(kThreads, 3)
    prune_kernel(Matrix<T> W, const T* A, const std::int32_t* order, const Index* start,
                 const std::uint64_t* report) {
    if (*report != kNothing) return;
    const Index C = W.columns;
    Carver carve(shared());
    T *c = nullptr, *w = nullptr;
    carve.take(c, kGroup);
    if constexpr (kShared) carve.take(w, C);
    for (Index r = blockIdx.x; r < W.rows; r += gridDim.x) {
        T* row = W.data + r * W.row_stride;
        const Index count = start[r + 1] - start[r];
        const std::int32_t* columns = order + start[r];
        if (count == 0) continue;
        if constexpr (kShared)
            for (Index j = threadIdx.x; j < C; j += blockDim.x) w[j] = row[j];
        else
            w = row;
        const bool solving = threadIdx.x < kWarp;
        Corner<T> corner{};
        if (solving) corner.load(A, C, Group(columns, count));
        for (Index p = 0; p < count; p += kGroup) {
            const Group group(columns + p, count - p);
            __syncthreads();  // w is up to date
            if (solving) {
                const T found = corner.solve(w[group.column(threadIdx.x % kGroup)], group.size);
                if (threadIdx.x < kGroup) c[threadIdx.x] = found;
                if (p + kGroup < count)
                    corner.load(A, C, Group(columns + p + kGroup, count - p - kGroup));
            }
            __syncthreads();
            apply<T, kWide>(w, A, C, group, c);
        }
        __syncthreads();
        for (Index p = threadIdx.x; p < count; p += blockDim.x) w[columns[p]] = 0;
        if constexpr (kShared) {
            __syncthreads();
            for (Index j = threadIdx.x; j < C; j += blockDim.x) row[j] = w[j];
        }
        __syncthreads();
    }
}

// ---- launching ----------------------------------------------------------------------------------

template <typename T>
Info check(const T* A, Index C, const std::int32_t* order, const Index* start, Index rows,
           const Context& context) {
    Index blocks = least(rows, Index{8} * processors(context)), bytes = C * Index{sizeof(int)};
    int* scratch = nullptr;
    if (bytes > shared_limit(context)) {
        blocks = least(rows, processors(context));
        scratch = allocate<int>(context, blocks * C);
        if (scratch == nullptr) return {Status::out_of_memory, 0};
        bytes = 0;
    }
    return launch(context, "static order check", check_kernel<T>,
                  dim3(static_cast<unsigned>(blocks)), kThreads, static_cast<std::size_t>(bytes), A,
                  C, order, start, rows, scratch, context.device->report);
}

template <typename T>
Info run(AnyMatrix any, const T* A, const std::int32_t* order, const Index* start,
         const Context& context) {
    const Matrix<T> W{static_cast<T*>(any.data), any.rows, any.columns, any.row_stride, 1};
    const Index C = W.columns;
    constexpr Index kVector = 16 / sizeof(T);
    LOBS_TRY(check(A, C, order, start, W.rows, context));
    const Index bytes = 64 + C * static_cast<Index>(sizeof(T));
    const bool fits = bytes <= shared_limit(context);
    const bool wide = fits && C % kVector == 0 && reinterpret_cast<std::uintptr_t>(A) % 16 == 0;
    const Index pieces = wide ? C / kVector : C;
    const auto threads = static_cast<unsigned>(least(up(pieces, kWarp), kThreads));
    const auto grid = static_cast<unsigned>(least(W.rows, Index{16} * processors(context)));
    return launch(context, "static order",
                  wide   ? prune_kernel<T, kVector, true>
                  : fits ? prune_kernel<T, 1, true>
                         : prune_kernel<T, 1, false>,
                  dim3(grid), threads, static_cast<std::size_t>(fits ? bytes : 64), W, A, order,
                  start, context.device->report);
}

}  // namespace

Info static_order_prune(AnyMatrix W, const void* A, const std::int32_t* order, const Index* start,
                        const Context& context) {
    if (W.rows == 0) return {Status::ok, 0};
    return W.dtype == Dtype::f64 ? run(W, static_cast<const double*>(A), order, start, context)
                                 : run(W, static_cast<const float*>(A), order, start, context);
}

}  // namespace lobs::cuda
