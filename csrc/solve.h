// solve.h: one small symmetric system per row, all submatrices of one matrix.
//
//   M[P_r, P_r] x = b_r[P_r],   P_r = the columns chosen for row r
//
// With M = A and P the removed columns, x is the multiplier of the best repair, w - A[:, P] x. With
// M = H and P the kept columns, x is the repaired row itself.
//
// Shapes    X (R, C), rows with any stride, columns contiguous: b on entry, x on exit.  M (C, C)
//           symmetric, contiguous; only its upper triangle is read.  chosen (R, C) bytes, 1 where a
//           column is in P_r.
// Types     X and M in float64 or float32, the same for both.
// On exit   X[r, P_r] = x; all other entries of X are +0.
// Fails     not_positive: M[P_r, P_r] has a pivot <= 0 or NaN; where = the lowest such row. Its
//           entries of X are undefined; other rows are done. out_of_memory: X untouched.
//           interrupted: some rows are done, others are not.
// Accuracy  That of a Cholesky factorisation and two triangular solves in the type of M: a backward
//           error of a few eps. Results do not depend on the number of threads.
// Cost      k^3 / 3 flops per row with k columns.
// Memory    Scratch per thread: k^2 / 2 values for the largest k.
// Source    Textbook: blocked Cholesky (Golub & Van Loan, section 4.2).
#pragma once

#include "errors.h"
#include "types.h"

namespace lobs {

using SupportSolveFn = Info(AnyMatrix X, const void* M, const unsigned char* chosen,
                            const Context& context);

}  // namespace lobs
