// conjugate.h: a step of conjugate gradients for every row, each with its own support.
//
//   q = <p, h>_S    a = rr / q    w += a p    g -= a h on S    t = <g, g>_S    p = g + (t / rr) p
//
// per row, with h = p H from a matrix product, S the kept columns and rr = <g, g> from the last
// step. It solves H[S, S] w[S] = b[S] for all rows at once, at the price of one product R x C x C
// per step.
//
// Shapes    w, g, p, h (R, C), rows with any stride, columns contiguous.  removed (R, C) bytes, 0 or
//           1, contiguous: S is where it is 0.  rr (R) float64.
// Types     w, g, p and h in float64 or float32, the same for all.
// On entry  g and p are zero outside S. rr[r] = <g, g> of row r.
// On exit   w, g, p and rr are those of the next step, rr[r] = t; w outside S is untouched. h is not
//           modified. A row with rr = 0, or with q <= 0 or not finite (where H is not positive
//           definite to rounding), stays as it is, with rr[r] = 0.
// Fails     interrupted: some rows are done, others are not.
// Accuracy  a, t / rr and both sums are in float64, the sums in an order that depends on the backend
//           alone. Results do not depend on the number of threads.
// Cost      Memory-bound: w, g, p and h are read, w, g and p written, per row in cache: 7 values and
//           a byte per weight, against 2 C flops of the product.
// Source    Hestenes & Stiefel 1952; for pruned layers ALPS, Meng et al. 2024.
#pragma once

#include "errors.h"
#include "types.h"

namespace lobs {

using ConjugateStepFn = Info(AnyMatrix w, AnyMatrix g, AnyMatrix p, AnyMatrix h,
                             const unsigned char* removed, double* rr, const Context& context);

}  // namespace lobs
