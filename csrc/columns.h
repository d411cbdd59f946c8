// columns.h: remove units, groups of columns, from all rows of one or several layers at once, always
// the cheapest, and re-optimise all others after each removal.
//
//   u = argmin over eligible units of  sum over layers of scale * tr(A_uu^-1 B_uu)     B = W^T W
//   A <- A - A_:u A_uu^-1 A_u:,    B <- B - P^T Q - Q^T P    in every layer that reads u, with
//   Q = A_uu^-1 A_u:,  P = B_u: - B_uu Q / 2
//
// tr(A_uu^-1 B_uu) = tr(W_u A_uu^-1 W_u^T) is what the best repair of all other columns leaves. The
// repaired W never occurs: rows matter through B alone, and B is updated as it would be.
//
// Neither A nor B is written. With A_uu = U^T U they lose V^T V and P^T V + V^T P for
//
//   V = U^-T A_u:,    P = Z - M V / 2,    Z = U^-T B_u:,    M = U^-T B_uu U^-1,   cost = tr M
//
// V and P of all removals are kept, two lines for every column that has gone. The blocks A_uu and
// B_uu of all units are kept up to date, and rows are computed when they are needed.
//
// Shapes    Per layer: W (R, C), rows with any stride, columns contiguous.  A (C, C) symmetric,
//           contiguous.  start (units + 1), rising from 0 to C: unit u is columns start[u] ..
//           start[u + 1] - 1, none if the layer does not read it. Sizes differ freely.
//           first (units): below zero for units that go before all others, the lowest first.
//           Sets of units of which one has to stay: set s is set_unit[set_start[s]] .. A unit that is
//           the last of a set is not eligible.  order, cost (limit), count (1).
// Types     W and A in float64 or float32, the same for all layers; scale, first and cost float64.
// On exit   order[done .. *count) are the units in the order of removal, and cost[i] >= 0 is what
//           removal i added to the error of all layers. Removals end at `limit`, or when no unit is
//           eligible. Every prefix is the choice for its length. Ties go to the lowest unit. W and A
//           are not modified.
// Continued `done` > 0 goes on after a call that ended with *count = done, with the same arguments
//           and the same `memory`. The result is that of one call, bit for bit.
// Fails     not_positive: a pivot of A_uu is not above `floor` times its first value. At the start,
//           where = layer * units + u, the lowest; order and cost are untouched. Later, where = that
//           of the unit that is to go (units that rounding has eaten cost nothing, so that they are
//           chosen next); the removals before it are in order, cost and *count. interrupted and
//           out_of_memory: `memory` is lost.
// Accuracy  Blocks follow the plain recurrences in the type of W; an entry of a row takes the same
//           subtractions in the same order, whichever rows are computed ahead. Results do not depend
//           on the number of threads.
// Cost      (3 - 2 s) C k^2 + (2 - s) R C k flops for k = s C columns of a layer, nearly all in
//           register-tiled products, plus rows that are computed ahead and never used
//           (csrc/cpu/columns.cpp); about 10 b^2 for each column that goes and each unit of b > 1
//           columns that is left.
// Memory    columns_bytes(): V and P of all columns, a copy of W, and the rows ahead. Most of it is
//           not touched before it is used. On the host, scratch for every thread besides.
// Source    Hassibi & Stork 1993, the block form; Kurtic et al. 2023 (ZipLM) for removing structures
//           of one layer by it. The factored form is ours, as that of exact.h.
#pragma once

#include "errors.h"
#include "types.h"

namespace lobs {

// A layer that reads units.
struct ColumnLayer {
    AnyMatrix W;
    const void* A;
    const Index* start;
    double scale;
    Index widest;  // columns of the widest unit
};

struct ColumnsPlan {
    Index units;
    Index done, limit;  // removals before and after this call
    double floor;       // a pivot is lost where it is not above this share of its first value
    const double* first;
    Index sets;
    const Index* set_start;        // (sets + 1)
    const std::int32_t* set_unit;  // (set_start[sets]): distinct within a set
};

struct ColumnsOut {
    std::int32_t* order;
    double* cost;
    Index* count;
};

using ColumnsTraceFn = Info(const ColumnsOut& out, const ColumnLayer* layers, Index count,
                            const ColumnsPlan& plan, void* memory, const Context& context);

// Bytes of `memory`. `start` of every layer is on the host here, whatever the backend.
using ColumnsBytes = Index(const ColumnLayer* layers, Index count, Index units, Index sets);

}  // namespace lobs
