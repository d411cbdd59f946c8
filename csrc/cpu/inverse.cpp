// inverse.cpp: contract in inverse.h.
//
// A run of blocks is one item of work. A block is copied once into a padded local square (in L1 for
// B = 50, in L2 for B = 128), takes all r samples there in groups of kGroup, and is copied back. So
// F is read and written once, whatever the number of samples. Per group, with Y = G F and S = m I +
// Y G^T = U^T U:   Z = U^-T Y,   F -= Z^T Z. With groups of 16, a row of S is one AVX-512 vector in
// float32, and its Cholesky takes 120 vector operations instead of 1,365 scalar ones.
#include "inverse.h"

#include "parallel.h"
#include "vector.h"

namespace lobs::LOBS_LEVEL {
namespace {

constexpr int kGroup = 16;
constexpr Index kRun = 8;  // neighbouring blocks for one worker, which prefetches for itself
constexpr int kRows =
    4;  // 16 accumulators in 32 registers, or 8 in 16: enough to hide the latency of an FMA
constexpr int kVectors = kManyRegisters ? 4 : 2;
template <typename T>
constexpr int kWidth = kVectors * kLanes<T>;

template <typename T>
constexpr int kGroupVectors = kGroup / kLanes<T> > 0 ? kGroup / kLanes<T> : 1;

template <typename T>
struct Local {  // one worker's scratch
    T* F;       // (B rounded up to kRows, padded)
    T* Y;       // (kGroup, padded): G F, then Z
    T* G;       // (B, kGroup): the group's samples, transposed; zero beyond samples and columns
};

template <typename T>
Index padded(Index B) {
    return (B + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

// out (kGroup, padded) = G (kGroup, B) @ F (B, padded)
template <typename T>
void project(const Local<T>& local, Index B, Index stride) {
    for (Index j = 0; j < stride; j += kWidth<T>)
        for (int s = 0; s < kGroup; s += kRows) {
            Vector<T> sum[kRows][kVectors] = {};
            multiply<T, kRows, kVectors>(sum, B, local.G + s, kGroup, 1, local.F + j, stride);
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v)
                    store(local.Y + (s + i) * stride + j + v * kLanes<T>, sum[i][v]);
        }
}

// S = m I + Y G^T (kGroup, kGroup).
template <typename T>
void gram(T (&S)[kGroup][kGroup], const Local<T>& local, Index B, Index stride, T m) {
    constexpr int vectors = kGroupVectors<T>;
    constexpr int rows = kManyRegisters ? 8 : (vectors > 4 ? 1 : 4);
    for (int s = 0; s < kGroup; s += rows) {
        Vector<T> sum[rows][vectors] = {};
        multiply<T, rows, vectors>(sum, B, local.Y + s * stride, 1, stride, local.G, kGroup);
        for (int i = 0; i < rows; ++i)
            for (int v = 0; v < vectors; ++v) store(&S[s + i][v * kLanes<T>], sum[i][v]);
    }
    for (int i = 0; i < kGroup; ++i) S[i][i] += m;
}

// S <- U with U^T U = S, in the upper triangle. False if a pivot is not positive. If a row is one
// vector, the whole matrix stays in registers: latency bounds the chain of 16 pivots. Without
// accesses to memory, this and gram went from a fifth to an eighth of the time for B = 50.
template <typename T>
bool factor(T (&S)[kGroup][kGroup]) {
    if constexpr (kLanes<T> == kGroup) {
        Vector<T> row[kGroup];
        bool good = true;
#pragma GCC unroll 16
        for (int i = 0; i < kGroup; ++i) row[i] = load(&S[i][0]);
#pragma GCC unroll 16
        for (int j = 0; j < kGroup; ++j) {
            const T pivot = row[j][j];
            good = good && pivot > 0 && finite_bits(magnitude_bits(pivot));
            row[j] *= 1 / root(pivot);
#pragma GCC unroll 16
            for (int k = j + 1; k < kGroup; ++k) row[k] -= row[j][k] * row[j];
            store(&S[j][0], row[j]);
        }
        return good;
    }
    for (int j = 0; j < kGroup; ++j) {
        const T pivot = S[j][j];
        if (!(pivot > 0) || !finite_bits(magnitude_bits(pivot))) return false;
        const T scale = 1 / root(pivot);
        for (int i = 0; i < kGroup; ++i) S[j][i] *= scale;
        for (int k = j + 1; k < kGroup; ++k) {
            const T u = S[j][k];
            for (int i = 0; i < kGroup; ++i) S[k][i] -= u * S[j][i];
        }
    }
    return true;
}

// Y <- U^-T Y, row by row.
template <typename T>
void solve(const T (&U)[kGroup][kGroup], T* Y, Index stride) {
    for (Index j = 0; j < stride; j += kLanes<T>) {
        Vector<T> z[kGroup];
#pragma GCC unroll 16
        for (int s = 0; s < kGroup; ++s) {
            Vector<T> sum = load(Y + s * stride + j);
#pragma GCC unroll 16
            for (int i = 0; i < s; ++i) sum -= U[i][s] * z[i];
            z[s] = sum / U[s][s];
            store(Y + s * stride + j, z[s]);
        }
    }
}

// F -= Z^T Z. Entries (i, j) and (j, i) sum the same products in the same order, so F stays exactly
// symmetric.
template <typename T>
void subtract(const Local<T>& local, Index rows, Index stride) {
    for (Index j = 0; j < stride; j += kWidth<T>)
        for (Index i = 0; i < rows; i += kRows) {
            Vector<T> sum[kRows][kVectors] = {};
            multiply<T, kRows, kVectors>(sum, kGroup, local.Y + i, stride, 1, local.Y + j, stride);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v) {
                    T* f = local.F + (i + r) * stride + j + v * kLanes<T>;
                    store(f, load(f) - sum[r][v]);
                }
        }
}

// A block needs a short segment of each sample, which is a long row: the hardware does not prefetch
// that, so this asks for the next block's segment now. (20,000 blocks of 50 with 64 samples, one
// core: 390 ms without this, without runs and with a second copy of the samples; 343 ms after.)
template <typename T>
LOBS_INLINE void prefetch(const T* p, Index count) {
    for (Index i = 0; i < count; i += static_cast<Index>(64 / sizeof(T))) __builtin_prefetch(p + i);
}

// Rows are so short that calling memcpy would cost more than the copy.
template <typename T>
LOBS_INLINE void copy_row(T* out, const T* in, Index count) {
    Index i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) store(out + i, load(in + i));
    for (; i < count; ++i) out[i] = in[i];
}

// out (columns, kGroup) = the transpose of `group` rows. Missing samples are zero and change
// nothing. Full 4 x 4 tiles use shuffles, which took 20,000 blocks of 50 from 145 to 135 ms on two
// cores.
template <typename T>
void take_samples(T* out, const T* rows, Index row_stride, Index group, Index columns) {
    typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
    Index s = 0;
    for (; s + 4 <= group; s += 4) {
        const T* row = rows + s * row_stride;
        Index i = 0;
        for (; i + 4 <= columns; i += 4) {
            const Four a = *reinterpret_cast<const Four*>(row + i);
            const Four b = *reinterpret_cast<const Four*>(row + row_stride + i);
            const Four c = *reinterpret_cast<const Four*>(row + 2 * row_stride + i);
            const Four d = *reinterpret_cast<const Four*>(row + 3 * row_stride + i);
            const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
            const Four ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
            const Four cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
            const Four cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
            T* to = out + i * kGroup + s;
            *reinterpret_cast<Four*>(to) = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
            *reinterpret_cast<Four*>(to + kGroup) =
                __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
            *reinterpret_cast<Four*>(to + 2 * kGroup) =
                __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
            *reinterpret_cast<Four*>(to + 3 * kGroup) =
                __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
        }
        for (; i < columns; ++i)
            for (Index r = 0; r < 4; ++r) out[i * kGroup + s + r] = row[r * row_stride + i];
    }
    for (; s < kGroup; ++s)
        for (Index i = 0; i < columns; ++i)
            out[i * kGroup + s] = s < group ? rows[s * row_stride + i] : T(0);
}

// The padding of local.F and local.G is zero on entry and stays zero, because zero columns of G and
// F give zero columns of Z.
template <typename T>
bool update_block(T* F, const Matrix<const T>& G, Index b, Index B, T m, const Local<T>& local) {
    const Index stride = padded<T>(B);
    const Index rows = (B + kRows - 1) / kRows * kRows;
    for (Index i = 0; i < B; ++i) copy_row(local.F + i * stride, F + i * B, B);
    const Index left = G.columns - b * B;
    const Index columns = left < B ? left : B;
    for (Index i = columns; i < B; ++i)
        for (int s = 0; s < kGroup; ++s) local.G[i * kGroup + s] = 0;
    alignas(64) T S[kGroup][kGroup];
    for (Index n = 0; n < G.rows; n += kGroup) {
        const Index group = G.rows - n < kGroup ? G.rows - n : kGroup;
        take_samples(local.G, G.data + n * G.row_stride + b * B, G.row_stride, group, columns);
        for (Index s = 0; s < group; ++s)
            prefetch(G.data + (n + s) * G.row_stride + (b + 1) * B, B);
        project(local, B, stride);
        gram(S, local, B, stride, m);
        if (!factor(S)) return false;
        solve(S, local.Y, stride);
        subtract(local, rows, stride);
    }
    for (Index i = 0; i < B; ++i) copy_row(F + i * B, local.F + i * stride, B);
    return true;
}

// Position of the first NaN or infinity in the rows of G, or their number of elements if there is
// none. In parallel, because G is usually larger than any cache.
template <typename T>
Index look(const Matrix<const T>& G, Lowest& found, const Context& context) {
    constexpr Index kSpan = 1 << 16;
    const Index spans = (G.columns + kSpan - 1) / kSpan;
    auto body = [&](Index item, int worker) {
        const Index n = item / spans;
        const Index first = item % spans * kSpan;
        const Index last = first + kSpan < G.columns ? first + kSpan : G.columns;
        const T* row = G.data + n * G.row_stride;
        decltype(magnitude_bits(T{})) largest = 0;
        for (Index i = first; i < last; ++i) {
            const auto bits = magnitude_bits(row[i]);
            largest = bits > largest ? bits : largest;
        }
        if (finite_bits(largest)) return;
        Index i = first;
        while (finite_bits(magnitude_bits(row[i]))) ++i;
        found.note(worker, n * G.columns + i);
    };
    const Context quiet{context.threads, nullptr};
    parallel_items(G.rows * spans, quiet, body);
    return found.item();
}

template <typename T>
Info launch(T* F, Index blocks, Index B, AnyMatrix any, double m, const Context& context) {
    const Matrix<const T> G{static_cast<const T*>(any.data), any.rows, any.columns, any.row_stride,
                            1};
    const Index stride = padded<T>(B);
    const Index rows = (B + kRows - 1) / kRows * kRows;
    Index elements = 0;
    if (__builtin_mul_overflow(rows + 2 * kGroup, stride, &elements))
        return {Status::out_of_memory, 0};
    Scratch scratch(context.threads, elements * static_cast<Index>(sizeof(T)));
    const Index none = G.rows * G.columns;
    Lowest found(context.threads, none), failed(context.threads, blocks);
    if (!scratch.ok() || !found.ok() || !failed.ok()) return {Status::out_of_memory, 0};
    const Index bad = look(G, found, context);
    if (bad < none) return {Status::not_finite, bad};
    const auto bytes = static_cast<std::size_t>(elements) * sizeof(T);
    for (int w = 0; w < context.threads; ++w) std::memset(scratch.of<T>(w), 0, bytes);
    auto body = [&](Index item, int worker) {
        T* base = scratch.of<T>(worker);
        const Local<T> local{base, base + rows * stride, base + (rows + kGroup) * stride};
        const Index end = (item + 1) * kRun < blocks ? (item + 1) * kRun : blocks;
        for (Index b = item * kRun; b < end; ++b)
            if (!update_block(F + b * B * B, G, b, B, static_cast<T>(m), local)) {
                failed.note(worker, b);
                std::memset(base, 0, bytes);  // the failure must not reach the next block
            }
    };
    if (!parallel_items((blocks + kRun - 1) / kRun, context, body)) return {Status::interrupted, 0};
    const Index lowest = failed.item();
    return {lowest < blocks ? Status::not_positive : Status::ok, lowest < blocks ? lowest : 0};
}

}  // namespace

Info inverse_update(void* F, Dtype dtype, Index blocks, Index B, AnyMatrix G, double m,
                    const Context& context) {
    switch (dtype) {
        case Dtype::f64:
            return launch(static_cast<double*>(F), blocks, B, G, m, context);
        case Dtype::f32:
            return launch(static_cast<float*>(F), blocks, B, G, m, context);
        default:
            return {Status::unsupported, 0};
    }
}

}  // namespace lobs::LOBS_LEVEL
