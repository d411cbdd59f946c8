// solve.cpp: contract in solve.h.
//
// One row is one item of work. Its k x k system is gathered from M row by row and stored as the
// upper factor U (U^T U = M[P, P]) in column tiles of kTile, each contiguous: tile t holds rows 0
// .. (t + 1) * kTile - 1. So both operands of a block update are contiguous streams. The padding is
// the identity, so that no loop needs a special case for the last, partial tile.
#include "solve.h"

#include "parallel.h"
#include "vector.h"

namespace lobs::LOBS_LEVEL {
namespace {

// kRows divides a tile. 16 accumulators in 32 registers; 12 in 16, or 8 where products need one more.
constexpr int kVectors = kManyRegisters ? 4 : kVectorBytes == 32 ? 3 : 2;
constexpr int kRows = 4;
template <typename T>
constexpr Index kTile = kVectors * kLanes<T>;
constexpr Index kDepth =
    128;  // rows of two tiles that are multiplied at a time, so that they stay in cache

template <typename T>
Index tiles_for(Index k) {
    return (k + kTile<T> - 1) / kTile<T>;
}

template <typename T>
struct System {
    T* U;         // tiles
    T* x;         // (k padded)
    T* inverse;   // (k padded): 1 / U_jj
    T* line;      // (k padded + kLanes)
    Index tiles;  // of this row
    Index count;  // k

    static Index elements(Index k) {
        const Index n = tiles_for<T>(k);
        return n * (n + 1) / 2 * kTile<T> * kTile<T> + (3 * n + 1) * kTile<T>;
    }
    System(T* memory, Index k) : tiles(tiles_for<T>(k)), count(k) {
        U = memory;
        x = U + tiles * (tiles + 1) / 2 * kTile<T> * kTile<T>;
        inverse = x + tiles * kTile<T>;
        line = inverse + tiles * kTile<T>;
    }
    LOBS_INLINE T* tile(Index t) const { return U + t * (t + 1) / 2 * kTile<T> * kTile<T>; }
};

// Copies M[P, P] and b[P].
template <typename T>
void cut(const System<T>& s, const T* M, Index C, const T* b, const unsigned char* chosen) {
    const Index padded = s.tiles * kTile<T>;
    Index row = 0;
    for (Index q = 0; q < C; ++q) {
        if (!chosen[q]) continue;
        T* out = s.line;
        const T* m = M + q * C;
        Index i = 0;
        for (; i + kLanes<T> <= C; i += kLanes<T>) {
            if (const unsigned keep = bits_of(widen<T>(chosen + i) != 0))
                out = compress(out, m + i, keep);
        }
        for (; i < C; ++i)
            if (chosen[i]) *out++ = m[i];
        for (T* end = s.line + padded; out < end; ++out) *out = 0;
        for (Index t = row / kTile<T>; t < s.tiles; ++t)
            std::memcpy(s.tile(t) + row * kTile<T>, s.line + t * kTile<T>, kTile<T> * sizeof(T));
        s.x[row] = b[q];
        ++row;
    }
    for (; row < padded; ++row) {
        T* out = s.tile(s.tiles - 1) + row * kTile<T>;
        for (Index l = 0; l < kTile<T>; ++l) out[l] = 0;
        out[row % kTile<T>] = 1;
        s.x[row] = 0;
    }
}

// Subtracts the contribution of the rows above from rows of block b in tile t.
template <typename T>
void update(const System<T>& s, Index b, Index t) {
    T* const out = s.tile(t) + b * kTile<T> * kTile<T>;
    for (Index first = 0; first < b * kTile<T>; first += kDepth) {
        const Index left = b * kTile<T> - first;
        const Index depth = left < kDepth ? left : kDepth;
        const T* left_rows = s.tile(b) + first * kTile<T>;
        const T* right_rows = s.tile(t) + first * kTile<T>;
        for (Index i = 0; i < kTile<T>; i += kRows) {
            Vector<T> sum[kRows][kVectors] = {};
            multiply<T, kRows, kVectors>(sum, depth, left_rows + i, kTile<T>, 1, right_rows,
                                         kTile<T>);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                    T* at = out + (i + r) * kTile<T> + v * kLanes<T>;
                    store(at, load(at) - sum[r][v]);
                }
        }
    }
}

// Factors the diagonal tile of block b. False if a pivot is not positive.
template <typename T>
bool factor_diagonal(const System<T>& s, Index b) {
    T* const a = s.tile(b) + b * kTile<T> * kTile<T>;
    for (Index j = 0; j < kTile<T>; ++j) {
        T* const row = a + j * kTile<T>;
        const T pivot = row[j];
        if (!(pivot > 0) || !finite_bits(magnitude_bits(pivot))) return false;
        const T scale = 1 / root(pivot);
        s.inverse[b * kTile<T> + j] = scale;
        const Index from = j / kLanes<T> * kLanes<T>;
        for (Index l = from; l < kTile<T>; l += kLanes<T>) store(row + l, load(row + l) * scale);
        for (Index i = j + 1; i < kTile<T>; ++i) {
            const T u = row[i];
            T* const other = a + i * kTile<T>;
            for (Index l = i / kLanes<T> * kLanes<T>; l < kTile<T>; l += kLanes<T>)
                store(other + l, load(other + l) - u * load(row + l));
        }
    }
    return true;
}

// Multiplies rows of block b in tile t > b by U_bb^-T.
template <typename T>
void solve_tile(const System<T>& s, Index b, Index t) {
    const Index rows = b * kTile<T>;
    substitute<T, kVectors>(s.tile(t) + rows * kTile<T>, kTile<T>, kTile<T>,
                            s.tile(b) + rows * kTile<T>, kTile<T>, 1, s.inverse + rows, 1);
}

// x <- U^-T x
template <typename T>
void forward(const System<T>& s) {
    for (Index t = 0; t < s.tiles; ++t) {
        const T* const U = s.tile(t);
        Vector<T> sum[kVectors];
        T* const x = s.x + t * kTile<T>;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[v] = load(x + v * kLanes<T>);
        for (Index i = 0; i < t * kTile<T>; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v)
                sum[v] -= s.x[i] * load(U + i * kTile<T> + v * kLanes<T>);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(x + v * kLanes<T>, sum[v]);
        const T* const a = U + t * kTile<T> * kTile<T>;
        for (Index j = 0; j < kTile<T>; ++j) {
            x[j] *= s.inverse[t * kTile<T> + j];
            for (Index i = j + 1; i < kTile<T>; ++i) x[i] -= x[j] * a[j * kTile<T> + i];
        }
    }
}

// x <- U^-1 x
template <typename T>
void backward(const System<T>& s) {
    for (Index t = s.tiles - 1; t >= 0; --t) {
        const T* const U = s.tile(t);
        T* const x = s.x + t * kTile<T>;
        const T* const a = U + t * kTile<T> * kTile<T>;
        for (Index j = kTile<T> - 1; j >= 0; --j) {
            T sum = x[j];
            for (Index i = j + 1; i < kTile<T>; ++i) sum -= a[j * kTile<T> + i] * x[i];
            x[j] = sum * s.inverse[t * kTile<T> + j];
        }
        Vector<T> known[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) known[v] = load(x + v * kLanes<T>);
        for (Index i = 0; i < t * kTile<T>; ++i) {
            Vector<T> sum = {};
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v)
                sum += known[v] * load(U + i * kTile<T> + v * kLanes<T>);
            T total = 0;
            for (int l = 0; l < kLanes<T>; ++l) total += sum[l];
            s.x[i] -= total;
        }
    }
}

template <typename T>
bool solve_row(T* X, const T* M, Index C, const unsigned char* chosen, Index count, T* memory,
               Interrupt& interrupt, int worker) {
    const System<T> s(memory, count);
    cut(s, M, C, X, chosen);
    for (Index b = 0; b < s.tiles; ++b) {
        if (interrupt.asked(worker)) return true;
        for (Index t = b; t < s.tiles; ++t) update(s, b, t);
        if (!factor_diagonal(s, b)) return false;
        for (Index t = b + 1; t < s.tiles; ++t) solve_tile(s, b, t);
    }
    forward(s);
    backward(s);
    Index i = 0;
    for (Index q = 0; q < C; ++q) X[q] = chosen[q] ? s.x[i++] : T(0);
    return true;
}

template <typename T>
Info launch(AnyMatrix X, const T* M, const unsigned char* chosen, const Context& context) {
    const Index R = X.rows, C = X.columns;
    const Index workers = R < context.threads ? R : context.threads;
    Index most = 0;
    auto counted = [&](Index r) {
        Index k = 0;
        for (Index q = 0; q < C; ++q) k += chosen[r * C + q] != 0;
        return k;
    };
    for (Index r = 0; r < R; ++r) {
        const Index k = counted(r);
        most = k > most ? k : most;
    }
    Scratch scratch(workers, System<T>::elements(most) * static_cast<Index>(sizeof(T)));
    Lowest failed(workers, R);
    if (!scratch.ok() || !failed.ok()) return {Status::out_of_memory, 0};
    Interrupt interrupt(context);
    auto body = [&](Index r, int worker) {
        T* x = static_cast<T*>(X.data) + r * X.row_stride;
        if (interrupt.asked(worker)) return;
        if (!solve_row(x, M, C, chosen + r * C, counted(r), scratch.of<T>(worker), interrupt,
                       worker))
            failed.note(worker, r);
    };
    const bool whole = parallel_items(R, context, body);
    if (!whole || interrupt.raised()) return {Status::interrupted, 0};
    const Index lowest = failed.item();
    return {lowest < R ? Status::not_positive : Status::ok, lowest < R ? lowest : 0};
}

}  // namespace

Info support_solve(AnyMatrix X, const void* M, const unsigned char* chosen,
                   const Context& context) {
    switch (X.dtype) {
        case Dtype::f64:
            return launch(X, static_cast<const double*>(M), chosen, context);
        case Dtype::f32:
            return launch(X, static_cast<const float*>(M), chosen, context);
        default:
            return {Status::unsupported, 0};
    }
}

}  // namespace lobs::LOBS_LEVEL
