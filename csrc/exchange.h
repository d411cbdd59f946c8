// exchange.h: swap a kept weight of a row for a removed one, as long as a swap lowers the error.
//
//   w = the best weights with the kept set S,  P = the others (removed)
//   adding j gains x_j^2 / K_jj,  removing i then costs
//   (w_i + T_ij x_j / K_jj)^2 / (D_ii + T_ij^2 / K_jj)
//   with  K = A[P, P]^-1,  T = A[S, P] K,  D = A[S, S] - T A[P, S],  x = K w0[P],
//         w = w0[S] - A[S, P] x
//
// Each round makes the one swap, among all pairs, that lowers the error of the row most. Ties go to
// the lowest kept column, then to the lowest removed one.
//
// Shapes    W (R, C), rows with any stride, columns contiguous: the original weights on entry.  A
//           (C, C) symmetric, contiguous.  kept (R, C) bytes, 1 = kept.  fixed (R, C) bytes or
//           null, 1 = stays on its side.  swaps (R), left (R).
// Types     float64.
// Patterns  group = M > 0: swaps only within columns M*g .. M*g + M - 1; 0 = any pair.
// On exit   kept is the final kept set. W holds the best weights for it, and +0 elsewhere. swaps[r]
//           is the number of swaps made, at most `limit`, and left[r] the remaining error,
//           w0[P]^T K w0[P]. A swap must lower the error of a row by more than 1e-9 of it.
// Fails     not_positive: A is not positive definite in float64; where = the lowest such row, which
//           is untouched. out_of_memory: outputs untouched. interrupted: some rows are done, others
//           are not.
// Cost      About k C^2 flops per row to pivot the tableau [D, T; T^T, K] to P with |P| = k, then,
//           for each swap, 3 C^2 flops and |S||P| evaluations of the formula.
// Memory    Scratch per thread: C^2 / 2 values.
// Source    Algorithm: greedy exchange (Miller 2002, Subset Selection in Regression, section 3.5);
//           the tableau is Beaton's sweep operator (Goodnight 1979).
#pragma once

#include "errors.h"
#include "types.h"

namespace lobs {

struct ExchangeOut {
    unsigned char* kept;  // (R, C), in and out
    Index* swaps;         // (R)
    double* left;         // (R)
};

using ExchangeFn = Info(const ExchangeOut& out, AnyMatrix W, const double* A,
                        const unsigned char* fixed, Index group, Index limit,
                        const Context& context);

}  // namespace lobs
