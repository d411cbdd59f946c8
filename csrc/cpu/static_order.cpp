// static_order.cpp: contract in static_order.h.
//
// One row is one item of work. A removal is an axpy of one row of A, which only the last-level
// cache holds, onto w, which L1 holds. Eight removals are done together: their coefficients need
// only the 28 entries A[q, q'] among themselves. Then one pass over w applies all eight, so that w
// is read and written once for eight rows of A. The order is static, so the rows of the next group
// are known, and the hardware prefetches them as eight streams.
#include "static_order.h"

#include "parallel.h"
#include "vector.h"

namespace lobs::LOBS_LEVEL {
namespace {

constexpr int kGroup = 8;

template <typename T>
void apply(T* w, Index C, const T* const (&a)[kGroup], const T (&c)[kGroup]) {
    Index j = 0;
    for (; j + kLanes<T> <= C; j += kLanes<T>) {
        Vector<T> sum = load(w + j);
#pragma GCC unroll 8
        for (int g = 0; g < kGroup; ++g) sum += c[g] * load(a[g] + j);
        store(w + j, sum);
    }
    for (; j < C; ++j) {
        T sum = w[j];
        for (int g = 0; g < kGroup; ++g) sum += c[g] * a[g][j];
        w[j] = sum;
    }
}

template <typename T>
void prune_row(T* w, const T* A, Index C, const std::int32_t* order, Index count) {
    for (Index p = 0; p < count; p += kGroup) {
        const int group = static_cast<int>(count - p < kGroup ? count - p : kGroup);
        const T* a[kGroup];
        T c[kGroup];
        for (int g = 0; g < kGroup; ++g) {
            const Index q = order[p + (g < group ? g : 0)];
            a[g] = A + q * C;
            c[g] = 0;  // beyond the last removal: adds zero times a row that is in use anyway
        }
        for (int g = 0; g < group; ++g) {
            const Index q = order[p + g];
            T now = w[q];
            for (int h = 0; h < g; ++h) now += c[h] * a[h][q];
            c[g] = -now / a[g][q];
        }
        apply(w, C, a, c);
    }
    for (Index p = 0; p < count; ++p) w[order[p]] = 0;
}

// The first position in the order of one row that cannot be carried out. `stamp` (C) holds where
// each column was seen last.
template <typename T>
Info check_row(const T* A, Index C, const std::int32_t* order, Index first, Index last,
               Index* stamp) {
    for (Index p = first; p < last; ++p) {
        const Index q = order[p];
        if (q < 0 || q >= C) return {Status::bad_order, p};
        if (stamp[q] > first) return {Status::bad_order, p};
        stamp[q] = p + 1;
        if (!(A[q * C + q] > 0)) return {Status::not_positive, p};
    }
    return {Status::ok, 0};
}

template <typename T>
Info launch(AnyMatrix W, const T* A, const std::int32_t* order, const Index* start,
            const Context& context) {
    const Index R = W.rows, C = W.columns;
    Scratch stamp(1, C * static_cast<Index>(sizeof(Index)));
    if (!stamp.ok()) return {Status::out_of_memory, 0};
    std::memset(stamp.of<Index>(0), 0, static_cast<std::size_t>(C) * sizeof(Index));
    for (Index r = 0; r < R; ++r) {
        const Info info = check_row(A, C, order, start[r], start[r + 1], stamp.of<Index>(0));
        if (info.status != Status::ok) return info;
    }
    auto body = [&](Index r, int) {
        prune_row(static_cast<T*>(W.data) + r * W.row_stride, A, C, order + start[r],
                  start[r + 1] - start[r]);
    };
    return {parallel_items(R, context, body) ? Status::ok : Status::interrupted, 0};
}

}  // namespace

Info static_order_prune(AnyMatrix W, const void* A, const std::int32_t* order, const Index* start,
                        const Context& context) {
    switch (W.dtype) {
        case Dtype::f64:
            return launch(W, static_cast<const double*>(A), order, start, context);
        case Dtype::f32:
            return launch(W, static_cast<const float*>(A), order, start, context);
        default:
            return {Status::unsupported, 0};
    }
}

}  // namespace lobs::LOBS_LEVEL
