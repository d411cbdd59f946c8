// hessian.cpp: contract in hessian.h.
//
// H is divided into tiles of kTile x kTile. A tile on or below the diagonal is one item of work, so
// no two threads write the same number and no sum depends on the thread that computes it. A tile
// packs its own two panels of X: with 192 columns to a side, packing moves one number for every 96
// multiply-adds, which costs less than a barrier would. Within a tile, micro-tiles that lie
// entirely above the diagonal are skipped.
#include "hessian.h"

#include "parallel.h"
#include "vector.h"

namespace lobs::LOBS_LEVEL {
namespace {

// Micro-tile: kRows broadcast values times kVectors vectors: 24 accumulators if there are 32
// registers.
constexpr int kRows = kManyRegisters ? 8 : 4;
template <typename T>
constexpr int kVectors = kManyRegisters || kVectorBytes == 32 ? 3 : 2;
template <typename T>
constexpr int kWidth = kVectors<T> * kLanes<T>;
constexpr Index kTile = 192;  // a multiple of every kRows and kWidth
static_assert(kTile % kRows == 0 && kTile % kWidth<float> == 0 && kTile % kWidth<double> == 0);

template <typename S>
struct Chunk {  // the part of X that one call adds
    const S* data;
    Index rows, columns;
    Index row_stride, column_stride;
    const double* weight;
    bool ones;
};

// ---- scan: are all values finite, and do float32 products stay in range? ------------------------

template <typename S>
struct Magnitude {
    using Bits = decltype(magnitude_bits(to_float(S{})));
    Bits largest;
    Index where;  // first value that is not finite, or -1
};

template <typename S>
Magnitude<S> look(const Chunk<S>& x, Index first, Index last) {
    Magnitude<S> seen{0, -1};
    for (Index n = first; n < last; ++n) {
        if (x.weight != nullptr && x.weight[n] == 0) continue;
        const S* row = x.data + n * x.row_stride;
        typename Magnitude<S>::Bits largest = 0;
        if (x.column_stride == 1) {
            for (Index i = 0; i < x.columns; ++i) {
                const auto bits = magnitude_bits(to_float(row[i]));
                largest = bits > largest ? bits : largest;
            }
        } else {
            for (Index i = 0; i < x.columns; ++i) {
                const auto bits = magnitude_bits(to_float(row[i * x.column_stride]));
                largest = bits > largest ? bits : largest;
            }
        }
        seen.largest = largest > seen.largest ? largest : seen.largest;
        if (finite_bits(largest)) continue;
        Index i = 0;
        while (finite_bits(magnitude_bits(to_float(row[i * x.column_stride])))) ++i;
        seen.where = n * x.columns + i;
        return seen;
    }
    return seen;
}

// A tile reads up to 768 bytes of each row of X, and rows are a page or more apart: the hardware
// does not recognise the pattern. Prefetching eight rows ahead took 8192 x 1024 float32 from 68 to
// 65 ms.
constexpr Index kAhead = 8;

// ---- packing ------------------------------------------------------------------------------------

// Columns first .. first + kTile - 1 of rows n .. n + depth - 1, as groups of kGroup columns:
// out[group][k][kGroup].
template <int kGroup, typename T, typename S>
void pack(T* out, const Chunk<S>& x, Index n, Index depth, Index first, bool weighted) {
    const Index columns = x.columns - first < kTile ? x.columns - first : kTile;
    alignas(64) T row[kTile];
    for (Index i = columns < 0 ? 0 : columns; i < kTile; ++i) row[i] = 0;
    const bool has_ones = x.ones && columns >= 0 && columns < kTile;
    for (Index k = 0; k < depth; ++k) {
        const double t = x.weight != nullptr ? x.weight[n + k] : 1.0;
        if (t == 0) {
            for (Index i = 0; i < kTile; ++i) row[i] = 0;
        } else {
            const S* source = x.data + (n + k) * x.row_stride + first * x.column_stride;
            if (x.column_stride == 1) {
                const char* ahead = reinterpret_cast<const char*>(source + kAhead * x.row_stride);
                for (Index line = 0; line < columns * static_cast<Index>(sizeof(S)); line += 64)
                    __builtin_prefetch(ahead + line);
                for (Index i = 0; i < columns; ++i) row[i] = static_cast<T>(to_float(source[i]));
            } else {
                for (Index i = 0; i < columns; ++i)
                    row[i] = static_cast<T>(to_float(source[i * x.column_stride]));
            }
            if (has_ones) row[columns] = 1;
            if (weighted && t != 1)
                for (Index i = 0; i < kTile; ++i) row[i] *= static_cast<T>(t);
        }
        for (Index g = 0; g < kTile / kGroup; ++g)
            std::memcpy(out + (g * depth + k) * kGroup, row + g * kGroup, kGroup * sizeof(T));
    }
}

// ---- one tile -----------------------------------------------------------------------------------

template <typename T, typename M>
void add_micro_tile(M* H, Index stride, Index i0, Index j0, Index size, Index depth, const T* a,
                    const T* b) {
    Vector<T> accumulator[kRows][kVectors<T>] = {};
    multiply<T, kRows, kVectors<T>>(accumulator, depth, a, kRows, 1, b, kWidth<T>);
    alignas(64) T sum[kRows][kWidth<T>];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors<T>; ++v) store(&sum[i][v * kLanes<T>], accumulator[i][v]);
    if (i0 + kRows <= size && j0 + kWidth<T> - 1 <= i0) {  // entirely inside and below the diagonal
        for (int i = 0; i < kRows; ++i) {
            M* row = H + (i0 + i) * stride + j0;
            for (int j = 0; j < kWidth<T>; ++j) row[j] += static_cast<M>(sum[i][j]);
        }
        return;
    }
    for (int i = 0; i < kRows && i0 + i < size; ++i)
        for (int j = 0; j < kWidth<T> && j0 + j <= i0 + i; ++j)
            H[(i0 + i) * stride + j0 + j] += static_cast<M>(sum[i][j]);
}

template <typename T, typename S, typename M>
void add_tile(M* H, Index stride, const Chunk<S>& x, Index row_tile, Index column_tile,
              T* scratch) {
    const Index size = x.columns + (x.ones ? 1 : 0);
    T* left = scratch;
    T* right = scratch + kTile * kHessianRows;
    for (Index n = 0; n < x.rows; n += kHessianRows) {
        const Index depth = x.rows - n < kHessianRows ? x.rows - n : kHessianRows;
        pack<kRows>(left, x, n, depth, row_tile * kTile, true);
        pack<kWidth<T>>(right, x, n, depth, column_tile * kTile, false);
        for (Index j = 0; j < kTile; j += kWidth<T>) {
            const Index j0 = column_tile * kTile + j;
            if (j0 >= size) break;
            for (Index i = 0; i < kTile; i += kRows) {
                const Index i0 = row_tile * kTile + i;
                if (i0 >= size) break;
                if (i0 + kRows <= j0) continue;  // entirely above the diagonal
                add_micro_tile<T, M>(H, stride, i0, j0, size, depth, left + i * depth,
                                     right + j * depth);
            }
        }
    }
}

// A narrow H has too few tiles for all threads, and each takes long. Then the rows of X are cut
// into segments, which are summed separately and added in order at the end. The number of segments
// depends on the sizes alone, never on the threads.
constexpr Index kFewTiles = 8;
constexpr Index kSegmentRows = 4096;
constexpr Index kSegments = 16;

Index segments_of(Index tile_items, Index rows) {
    if (tile_items >= kFewTiles) return 1;
    const Index wanted = (rows + kSegmentRows - 1) / kSegmentRows;
    return wanted < kSegments ? wanted : kSegments;
}

template <typename S>
Chunk<S> segment_of(const Chunk<S>& x, Index segment, Index rows) {
    const Index first = segment * rows;
    const Index left = x.rows - first;
    Chunk<S> part = x;
    part.data += first * x.row_stride;
    part.rows = left < 0 ? 0 : (left < rows ? left : rows);
    if (x.weight != nullptr) part.weight += first;
    return part;
}

void clear_tile(double* part, Index size, Index row_tile, Index column_tile) {
    for (Index i = row_tile * kTile; i < size && i < (row_tile + 1) * kTile; ++i)
        for (Index j = column_tile * kTile; j <= i && j < (column_tile + 1) * kTile; ++j)
            part[i * size + j] = 0;
}

template <typename T, typename S, typename M>
Info accumulate(M* H, Index stride, const Chunk<S>& x, const Context& context) {
    const Index size = x.columns + (x.ones ? 1 : 0);
    const Index tiles = (size + kTile - 1) / kTile;
    const Index tile_items = tiles * (tiles + 1) / 2;
    const Index segments = segments_of(tile_items, x.rows);
    const Index rows =
        ((x.rows + segments - 1) / segments + kHessianRows - 1) / kHessianRows * kHessianRows;
    Scratch scratch(context.threads, static_cast<Index>(sizeof(T)) * 2 * kTile * kHessianRows);
    Scratch parts(segments, segments > 1 ? size * size * static_cast<Index>(sizeof(double)) : 64);
    if (!scratch.ok() || !parts.ok()) return {Status::out_of_memory, 0};
    auto body = [&](Index item, int worker) {
        const Index segment = item / tile_items;
        const Index tile = item % tile_items;
        Index row_tile = 0;
        while ((row_tile + 1) * (row_tile + 2) / 2 <= tile) ++row_tile;
        const Index column_tile = tile - row_tile * (row_tile + 1) / 2;
        T* panels = scratch.of<T>(worker);
        if (segments == 1) {
            add_tile<T>(H, stride, x, row_tile, column_tile, panels);
            return;
        }
        double* part = parts.of<double>(static_cast<int>(segment));
        clear_tile(part, size, row_tile, column_tile);
        add_tile<T>(part, size, segment_of(x, segment, rows), row_tile, column_tile, panels);
    };
    if (!parallel_items(segments * tile_items, context, body)) return {Status::interrupted, 0};
    if (segments == 1) return {Status::ok, 0};
    for (Index i = 0; i < size; ++i)
        for (Index j = 0; j <= i; ++j) {
            double sum = 0;
            for (int s = 0; s < static_cast<int>(segments); ++s)
                sum += parts.of<double>(s)[i * size + j];
            H[i * stride + j] += static_cast<M>(sum);
        }
    return {Status::ok, 0};
}

// ---- launchers ----------------------------------------------------------------------------------

LOBS_INLINE double magnitude(std::uint32_t bits) { return static_cast<double>(as_float(bits)); }
LOBS_INLINE double magnitude(std::uint64_t bits) {
    double d;
    std::memcpy(&d, &bits, sizeof d);
    return d;
}

template <typename S, typename M>
Info launch(AnyMatrix H, AnyMatrix X, const double* t, bool ones, const Context& context) {
    const Chunk<S> x{
        static_cast<const S*>(X.data), X.rows, X.columns, X.row_stride, X.column_stride, t, ones};
    // The scan costs one pass over X at memory speed. It is what keeps H untouched on failure and
    // what chooses the precision.
    constexpr Index kLook = 1024;
    const Index looks = (x.rows + kLook - 1) / kLook;
    Scratch seen(1, looks * static_cast<Index>(sizeof(Magnitude<S>)));
    if (!seen.ok()) return {Status::out_of_memory, 0};
    Magnitude<S>* part = seen.of<Magnitude<S>>(0);
    auto body = [&](Index item, int) {
        const Index last = (item + 1) * kLook;
        part[item] = look(x, item * kLook, last < x.rows ? last : x.rows);
    };
    if (!parallel_items(looks, context, body)) return {Status::interrupted, 0};
    double largest = 0;
    for (Index p = 0; p < looks; ++p) {
        if (part[p].where >= 0) return {Status::not_finite, part[p].where};
        const double here = magnitude(part[p].largest);
        largest = here > largest ? here : largest;
    }
    double heaviest = t == nullptr ? 1 : 0;
    for (Index n = 0; t != nullptr && n < x.rows; ++n) heaviest = t[n] > heaviest ? t[n] : heaviest;
    M* out = static_cast<M*>(H.data);
    constexpr bool wide = sizeof(S) == sizeof(double);
    // float32 has to hold x, t, t * x, and 256 products t * x * x.
    const auto fits = [](double v) { return v == 0 || (v > 0x1p-100 && v < 0x1p112); };
    const bool in_range = fits(largest) && fits(heaviest) && fits(largest * heaviest) &&
                          fits(largest * heaviest * largest);
    if constexpr (!wide) {
        if (in_range) return accumulate<float>(out, H.row_stride, x, context);
    }
    return accumulate<double>(out, H.row_stride, x, context);
}

template <typename M>
Info launch(AnyMatrix H, AnyMatrix X, const double* t, bool ones, const Context& context) {
    switch (X.dtype) {
        case Dtype::f64:
            return launch<double, M>(H, X, t, ones, context);
        case Dtype::f32:
            return launch<float, M>(H, X, t, ones, context);
        case Dtype::f16:
            return launch<Half, M>(H, X, t, ones, context);
        case Dtype::bf16:
            return launch<BFloat, M>(H, X, t, ones, context);
    }
    return {Status::unsupported, 0};
}

}  // namespace

Info hessian_accumulate(AnyMatrix H, AnyMatrix X, const double* t, bool ones,
                        const Context& context) {
    switch (H.dtype) {
        case Dtype::f64:
            return launch<double>(H, X, t, ones, context);
        case Dtype::f32:
            return launch<float>(H, X, t, ones, context);
        default:
            return {Status::unsupported, 0};
    }
}

}  // namespace lobs::LOBS_LEVEL
