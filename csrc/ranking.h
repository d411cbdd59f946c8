// ranking.h: choose the cheapest removals, and put each row's in order.
//
//   rank_lowest:  chosen[r, i] = 1 for the `count` lowest scores of row r, else 0
//   rank_rows:    order = the chosen columns of row 0 by rising score, then of row 1, ...
//
// Shapes    score (R, C) contiguous float64, without NaN; infinities are allowed.  chosen (R, C)
//           bytes, 0 or 1.  order (number of ones in chosen).  start (R + 1): row r owns
//           order[start[r]] .. order[start[r + 1] - 1].
// On exit   rank_lowest chooses exactly `count` in every row, 0 <= count <= C; among equal scores
//           the lowest column goes first. rank_rows writes order; start is given by the caller and
//           must agree with chosen. -0 and +0 are equal.
// Fails     out_of_memory: outputs untouched. interrupted: outputs undefined.
// Accuracy  Exact: no arithmetic is done on scores.
// Cost      rank_lowest reads the scores at most 6 times, whatever C (radix selection by 16 bits for
//           one long row, which all threads share, by 8 bits for many). rank_rows reads them once
//           and moves each chosen one at most 8 times (radix sort).
// Source    Textbook. The ranking is that of Dong, Chen & Pan 2017, algorithm 1.
#pragma once

#include "errors.h"
#include "types.h"

namespace lobs {

using RankLowestFn = Info(unsigned char* chosen, const double* score, Index R, Index C, Index count,
                          const Context& context);
using RankRowsFn = Info(std::int32_t* order, const Index* start, const unsigned char* chosen,
                        const double* score, Index R, Index C, const Context& context);

}  // namespace lobs
