// sliced.h: the product with a sparse weight, y = x W^T + b, for few rows of x.
//
// W is stored in slices of 16 rows, as in sliced ELLPACK, with the rows in their own order. The
// columns are divided into blocks of width - 1. The weights of a row in a block follow one another
// in steps: a step holds one weight of each of the 16 rows, and where a row has none left, 0 in
// column width - 1 of the block, which stands for no column. Indices within a block fit registers:
// on AVX-512 a block of x is four vectors, and the x of a step come from two permutations instead
// of 16 loads.
//
// Shapes    x (N, C) and y (N, R), any strides in x, columns of y contiguous.  values and columns
//           (T, 16), steps (S, K), start (S + 1) with S = ceil(R / 16), K = ceil(C / (width - 1)):
//           slice s has steps[s, k] steps for block k, one after the other from step start[s] on,
//           and start[S] = T.  bias (R) or null.  width is 16 or 64.
// Types     x and y float32 or bfloat16, both the same; values float32 or bfloat16; bias float32.
// On entry  steps and start agree. Rows beyond R and columns beyond C have no weights.
// On exit   y is written. Nothing else is modified. C <= 2^31.
// Fails     out_of_memory: y is untouched.  interrupted: parts of y are written.
// Accuracy  Sums in float32, in an order that depends on the backend, on width, on whether N is
//           above kFewRows, and there on N. Results do not depend on the number of threads. A weight
//           that is not stored does not touch y, so an infinity or NaN in its column is not seen,
//           where the dense product would turn 0 * inf into NaN.
// Cost      Up to kFewRows rows: the slices are read once for every 4 rows of x, values and a byte
//           per weight, and the padding: with random zeros and width 64, 1.36, 1.47 and 1.74
//           entries per weight at 70, 80 and 90 % zeros. Above: 2 N flops per weight, without
//           padding.
// Source    Monakov, Lokhmotov and Avetisyan 2010 (sliced ELLPACK). Kreutzer et al. 2014
//           (SELL-C-sigma, here with chunks of 16 rows and sigma = 1). Blocks of columns as in
//           cache blocking.
#pragma once

#include "errors.h"
#include "types.h"

namespace lobs {

constexpr Index kSliceRows = 16;
constexpr Index kFewRows = 16;

struct SlicedWeight {
    const void* values;
    Dtype dtype;
    const unsigned char* columns;
    const unsigned char* steps;
    const Index* start;
    Index rows, width;
};

using SlicedLinearFn = Info(AnyMatrix y, AnyMatrix x, const SlicedWeight& weight, const float* bias,
                            const Context& context);

}  // namespace lobs
