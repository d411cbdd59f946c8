// conjugate.cu: contract in conjugate.h.
//
// A block of threads takes a row, and a thread the columns t, t + kThreads, ... of it in all three
// passes, so that no thread reads what another has written.
#include "selection.cuh"

namespace lobs::cuda {
namespace {

template <typename T>
struct Rows {
    T *w, *g, *p;
    const T* h;
    const unsigned char* removed;
    double* rr;
    Index rows, columns, w_stride, g_stride, p_stride, h_stride;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) step_kernel(Rows<T> all) {
    Carver carve(shared());
    double* warps = nullptr;
    carve.take(warps, kThreads / kWarp);
    const Index C = all.columns, t = threadIdx.x;
    for (Index r = blockIdx.x; r < all.rows; r += gridDim.x) {
        T *w = all.w + r * all.w_stride, *g = all.g + r * all.g_stride;
        T* p = all.p + r * all.p_stride;
        const T* h = all.h + r * all.h_stride;
        const unsigned char* removed = all.removed + r * C;
        const double rr = all.rr[r];
        double own = 0, q = 0, next = 0;
        for (Index j = t; j < C; j += kThreads)
            if (removed[j] == 0)
                own = fused(static_cast<double>(p[j]), static_cast<double>(h[j]), own);
        sum_before_in_block(own, warps, &q);  // every thread has read rr
        if (rr == 0 || !(q > 0) || !finite(q)) {
            if (t == 0) all.rr[r] = 0;
            continue;
        }
        const T a = static_cast<T>(rr / q);
        own = 0;
        for (Index j = t; j < C; j += kThreads) {
            if (removed[j] != 0) continue;
            w[j] = fused(a, p[j], w[j]);
            g[j] = fused(-a, h[j], g[j]);
            own = fused(static_cast<double>(g[j]), static_cast<double>(g[j]), own);
        }
        sum_before_in_block(own, warps, &next);
        const T b = static_cast<T>(next / rr);
        for (Index j = t; j < C; j += kThreads)
            if (removed[j] == 0) p[j] = fused(b, p[j], g[j]);
        if (t == 0) all.rr[r] = next;
    }
}

template <typename T>
Info run(AnyMatrix w, AnyMatrix g, AnyMatrix p, AnyMatrix h, const unsigned char* removed,
         double* rr, const Context& context) {
    const Rows<T> rows{static_cast<T*>(w.data),
                       static_cast<T*>(g.data),
                       static_cast<T*>(p.data),
                       static_cast<const T*>(h.data),
                       removed,
                       rr,
                       w.rows,
                       w.columns,
                       w.row_stride,
                       g.row_stride,
                       p.row_stride,
                       h.row_stride};
    return launch(context, "conjugate step", step_kernel<T>,
                  grid_of(w.rows, Index{16} * processors(context)), kThreads,
                  kThreads / kWarp * sizeof(double), rows);
}

}  // namespace

Info conjugate_step(AnyMatrix w, AnyMatrix g, AnyMatrix p, AnyMatrix h,
                    const unsigned char* removed, double* rr, const Context& context) {
    if (w.rows == 0) return {Status::ok, 0};
    return w.dtype == Dtype::f64 ? run<double>(w, g, p, h, removed, rr, context)
                                 : run<float>(w, g, p, h, removed, rr, context);
}

}  // namespace lobs::cuda
