// inverse.h: update a batch of inverse second moments with r new samples.
//
//   F_b <- F_b - F_b G_b^T (m I + G_b F_b G_b^T)^-1 G_b F_b          for every diagonal block b
//
// This equals r rank-1 updates F <- F - F g g^T F / (m + g^T F g), one after another, exactly.
//
// Shapes    F (blocks, B, B) contiguous, symmetric.  G (r, d), rows with any stride, columns
//           contiguous, (blocks - 1) * B < d <= blocks * B. Block b sees columns b * B .. b * B +
//           B - 1; columns from d on count as zero.
// Types     float64 or float32, the same for F and G.  m > 0: the number of samples in the mean.
// On exit   F_b is updated, and exactly symmetric if it was so on entry.
// Fails     not_finite: where = n * d + i of the first NaN or infinity in G; F untouched.
//           not_positive: m I + G F G^T has a pivot <= 0 or NaN, because F lost definiteness; where
//           = the lowest such block. That block is untouched and others are updated: discard F.
//           unsupported (a device only): its shared memory does not hold a block; F untouched.
//           interrupted: some blocks are updated, others are not.
// Cost      Per block and 16 samples: 4 * 16 * B^2 + 3 * 16^2 * B flops. F is read and written once
//           per call, whatever r is; a published rank-1 update reads it twice and writes it once
//           for each sample.
//           The host leaves out up to 16 * B^2 of them, because F is symmetric.
// Memory    Scratch per thread: about B * (B + 16) elements for each block that it works on at a
//           time. These are as many as fit into 192 KB (384 KB with 32 registers), but at least one
//           and at most the lanes of a vector.
// Source    Dong, Chen & Pan 2017, section 3.4.1 (r = 1, one block); Singh & Alistarh 2020
//           (WoodFisher) and Kurtic et al. 2022 (oBERT) for blocks; the matrix inversion lemma for
//           r at once.
#pragma once

#include "errors.h"
#include "types.h"

namespace lobs {

using InverseUpdateFn = Info(void* F, Dtype dtype, Index blocks, Index B, AnyMatrix G, double m,
                             const Context& context);

}  // namespace lobs
