// columns.cu: contract in columns.h.
//
// Nothing is computed ahead: a removal is a few kernels, enqueued without waiting for one another. One
// block of threads chooses the unit. Blocks of 32 columns compute its rows of A and B from all lines
// of V and P so far, whose depth is divided among their warps; the time is bound by reading these
// lines and W once for every four columns that go. A thread takes a unit of one column, and a block a
// wider one: its blocks of A and B, their factors and its cost, so that those of the unit that goes
// next are there already. Lines are not squeezed.
#include "columns.h"
#include "common.cuh"

namespace lobs::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTogether = 4;  // rows of A and of B that a pass computes

// What all layers share. Costs are those of layer * units + unit, times the layer's scale; -1 where
// a pivot is lost.
struct Shared {
    Index units, layers, sets;
    double* cost;
    int* width;
    Index* steps;  // (layers): lines of V and P
    Index* left;   // (sets): units that have not gone
    unsigned char *gone, *stay;
    Index* chosen;  // (1): the unit that goes, or -1
    int* stopped;   // (1)

    template <typename Carve>
    void carve(Carve& carve) {
        carve.take(cost, layers * units);
        carve.take(width, layers * units);
        carve.take(steps, layers);
        carve.take(left, sets);
        carve.take(gone, units);
        carve.take(stay, units);
        carve.take(chosen, 1);
        carve.take(stopped, 1);
    }
};

template <typename T>
struct Layer {
    const T *W, *A;
    const Index* start;
    double scale;
    Index R, C, W_stride, wide, number;
    T *V, *P;              // (C, C): lines
    T *a, *b, *U, *Y, *M;  // (units, wide, wide)

    template <typename Carve>
    void carve(Carve& carve, Index units) {
        const Index blocks = units * wide * wide;
        carve.take(V, C * C);
        carve.take(P, C * C);
        carve.take(a, blocks);
        carve.take(b, blocks);
        carve.take(U, blocks);
        carve.take(Y, blocks);
        carve.take(M, blocks);
    }
};

struct Counting {
    Index bytes = 0;

    template <typename T>
    void take(T*&, Index count) {
        bytes += up(count * static_cast<Index>(sizeof(T)), 64);
    }
};

template <typename T>
Layer<T> layer_of(const ColumnLayer& of, Index number) {
    Layer<T> layer{};
    layer.W = static_cast<const T*>(of.W.data);
    layer.A = static_cast<const T*>(of.A);
    layer.start = of.start;
    layer.scale = of.scale;
    layer.R = of.W.rows;
    layer.C = of.W.columns;
    layer.W_stride = of.W.row_stride;
    layer.wide = of.widest;
    layer.number = number;
    return layer;
}

// ---- the start ----------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) begin_kernel(Shared all, const Index* set_start) {
    for (Index i = threadIdx.x; i < all.units; i += kThreads) all.gone[i] = 0;
    for (Index i = threadIdx.x; i < all.layers; i += kThreads) all.steps[i] = 0;
    for (Index i = threadIdx.x; i < all.sets; i += kThreads)
        all.left[i] = set_start[i + 1] - set_start[i];
    if (threadIdx.x == 0) *all.chosen = -1, *all.stopped = 0;
}

__global__ void __launch_bounds__(kThreads) check_kernel(Shared all, std::uint64_t* report) {
    for (Index i = threadIdx.x; i < all.layers * all.units; i += kThreads)
        if (all.cost[i] < 0) {
            report_failure(report, Status::not_positive, i);
            *all.stopped = 1;
        }
}

// ---- the choice ---------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    choose_kernel(Shared all, ColumnsPlan plan, ColumnsOut out, Index place,
                  std::uint64_t* report) {
    Carver carve(shared());
    double* ranks = nullptr;
    Index* units = nullptr;
    carve.take(ranks, kThreads);
    carve.take(units, kThreads);
    const Index before = *all.chosen;
    for (Index u = threadIdx.x; u < all.units; u += kThreads) all.stay[u] = all.gone[u];
    for (Index m = threadIdx.x; before >= 0 && m < all.layers; m += kThreads)
        all.steps[m] += all.width[m * all.units + before];
    __syncthreads();
    for (Index s = threadIdx.x; s < all.sets; s += kThreads)
        for (Index i = plan.set_start[s]; all.left[s] == 1 && i < plan.set_start[s + 1]; ++i)
            all.stay[plan.set_unit[i]] = 1;
    __syncthreads();
    double lowest = infinity<double>();
    Index best = -1;
    for (Index u = threadIdx.x; u < all.units; u += kThreads) {
        if (all.stay[u] != 0) continue;
        double rank = plan.first[u];
        if (!(rank < 0)) {
            rank = 0;
            for (Index m = 0; m < all.layers; ++m) {
                const double cost = all.cost[m * all.units + u];
                rank += cost > 0 ? cost : 0.0;
            }
        }
        if (rank < lowest) lowest = rank, best = u;
    }
    ranks[threadIdx.x] = lowest;
    units[threadIdx.x] = best;
    __syncthreads();
    for (unsigned half = kThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            const unsigned other = threadIdx.x + half;
            const bool lower = ranks[other] < ranks[threadIdx.x] ||
                               (ranks[other] == ranks[threadIdx.x] && units[other] >= 0 &&
                                units[other] < units[threadIdx.x]);
            if (lower) ranks[threadIdx.x] = ranks[other], units[threadIdx.x] = units[other];
        }
        __syncthreads();
    }
    const Index u = units[0];
    const bool over = *all.stopped != 0 || u < 0;
    for (Index s = threadIdx.x; !over && s < all.sets; s += kThreads)
        for (Index i = plan.set_start[s]; i < plan.set_start[s + 1]; ++i)
            if (plan.set_unit[i] == u) --all.left[s];
    __syncthreads();
    if (threadIdx.x != 0) return;
    *all.chosen = -1;
    if (over) {
        *all.stopped = 1;
        return;
    }
    double cost = 0;
    for (Index m = 0; m < all.layers; ++m) {
        const double own = all.cost[m * all.units + u];
        if (own < 0) {
            report_failure(report, Status::not_positive, m * all.units + u);
            *all.stopped = 1;
            return;
        }
        cost += own;
    }
    *all.chosen = u;
    all.gone[u] = 1;
    out.order[place] = static_cast<std::int32_t>(u);
    out.cost[place] = cost;
    *out.count = place + 1;
}

// ---- rows of A and B, which become lines of V and P ---------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads) rows_kernel(Shared all, Layer<T> layer) {
    Carver carve(shared());
    T* parts = nullptr;  // (warps, rows, A or B, lanes)
    carve.take(parts, kWarps * kTogether * 2 * kWarp);
    const Index u = *all.chosen;
    if (u < 0) return;
    const Index C = layer.C, steps = all.steps[layer.number], from = layer.start[u];
    const int width = static_cast<int>(layer.start[u + 1] - from);
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const Index j = static_cast<Index>(blockIdx.x) * kWarp + lane;
    const Index column = j < C ? j : C - 1;
    for (int first = 0; first < width; first += kTogether) {
        Index s[kTogether];
        T a[kTogether] = {}, b[kTogether] = {};
#pragma unroll
        for (int i = 0; i < kTogether; ++i) s[i] = from + (first + i < width ? first + i : first);
        for (Index k = warp; k < steps; k += kWarps) {
            const T *V = layer.V + k * C, *P = layer.P + k * C;
            const T v = V[column], p = P[column];
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                a[i] = fused(V[s[i]], v, a[i]);
                b[i] = fused(P[s[i]], v, b[i]);
                b[i] = fused(V[s[i]], p, b[i]);
            }
        }
        for (Index r = warp; r < layer.R; r += kWarps) {
            const T* w = layer.W + r * layer.W_stride;
            const T own = -w[column];
#pragma unroll
            for (int i = 0; i < kTogether; ++i) b[i] = fused(w[s[i]], own, b[i]);
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            T* part = parts + (warp * kTogether + i) * 2 * kWarp + lane;
            part[0] = a[i];
            part[kWarp] = b[i];
        }
        __syncthreads();
        static_assert(kWarps == 2 * kTogether, "a warp sums the parts of one row of A or B");
        const int row = warp / 2, which = warp % 2;
        T sum = 0;
        for (int part = 0; part < kWarps; ++part)
            sum += parts[((part * kTogether + row) * 2 + which) * kWarp + lane];
        if (first + row < width && j < C) {
            const T begun = which == 0 ? layer.A[(from + first + row) * C + j] : T(0);
            (which == 0 ? layer.V : layer.P)[(steps + first + row) * C + j] = begun - sum;
        }
        __syncthreads();
    }
    if (warp != 0 || j >= C) return;  // no barrier follows
    const T* U = layer.U + u * layer.wide * layer.wide;
    const T* M = layer.M + u * layer.wide * layer.wide;
    T *V = layer.V + steps * C + j, *P = layer.P + steps * C + j;
    for (int i = 0; i < width; ++i) {
        T v = V[i * C], p = P[i * C];
        for (int k = 0; k < i; ++k) {
            v = fused(-U[k * layer.wide + i], V[k * C], v);
            p = fused(-U[k * layer.wide + i], P[k * C], p);
        }
        V[i * C] = v / U[i * layer.wide + i];
        P[i * C] = p / U[i * layer.wide + i];
    }
    for (int i = 0; i < width; ++i) {
        T sum = 0;
        for (int k = 0; k < width; ++k) sum = fused(M[k * layer.wide + i], V[k * C], sum);
        P[i * C] = fused(T(-0.5), sum, P[i * C]);
    }
}

// ---- blocks of A and B, and costs ---------------------------------------------------------------

// An entry of the blocks of a unit that begins at column `from`: as it was at first, or after the
// latest removal, whose lines are those from `steps` on.
template <typename T>
__device__ __forceinline__ void entry(const Layer<T>& layer, Index from, int i, int j, bool begin,
                                      Index steps, int lines, T* a, T* b) {
    T own = 0, both = 0;
    if (begin) {
        for (Index r = 0; r < layer.R; ++r) {
            const T* w = layer.W + r * layer.W_stride + from;
            both = fused(w[i], w[j], both);
        }
        *a = layer.A[(from + i) * layer.C + from + j];
        *b = both;
        return;
    }
    for (int k = 0; k < lines; ++k) {
        const T* V = layer.V + (steps + k) * layer.C + from;
        const T* P = layer.P + (steps + k) * layer.C + from;
        own = fused(V[i], V[j], own);
        both = fused(P[i], V[j], fused(V[i], P[j], both));
    }
    *a -= own;
    *b -= both;
}

// Units of one column: a thread each.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    single_kernel(Shared all, Layer<T> layer, T floor, bool begin) {
    const Index chosen = *all.chosen, step = static_cast<Index>(gridDim.x) * kThreads;
    if (!begin && chosen < 0) return;
    const Index steps = all.steps[layer.number];
    const int lines = begin ? 0 : static_cast<int>(layer.start[chosen + 1] - layer.start[chosen]);
    for (Index u = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; u < all.units;
         u += step) {
        const Index from = layer.start[u], at = layer.number * all.units + u;
        const bool there = layer.start[u + 1] > from;
        if (begin) all.width[at] = there ? 1 : 0;
        if (!there && begin) all.cost[at] = 0;
        if (!there || all.gone[u] != 0) continue;
        entry(layer, from, 0, 0, begin, steps, lines, layer.a + u, layer.b + u);
        const T a = layer.a[u], cost = layer.b[u] / a;
        const bool good = a > floor * layer.A[from * layer.C + from];
        layer.U[u] = root(a);
        layer.M[u] = cost;
        all.cost[at] = !good ? -1.0 : cost > 0 ? layer.scale * static_cast<double>(cost) : 0.0;
    }
}

// Wider units: a block of threads each.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    block_kernel(Shared all, Layer<T> layer, T floor, bool begin) {
    const Index chosen = *all.chosen;
    if (!begin && chosen < 0) return;
    const Index steps = all.steps[layer.number], wide = layer.wide;
    const int lines = begin ? 0 : static_cast<int>(layer.start[chosen + 1] - layer.start[chosen]);
    const int t = static_cast<int>(threadIdx.x), threads = static_cast<int>(kThreads);
    for (Index u = blockIdx.x; u < all.units; u += gridDim.x) {
        const Index from = layer.start[u], at = layer.number * all.units + u;
        const int width = static_cast<int>(layer.start[u + 1] - from);
        if (begin && t == 0) all.width[at] = width, all.cost[at] = 0;
        if (width == 0 || all.gone[u] != 0) continue;
        T *a = layer.a + u * wide * wide, *b = layer.b + u * wide * wide;
        T *U = layer.U + u * wide * wide, *Y = layer.Y + u * wide * wide;
        T* M = layer.M + u * wide * wide;
        for (int n = t; n < width * width; n += threads) {
            const int i = n / width, j = n % width;
            if (i <= j) {
                entry(layer, from, i, j, begin, steps, lines, a + i * wide + j, b + i * wide + j);
                U[i * wide + j] = a[i * wide + j];
            }
        }
        __syncthreads();
        bool good = true;
        for (int j = 0; j < width && good; ++j) {
            const T pivot = U[j * wide + j], first = layer.A[(from + j) * layer.C + from + j];
            good = pivot > floor * first;
            const T scale = root(pivot);
            __syncthreads();  // all have read the pivot
            for (int l = j + t; l < width; l += threads) U[j * wide + l] /= scale;
            __syncthreads();
            const int rest = width - j - 1;
            for (int n = t; n < rest * rest; n += threads) {
                const int i = j + 1 + n / rest, l = j + 1 + n % rest;
                if (i <= l)
                    U[i * wide + l] = fused(-U[j * wide + i], U[j * wide + l], U[i * wide + l]);
            }
            __syncthreads();
        }
        if (!good) {
            if (t == 0) all.cost[at] = -1;
            continue;
        }
        for (int j = t; j < width; j += threads)
            for (int i = 0; i < width; ++i) {
                T sum = i <= j ? b[i * wide + j] : b[j * wide + i];
                for (int k = 0; k < i; ++k) sum = fused(-U[k * wide + i], Y[k * wide + j], sum);
                Y[i * wide + j] = sum / U[i * wide + i];
            }
        __syncthreads();
        for (int j = t; j < width; j += threads)
            for (int i = 0; i < width; ++i) {
                T sum = Y[j * wide + i];
                for (int k = 0; k < i; ++k) sum = fused(-U[k * wide + i], M[k * wide + j], sum);
                M[i * wide + j] = sum / U[i * wide + i];
            }
        __syncthreads();
        if (t != 0) continue;
        T cost = 0;
        for (int i = 0; i < width; ++i) cost += M[i * wide + i];
        all.cost[at] = cost > 0 ? layer.scale * static_cast<double>(cost) : 0.0;
    }
}

// ---- launching ----------------------------------------------------------------------------------

template <typename T>
Info blocks(const Shared& all, const Layer<T>& layer, T floor, bool begin, const Context& context) {
    const Index many = Index{16} * processors(context);
    if (layer.wide <= 1)
        return launch(context, "columns single", single_kernel<T>,
                      dim3(static_cast<unsigned>(least(up(all.units, kThreads) / kThreads, many))),
                      kThreads, 0, all, layer, floor, begin);
    return launch(context, "columns blocks", block_kernel<T>,
                  dim3(static_cast<unsigned>(least(all.units, many))), kThreads, 0, all, layer,
                  floor, begin);
}

template <typename T>
Info run(const ColumnsOut& out, const ColumnLayer* layers, Index count, const ColumnsPlan& plan,
         void* memory, const Context& context) {
    Carver carver(static_cast<unsigned char*>(memory));
    Shared all{};
    all.units = plan.units, all.layers = count, all.sets = plan.sets;
    all.carve(carver);
    const T floor = static_cast<T>(plan.floor);
    std::uint64_t* const report = context.device->report;
    unsigned char* rest = nullptr;
    carver.take(rest, 0);
    if (plan.done == 0) {
        LOBS_TRY(launch(context, "columns begin", begin_kernel, dim3(1), kThreads, 0, all,
                        plan.set_start));
        Carver each(rest);
        for (Index m = 0; m < count; ++m) {
            Layer<T> layer = layer_of<T>(layers[m], m);
            layer.carve(each, plan.units);
            LOBS_TRY(blocks(all, layer, floor, true, context));
        }
        LOBS_TRY(launch(context, "columns check", check_kernel, dim3(1), kThreads, 0, all, report));
    }
    for (Index done = plan.done; done < plan.limit; ++done) {
        const std::size_t ranks = kThreads * (sizeof(double) + sizeof(Index));
        LOBS_TRY(launch(context, "columns choose", choose_kernel, dim3(1), kThreads, ranks, all,
                        plan, out, done, report));
        Carver each(rest);
        for (Index m = 0; m < count; ++m) {
            Layer<T> layer = layer_of<T>(layers[m], m);
            layer.carve(each, plan.units);
            if (layer.C == 0) continue;
            const std::size_t parts = kWarps * kTogether * 2 * kWarp * sizeof(T);
            LOBS_TRY(launch(context, "columns rows", rows_kernel<T>,
                            dim3(static_cast<unsigned>(up(layer.C, kWarp) / kWarp)), kThreads,
                            parts, all, layer));
            LOBS_TRY(blocks(all, layer, floor, false, context));
        }
    }
    return {Status::ok, 0};
}

template <typename T>
Index bytes(const ColumnLayer* layers, Index count, Index units, Index sets) {
    Counting counted;
    Shared all{};
    all.units = units, all.layers = count, all.sets = sets;
    all.carve(counted);
    for (Index m = 0; m < count; ++m) {
        Layer<T> layer = layer_of<T>(layers[m], m);
        layer.carve(counted, units);
    }
    return counted.bytes;
}

}  // namespace

Info columns_trace(const ColumnsOut& out, const ColumnLayer* layers, Index count,
                   const ColumnsPlan& plan, void* memory, const Context& context) {
    if (plan.units == 0) return {Status::ok, 0};
    return layers[0].W.dtype == Dtype::f64 ? run<double>(out, layers, count, plan, memory, context)
                                           : run<float>(out, layers, count, plan, memory, context);
}

Index columns_bytes(const ColumnLayer* layers, Index count, Index units, Index sets) {
    return layers[0].W.dtype == Dtype::f64 ? bytes<double>(layers, count, units, sets)
                                           : bytes<float>(layers, count, units, sets);
}

}  // namespace lobs::cuda
