// saliency.cu: contract in saliency.h.
//
// A warp takes a row. Its lanes walk the columns, then agree on the lowest value and, among equals,
// on the lowest column.
#include "common.cuh"

namespace lobs::cuda {
namespace {

constexpr unsigned kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    argmin_kernel(Index* column, T* value, Matrix<const T> W, Matrix<const T> diag,
                  Matrix<const unsigned char> live, std::uint64_t* report) {
    const unsigned lane = threadIdx.x % kWarp;
    const Index first = static_cast<Index>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    const Index step = static_cast<Index>(gridDim.x) * (kThreads / kWarp);
    for (Index r = first; r < W.rows; r += step) {
        T lowest = infinity<T>();
        Index best = -1;
        for (Index q = lane; q < W.columns; q += kWarp) {
            if (live.data[r * live.row_stride + q * live.column_stride] == 0) continue;
            const T w = W.data[r * W.row_stride + q * W.column_stride];
            const T d = diag.data[r * diag.row_stride + q * diag.column_stride];
            if (!(d > 0) || !finite(d))
                report_failure(report, Status::not_positive, r * W.columns + q);
            else if (!finite(w))
                report_failure(report, Status::not_finite, r * W.columns + q);
            const T s = saliency(w, d);
            if (best < 0 || s < lowest) lowest = s, best = q;
        }
        for (int by = kWarp / 2; by > 0; by /= 2) {
            const T other = __shfl_xor_sync(kAllLanes, lowest, by);
            const Index at = __shfl_xor_sync(kAllLanes, best, by);
            if (at >= 0 && (best < 0 || other < lowest || (other == lowest && at < best)))
                lowest = other, best = at;
        }
        if (lane == 0) column[r] = best, value[r] = lowest;
    }
}

template <typename T>
Info run(Index* column, void* value, AnyMatrix W, AnyMatrix diag, Matrix<const unsigned char> live,
         const Context& context) {
    const Matrix<const T> w{static_cast<const T*>(W.data), W.rows, W.columns, W.row_stride,
                            W.column_stride};
    const Matrix<const T> d{static_cast<const T*>(diag.data), diag.rows, diag.columns,
                            diag.row_stride, diag.column_stride};
    const Index blocks = (W.rows + kThreads / kWarp - 1) / (kThreads / kWarp);
    const auto grid = static_cast<unsigned>(least(blocks, Index{16} * processors(context)));
    return launch(context, "saliency argmin", argmin_kernel<T>, dim3(grid), kThreads, 0, column,
                  static_cast<T*>(value), w, d, live, context.device->report);
}

}  // namespace

Info saliency_argmin(Index* column, void* value, AnyMatrix W, AnyMatrix diag,
                     Matrix<const unsigned char> live, const Context& context) {
    if (W.rows == 0) return {Status::ok, 0};
    return W.dtype == Dtype::f64 ? run<double>(column, value, W, diag, live, context)
                                 : run<float>(column, value, W, diag, live, context);
}

}  // namespace lobs::cuda
