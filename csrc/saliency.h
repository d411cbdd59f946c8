// saliency.h: the cost of a removal, and the cheapest allowed removal of every row.
//
//   s_q = w_q^2 / d_q ,   d = diag of the inverse second moment
//   column[r] = argmin over live q of s_q
//
// Shapes    W (R, C).  diag (R, C), or (1, C) with row stride 0 when all rows share it.  live
//           (R, C) bytes, 0 or 1.  column (R), value (R).
// Types     W, diag and value in float64 or float32, the same for all.
// On exit   column[r] is the lowest column with the lowest s, and value[r] that s; -1 and +infinity
//           where nothing is live.
// Fails     not_positive: a live diag entry is <= 0, NaN or infinite; where = r * C + q of the
//           first. not_finite: a live weight is NaN or infinite; where likewise. Outputs undefined.
// Accuracy  One product and one division, each rounded once: all backends agree bit for bit, ties
//           included.
// Cost      Reads W, diag and live once: 9 bytes per weight in float32 (5 with a shared diag).
//           Memory-bound.
// Source    Hassibi & Stork 1993; Dong, Chen & Pan 2017, eq. 6, without the paper's factor 1/2: s
//           is the exact increase of tr(dW H dW^T).
#pragma once

#include "errors.h"
#include "types.h"

namespace lobs {

// The formula, once: for the host's scalars and vectors, and for a device's scalars. No other file
// spells it out (tests/test_architecture.py).
template <typename T>
LOBS_HD LOBS_INLINE T saliency(T w, T d) {
    return w * w / d;
}

using SaliencyArgminFn = Info(Index* column, void* value, AnyMatrix W, AnyMatrix diag,
                              Matrix<const unsigned char> live, const Context& context);

}  // namespace lobs
