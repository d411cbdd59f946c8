// ranking.h: choose the cheapest removals, and sort those of each row.
//
//   rank_lowest:  chosen[r, i] = 1 for the `count` lowest scores of row r, else 0
//   rank_rows:    order = the chosen columns of row 0 by rising score, then of row 1, ...
//
// Shapes    score (R, C) contiguous float64, without NaN; infinities are allowed.  chosen (R, C)
//           bytes, 0 or 1.  order: as many as there are ones in chosen.  start (R + 1): row r owns
//           order[start[r]] .. order[start[r + 1] - 1].
// On entry  rank_rows: start agrees with chosen.
// On exit   rank_lowest chooses exactly `count` in every row, 0 <= count <= C. rank_rows writes
//           order. Among equal scores the lowest column goes first; -0 and +0 are equal.
// Fails     out_of_memory: outputs untouched. interrupted: outputs undefined.
// Accuracy  Exact: scores are only compared.
// Cost      rank_lowest reads the scores at most 6 times, whatever C is (radix selection, by 16
//           bits for one long row that all threads share, by 8 bits for many rows). rank_rows reads
//           them once and moves each chosen one at most 8 times (radix sort).
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
