// admm.cu: contract in admm.h.
//
// y goes to d. A key is an integer that orders like the cost of a unit; those that go first have
// the lowest, those that stay the highest. selection.cuh finds the lowest.
//
// Rows and groups: a block of threads takes a row in one kernel and keeps its keys in shared memory
// if they fit; otherwise it finds them from y again. All rows together are one long row: one kernel
// for y, those of the selection, and one for d and `removed`.
#include "selection.cuh"

namespace lobs::cuda {
namespace {

// ---- keys ---------------------------------------------------------------------------------------

__device__ __forceinline__ Bits cost_bits(float y) { return __float_as_uint(y) & 0x7fffffffu; }
__device__ __forceinline__ Bits cost_bits(double y) {
    return static_cast<Bits>(__double_as_longlong(y)) & ~(Bits{1} << 63);
}

template <typename T, bool kWide>
constexpr int kKeyBits = kWide || sizeof(T) == 8 ? 63 : 31;
template <typename T, bool kWide>
constexpr Bits kStays = (Bits{1} << kKeyBits<T, kWide>)-1;
constexpr Bits kFirst = 0;

// kWide: units of several columns.
template <typename T, bool kWide>
struct Problem {
    const T *p, *x;
    T* d;
    unsigned char* removed;
    const unsigned char* state;
    Count* changed;
    Index rows, columns;
    Index unit, units;  // units of a row
    Index count, group, per_group;
    std::uint64_t* report;

    // d becomes y.
    __device__ __forceinline__ void price(Index i) const {
        const T u = removed[i] != 0 ? -(d[i] + x[i]) : T(0);
        const T y = (p[i] + x[i]) + u;
        if (!finite(y)) report_failure(report, Status::not_finite, i);
        d[i] = y;
    }

    // The key of the unit whose first weight is i.
    __device__ __forceinline__ Bits key_at(Index i) const {
        if (state != nullptr && state[i] != 0)
            return state[i] == static_cast<unsigned char>(WeightState::goes_first)
                       ? kFirst
                       : kStays<T, kWide>;
        if constexpr (!kWide) {
            return cost_bits(d[i]) + 1;
        } else {
            double cost = 0;
            for (Index k = 0; k < unit; ++k) {
                const double y = static_cast<double>(d[i + k]);
                cost = fused(y, y, cost);
            }
            return cost_bits(cost) + 1;
        }
    }

    __device__ __forceinline__ bool goes(Bits key, bool chosen) const {
        return key == kFirst || (chosen && key != kStays<T, kWide>);
    }

    // Returns how many weights of the unit were not removed before, if it goes.
    __device__ __forceinline__ Index remove(Index i, bool gone) const {
        Index fresh = 0;
        for (Index k = 0; k < unit; ++k) {
            fresh += gone && removed[i + k] == 0 ? 1 : 0;
            removed[i + k] = gone ? 1 : 0;
        }
        return fresh;
    }

    // d from y, once `removed` is known.
    __device__ __forceinline__ void finish(Index i) const {
        d[i] = (removed[i] != 0 ? -d[i] : d[i]) - x[i];
    }

    __device__ __forceinline__ void add_changed(Index own) const {
        Index total = 0;
        sum_before(own, &total);
        if (threadIdx.x % kWarp == 0 && total != 0) atomicAdd(changed, static_cast<Count>(total));
    }
};

// ---- rows and groups ----------------------------------------------------------------------------

template <typename T, bool kWide, bool kShared>
__global__ void __launch_bounds__(kThreads) row_kernel(Problem<T, kWide> all) {
    Carver carve(shared());
    Bits* keys = nullptr;
    RowSpace space{};
    space.take(carve);
    if constexpr (kShared) carve.take(keys, all.units);
    const Index C = all.columns, t = threadIdx.x;
    Index changed = 0;
    for (Index r = blockIdx.x; r < all.rows; r += gridDim.x) {
        const Index row = r * C;
        for (Index q = t; q < C; q += kThreads) all.price(row + q);
        __syncthreads();
        const auto key_at = [&](Index u) {
            if constexpr (kShared)
                return keys[u];
            else
                return all.key_at(row + u * all.unit);
        };
        if constexpr (kShared) {
            for (Index u = t; u < all.units; u += kThreads)
                keys[u] = all.key_at(row + u * all.unit);
            __syncthreads();
        }
        if (all.group > 0) {
            for (Index u = t; u < all.units; u += kThreads) {
                const Index first = u - u % all.group;
                const Bits key = key_at(u);
                Index rank = 0;
                for (Index k = first; k < first + all.group; ++k) {
                    const Bits other = key_at(k);
                    rank += other < key || (other == key && k < u) ? 1 : 0;
                }
                changed += all.remove(row + u, all.goes(key, rank < all.per_group));
            }
        } else {
            Cut cut{0, -1, 0};  // nothing
            if (all.count > 0)
                cut = cut_of_row(key_at, all.units, all.count, kKeyBits<T, kWide>, space);
            const auto put = [&](Index u, Bits key, bool chosen) {
                changed += all.remove(row + u * all.unit, all.goes(key, chosen));
            };
            mark_row(put, key_at, all.units, cut, space);
        }
        for (Index q = all.units * all.unit + t; q < C; q += kThreads) all.removed[row + q] = 0;
        __syncthreads();
        for (Index q = t; q < C; q += kThreads) all.finish(row + q);
        __syncthreads();
    }
    all.add_changed(changed);
}

// ---- all rows -----------------------------------------------------------------------------------

// The first weight of unit u of all.
template <typename T, bool kWide>
__device__ __forceinline__ Index place_of(const Problem<T, kWide>& all, Index u) {
    if constexpr (kWide)
        return u / all.units * all.columns + u % all.units * all.unit;
    else
        return u;
}

// y of all weights, and d of those that belong to no unit.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) price_kernel(Problem<T, kWide> all) {
    const Index step = static_cast<Index>(gridDim.x) * kThreads;
    const Index whole = all.units * all.unit, weights = all.rows * all.columns;
    for (Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; i < weights;
         i += step) {
        all.price(i);
        if (kWide && i % all.columns >= whole) {
            all.removed[i] = 0;
            all.finish(i);
        }
    }
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kLong)
    tally_kernel(Problem<T, kWide> all, Work work, int shift, int bits) {
    Carver carve(shared());
    unsigned* histogram = nullptr;
    carve.take(histogram, kBins);
    tally_row([&](Index u) { return all.key_at(place_of(all, u)); }, 0, work, shift, bits,
              histogram);
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) ties_kernel(Problem<T, kWide> all, Work work) {
    ties_of_segments([&](Index u) { return all.key_at(place_of(all, u)); }, 0, work);
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) finish_kernel(Problem<T, kWide> all, Work work) {
    Index changed = 0;
    const auto put = [&](Index u, Bits key, bool chosen) {
        const Index i = place_of(all, u);
        changed += all.remove(i, all.goes(key, chosen));
        for (Index k = 0; k < all.unit; ++k) all.finish(i + k);
    };
    mark_segments(put, [&](Index u) { return all.key_at(place_of(all, u)); }, 0, work);
    all.add_changed(changed);
}

// ---- launching ----------------------------------------------------------------------------------

template <typename T, bool kWide>
Info all_rows(const Problem<T, kWide>& all, const Context& context) {
    Work work{};
    const Index units = all.rows * all.units;
    if (units > 0) LOBS_TRY(allocate_work(&work, 1, units, context));
    const Index blocks = (all.rows * all.columns + kThreads - 1) / kThreads;
    LOBS_TRY(launch(context, "admm price", price_kernel<T, kWide>,
                    grid_of(blocks, Index{16} * processors(context)), kThreads, 0, all));
    if (units == 0) return {Status::ok, 0};
    const Grids grids = grids_of(work, context);
    const auto tally = [&](int shift, int bits) {
        return launch(context, "admm tally", tally_kernel<T, kWide>, grids.tallies, kLong,
                      static_cast<std::size_t>(kTallyBytes), all, work, shift, bits);
    };
    const auto ties = [&] {
        return launch(context, "admm ties", ties_kernel<T, kWide>, grids.segments, kThreads, 0, all,
                      work);
    };
    LOBS_TRY(find_cuts(work, all.count, kKeyBits<T, kWide>, context, tally, ties));
    return launch(context, "admm finish", finish_kernel<T, kWide>, grids.segments, kThreads, 0, all,
                  work);
}

template <typename T, bool kWide>
Info run(Index* changed, AnyMatrix p, AnyMatrix d, AnyMatrix x, unsigned char* removed,
         const unsigned char* state, const AdmmPlan& plan, const Context& context) {
    const Index span = plan.group > 0 ? plan.group : plan.unit;
    const Problem<T, kWide> all{static_cast<const T*>(p.data),
                                static_cast<const T*>(x.data),
                                static_cast<T*>(d.data),
                                removed,
                                state,
                                reinterpret_cast<Count*>(changed),
                                d.rows,
                                d.columns,
                                plan.group > 0 ? 1 : plan.unit,
                                plan.group > 0 ? d.columns / span * span : d.columns / span,
                                plan.count,
                                plan.group,
                                plan.per_group,
                                context.device->report};
    if (plan.group == 0 && !plan.by_row) return all_rows(all, context);
    const Index bytes = RowSpace::kBytes + up(all.units * Index{sizeof(Bits)}, 64);
    const bool fits = bytes <= shared_limit(context);
    const auto kernel = fits ? row_kernel<T, kWide, true> : row_kernel<T, kWide, false>;
    return launch(context, "admm rows", kernel, grid_of(d.rows, Index{16} * processors(context)),
                  kThreads, static_cast<std::size_t>(fits ? bytes : RowSpace::kBytes), all);
}

}  // namespace

Info admm_step(Index* changed, double*, AnyMatrix p, AnyMatrix d, AnyMatrix x,
               unsigned char* removed, const unsigned char* state, const AdmmPlan& plan,
               const Context& context) {
    if (d.rows == 0 || d.columns == 0) return {Status::ok, 0};
    const bool wide = plan.group == 0 && plan.unit > 1;
    if (d.dtype == Dtype::f64)
        return wide ? run<double, true>(changed, p, d, x, removed, state, plan, context)
                    : run<double, false>(changed, p, d, x, removed, state, plan, context);
    return wide ? run<float, true>(changed, p, d, x, removed, state, plan, context)
                : run<float, false>(changed, p, d, x, removed, state, plan, context);
}

}  // namespace lobs::cuda
