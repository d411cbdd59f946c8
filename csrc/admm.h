// admm.h: all that an iteration of ADMM does between two matrix products.
//
//   y = (p + x) + u            u = removed ? -(d + x) : 0     what was left out last time
//   removed = the lowest |y|, as the plan says
//   d = removed ? -y - x : y - x
//
// with x the original weights and p = d M rho, M = (H + rho I)^-1: the minimum of the layer's error
// plus rho / 2 times the squared distance from the sparse weights. On exit the sparse weights are
// d + x where a weight is kept, and the next product is that of d. With p = d = 0 and nothing
// removed it is the first iteration: y = x.
//
// Shapes    p, d, x (R, C) contiguous.  removed (R, C) bytes, 0 or 1.  state (R, C) bytes, entries
//           of WeightState; null if every weight may go.  changed: one count.
// Types     p, d and x in float64 or float32, the same for all.
// Plan      `unit` neighbouring columns of a row are removed together. A single weight costs |y|; a
//           wider unit costs the sum of its y^2 in float64, added from the left. Columns after the
//           last whole unit (or group) stay.
//           With group = 0, `count` units are removed: of all rows together, or (by_row) of each
//           row. With a group, `per_group` of every `group` neighbouring columns; unit is 1, and
//           count and by_row are ignored.
//           The first column of a unit has the state of all of it. Units that go first are removed
//           before all others, and units that stay never, even if that makes more or fewer removals
//           than the plan says.
// On entry  *changed is 0.
// On exit   Exactly as many units are removed as the plan and the states say. Among equals the
//           lowest row goes first, then the lowest column; -0 and +0 are equal. *changed = weights
//           that are removed now and were not before. p and x are not modified. On a device,
//           *changed is in device memory.
// Fails     not_finite: some y is NaN or infinite; where = r * C + q of the first. out_of_memory:
//           outputs untouched. interrupted. After not_finite and interrupted, outputs are undefined.
// Accuracy  Every y and d is rounded as the brackets say, and a square of a float32 is exact in
//           float64. So all backends agree bit for bit, except in which units of several float64
//           columns go where two cost the same to rounding. Results do not depend on the number of
//           threads.
// Cost      Memory-bound. Rows, groups: p, x, d and removed are read once, d and removed written
//           once: 4 values and 2 bytes per weight. Over all rows it is 7 values and 3 bytes, and
//           three more readings of y where the cut is far from where it was last time (`cut`).
// Memory    Host: keys of a row twice (by_row) or about 20 KB, per thread; over all rows 0.5 MB more
//           per thread, and with a cut 1 byte per weight (float64: 2), of which about a quarter is
//           touched. Device: 64 KB and 4 bytes per 1000 units, over all rows only.
// Source    Boza 2024 (arXiv 2401.02938); ALPS, Meng et al. 2024 (NeurIPS), for the splitting and the
//           projection. This form, in which one matrix d holds weights, duals and the next
//           right-hand side, is ours.
#pragma once

#include "errors.h"
#include "types.h"

namespace lobs {

struct AdmmPlan {
    Index count;             // 0 .. all units that it may choose from
    Index unit;              // at least 1
    Index group, per_group;  // group = 0: no groups
    bool by_row;
    // Over all rows: *cut_out of last time, or 0. A guess that is wrong costs time and nothing else.
    double cut;
};

// *cut_out (host backends only, may be null): what the costliest removed unit costs, for the next
// plan; 0 where that is not known: with by_row or groups, and where states decide.
using AdmmStepFn = Info(Index* changed, double* cut_out, AnyMatrix p, AnyMatrix d, AnyMatrix x,
                        unsigned char* removed, const unsigned char* state, const AdmmPlan& plan,
                        const Context& context);

}  // namespace lobs
