// conjugate.cpp: contract in conjugate.h.
//
// A row is one item of work: a pass for q, one for w, g and t, and one for p. After the first, g
// and p of the row are in cache. h comes through a strip that is zero outside the support.
#include "conjugate.h"

#include "parallel.h"
#include "vector.h"

namespace lobs::LOBS_LEVEL {
namespace {

constexpr Index kStrip = 512;
constexpr int kLines = 4;  // vectors in flight, so that additions do not wait for one another

LOBS_INLINE Vector<double> in_double(const double* from) { return load(from); }
LOBS_INLINE Vector<double> in_double(const float* from) {
    typedef float Narrow __attribute__((vector_size(kVectorBytes / 2), aligned(4), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Narrow*>(from), Vector<double>);
}

// A sum of products in float64. Column j of a strip goes to lane j % (kLines * lanes), those after
// the last whole vectors to a sum of their own.
class Sum {
   public:
    template <typename T>
    LOBS_INLINE void add(const T* a, const T* b, Index count) {
        constexpr Index kLane = kLanes<double>;
        Index j = 0;
        for (; j + kLines * kLane <= count; j += kLines * kLane)
#pragma GCC unroll 4
            for (int l = 0; l < kLines; ++l)
                line_[l] += in_double(a + j + l * kLane) * in_double(b + j + l * kLane);
        for (; j < count; ++j) rest_ += static_cast<double>(a[j]) * static_cast<double>(b[j]);
    }

    LOBS_INLINE double value() const {
        const Vector<double> lines = (line_[0] + line_[1]) + (line_[2] + line_[3]);
        double sum = rest_;
        for (int l = 0; l < kLanes<double>; ++l) sum += lines[l];
        return sum;
    }

   private:
    Vector<double> line_[kLines] = {};
    double rest_ = 0;
};

// `kept` becomes h where a weight is kept, else 0.
template <typename T>
LOBS_INLINE void keep(T* kept, const T* h, const unsigned char* removed, Index count) {
    Index j = 0;
    for (; j + kLanes<T> <= count; j += kLanes<T>) {
        const Mask<T> gone = widen<T>(removed + j) != 0;
        store(kept + j, gone ? Vector<T>{} : load(h + j));
    }
    for (; j < count; ++j) kept[j] = removed[j] != 0 ? T(0) : h[j];
}

// y += a x
template <typename T>
LOBS_INLINE void add_scaled(T* y, T a, const T* x, Index count) {
    Index j = 0;
    for (; j + kLanes<T> <= count; j += kLanes<T>) store(y + j, load(y + j) + a * load(x + j));
    for (; j < count; ++j) y[j] += a * x[j];
}

template <typename T>
void step_row(T* w, T* g, T* p, const T* h, const unsigned char* removed, double* rr, Index C) {
    if (*rr == 0) return;
    alignas(64) T kept[kStrip];
    Sum q;
    for (Index first = 0; first < C; first += kStrip) {
        const Index count = least(kStrip, C - first);
        keep(kept, h + first, removed + first, count);
        q.add(p + first, kept, count);
    }
    const double curvature = q.value();
    if (!(curvature > 0) || !finite_bits(magnitude_bits(curvature))) {
        *rr = 0;
        return;
    }
    const T a = static_cast<T>(*rr / curvature);
    Sum t;
    for (Index first = 0; first < C; first += kStrip) {
        const Index count = least(kStrip, C - first);
        keep(kept, h + first, removed + first, count);
        add_scaled(w + first, a, p + first, count);
        add_scaled(g + first, static_cast<T>(-a), kept, count);
        t.add(g + first, g + first, count);
    }
    const T b = static_cast<T>(t.value() / *rr);
    Index j = 0;
    for (; j + kLanes<T> <= C; j += kLanes<T>) store(p + j, load(g + j) + b * load(p + j));
    for (; j < C; ++j) p[j] = g[j] + b * p[j];
    *rr = t.value();
}

template <typename T>
Info launch(AnyMatrix w, AnyMatrix g, AnyMatrix p, AnyMatrix h, const unsigned char* removed,
            double* rr, const Context& context) {
    auto body = [&](Index r, int) {
        step_row(static_cast<T*>(w.data) + r * w.row_stride,
                 static_cast<T*>(g.data) + r * g.row_stride,
                 static_cast<T*>(p.data) + r * p.row_stride,
                 static_cast<const T*>(h.data) + r * h.row_stride, removed + r * w.columns, rr + r,
                 w.columns);
    };
    return {parallel_items(w.rows, context, body) ? Status::ok : Status::interrupted, 0};
}

}  // namespace

Info conjugate_step(AnyMatrix w, AnyMatrix g, AnyMatrix p, AnyMatrix h,
                    const unsigned char* removed, double* rr, const Context& context) {
    switch (w.dtype) {
        case Dtype::f64:
            return launch<double>(w, g, p, h, removed, rr, context);
        case Dtype::f32:
            return launch<float>(w, g, p, h, removed, rr, context);
        default:
            return {Status::unsupported, 0};
    }
}

}  // namespace lobs::LOBS_LEVEL
