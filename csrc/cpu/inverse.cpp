// inverse.cpp: contract in inverse.h.
//
// A run of blocks is one item of work: as many as fit into the second-level cache together, at most
// one per lane. A block is copied once into a padded local square, takes all r samples there in
// groups of kGroup, and is copied back. So F is read and written once, whatever the number of
// samples. Per group and block, with Y = G F and S = m I + Y G^T = U^T U:   Z = U^-T Y,
// F -= Z^T Z.
//
// The small factorizations are chains of square roots and divisions, which wait on one another. So
// those of all blocks of a run are done together, one block to a lane. Of Z^T Z only the tiles on
// and below the diagonal are computed; the others are their mirror images. Columns are rounded up
// to whole vectors, and tiles have 12 sums with AVX2. All this took 400,000 weights in blocks of 50
// from 91 to 65 ms on one core with AVX2, and blocks of 128 from 146 to 122 (51 to 49 and 83 to 80
// with AVX-512). Products take three quarters of it, at nine tenths of their peak.
#include "inverse.h"

#include "parallel.h"
#include "vector.h"

namespace lobs::LOBS_LEVEL {
namespace {

constexpr int kGroup = 16;
// A tile in registers: 16 accumulators in 32 registers; 12 in 16, or 8 where products need one more.
constexpr int kRows = kVectorBytes == 64 ? 8 : 4;
constexpr int kVectors = kVectorBytes == 64 ? 2 : kVectorBytes == 32 ? 3 : kManyRegisters ? 4 : 2;
constexpr Index kRunBytes = kManyRegisters ? 384 << 10 : 192 << 10;  // of a run's local blocks

template <typename T>
constexpr int kGroupVectors = kGroup / kLanes<T> > 0 ? kGroup / kLanes<T> : 1;

// Sizes of a local block, in elements.
template <typename T>
struct Shape {
    Index B, rows, columns, stride;  // columns: whole vectors, and not fewer than rows

    explicit Shape(Index size) : B(size), rows(up(size, kRows)), columns(up(rows, kLanes<T>)) {
        // Rows at multiples of 512 bytes would share an eighth of L1.
        constexpr Index line = 64 / static_cast<Index>(sizeof(T));
        stride = columns % (8 * line) == 0 ? columns + line : columns;
    }
    Index own() const { return (rows + kGroup) * stride; }
    Index run() const {
        const Index most = kRunBytes / (own() * static_cast<Index>(sizeof(T)));
        return most < 1 ? 1 : least(most, kLanes<T>);
    }
    Index shared() const { return B * kGroup + (kGroup + 1) * kGroup * kLanes<T>; }
};

template <typename T>
struct Local {  // one worker's scratch
    T* G;       // (B, kGroup): the group's samples, transposed; zero beyond samples and columns
    T* U;       // (kGroup, kGroup, kLanes): S of every block of the run, then its factor
    T* scale;   // (kGroup, kLanes): 1 / U_jj
    T* blocks;  // of each block F (rows, stride), then Y (kGroup, stride)

    Local(T* memory, const Shape<T>& shape) {
        G = memory;
        U = G + shape.B * kGroup;
        scale = U + kGroup * kGroup * kLanes<T>;
        blocks = scale + kGroup * kLanes<T>;
    }
};

template <int count>
struct Count {
    static constexpr int value = count;
};

// Calls body(first column, Count of vectors) for tiles that cover the columns.
template <typename T, typename Body>
LOBS_INLINE void each_tile(Index columns, Body&& body) {
    Index j = 0;
    while (j < columns) {
        const Index left = (columns - j) / kLanes<T>;
        const Index take = left == 4 && kVectors == 3 ? 2 : least(left, kVectors);
        if (kVectors >= 4 && take == 4)
            body(j, Count<4>{});
        else if (kVectors >= 3 && take == 3)
            body(j, Count<3>{});
        else if (take == 2)
            body(j, Count<2>{});
        else
            body(j, Count<1>{});
        j += take * kLanes<T>;
    }
}

// Y = G F.
template <typename T>
void project(T* Y, const T* G, const T* F, const Shape<T>& shape) {
    each_tile<T>(shape.columns, [&](Index j, auto count) {
        constexpr int vectors = decltype(count)::value;
        for (int s = 0; s < kGroup; s += kRows) {
            Vector<T> sum[kRows][vectors] = {};
            multiply<T, kRows, vectors>(sum, shape.B, G + s, kGroup, 1, F + j, shape.stride);
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v)
                    store(Y + (s + i) * shape.stride + j + v * kLanes<T>, sum[i][v]);
        }
    });
}

// S[first ..] = Y[first ..] G^T for kCount rows and vectors from .. from + kVectors - 1.
template <int kCount, int kVectors, typename T>
LOBS_INLINE void gram_rows(T (&S)[kGroup][kGroup], int first, int from, const T* Y, const T* G,
                           const Shape<T>& shape) {
    Vector<T> sum[kCount][kVectors] = {};
    multiply<T, kCount, kVectors>(sum, shape.B, Y + first * shape.stride, 1, shape.stride,
                                  G + from * kLanes<T>, kGroup);
    for (int i = 0; i < kCount; ++i)
        for (int v = 0; v < kVectors; ++v) store(&S[first + i][(from + v) * kLanes<T>], sum[i][v]);
}

// S = m I + Y G^T, the upper triangle, into a lane of U.
template <typename T>
void gram(T* U, const T* Y, const T* G, const Shape<T>& shape, T m) {
    constexpr int vectors = kGroupVectors<T>;
    alignas(64) T S[kGroup][kGroup];
    if constexpr (vectors == 2) {  // of rows 8 .. 15, the first half is below the diagonal
        constexpr int rows = kManyRegisters ? 8 : 4;
        for (int s = 0; s < 8; s += rows) gram_rows<rows, 2>(S, s, 0, Y, G, shape);
        gram_rows<8, 1>(S, 8, 1, Y, G, shape);
    } else {
        constexpr int rows = kManyRegisters ? 8 : vectors > 4 ? 1 : vectors > 2 ? 2 : 4;
        for (int s = 0; s < kGroup; s += rows) gram_rows<rows, vectors>(S, s, 0, Y, G, shape);
    }
    for (int i = 0; i < kGroup; ++i)
        for (int k = i; k < kGroup; ++k)
            U[(i * kGroup + k) * kLanes<T>] = i == k ? S[i][k] + m : S[i][k];
}

// U <- the upper factor of every lane. Returns the lanes whose pivots are all positive and finite.
template <typename T>
unsigned factor(T* U, T* scale) {
    constexpr Index row = kGroup * kLanes<T>;
    constexpr T kInfinity = static_cast<T>(__builtin_inf());
    Mask<T> good = Vector<T>{} == Vector<T>{};
    for (int j = 0; j < kGroup; ++j) {
        T* const u = U + j * row;
        T* const own = scale + j * kLanes<T>;
        const Vector<T> pivot = load(u + j * kLanes<T>);
        good &= (pivot > 0) & (pivot < kInfinity);
        for (int l = 0; l < kLanes<T>; ++l) own[l] = 1 / root(u[j * kLanes<T> + l]);
        const Vector<T> by = load(own);
        for (int k = j; k < kGroup; ++k) store(u + k * kLanes<T>, load(u + k * kLanes<T>) * by);
        for (int i = j + 1; i < kGroup; ++i) {
            const Vector<T> f = load(u + i * kLanes<T>);
            for (int k = i; k < kGroup; ++k) {
                T* const at = U + i * row + k * kLanes<T>;
                store(at, load(at) - f * load(u + k * kLanes<T>));
            }
        }
    }
    return bits_of(good);
}

// Y <- U^-T Y, for the factor in a lane of U.
template <typename T>
void solve(T* Y, const T* U, const T* scale, const Shape<T>& shape) {
    each_tile<T>(shape.columns, [&](Index j, auto count) {
        substitute<T, decltype(count)::value>(Y + j, shape.stride, kGroup, U, kGroup * kLanes<T>,
                                              kLanes<T>, scale, kLanes<T>);
    });
}

// out (4 x 4) = the transpose of in.
template <typename T>
LOBS_INLINE void transpose_four(T* out, Index out_stride, const T* in, Index in_stride) {
    typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
    const Four a = *reinterpret_cast<const Four*>(in);
    const Four b = *reinterpret_cast<const Four*>(in + in_stride);
    const Four c = *reinterpret_cast<const Four*>(in + 2 * in_stride);
    const Four d = *reinterpret_cast<const Four*>(in + 3 * in_stride);
    const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    const Four ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Four cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const Four cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    *reinterpret_cast<Four*>(out) = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
    *reinterpret_cast<Four*>(out + out_stride) =
        __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
    *reinterpret_cast<Four*>(out + 2 * out_stride) =
        __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
    *reinterpret_cast<Four*>(out + 3 * out_stride) =
        __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
}

// F -= Z^T Z. Columns are cut into tiles and rows at the same places. Squares on the diagonal are
// computed whole: entries (i, j) and (j, i) sum the same products in the same order. So F stays
// exactly symmetric.
template <typename T>
void subtract(T* F, const T* Z, const Shape<T>& shape) {
    const Index stride = shape.stride;
    each_tile<T>(shape.columns, [&](Index j, auto count) {
        constexpr int vectors = decltype(count)::value;
        for (Index i = j; i < shape.rows; i += kRows) {
            Vector<T> sum[kRows][vectors] = {};
            multiply<T, kRows, vectors>(sum, kGroup, Z + i, stride, 1, Z + j, stride);
            T* const f = F + i * stride + j;
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) {
                    T* const at = f + r * stride + v * kLanes<T>;
                    store(at, load(at) - sum[r][v]);
                }
            if (i < j + vectors * kLanes<T>) continue;
            for (int r = 0; r < kRows; r += 4)
                for (int k = 0; k < vectors * kLanes<T>; k += 4)
                    transpose_four(F + (j + k) * stride + i + r, stride, f + r * stride + k,
                                   stride);
        }
    });
}

// A block needs a short segment of each sample, which is a long row: the hardware does not prefetch
// that, so this asks for the next block's segment now. (20,000 blocks of 50 with 64 samples, one
// core: 390 ms without this, without runs and with a second copy of the samples; 343 ms after.)
template <typename T>
LOBS_INLINE void prefetch(const T* p, Index count) {
    for (Index i = 0; i < count; i += static_cast<Index>(64 / sizeof(T))) __builtin_prefetch(p + i);
}

// The factor of a block (B, B) that is a multiple of the identity, as every inverse begins; else 0.
template <typename T>
T multiple_of_identity(const T* F, Index B) {
    const T factor = F[0];
    for (Index i = 0; i < B; ++i) {
        const T* const row = F + i * B;
        decltype(magnitude_bits(T{})) others = 0;
        for (Index j = 0; j < i; ++j) others |= magnitude_bits(row[j]);
        for (Index j = i + 1; j < B; ++j) others |= magnitude_bits(row[j]);
        if (row[i] != factor || others != 0) return 0;
    }
    return factor;
}

// Y = factor * G for `group` rows: G F without its product where F is that multiple of the identity.
// (A million weights, 64 samples, one core with AVX2: blocks of 50 from 206 to 199 ms, blocks of 128
// from 390 to 355.)
template <typename T>
void scale_samples(T* Y, const T* rows, Index row_stride, Index group, Index columns, T factor,
                   const Shape<T>& shape) {
    for (Index s = 0; s < kGroup; ++s) {
        T* const y = Y + s * shape.stride;
        const Index count = s < group ? columns : 0;
        for (Index i = 0; i < count; ++i) y[i] = factor * rows[s * row_stride + i];
        for (Index i = count; i < shape.columns; ++i) y[i] = 0;
    }
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
    Index s = 0;
    for (; s + 4 <= group; s += 4) {
        const T* row = rows + s * row_stride;
        Index i = 0;
        for (; i + 4 <= columns; i += 4)
            transpose_four(out + i * kGroup + s, kGroup, row + i, row_stride);
        for (; i < columns; ++i)
            for (Index r = 0; r < 4; ++r) out[i * kGroup + s + r] = row[r * row_stride + i];
    }
    for (; s < kGroup; ++s)
        for (Index i = 0; i < columns; ++i)
            out[i * kGroup + s] = s < group ? rows[s * row_stride + i] : T(0);
}

// Updates blocks first .. first + count - 1. Returns those whose pivots stayed positive, a bit for
// each; the others are untouched. The padding of the local blocks is zero on entry and stays zero,
// because zero columns of G and F give zero columns of Z.
template <typename T>
unsigned update_run(T* F, const Matrix<const T>& G, Index first, Index count, T m,
                    const Shape<T>& shape, const Local<T>& local) {
    const Index B = shape.B;
    unsigned good = (1u << count) - 1;
    T multiples[kLanes<T>];
    for (Index lane = 0; lane < count; ++lane) {
        const T* const f = F + (first + lane) * B * B;
        multiples[lane] = multiple_of_identity(f, B);
        for (Index i = 0; i < B; ++i)
            copy_row(local.blocks + lane * shape.own() + i * shape.stride, f + i * B, B);
    }
    for (Index n = 0; n < G.rows && good != 0; n += kGroup) {
        const Index group = least(G.rows - n, kGroup);
        for (Index lane = 0; lane < count; ++lane) {
            const Index from = (first + lane) * B;
            const Index columns = least(G.columns - from, B);
            const T* const rows = G.data + n * G.row_stride + from;
            take_samples(local.G, rows, G.row_stride, group, columns);
            for (Index i = columns * kGroup; i < B * kGroup; ++i) local.G[i] = 0;
            for (Index s = 0; s < group; ++s) prefetch(rows + s * G.row_stride + B, B);
            T* const f = local.blocks + lane * shape.own();
            T* const y = f + shape.rows * shape.stride;
            if (n == 0 && multiples[lane] != 0)
                scale_samples(y, rows, G.row_stride, group, columns, multiples[lane], shape);
            else
                project(y, local.G, f, shape);
            gram(local.U + lane, y, local.G, shape, m);
        }
        good &= factor(local.U, local.scale);
        for (Index lane = 0; lane < count; ++lane) {
            if ((good >> lane & 1) == 0) continue;
            T* const f = local.blocks + lane * shape.own();
            T* const y = f + shape.rows * shape.stride;
            solve(y, local.U + lane, local.scale + lane, shape);
            subtract(f, y, shape);
        }
    }
    for (Index lane = 0; lane < count; ++lane)
        for (Index i = 0; i < B && (good >> lane & 1) != 0; ++i)
            copy_row(F + ((first + lane) * B + i) * B,
                     local.blocks + lane * shape.own() + i * shape.stride, B);
    return good;
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
    const Shape<T> shape(B);
    const Index run = least(shape.run(), blocks);
    Scratch scratch(context.threads,
                    (shape.shared() + run * shape.own()) * static_cast<Index>(sizeof(T)));
    const Index none = G.rows * G.columns;
    Lowest found(context.threads, none), failed(context.threads, blocks);
    if (!scratch.ok() || !found.ok() || !failed.ok()) return {Status::out_of_memory, 0};
    const Index bad = look(G, found, context);
    if (bad < none) return {Status::not_finite, bad};
    const auto clear = [&](int worker) {
        std::memset(scratch.of<T>(worker), 0,
                    static_cast<std::size_t>(shape.shared() + run * shape.own()) * sizeof(T));
    };
    for (int w = 0; w < context.threads; ++w) clear(w);
    auto body = [&](Index item, int worker) {
        const Local<T> local(scratch.of<T>(worker), shape);
        const Index first = item * run, count = least(run, blocks - first);
        const unsigned good = update_run(F, G, first, count, static_cast<T>(m), shape, local);
        if (good == (1u << count) - 1) return;
        failed.note(worker, first + __builtin_ctz(~good));
        clear(worker);  // the failure must not reach the padding of the next run
    };
    if (!parallel_items((blocks + run - 1) / run, context, body)) return {Status::interrupted, 0};
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
