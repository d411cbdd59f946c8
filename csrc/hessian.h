// hessian.h: add a chunk of a layer's inputs to its second moment.
//
//   H[i, j] += sum_n t[n] * x[n, i] * x[n, j]                    for j <= i only
//
// Shapes    X (N, C), any strides.  t (N) or null (then 1).  H (D, D), rows contiguous, D = C, or
//           D = C + 1 with `ones`: then X counts as if a last column of ones followed it.
// Types     X in float64, float32, float16 or bfloat16; H in float64 or float32; t in float64,
//           finite, >= 0.
// On entry  The lower triangle of H holds a sum. The upper one is neither read nor written.
// On exit   The same, with the chunk added. Rows with t = 0 are not read: padding may hold
//           anything.
// Fails     not_finite: where = n * C + i of the first NaN or infinity in a row that counts; H is
//           untouched. interrupted: only some tiles of H have the chunk; discard H.
// Accuracy  float32 and 16-bit inputs: products and partial sums over at most 256 rows in float32
//           (the product of two 16-bit floats is exact there), then added to H in the type of H (on
//           a device: 128 rows, then a compensated float32 sum, then H). Everything is done in
//           float64 for float64 inputs, and where float32 could not hold the products (x, t, t * x
//           or t * x * x above 2^112, or all below 2^-100). The order of summation depends on N and
//           D alone, not on threads or strides.
// Cost      N * D * (D + 1) useful flops, half of those of a matrix product of the same shape.
//           The host reads X twice: to see that all is finite, and to pack it. A device reads it
//           once per 128 columns of H, from cache where 256 rows fit.
// Memory    On the host, scratch that all threads share: X twice, its columns rounded up to a
//           multiple of 192, but no more than fits into 16 MiB or, if that is more, 256 rows of it.
//           For D <= 576 and more than 4096 rows X is cut into up to 16 segments: 256 rows of each,
//           and for each a partial sum of D * D doubles.
// Source    Dong, Chen & Pan 2017, eq. 9 (their Psi, before the division by n).
#pragma once

#include "errors.h"
#include "types.h"

namespace lobs {

constexpr Index kHessianRows = 256;  // rows that are summed in float32 before the sum is widened

using HessianAccumulateFn = Info(AnyMatrix H, AnyMatrix X, const double* t, bool ones,
                                 const Context& context);

}  // namespace lobs
