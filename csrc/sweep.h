// sweep.h: one block of columns of SparseGPT's sweep: choose, remove, and repair to the right
// within the block.
//
//   for j = 0 .. B - 1:  e_j = w_j / U_jj where column j goes, else 0
//                        w[j:] -= e_j U[j, j:]        with the current w;  removed w_j = +0
//
// The caller repairs the columns to the right of the block: W[:, right] -= E U[block, right].
//
// Shapes    W (R, B), rows with any stride, columns contiguous: the block of the weights.  U (B,
//           B), rows with any stride, columns contiguous: the diagonal block of the upper factor
//           U^T U = A.  gone (R, B) contiguous bytes.  E (R, B), rows with any stride, columns
//           contiguous.
// Choice    group = 0: gone is an input, 1 where a weight goes. group = M > 0: B is a multiple of
//           M, and the `per_group` lowest w_j^2 / U_jj^2 of columns M*g .. M*g + M - 1 go, by the
//           weights as they are when the sweep reaches the group. On entry gone holds values of
//           WeightState: goes_first columns go before all others and count; columns that stay do
//           not go. On exit it is 1 where a weight goes, else 0. Ties go to the lowest column.
// Types     W, U and E in float64 or float32, the same for all.
// On exit   W, gone and E as above; E is +0 where a weight stays.
// Fails     not_positive: U_jj <= 0 or NaN; where = the lowest such j; outputs untouched.
//           interrupted: outputs undefined.
// Accuracy  The operations of the sequential loop in its order, each product and subtraction fused
//           where the machine can. Results do not depend on the number of threads.
// Cost      R B^2 flops; W and E move once.
// Source    Frantar & Alistarh 2023 (SparseGPT), algorithm 1.
#pragma once

#include "errors.h"
#include "types.h"

namespace lobs {

using SweepBlockFn = Info(AnyMatrix W, AnyMatrix U, unsigned char* gone, AnyMatrix E, Index group,
                          Index per_group, const Context& context);

}  // namespace lobs
