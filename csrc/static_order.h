// static_order.h: remove given weights from every row in a given order, without downdating the
// inverse.
//
//   for q in order:  w <- w - (w_q / A_qq) * A[:, q]      with the current w_q
//   afterwards:      w_q = 0 for every q in order
//
// This is one forward Gauss-Seidel sweep:
//
//   c = -tril(A[P, P])^-1 w[P],   w <- w + A[:, P] c,   w[P] = 0
//
// Shapes    W (R, C), rows with any stride, columns contiguous.  A (C, C) symmetric, contiguous.
//           order: the columns to remove, row after row; row r owns order[start[r]] ..
//           order[start[r + 1] - 1].  start (R + 1), rising from 0 (checked by the caller).
// Types     W and A in float64 or float32, the same for both.
// On exit   Every removed entry is exactly +0; the others carry the paper's compensation.
// Fails     bad_order: a column is outside [0, C) or occurs twice in a row; where = its position in
//           order. not_positive: A_qq <= 0 or NaN for a q to be removed; where = the position of q.
//           W is untouched in both cases. interrupted: some rows are done, others are not: pass a
//           copy.
// Accuracy  As the sequential loop in the same type, up to the order of additions within groups of
//           eight removals.
// Cost      2 k C flops and 4 k C bytes of A (float32) for k removals in a row; bound by the cache
//           that holds A.
// Source    Dong, Chen & Pan 2017, algorithm 1 and eq. 6; the triangular form is ours.
#pragma once

#include "errors.h"
#include "types.h"

namespace lobs {

using StaticOrderPruneFn = Info(AnyMatrix W, const void* A, const std::int32_t* order,
                                const Index* start, const Context& context);

}  // namespace lobs
