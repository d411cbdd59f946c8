// blocks.h: the blocks of A and B that belong to one unit of columns (columns.h): their updates, and
// what it costs to remove the unit.
//
// A block is stored by rows that are padded to whole vectors. Only its upper triangle is kept up to
// date. Loops run over rows in fours and over whole vectors: what lies beyond the unit's columns is
// computed and never read.
#pragma once

#include "vector.h"

namespace lobs::LOBS_LEVEL {
namespace {

template <typename T>
struct Block {
    Index size, rows, stride;

    LOBS_INLINE explicit Block(Index columns)
        : size(columns), rows(up(columns, 4)), stride(up(rows, kLanes<T>)) {}
    LOBS_INLINE Index elements() const { return rows * stride; }
};

template <typename T, int kCount, int kWide>
LOBS_INLINE void add_tile(T* out, Index stride, const T* X, const T* Y, Index line, Index lines,
                          T sign) {
    Vector<T> sum[kCount][kWide] = {};
    multiply<T, kCount, kWide>(sum, lines, X, line, 1, Y, line);
    for (int i = 0; i < kCount; ++i)
        for (int v = 0; v < kWide; ++v) {
            T* const at = out + i * stride + v * kLanes<T>;
            store(at, load(at) + sign * sum[i][v]);
        }
}

// out[i][j] += sign * sum over lines of X[line][i] Y[line][j], for j >= i. Reads Y up to the stride
// of the block.
template <typename T>
void add_products(T* out, const Block<T>& block, const T* X, const T* Y, Index line, Index lines,
                  T sign) {
    for (Index i = 0; i < block.size; i += 4) {
        const Index count = least(block.size - i, 4);
        T* const to = out + i * block.stride;
        Index j = i / kLanes<T> * kLanes<T>;
        for (; count == 4 && j + 2 * kLanes<T> <= block.stride; j += 2 * kLanes<T>)
            add_tile<T, 4, 2>(to + j, block.stride, X + i, Y + j, line, lines, sign);
        for (; j < block.stride; j += kLanes<T>) switch (count) {
                case 4:
                    add_tile<T, 4, 1>(to + j, block.stride, X + i, Y + j, line, lines, sign);
                    break;
                case 3:
                    add_tile<T, 3, 1>(to + j, block.stride, X + i, Y + j, line, lines, sign);
                    break;
                case 2:
                    add_tile<T, 2, 1>(to + j, block.stride, X + i, Y + j, line, lines, sign);
                    break;
                default:
                    add_tile<T, 1, 1>(to + j, block.stride, X + i, Y + j, line, lines, sign);
            }
    }
}

// Room for the removal of one unit.
template <typename T>
struct Reduced {
    T *U, *M, *turned;  // blocks
    T* inverse;         // (rows): 1 / U_ii

    template <typename Carve>
    LOBS_INLINE void carve(Carve& carve, const Block<T>& widest) {
        carve.take(U, widest.elements());
        carve.take(M, widest.elements());
        carve.take(turned, widest.elements());
        carve.take(inverse, widest.rows);
    }
};

// Z <- U^-T Z for a block.
template <typename T>
void substitute_block(T* Z, const Block<T>& block, const Reduced<T>& to) {
    Index j = 0;
    for (; j + 2 * kLanes<T> <= block.stride; j += 2 * kLanes<T>)
        substitute<T, 2>(Z + j, block.stride, block.rows, to.U, block.stride, 1, to.inverse, 1);
    if (j < block.stride)
        substitute<T, 1>(Z + j, block.stride, block.rows, to.U, block.stride, 1, to.inverse, 1);
}

// U^T U = a, M = U^-T b U^-1. Returns the cost tr M, or -1 where a pivot is not above `floor` times
// its first value in `origin`.
template <typename T>
T reduce(const Reduced<T>& to, const Block<T>& block, const T* a, const T* b, const T* origin,
         T floor) {
    const Index size = block.size, stride = block.stride;
    std::memset(to.U, 0, static_cast<std::size_t>(block.elements()) * sizeof(T));
    std::memset(to.turned, 0, static_cast<std::size_t>(block.elements()) * sizeof(T));
    for (Index i = 0; i < size; ++i)
        for (Index j = i; j < size; ++j) {
            to.U[i * stride + j] = a[i * stride + j];
            to.turned[i * stride + j] = to.turned[j * stride + i] = b[i * stride + j];
        }
    for (Index i = size; i < block.rows; ++i) to.U[i * stride + i] = to.inverse[i] = 1;
    for (Index j = 0; j < size; ++j) {
        T* const row = to.U + j * stride;
        if (!(row[j] > floor * origin[j])) return -1;
        const T scale = to.inverse[j] = 1 / root(row[j]);
        for (Index l = j / kLanes<T> * kLanes<T>; l < stride; l += kLanes<T>)
            store(row + l, load(row + l) * scale);
        for (Index i = j + 1; i < size; ++i) {
            const T u = row[i];
            T* const other = to.U + i * stride;
            for (Index l = i / kLanes<T> * kLanes<T>; l < stride; l += kLanes<T>)
                store(other + l, load(other + l) - u * load(row + l));
        }
    }
    substitute_block(to.turned, block, to);
    std::memset(to.M, 0, static_cast<std::size_t>(block.elements()) * sizeof(T));
    for (Index i = 0; i < size; ++i)
        for (Index j = 0; j < size; ++j) to.M[j * stride + i] = to.turned[i * stride + j];
    substitute_block(to.M, block, to);
    T cost = 0;
    for (Index i = 0; i < size; ++i) cost += to.M[i * stride + i];
    return cost > 0 ? cost : T(0);
}

}  // namespace
}  // namespace lobs::LOBS_LEVEL
