// hessian.h: accumulate a layer's second moment from a chunk of its inputs.
//
//   H[i, j] += sum_n t[n] * x[n, i] * x[n, j]                    for j <= i only
//
// Shapes    X (N, C), any strides.  t (N) or absent (then 1).  H (D, D), rows contiguous, D = C, or
//           D = C + 1 with `ones`: then X is read as if a last column of ones followed it.
// Types     X in float64, float32, float16, bfloat16; H in float64 or float32; t in float64,
//           finite, >= 0.
// On entry  The lower triangle of H holds a sum. The upper one is neither read nor written.
// On exit   The same, with the chunk added. Rows with t = 0 are not read at all (padding may hold
//           anything).
// Fails     not_finite: where = n * C + i of the first NaN or infinity in a row that counts; H is
//           untouched. interrupted: H holds some tiles with the chunk and some without; throw it
//           away.
// Accuracy  float32 and 16-bit inputs: products and partial sums over at most 256 rows in float32
//           (the product of two 16-bit floats is exact there), then added into H in H's own type
//           (a device: 128 rows, then a compensated float32 sum, then H). Where float32 could not
//           hold the products (x, t, t * x or t * x * x above 2^112 or all below 2^-100), and for
//           float64 inputs, everything is done in float64. The order of summation depends on N and D
//           alone: not on threads, not on strides.
// Cost      N * D * (D + 1) useful flops, half of what a matrix product of the same shape needs.
//           Reads X once per 192 columns of H (a device: 128), from cache where 256 rows fit.
// Memory    On the host, scratch per thread: 2 * 192 * 256 elements (float32: 384 KiB). For D <= 576 and more
//           than 4096 rows also up to 16 partial sums of D * D doubles.
// Source    Dong, Chen & Pan 2017, eq. 9 (their Psi, before the division by n).
#pragma once

#include "errors.h"
#include "types.h"

namespace lobs {

constexpr Index kHessianRows = 256;  // rows summed in float32 before they are promoted

using HessianAccumulateFn = Info(AnyMatrix H, AnyMatrix X, const double* t, bool ones,
                                 const Context& context);

}  // namespace lobs
