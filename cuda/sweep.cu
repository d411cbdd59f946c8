// sweep.cu: contract in sweep.h.
//
// A warp takes a row, and a panel of up to 128 of its columns at a time: lane l holds columns l,
// l + 32, ... of the panel in registers. A removal is one division and one fused step per register,
// so a weight moves once. A panel first takes the errors of all columns before it. The operations
// on a weight come in the order of the sequential loop, whatever the panels are.
//
// Up to 128 columns are one panel, and shared memory holds the part of U that is read: its upper
// triangle in steps of 32 columns (40 KB in float32). Wider blocks read U through the caches.
#include "common.cuh"

namespace lobs::cuda {
namespace {

constexpr int kWarps = 8;  // the most rows that a block takes at a time
constexpr int kMostSlots = 4;
constexpr int kGoes = static_cast<int>(WeightState::goes_first);
constexpr int kStays = static_cast<int>(WeightState::stays);

template <typename T>
struct Sweep {
    T *W, *E;
    const T* U;
    unsigned char* gone;
    Index rows, columns, W_stride, U_stride, E_stride;
    Index group, per_group;
    Index unit;  // whole groups, or one group; no panel crosses a multiple of it
};

// ---- keys ---------------------------------------------------------------------------------------

// |w| / U_jj orders like its square, but neither overflows nor loses small scores. Its bits order
// like the value and leave room for the codes: a key below zero goes first, the top key stays.
template <typename T>
struct KeyOf;
template <>
struct KeyOf<float> {
    using type = std::int32_t;
    static constexpr type top = INT32_MAX;
};
template <>
struct KeyOf<double> {
    using type = std::int64_t;
    static constexpr type top = INT64_MAX;
};
template <typename T>
using Key = typename KeyOf<T>::type;

__device__ __forceinline__ std::int32_t bits_of(float x) {
    return static_cast<std::int32_t>(__float_as_uint(x));
}
__device__ __forceinline__ std::int64_t bits_of(double x) { return __double_as_longlong(x); }

template <typename T>
__device__ __forceinline__ Key<T> key_of(T w, T pivot, int code) {
    const Key<T> key = bits_of(w / pivot) & KeyOf<T>::top;
    return code == kGoes ? Key<T>{-1} : code == kStays ? KeyOf<T>::top : key;
}

// Whether column `q` of a group goes. Its rank is the number of columns before it in order.
template <typename T>
__device__ __forceinline__ bool goes(const Key<T>* keys, Index q, Index group, Index per_group) {
    const Key<T> key = keys[q];
    Index rank = 0;
    for (Index k = 0; k < group; ++k) {
        const Key<T> other = keys[k];
        rank += other < key || (other == key && k < q) ? 1 : 0;
    }
    return key < 0 || (rank < per_group && key < KeyOf<T>::top);
}

// ---- U ------------------------------------------------------------------------------------------

// Row j of the packed U starts with the 32 columns that hold its diagonal entry.
template <int kSlots>
__device__ __forceinline__ int packed_row(int j) {
    const int s = j / kWarp;
    const int before = kWarp * kWarp * (s * kSlots - s * (s - 1) / 2);
    return before + j % kWarp * (kSlots - s) * kWarp - s * kWarp;  // plus the column
}
template <int kSlots>
constexpr Index kPacked = Index{kWarp} * kWarp * (kSlots * (kSlots + 1) / 2);

// Entry (j, first + at) of U. Rows and columns count from the first column of the block.
template <typename T, int kSlots, bool kPackedU>
struct Upper {
    const T* data;
    Index stride;

    __device__ __forceinline__ T operator()(Index j, Index first, int at, bool inside) const {
        if constexpr (kPackedU)
            return data[packed_row<kSlots>(static_cast<int>(j)) + at];
        else
            return inside ? data[j * stride + first + at] : T(0);
    }
};

// ---- one row ------------------------------------------------------------------------------------

template <typename T, int kSlots>
struct Panel {
    Index first;
    int width;
    T w[kSlots];

    __device__ __forceinline__ static int at(int s) {
        return s * kWarp + static_cast<int>(threadIdx.x % kWarp);
    }
    __device__ __forceinline__ void load(const T* row) {
#pragma unroll
        for (int s = 0; s < kSlots; ++s) w[s] = at(s) < width ? row[first + at(s)] : T(0);
    }
    __device__ __forceinline__ void store(T* row) const {
#pragma unroll
        for (int s = 0; s < kSlots; ++s)
            if (at(s) < width) row[first + at(s)] = w[s];
    }
};

template <typename T>
__device__ __forceinline__ int panel_width(const Sweep<T>& sweep, Index first, Index most) {
    const Index end = least((first / sweep.unit + 1) * sweep.unit, sweep.columns);
    return static_cast<int>(least(end - first, most));
}

// Applies the errors of columns from .. to - 1 to the panel. Columns without an error are skipped.
template <typename T, int kSlots, typename U>
__device__ __forceinline__ void take_errors(Panel<T, kSlots>& panel, const U& upper, const T* E,
                                            Index from, Index to) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    for (Index k = from; k < to; k += kWarp) {
        const T own = k + lane < to ? E[k + lane] : T(0);
        unsigned left = __ballot_sync(kAllLanes, own != 0);
        while (left != 0) {
            const int t = __ffs(static_cast<int>(left)) - 1;
            left &= left - 1;
            const T e = __shfl_sync(kAllLanes, own, t);
#pragma unroll
            for (int s = 0; s < kSlots; ++s) {
                const int at = panel.at(s);
                const T u = upper(k + t, panel.first, at, at < panel.width);
                panel.w[s] = fused(-e, u, panel.w[s]);
            }
        }
    }
}

// Decides for the group that starts at column `start` of the panel: bit l of mask[s] says that the
// column of lane l goes. `codes` holds two bits for each column of a lane.
template <typename T, int kSlots>
__device__ __forceinline__ void choose(unsigned (&mask)[kSlots], const Panel<T, kSlots>& panel,
                                       const T (&pivot)[kSlots], unsigned codes, Key<T>* keys,
                                       int start, int group, Index per_group) {
    __syncwarp();  // all lanes have read the keys of the previous group
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
        if (panel.at(s) >= start && panel.at(s) < start + group)
            keys[panel.at(s) - start] =
                key_of(panel.w[s], pivot[s], static_cast<int>(codes >> 2 * s & 3u));
    __syncwarp();
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
        if (s * kWarp >= start + group || (s + 1) * kWarp <= start) continue;
        const int q = panel.at(s) - start;
        const bool chosen = q >= 0 && q < group && goes<T>(keys, q, group, per_group);
        mask[s] |= __ballot_sync(kAllLanes, chosen);
    }
}

// Sweeps the panel's own columns, one after another. The register of a weight that goes keeps its
// error.
template <typename T, int kSlots, bool kPackedU>
__device__ __forceinline__ void sweep_panel(Panel<T, kSlots>& panel, const Sweep<T>& sweep,
                                            const Upper<T, kSlots, kPackedU>& upper, Key<T>* keys,
                                            T* W, T* E, unsigned char* gone) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const bool choosing = keys != nullptr;
    const int group = static_cast<int>(sweep.group);
    unsigned codes = 0, mask[kSlots];
    T pivot[kSlots];
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
        const int at = panel.at(s);
        const bool inside = at < panel.width;
        const int code = inside ? gone[panel.first + at] : kStays;
        pivot[s] = inside ? upper(panel.first + at, panel.first, at, true) : T(1);
        codes |= static_cast<unsigned>(code <= kStays ? code : 0) << 2 * s;
        mask[s] = choosing ? 0u : __ballot_sync(kAllLanes, code == kGoes);
    }
    int next_group = choosing ? 0 : panel.width;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
        const int end = panel.width < (s + 1) * kWarp ? panel.width : (s + 1) * kWarp;
        for (int j = s * kWarp; j < end; ++j) {
            if (j == next_group) {
                choose(mask, panel, pivot, codes, keys, j, group, sweep.per_group);
                next_group += group;
            }
            const int owner = j - s * kWarp;
            if ((mask[s] >> owner & 1u) == 0) continue;
            const T own = panel.w[s] / pivot[s];
            const T e = __shfl_sync(kAllLanes, own, owner);
#pragma unroll
            for (int i = s; i < kSlots; ++i) {
                const int at = panel.at(i);
                const T u = upper(panel.first + j, panel.first, at, at < panel.width);
                const T w = fused(-e, u, panel.w[i]);
                if (i > s || lane > owner) panel.w[i] = w;
            }
            if (lane == owner) panel.w[s] = e;
        }
    }
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
        const Index at = panel.first + panel.at(s);
        if (panel.at(s) >= panel.width) continue;
        const bool went = mask[s] >> lane & 1u;
        W[at] = went ? T(0) : panel.w[s];
        E[at] = went ? panel.w[s] : T(0);
        if (choosing) gone[at] = went ? 1 : 0;
    }
}

// Updates a group wider than a panel as a whole, and chooses before its columns are swept. Its
// keys are stored where its errors will be.
template <typename T, int kSlots, bool kPackedU>
__device__ __forceinline__ void choose_wide(const Sweep<T>& sweep,
                                            const Upper<T, kSlots, kPackedU>& upper, Index first,
                                            T* W, T* E, unsigned char* gone) {
    static_assert(sizeof(Key<T>) == sizeof(T) && alignof(Key<T>) == alignof(T));
    Panel<T, kSlots> panel;
    for (Index j = first; j < first + sweep.group; j += panel.width) {
        panel.first = j, panel.width = panel_width(sweep, j, kSlots * kWarp);
        panel.load(W);
        take_errors(panel, upper, E, 0, first);
        panel.store(W);
    }
    __syncwarp();
    Key<T>* keys = reinterpret_cast<Key<T>*>(E + first);
    const Index lane = threadIdx.x % kWarp;
    for (Index k = lane; k < sweep.group; k += kWarp)
        keys[k] = key_of(W[first + k], upper(first + k, first, static_cast<int>(k), true),
                         gone[first + k]);
    __syncwarp();
    for (Index k = lane; k < sweep.group; k += kWarp)
        gone[first + k] = goes<T>(keys, k, sweep.group, sweep.per_group) ? 1 : 0;
    __syncwarp();
}

template <typename T, int kSlots, bool kPackedU>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    sweep_kernel(Sweep<T> sweep, bool choosing, const std::uint64_t* report) {
    if (*report != kNothing) return;
    constexpr int kWidth = kSlots * kWarp;
    Carver carve(shared());
    Upper<T, kSlots, kPackedU> upper{sweep.U, sweep.U_stride};
    if constexpr (kPackedU) {
        T* packed = nullptr;
        carve.take(packed, kPacked<kSlots>);
        const int columns = static_cast<int>(sweep.columns), warps = blockDim.x / kWarp;
        for (int j = static_cast<int>(threadIdx.x / kWarp); j < columns; j += warps)
            for (int q = j / kWarp * kWarp + static_cast<int>(threadIdx.x % kWarp); q < kWidth;
                 q += kWarp)
                packed[packed_row<kSlots>(j) + q] =
                    q >= j && q < columns ? sweep.U[j * sweep.U_stride + q] : T(0);
        __syncthreads();
        upper.data = packed;
    }
    Key<T>* keys = nullptr;
    if (choosing) {
        carve.take(keys, Index{kWidth} * (blockDim.x / kWarp));
        keys += threadIdx.x / kWarp * kWidth;
    }
    const Index step = static_cast<Index>(gridDim.x) * (blockDim.x / kWarp);
    Index r = static_cast<Index>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    for (; r < sweep.rows; r += step) {
        T* W = sweep.W + r * sweep.W_stride;
        T* E = sweep.E + r * sweep.E_stride;
        unsigned char* gone = sweep.gone + r * sweep.columns;
        Index from = 0;
        Panel<T, kSlots> panel;
        for (Index first = 0; first < sweep.columns; first += panel.width) {
            if constexpr (!kPackedU)
                if (sweep.group > kWidth && first % sweep.group == 0) {
                    choose_wide(sweep, upper, first, W, E, gone);
                    from = first;
                }
            panel.first = first, panel.width = panel_width(sweep, first, kWidth);
            panel.load(W);
            if constexpr (!kPackedU) take_errors(panel, upper, E, from, first);
            sweep_panel(panel, sweep, upper, keys, W, E, gone);
            __syncwarp();  // other lanes will read these errors and overwrite the keys
        }
    }
}

template <typename T>
__global__ void pivot_kernel(const T* U, Index stride, Index columns, std::uint64_t* report) {
    for (Index j = threadIdx.x; j < columns; j += blockDim.x)
        if (!(U[j * stride + j] > 0)) report_failure(report, Status::not_positive, j);
}

// ---- launching ----------------------------------------------------------------------------------

template <typename T, int kSlots, bool kPackedU>
Info enqueue(Sweep<T> sweep, const Context& context) {
    constexpr Index kWidth = kSlots * kWarp;
    const bool choosing = sweep.group > 0 && sweep.group <= kWidth;
    sweep.unit = sweep.group == 0        ? sweep.columns
                 : sweep.group <= kWidth ? kWidth / sweep.group * sweep.group
                                         : sweep.group;
    // Few rows are spread over all processors.
    const Index each = (sweep.rows + processors(context) - 1) / processors(context);
    const Index warps = each < 4 ? 4 : least(each, kWarps);
    Index bytes = kPackedU ? kPacked<kSlots> * static_cast<Index>(sizeof(T)) : 0;
    if (choosing) bytes += kWidth * warps * static_cast<Index>(sizeof(Key<T>));
    const Index blocks = least((sweep.rows + warps - 1) / warps, Index{4} * processors(context));
    return launch(context, "sweep", sweep_kernel<T, kSlots, kPackedU>,
                  dim3(static_cast<unsigned>(blocks)), static_cast<unsigned>(warps) * kWarp,
                  static_cast<std::size_t>(bytes), sweep, choosing, context.device->report);
}

template <typename T>
Info run(AnyMatrix W, AnyMatrix U, unsigned char* gone, AnyMatrix E, Index group, Index per_group,
         const Context& context) {
    const Sweep<T> sweep{static_cast<T*>(W.data),
                         static_cast<T*>(E.data),
                         static_cast<const T*>(U.data),
                         gone,
                         W.rows,
                         W.columns,
                         W.row_stride,
                         U.row_stride,
                         E.row_stride,
                         group,
                         per_group,
                         0};
    const Index B = W.columns;
    LOBS_TRY(launch(context, "sweep pivots", pivot_kernel<T>, dim3(1), 256, 0, sweep.U,
                    sweep.U_stride, B, context.device->report));
    if (W.rows == 0) return {Status::ok, 0};
    constexpr Index most = (kPacked<kMostSlots> + kMostSlots * kWarp * kWarps) * sizeof(T);
    if (B > kMostSlots * kWarp || most > shared_limit(context))
        return enqueue<T, kMostSlots, false>(sweep, context);
    return B <= kWarp       ? enqueue<T, 1, true>(sweep, context)
           : B <= 2 * kWarp ? enqueue<T, 2, true>(sweep, context)
                            : enqueue<T, kMostSlots, true>(sweep, context);
}

}  // namespace

Info sweep_block(AnyMatrix W, AnyMatrix U, unsigned char* gone, AnyMatrix E, Index group,
                 Index per_group, const Context& context) {
    if (W.columns == 0) return {Status::ok, 0};
    return W.dtype == Dtype::f64 ? run<double>(W, U, gone, E, group, per_group, context)
                                 : run<float>(W, U, gone, E, group, per_group, context);
}

}  // namespace lobs::cuda
