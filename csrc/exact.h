// exact.h: remove weights from every row one at a time, always the cheapest, and re-optimise the
// others after each removal: true Optimal Brain Surgeon, as a pivoted Cholesky factorisation of the
// shared A.
//
//   q = argmin over eligible i of w_i^2 / D_ii        D = A before the first removal of a row
//   loss = w_q^2 / D_qq,   w <- w - (w_q / D_qq) D[:, q],   D <- D - D[:, q] D[q, :] / D_qq
//
// D is never formed. It is A minus the sum of v v^T over all removals, v = D[:, q] / sqrt(D_qq),
// and only the columns that are needed are computed. The order is that of the algorithm above, step
// for step.
//
// Shapes    W (R, C), rows with any stride, columns contiguous.  A (C, C) symmetric, contiguous.
//           state (R, C) bytes, values of WeightState, or null: all may go.  order (R, limit)
//           int32, loss (R, limit), count (R), lost (R).
// Patterns  block = b > 1: columns b*g .. b*g + b - 1 go together, at the cost w_B^T D_BB^-1 w_B;
//           columns from C - C % b on stay; state is constant within a block. group = M > 0: at
//           most `per_group` columns of every M go, unless more are in the state goes_first;
//           columns from C - C % M on stay. Only one of the two.
// Types     W, A and loss in float64 or float32, the same for all.
// On exit   order[r, :count[r]] are the columns of row r in the order of removal, and loss[r, i] is
//           the cost of removal i. The cost of a block is spread over its columns in order; their
//           sum is the cost of the block. A row ends after `limit` removals, when nothing eligible
//           is left, or before the first removal that would cost more than `stop`, unless its state
//           is goes_first. With update, W holds the weights after count[r] removals, the removed
//           ones exactly +0; without, W is untouched.
//           lost[r] = 0, or 1 where D_qq of an eligible column was found not to be above `floor`
//           times A_qq, so that rounding has eaten it. This is checked in the column to be removed,
//           at every refill, and when nothing else is left. Then count[r] is the number of removals
//           before that, and the row must be redone in a wider type. Ties go to the lowest column.
// Fails     not_positive: A_qq <= 0 or NaN for some column; where = that column. out_of_memory:
//           outputs untouched. interrupted: outputs undefined.
// Accuracy  D_qq and w follow the plain recurrences in the type of W; a column takes the same
//           subtractions in the same order. Results do not depend on the number of threads.
// Cost      About 2 (C k^2 / 2 - k^3 / 3) flops per row for k removals, nearly all of it in
//           register-tiled products, plus columns that are computed ahead and never used
//           (csrc/cpu/exact.cpp).
// Memory    exact_bytes() per thread.
// Source    Frantar, Singh & Alistarh 2022 (ExactOBS, OBC) for the algorithm; Hassibi & Stork 1993
//           for the surgeon; the factored form that prefetches columns is ours.
#pragma once

#include "errors.h"
#include "types.h"

namespace lobs {

constexpr Index kMaxBlock = 64;  // columns of a block

struct ExactPlan {
    Index limit;      // removals per row, at most: 1 .. C
    double stop;      // highest cost of one removal (of a block); infinity: no such limit
    double floor;     // D_qq is lost where it is not above this share of A_qq
    Index block;      // b; 1 = single weights
    Index group;      // M; 0 = no groups
    Index per_group;  // columns of a group that may go
    bool update;      // whether to write W
};

struct ExactOut {
    std::int32_t* order;  // (R, limit)
    void* loss;           // (R, limit)
    Index* count;         // (R)
    unsigned char* lost;  // (R)
};

using ExactTraceFn = Info(const ExactOut& out, AnyMatrix W, const void* A,
                          const unsigned char* state, const ExactPlan& plan,
                          const Context& context);

// Scratch bytes that one thread needs for rows of C columns.
using ExactBytes = Index(Dtype dtype, Index C, const ExactPlan& plan);

}  // namespace lobs
