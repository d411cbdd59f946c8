// hessian.cpp: contract in hessian.h.
//
// H is divided into tiles of kTile x kTile. A tile on or below the diagonal is one item of work, so
// no two threads write the same number and no sum depends on the thread that computes it. Before
// that, a stretch of the rows of X is packed once for all tiles, in two forms: as the left operand,
// in groups of kRows columns with the weights applied, and as the right one, in groups of kWidth.
// Within a tile, micro-tiles that lie entirely above the diagonal are skipped. (8192 x 1024 float32
// on one core: 91 ms with AVX2 and 56 with AVX-512; 132 and 60 when each tile packed for itself, row
// by row.)
#include "hessian.h"

#include "parallel.h"
#include "vector.h"

namespace lobs::LOBS_LEVEL {
namespace {

// Micro-tile: kRows broadcast values times kVectors vectors: 24 accumulators in 32 registers, or 12
// in 16. There 6 x 2 leaves 16 KB of the right operand in L1, where 4 x 3 would take 24 KB.
constexpr int kRows = kManyRegisters ? 8 : 6;
constexpr int kVectors = kManyRegisters ? 3 : 2;
template <typename T>
constexpr int kWidth = kVectors * kLanes<T>;
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

// ---- packing ------------------------------------------------------------------------------------

// A panel has up to 768 bytes of each row of X, and rows are a page or more apart: the hardware does
// not recognise the pattern.
constexpr Index kAhead = 8;

// Rows that are converted before they are spread over the groups of a panel. Groups are often a
// multiple of 4 KB apart, and lines at such distances fall out of L1. So a group is given all the
// lines of kBlock rows at a time.
constexpr Index kBlock = 8;

constexpr Index kPanel = kTile * kHessianRows;  // elements of a packed panel

template <typename T, typename S>
LOBS_INLINE void read_row(T* row, const Chunk<S>& x, Index n, Index first, Index columns) {
    const S* source = x.data + n * x.row_stride + first * x.column_stride;
    if (x.column_stride == 1) {
        const char* ahead = reinterpret_cast<const char*>(source + kAhead * x.row_stride);
        for (Index line = 0; line < columns * static_cast<Index>(sizeof(S)); line += 64)
            __builtin_prefetch(ahead + line);
        for (Index i = 0; i < columns; ++i) row[i] = static_cast<T>(to_float(source[i]));
    } else {
        for (Index i = 0; i < columns; ++i)
            row[i] = static_cast<T>(to_float(source[i * x.column_stride]));
    }
}

// out[group][row][kGroup], with `depth` rows to a group.
template <int kGroup, typename T>
LOBS_INLINE void spread(T* out, const T (&rows)[kBlock][kTile], Index count, Index width,
                        Index depth) {
    for (Index g = 0; g * kGroup < width; ++g)
        for (Index r = 0; r < count; ++r)
            std::memcpy(out + (g * depth + r) * kGroup, rows[r] + g * kGroup, kGroup * sizeof(T));
}

// Columns first .. first + kTile - 1 of rows n .. n + depth - 1, as both operands.
template <typename T, typename S>
void pack(T* left, T* right, const Chunk<S>& x, Index n, Index depth, Index first) {
    const Index columns = least(x.columns - first, kTile);
    const bool has_ones = x.ones && columns < kTile;
    const Index width = columns + (has_ones ? 1 : 0);
    alignas(64) T rows[kBlock][kTile];
    for (Index r = 0; r < kBlock; ++r)
        for (Index i = columns; i < kTile; ++i) rows[r][i] = has_ones && i == columns ? T(1) : T(0);
    for (Index k = 0; k < depth; k += kBlock) {
        const Index count = least(depth - k, kBlock);
        const double* t = x.weight == nullptr ? nullptr : x.weight + n + k;
        for (Index r = 0; r < count; ++r) {
            if (t != nullptr && t[r] == 0)  // may hold anything
                for (Index i = 0; i < columns; ++i) rows[r][i] = 0;
            else
                read_row(rows[r], x, n + k + r, first, columns);
        }
        spread<kWidth<T>>(right + k * kWidth<T>, rows, count, width, depth);
        for (Index r = 0; r < count && t != nullptr; ++r)
            if (t[r] != 1)
                for (Index i = 0; i < width; ++i) rows[r][i] *= static_cast<T>(t[r]);
        spread<kRows>(left + k * kRows, rows, count, width, depth);
        if (t != nullptr && has_ones)
            for (Index r = 0; r < count; ++r) rows[r][columns] = 1;
    }
}

// ---- one tile -----------------------------------------------------------------------------------

template <typename T, typename M>
void add_micro_tile(M* H, Index stride, Index i0, Index j0, Index size, Index depth, const T* a,
                    const T* b) {
    const bool whole =
        i0 + kRows <= size && j0 + kWidth<T> - 1 <= i0;  // inside, below the diagonal
    if (whole)                                           // H is needed once the sums are there
        for (int i = 0; i < kRows; ++i)
            for (Index line = 0; line < kWidth<T>; line += 64 / static_cast<Index>(sizeof(M)))
                __builtin_prefetch(H + (i0 + i) * stride + j0 + line, 1);
    Vector<T> accumulator[kRows][kVectors] = {};
    multiply<T, kRows, kVectors>(accumulator, depth, a, kRows, 1, b, kWidth<T>);
    alignas(64) T sum[kRows][kWidth<T>];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) store(&sum[i][v * kLanes<T>], accumulator[i][v]);
    if (whole) {
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

// Adds `depth` rows. A micro-panel of the right operand stays in L1 while the left ones pass.
template <typename T, typename M>
void add_tile(M* H, Index stride, Index size, Index row_tile, Index column_tile, Index depth,
              const T* left, const T* right) {
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

constexpr Index kPacked = Index{1} << 24;  // bytes of packed panels that are worth their sharing

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
    const Index rows = up((x.rows + segments - 1) / segments, kHessianRows);  // of a segment
    // Chunks of kHessianRows rows of every segment that are packed at a time.
    const Index bytes = 2 * kPanel * tiles * segments * static_cast<Index>(sizeof(T));
    const Index together = least(rows / kHessianRows, bytes < kPacked ? kPacked / bytes : 1);
    Scratch packed(1, together * bytes);
    Scratch parts(segments, segments > 1 ? size * size * static_cast<Index>(sizeof(double)) : 64);
    if (!packed.ok() || !parts.ok()) return {Status::out_of_memory, 0};
    const auto left = [&](Index segment, Index chunk, Index tile) {
        return packed.of<T>(0) + ((segment * together + chunk) * tiles + tile) * 2 * kPanel;
    };
    for (Index from = 0; from < rows; from += together * kHessianRows) {
        const auto first_row = [&](Index segment, Index chunk) {
            return segment * rows + from + chunk * kHessianRows;
        };
        const auto depth_at = [&](Index n) { return least(x.rows - n, kHessianRows); };
        const Index chunks = least(together, (rows - from) / kHessianRows);
        auto pack_one = [&](Index item, int) {
            const Index tile = item % tiles, chunk = item / tiles % chunks;
            const Index segment = item / tiles / chunks, n = first_row(segment, chunk);
            T* const to = left(segment, chunk, tile);
            if (n < x.rows) pack(to, to + kPanel, x, n, depth_at(n), tile * kTile);
        };
        if (!parallel_items(segments * chunks * tiles, context, pack_one))
            return {Status::interrupted, 0};
        auto add_one = [&](Index item, int) {
            const Index segment = item / tile_items, tile = item % tile_items;
            Index row_tile = 0;
            while ((row_tile + 1) * (row_tile + 2) / 2 <= tile) ++row_tile;
            const Index column_tile = tile - row_tile * (row_tile + 1) / 2;
            double* const part = parts.of<double>(static_cast<int>(segment));
            if (segments > 1 && from == 0) clear_tile(part, size, row_tile, column_tile);
            for (Index chunk = 0; chunk < chunks; ++chunk) {
                const Index n = first_row(segment, chunk);
                if (n >= x.rows) return;
                const T* const a = left(segment, chunk, row_tile);
                const T* const b = left(segment, chunk, column_tile) + kPanel;
                if (segments > 1)
                    add_tile(part, size, size, row_tile, column_tile, depth_at(n), a, b);
                else
                    add_tile(H, stride, size, row_tile, column_tile, depth_at(n), a, b);
            }
        };
        if (!parallel_items(segments * tile_items, context, add_one))
            return {Status::interrupted, 0};
    }
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
