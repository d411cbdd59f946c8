// sweep.cpp: contract in sweep.h.
//
// A slab of rows is one item of work. It is transposed into scratch, so that a vector holds one
// column of several rows, and every step, a division included, works on full vectors. Columns form
// panels of kPanel. A panel stays in registers while it takes the errors of all columns before it,
// through the micro-kernel of the products, and while its own columns go one after another. So a
// weight is loaded and stored once, and only errors are read repeatedly. A sum starts from the
// weight and takes the errors by rising column: the operations of the sequential loop in its order.
// (2048 rows, B = 128, float32, one core with AVX-512: 0.65 ms, of which 0.25 for the products and
// the rest for transposes and memory.)
#include "sweep.h"

#include "parallel.h"
#include "vector.h"

namespace lobs::LOBS_LEVEL {
namespace {

// The panel in registers: 16 accumulators in 32 registers; 12 in 16, or 8 where products need one
// more. (12 instead of 8 with AVX2: 2048 rows, B = 128, 2:4 from 0.50 to 0.47 ms, half from 0.38 to
// 0.36.) kPanel is a multiple of 4, so that groups of 4 fill panels.
constexpr int kPanel = kManyRegisters ? 8 : 4;
constexpr int kVectors = kVectorBytes == 32 ? 3 : 2;
template <typename T>
constexpr int kStep = kVectors * kLanes<T>;  // rows that are swept together
template <typename T>
constexpr int kSlab = kVectors == 3   ? 48  // bytes are transposed 16 by 16
                      : kStep<T> < 16 ? 16
                                      : kStep<T>;
static_assert(kSlab<float> % kStep<float> == 0 && kSlab<double> % kStep<double> == 0);

constexpr int kGoes = static_cast<int>(WeightState::goes_first);
constexpr int kStays = static_cast<int>(WeightState::stays);

// ---- vectors of integers ------------------------------------------------------------------------

template <typename T>
struct BitsOf;
template <>
struct BitsOf<float> {
    using lane = std::int32_t;
    typedef lane type __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct BitsOf<double> {
    using lane = std::int64_t;
    typedef lane type __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <typename T>
using Bits = typename BitsOf<T>::type;  // a lane for every lane of Vector<T>
template <typename T>
using Lane = typename BitsOf<T>::lane;

template <typename T>
LOBS_INLINE Bits<T> load_bits(const Lane<T>* p) {
    return *reinterpret_cast<const Bits<T>*>(p);
}

template <typename T>
LOBS_INLINE void store_bits(Lane<T>* p, Bits<T> v) {
    *reinterpret_cast<Bits<T>*>(p) = v;
}

// ---- transposes ---------------------------------------------------------------------------------

template <typename T>
struct TileRowOf {
    using type = Vector<T>;
};
template <>
struct TileRowOf<unsigned char> {
    typedef unsigned char type __attribute__((vector_size(16), aligned(1), may_alias));
};
template <typename T>
using TileRow = typename TileRowOf<T>::type;  // one row of a square tile
template <typename T>
constexpr int kSide = static_cast<int>(sizeof(TileRow<T>) / sizeof(T));

// The lower halves of a and b, interleaved lane by lane.
template <int n, typename V>
LOBS_INLINE V riffle_low(V a, V b) {
    static_assert(n == 2 || n == 4 || n == 8 || n == 16);
    if constexpr (n == 2)
        return __builtin_shufflevector(a, b, 0, 2);
    else if constexpr (n == 4)
        return __builtin_shufflevector(a, b, 0, 4, 1, 5);
    else if constexpr (n == 8)
        return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    else
        return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                       23);
}

template <int n, typename V>
LOBS_INLINE V riffle_high(V a, V b) {
    if constexpr (n == 2)
        return __builtin_shufflevector(a, b, 1, 3);
    else if constexpr (n == 4)
        return __builtin_shufflevector(a, b, 2, 6, 3, 7);
    else if constexpr (n == 8)
        return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    else
        return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                       15, 31);
}

// Interleaves the first half of the tile with the second, entry by entry, log2(n) times. Each time
// rotates the bits of every entry's place, row before column, by one, until row and column have
// changed places.
template <typename T>
LOBS_INLINE void transpose(TileRow<T> (&tile)[kSide<T>]) {
    constexpr int n = kSide<T>;
#pragma GCC unroll 4
    for (int turned = 1; turned < n; turned *= 2) {
        TileRow<T> next[n];
#pragma GCC unroll 16
        for (int i = 0; i < n / 2; ++i) {
            next[2 * i] = riffle_low<n>(tile[i], tile[i + n / 2]);
            next[2 * i + 1] = riffle_high<n>(tile[i], tile[i + n / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) tile[i] = next[i];
    }
}

// out (columns, slab) = the transpose of `rows` <= slab rows. The last row replaces missing ones;
// the results for those are in range and never read. The last tile overlaps the one before it
// instead of being partial.
template <typename T>
void take(T* out, Index slab, const T* in, Index stride, Index rows, Index columns) {
    constexpr int n = kSide<T>;
    for (Index r = 0; r < slab; r += n) {
        const T* row[n];
        for (int i = 0; i < n; ++i) row[i] = in + (r + i < rows ? r + i : rows - 1) * stride;
        if (columns < n) {
            for (Index j = 0; j < columns; ++j)
                for (int i = 0; i < n; ++i) out[j * slab + r + i] = row[i][j];
            continue;
        }
        for (Index first = 0; first < columns; first += n) {
            const Index j = first + n <= columns ? first : columns - n;
            TileRow<T> tile[n];
#pragma GCC unroll 16
            for (int i = 0; i < n; ++i) tile[i] = *reinterpret_cast<const TileRow<T>*>(row[i] + j);
            transpose<T>(tile);
#pragma GCC unroll 16
            for (int i = 0; i < n; ++i)
                *reinterpret_cast<TileRow<T>*>(out + (j + i) * slab + r) = tile[i];
        }
    }
}

// The inverse of take, for `rows` rows.
template <typename T>
void give(T* out, Index stride, const T* in, Index slab, Index rows, Index columns) {
    constexpr int n = kSide<T>;
    for (Index r = 0; r < rows; r += n) {
        const int count = static_cast<int>(rows - r < n ? rows - r : n);
        T* row = out + r * stride;
        if (columns < n) {
            for (int i = 0; i < count; ++i)
                for (Index j = 0; j < columns; ++j) row[i * stride + j] = in[j * slab + r + i];
            continue;
        }
        for (Index first = 0; first < columns; first += n) {
            const Index j = first + n <= columns ? first : columns - n;
            TileRow<T> tile[n];
#pragma GCC unroll 16
            for (int i = 0; i < n; ++i)
                tile[i] = *reinterpret_cast<const TileRow<T>*>(in + (j + i) * slab + r);
            transpose<T>(tile);
#pragma GCC unroll 16
            for (int i = 0; i < n; ++i)
                if (i < count) *reinterpret_cast<TileRow<T>*>(row + i * stride + j) = tile[i];
        }
    }
}

template <typename Out, typename In>
void convert(Out* out, const In* in, Index count) {
    for (Index i = 0; i < count; ++i) out[i] = static_cast<Out>(in[i]);
}

// ---- one slab -----------------------------------------------------------------------------------

// Shared by all slabs. No panel crosses the end of a unit. A unit is a panel of whole groups, or a
// group of several panels; without groups it is the whole block.
template <typename T>
struct Plan {
    Index B, group, per_group, unit;
    const T* pivots;  // (B): U_jj
    const T* panels;  // per panel (B, kPanel): -U[k, first + i], zero beyond the panel's width
};

// Scratch of one worker, column by column of the slab's rows. Codes (values of WeightState) are in
// lanes as wide as weights: where they are used, compilers turn a conversion from bytes into scalar
// code, which took 0.12 ms of the 0.85 for 2:4.
template <typename T>
struct Slab {
    T* w;            // (B, kSlab)
    T* e;            // (B, kSlab)
    Lane<T>* codes;  // (B, kSlab): gone
    Lane<T>* keys;   // (group, kLanes)
};

template <typename T>
LOBS_INLINE Index panel_width(const Plan<T>& plan, Index first) {
    const Index unit_end = (first / plan.unit + 1) * plan.unit;
    const Index left = (unit_end < plan.B ? unit_end : plan.B) - first;
    return left < kPanel ? left : kPanel;
}

// Decides for the group that starts at `first`. |w| / U_jj orders like its square, but neither
// overflows nor loses small scores. Its bits order like the value and leave room for the codes: a
// key below zero goes first, the top key stays. The rank of a column is the number of columns that
// go before it.
template <typename T>
void choose(const Plan<T>& plan, const Slab<T>& slab, Index first, Index row) {
    constexpr auto top = static_cast<Lane<T>>(sizeof(T) == 4 ? INT32_MAX : INT64_MAX);
    constexpr Bits<T> none = {};
    const auto per_group = static_cast<Lane<T>>(plan.per_group);
    const Index M = plan.group;
    for (int v = 0; v < kVectors; ++v) {
        const Index at = first * kSlab<T> + row + v * kLanes<T>;
        for (Index i = 0; i < M; ++i) {
            const Vector<T> score = load(slab.w + at + i * kSlab<T>) / plan.pivots[first + i];
            const Bits<T> code = load_bits<T>(slab.codes + at + i * kSlab<T>);
            Bits<T> key = reinterpret_cast<Bits<T>>(score) & top;
            key = code == kGoes ? none - 1 : key;
            key = code == kStays ? none + top : key;
            store_bits<T>(slab.keys + i * kLanes<T>, key);
        }
        for (Index i = 0; i < M; ++i) {
            const Bits<T> key = load_bits<T>(slab.keys + i * kLanes<T>);
            Bits<T> rank = none;
            for (Index k = 0; k < i; ++k) rank -= load_bits<T>(slab.keys + k * kLanes<T>) <= key;
            for (Index k = i + 1; k < M; ++k) rank -= load_bits<T>(slab.keys + k * kLanes<T>) < key;
            const Bits<T> goes = (key < 0) | ((rank < per_group) & (key < top));
            store_bits<T>(slab.codes + at + i * kSlab<T>, goes & kGoes);
        }
    }
}

// w = the panel's weights minus the effect of the errors of columns from .. to - 1.
template <typename T>
LOBS_INLINE void take_errors(Vector<T> (&w)[kPanel][kVectors], const Slab<T>& slab, const T* panel,
                             Index first, Index width, Index from, Index to, Index row) {
    const T* source = slab.w + first * kSlab<T> + row;
#pragma GCC unroll 8
    for (int i = 0; i < kPanel; ++i)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v)
            w[i][v] = i < width ? load(source + i * kSlab<T> + v * kLanes<T>) : Vector<T>{};
    multiply<T, kPanel, kVectors>(w, to - from, panel + from * kPanel, kPanel, 1,
                                  slab.e + from * kSlab<T> + row, kSlab<T>);
}

// Puts columns from .. end - 1 of the panel into the slab.
template <typename T>
LOBS_INLINE void put(const Vector<T> (&w)[kPanel][kVectors], const Slab<T>& slab, Index first,
                     int from, Index end, Index row) {
#pragma GCC unroll 8
    for (int i = from; i < kPanel; ++i)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v)
            if (i < end) store(slab.w + (first + i) * kSlab<T> + row + v * kLanes<T>, w[i][v]);
}

// Brings the panel up to date with columns 0 .. to - 1.
template <typename T>
void update_panel(const Slab<T>& slab, const T* panel, Index first, Index width, Index to,
                  Index row) {
    Vector<T> w[kPanel][kVectors];
    take_errors(w, slab, panel, first, width, 0, to, row);
    put<T>(w, slab, first, 0, width, row);
}

// Brings the panel up to date, which it is with columns before `from`, and sweeps its own columns.
template <typename T>
void sweep_panel(const Plan<T>& plan, const Slab<T>& slab, const T* panel, Index first, Index width,
                 Index from, Index row) {
    constexpr Vector<T> zero = {};
    const bool choosing = plan.group > 0 && plan.group <= kPanel;
    Index next_group = 0;
    Vector<T> w[kPanel][kVectors];
    take_errors(w, slab, panel, first, width, from, first, row);
#pragma GCC unroll 8
    for (int i = 0; i < kPanel; ++i) {
        if (i >= width) break;
        if (choosing && i == next_group) {
            next_group += plan.group;
            put<T>(w, slab, first, i, next_group, row);
            choose(plan, slab, first + i, row);
        }
        const Index at = (first + i) * kSlab<T> + row;
        const T pivot = plan.pivots[first + i];
        Vector<T> e[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
            const Bits<T> goes = load_bits<T>(slab.codes + at + v * kLanes<T>) == kGoes;
            e[v] = goes ? w[i][v] / pivot : zero;
            store(slab.e + at + v * kLanes<T>, e[v]);
            store(slab.w + at + v * kLanes<T>, goes ? zero : w[i][v]);
        }
#pragma GCC unroll 8
        for (int k = i + 1; k < kPanel; ++k) {
            const T u = panel[(first + i) * kPanel + k];
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) w[k][v] += u * e[v];
        }
    }
}

// Sweeps all columns of kStep rows. A group wider than a panel is brought up to date as a whole
// before the choice.
template <typename T>
void sweep_rows(const Plan<T>& plan, const Slab<T>& slab, Index row) {
    const Index size = plan.B * kPanel;
    const T* panel = plan.panels;
    Index from = 0, width = 0;
    for (Index first = 0; first < plan.B; first += width, panel += size) {
        if (plan.group > kPanel && first % plan.group == 0) {
            const T* ahead = panel;
            for (Index j = first; j < first + plan.group; j += width, ahead += size) {
                width = panel_width(plan, j);
                update_panel(slab, ahead, j, width, first, row);
            }
            choose(plan, slab, first, row);
            from = first;
        }
        width = panel_width(plan, first);
        sweep_panel(plan, slab, panel, first, width, from, row);
    }
}

// ---- all rows -----------------------------------------------------------------------------------

// Copies U, negated, because the micro-kernel adds, and densely, because rows of U may be pages
// apart.
template <typename T>
void pack(T* panels, T* pivots, const Plan<T>& plan, const T* U, Index stride) {
    Index width = 0;
    for (Index first = 0; first < plan.B; first += width, panels += plan.B * kPanel) {
        width = panel_width(plan, first);
        for (Index k = 0; k < first + width; ++k)
            for (int i = 0; i < kPanel; ++i)
                panels[k * kPanel + i] = i < width ? -U[k * stride + first + i] : T(0);
    }
    for (Index j = 0; j < plan.B; ++j) pivots[j] = U[j * stride + j];
}

template <typename T>
Info launch(AnyMatrix W, AnyMatrix U, unsigned char* gone, AnyMatrix E, Index group,
            Index per_group, const Context& context) {
    const Index R = W.rows, B = W.columns;
    const T* u = static_cast<const T*>(U.data);
    T* w = static_cast<T*>(W.data);
    T* e = static_cast<T*>(E.data);
    for (Index j = 0; j < B; ++j)
        if (!(u[j * U.row_stride + j] > 0)) return {Status::not_positive, j};
    if (R == 0 || B == 0) return {Status::ok, 0};
    const Index unit = group == 0 ? B : group > kPanel ? group : kPanel / group * group;
    const Index panels = (B + unit - 1) / unit * ((unit + kPanel - 1) / kPanel);
    constexpr auto size = static_cast<Index>(sizeof(T));
    Index shared = 0, own = 0;
    if (__builtin_mul_overflow((panels * kPanel + 1) * size, B, &shared) ||
        __builtin_mul_overflow((3 * kSlab<T> + kLanes<T>)*size, B, &own))
        return {Status::out_of_memory, 0};
    Scratch packed(1, shared);
    Scratch scratch(context.threads, own);
    if (!packed.ok() || !scratch.ok()) return {Status::out_of_memory, 0};
    T* pivots = packed.of<T>(0) + panels * kPanel * B;
    const Plan<T> plan{B, group, per_group, unit, pivots, packed.of<T>(0)};
    pack(packed.of<T>(0), pivots, plan, u, U.row_stride);
    auto body = [&](Index item, int worker) {
        const Index area = B * kSlab<T>;
        T* base = scratch.of<T>(worker);
        Lane<T>* codes = reinterpret_cast<Lane<T>*>(base + 2 * area);
        const Slab<T> slab{base, base + area, codes, codes + area};
        unsigned char* bytes = reinterpret_cast<unsigned char*>(slab.e);  // before and after errors
        const Index first = item * kSlab<T>;
        const Index rows = R - first < kSlab<T> ? R - first : kSlab<T>;
        T* w_rows = w + first * W.row_stride;
        take(bytes, kSlab<T>, gone + first * B, B, rows, B);
        convert(codes, bytes, area);
        take(slab.w, kSlab<T>, w_rows, W.row_stride, rows, B);
        for (Index row = 0; row < rows; row += kStep<T>) sweep_rows(plan, slab, row);
        give(w_rows, W.row_stride, slab.w, kSlab<T>, rows, B);
        give(e + first * E.row_stride, E.row_stride, slab.e, kSlab<T>, rows, B);
        if (group == 0) return;
        convert(bytes, codes, area);
        give(gone + first * B, B, bytes, kSlab<T>, rows, B);
    };
    const Index items = (R + kSlab<T> - 1) / kSlab<T>;
    return {parallel_items(items, context, body) ? Status::ok : Status::interrupted, 0};
}

}  // namespace

Info sweep_block(AnyMatrix W, AnyMatrix U, unsigned char* gone, AnyMatrix E, Index group,
                 Index per_group, const Context& context) {
    switch (W.dtype) {
        case Dtype::f64:
            return launch<double>(W, U, gone, E, group, per_group, context);
        case Dtype::f32:
            return launch<float>(W, U, gone, E, group, per_group, context);
        default:
            return {Status::unsupported, 0};
    }
}

}  // namespace lobs::LOBS_LEVEL
