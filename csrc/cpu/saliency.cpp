// saliency.cpp: contract in saliency.h.
//
// Two passes over a strip of one row, which stays in L1. The first finds the smallest value
// (branch-free, vectorised). The second, only if that beats the best of the row, finds its first
// position. Strict comparison keeps the lowest column on a tie.
#include "saliency.h"

#include "parallel.h"
#include "vector.h"

namespace lobs::LOBS_LEVEL {
namespace {

constexpr Index kStrip = 512;

template <typename T>
struct Row {
    const T* w;
    const T* d;
    const unsigned char* live;
};

template <typename T>
LOBS_INLINE bool wrong(const Row<T>& row, Index q) {
    const bool positive = row.d[q] > 0 && finite_bits(magnitude_bits(row.d[q]));
    return row.live[q] != 0 && !(positive && finite_bits(magnitude_bits(row.w[q])));
}

template <typename T>
struct Seen {  // of one strip
    T smallest;
    bool fault, alive;
};

// Puts the costs of one strip into `cost`, infinite where not live. Explicit vectors, because
// compilers do not vectorise comparisons of floats next to bytes (4 M weights: 11 ms scalar, 3 ms
// with vectors).
template <typename T>
Seen<T> price(const Row<T>& row, Index count, T* cost) {
    constexpr T kInfinity = static_cast<T>(__builtin_inf());
    const Vector<T> infinity = Vector<T>{} + kInfinity;
    Vector<T> smallest = infinity;
    Mask<T> fault = {}, alive = {};
    Index q = 0;
    for (; q + kLanes<T> <= count; q += kLanes<T>) {
        const Vector<T> w = load(row.w + q), d = load(row.d + q);
        const Mask<T> live = widen<T>(row.live + q) != 0;
        const Vector<T> s = saliency(w, d);
        const Vector<T> c = live ? s : infinity;
        store(cost + q, c);
        smallest = c < smallest ? c : smallest;
        fault |= live & ~((d > 0) & (d < infinity) & (w < infinity) & (w > -infinity));
        alive |= live;
    }
    Seen<T> seen{kInfinity, false, false};
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        seen.smallest = smallest[lane] < seen.smallest ? smallest[lane] : seen.smallest;
        seen.fault = seen.fault || fault[lane] != 0;
        seen.alive = seen.alive || alive[lane] != 0;
    }
    for (; q < count; ++q) {
        cost[q] = row.live[q] != 0 ? saliency(row.w[q], row.d[q]) : kInfinity;
        seen.smallest = cost[q] < seen.smallest ? cost[q] : seen.smallest;
        seen.fault = seen.fault || wrong(row, q);
        seen.alive = seen.alive || row.live[q] != 0;
    }
    return seen;
}

template <typename T>
void search(const Row<T>& row, Index C, Index* column, T* value, Index* fault) {
    T best = static_cast<T>(__builtin_inf());
    Index where = -1;
    alignas(64) T cost[kStrip];
    for (Index first = 0; first < C; first += kStrip) {
        const Index count = C - first < kStrip ? C - first : kStrip;
        const Row<T> strip{row.w + first, row.d + first, row.live + first};
        const Seen<T> seen = price(strip, count, cost);
        if (seen.fault) {
            Index q = 0;
            while (!wrong(strip, q)) ++q;
            *fault = first + q;
            return;
        }
        if (!seen.alive || (where >= 0 && !(seen.smallest < best))) continue;
        Index q = 0;  // a live cost may have overflowed to infinity, so `live` is tested as well
        while (strip.live[q] == 0 || cost[q] != seen.smallest) ++q;
        best = seen.smallest;
        where = first + q;
    }
    *column = where;
    *value = best;
}

template <typename T>
Info launch(Index* column, void* value, AnyMatrix W, AnyMatrix diag,
            Matrix<const unsigned char> live, const Context& context) {
    const Index R = W.rows, C = W.columns;
    Scratch faults(1, R * static_cast<Index>(sizeof(Index)));
    if (!faults.ok()) return {Status::out_of_memory, 0};
    Index* fault = faults.of<Index>(0);
    auto body = [&](Index r, int) {
        const Row<T> row{static_cast<const T*>(W.data) + r * W.row_stride,
                         static_cast<const T*>(diag.data) + r * diag.row_stride,
                         live.data + r * live.row_stride};
        fault[r] = -1;
        search(row, C, column + r, static_cast<T*>(value) + r, fault + r);
    };
    if (!parallel_items(R, context, body)) return {Status::interrupted, 0};
    for (Index r = 0; r < R; ++r) {
        if (fault[r] < 0) continue;
        const T d = static_cast<const T*>(diag.data)[r * diag.row_stride + fault[r]];
        return {d > 0 && finite_bits(magnitude_bits(d)) ? Status::not_finite : Status::not_positive,
                r * C + fault[r]};
    }
    return {Status::ok, 0};
}

}  // namespace

Info saliency_argmin(Index* column, void* value, AnyMatrix W, AnyMatrix diag,
                     Matrix<const unsigned char> live, const Context& context) {
    switch (W.dtype) {
        case Dtype::f64:
            return launch<double>(column, value, W, diag, live, context);
        case Dtype::f32:
            return launch<float>(column, value, W, diag, live, context);
        default:
            return {Status::unsupported, 0};
    }
}

}  // namespace lobs::LOBS_LEVEL
