// sliced.cpp: contract in sliced.h.
//
// Few rows of x: a slice is one pass over its steps with the sums of its 16 rows in registers. x
// is copied into blocks whose last place is 0, so that padding multiplies 0 by 0.
//
// More rows: x is transposed in tiles of up to 32 samples, which are the lanes. The weights of a
// slice are listed once per chunk of tiles, without padding, and then each costs a broadcast and one
// multiplication per vector of samples.
#include "sliced.h"

#include "parallel.h"
#include "vector.h"

namespace lobs::LOBS_LEVEL {
namespace {

constexpr Index kTogether = 4;             // rows of x in one pass over a slice
constexpr Index kSlices = 4;               // in an item of work, with few rows of x
constexpr Index kTile = 32;                // samples
constexpr Index kChunkBytes = 512 * 1024;  // of transposed x, so that a chunk stays in L2
constexpr Index kMostTiles = 4;            // in a chunk
constexpr Index kAlone = 1 << 16;          // products that are not worth a second thread

LOBS_INLINE BFloat to_bfloat(float f) {  // to nearest, ties to even
    std::uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return {static_cast<std::uint16_t>(bits >> 16 | 0x40u)};  // a quiet NaN
    return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

LOBS_INLINE void put(float* y, float value) { *y = value; }
LOBS_INLINE void put(BFloat* y, float value) { *y = to_bfloat(value); }

// ---- few rows -----------------------------------------------------------------------------------

// Adds the steps of one block to the sums of 16 weight rows, for kRows rows of x. `x` is the block
// of the first of them, the others are `x_row` apart.
template <typename V, int kRows, int kWidth>
struct Sums {
    float sum[kRows][kSliceRows] = {};

    LOBS_INLINE void add(const V* values, const unsigned char* columns, Index steps, const float* x,
                         Index x_row) {
        for (Index j = 0; j < steps; ++j, values += kSliceRows, columns += kSliceRows)
            for (int l = 0; l < kSliceRows; ++l)
                for (int i = 0; i < kRows; ++i)
                    sum[i][l] += to_float(values[l]) * x[i * x_row + (columns[l] & (kWidth - 1))];
    }

    LOBS_INLINE void result(float (&to)[kRows][kSliceRows]) const {
        std::memcpy(to, sum, sizeof sum);
    }
};

#if defined(__AVX512F__)

LOBS_INLINE __m512 values_of(const float* values) { return _mm512_loadu_ps(values); }
LOBS_INLINE __m512 values_of(const BFloat* values) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    return _mm512_castsi512_ps(
        _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, half), 16));
}

template <typename V, int kRows>
struct Sums<V, kRows, 64> {
    __m512 even[kRows], odd[kRows];  // two chains of additions

    LOBS_INLINE Sums() {
        for (int i = 0; i < kRows; ++i) even[i] = odd[i] = _mm512_setzero_ps();
    }

    LOBS_INLINE void add(const V* values, const unsigned char* columns, Index steps, const float* x,
                         Index x_row) {
        __m512 block[kRows][4];
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) block[i][v] = _mm512_loadu_ps(x + i * x_row + v * 16);
        Index j = 0;
        for (; j + 2 <= steps; j += 2) {
            step(even, block, values + j * kSliceRows, columns + j * kSliceRows);
            step(odd, block, values + (j + 1) * kSliceRows, columns + (j + 1) * kSliceRows);
        }
        if (j < steps) step(even, block, values + j * kSliceRows, columns + j * kSliceRows);
    }

    static LOBS_INLINE void step(__m512 (&sum)[kRows], const __m512 (&block)[kRows][4],
                                 const V* values, const unsigned char* columns) {
        const __m512i at = _mm512_maskz_cvtepu8_epi32(
            0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns)));
        const __mmask16 upper = _mm512_test_epi32_mask(at, _mm512_set1_epi32(32));
        const __m512 value = values_of(values);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
            const __m512 low = _mm512_permutex2var_ps(block[i][0], at, block[i][1]);
            const __m512 high = _mm512_permutex2var_ps(block[i][2], at, block[i][3]);
            sum[i] = _mm512_fmadd_ps(_mm512_mask_blend_ps(upper, low, high), value, sum[i]);
        }
    }

    LOBS_INLINE void result(float (&to)[kRows][kSliceRows]) const {
        for (int i = 0; i < kRows; ++i) _mm512_storeu_ps(to[i], _mm512_add_ps(even[i], odd[i]));
    }
};

#endif
#if defined(__AVX2__)

LOBS_INLINE __m256 eight_of(const float* values) { return _mm256_loadu_ps(values); }
LOBS_INLINE __m256 eight_of(const BFloat* values) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

template <typename V, int kRows>
struct Sums<V, kRows, 16> {
    __m256 sum[kRows][2];

    LOBS_INLINE Sums() {
        for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    }

    LOBS_INLINE void add(const V* values, const unsigned char* columns, Index steps, const float* x,
                         Index x_row) {
        __m256 low[kRows], high[kRows];
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
            low[i] = _mm256_loadu_ps(x + i * x_row);
            high[i] = _mm256_loadu_ps(x + i * x_row + 8);
        }
        for (Index j = 0; j < steps; ++j, values += kSliceRows, columns += kSliceRows)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const __m256i at = _mm256_cvtepu8_epi32(
                    _mm_loadl_epi64(reinterpret_cast<const __m128i*>(columns + half * 8)));
                const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));  // bit 3
                const __m256 value = eight_of(values + half * 8);
#pragma GCC unroll 4
                for (int i = 0; i < kRows; ++i) {
                    const __m256 chosen =
                        _mm256_blendv_ps(_mm256_permutevar8x32_ps(low[i], at),
                                         _mm256_permutevar8x32_ps(high[i], at), upper);
                    sum[i][half] = _mm256_fmadd_ps(chosen, value, sum[i][half]);
                }
            }
    }

    LOBS_INLINE void result(float (&to)[kRows][kSliceRows]) const {
        for (int i = 0; i < kRows; ++i) {
            _mm256_storeu_ps(to[i], sum[i][0]);
            _mm256_storeu_ps(to[i] + 8, sum[i][1]);
        }
    }
};

#endif

// What every item of work reads.
template <typename V, typename X>
struct Product {
    const V* values;
    const SlicedWeight& weight;
    X* y;
    Index y_row;
    const float* bias;
    Index samples, features;

    LOBS_INLINE Index blocks() const { return (features + weight.width - 2) / (weight.width - 1); }
    LOBS_INLINE Index slices() const { return (weight.rows + kSliceRows - 1) / kSliceRows; }
};

template <int kWidth, int kRows, typename V, typename X>
void few_of_slice(const Product<V, X>& p, Index slice, const float* x, Index x_row, Index first) {
    const Index K = p.blocks();
    const unsigned char* const steps = p.weight.steps + slice * K;
    Sums<V, kRows, kWidth> sums;
    Index at = p.weight.start[slice] * kSliceRows;
    for (Index k = 0; k < K; ++k) {
        sums.add(p.values + at, p.weight.columns + at, steps[k], x + first * x_row + k * kWidth,
                 x_row);
        at += steps[k] * kSliceRows;
    }
    float result[kRows][kSliceRows];
    sums.result(result);
    const Index row = slice * kSliceRows, count = least(kSliceRows, p.weight.rows - row);
    for (int i = 0; i < kRows; ++i)
        for (Index l = 0; l < count; ++l)
            put(p.y + (first + i) * p.y_row + row + l,
                result[i][l] + (p.bias != nullptr ? p.bias[row + l] : 0.0f));
}

template <int kWidth, typename V, typename X>
Info few(const Product<V, X>& p, const X* x, const AnyMatrix& from, const Context& context) {
    const Index K = p.blocks(), x_row = K * kWidth;
    const Scratch scratch(1, p.samples * x_row * static_cast<Index>(sizeof(float)));
    if (!scratch.ok()) return {Status::out_of_memory, 0};
    float* const blocks = scratch.of<float>(0);
    for (Index n = 0; n < p.samples; ++n)
        for (Index k = 0; k < K; ++k) {
            float* const to = blocks + n * x_row + k * kWidth;
            const Index first = k * (kWidth - 1), count = least(kWidth - 1, p.features - first);
            for (Index c = 0; c < count; ++c)
                to[c] = to_float(x[n * from.row_stride + (first + c) * from.column_stride]);
            for (Index c = count; c < kWidth; ++c) to[c] = 0.0f;
        }
    auto body = [&](Index item, int) {
        const Index last = least((item + 1) * kSlices, p.slices());
        for (Index slice = item * kSlices; slice < last; ++slice) {
            Index n = 0;
            for (; n + kTogether <= p.samples; n += kTogether)
                few_of_slice<kWidth, kTogether>(p, slice, blocks, x_row, n);
            for (; n + 2 <= p.samples; n += 2) few_of_slice<kWidth, 2>(p, slice, blocks, x_row, n);
            for (; n < p.samples; ++n) few_of_slice<kWidth, 1>(p, slice, blocks, x_row, n);
        }
    };
    const bool done = parallel_items((p.slices() + kSlices - 1) / kSlices, context, body);
    return {done ? Status::ok : Status::interrupted, 0};
}

// ---- more rows ----------------------------------------------------------------------------------

// The weights of the 16 rows of a slice and their columns, without padding: a list for each row.
struct Lists {
    float* values;
    std::int32_t* columns;
    Index stride;  // entries from list to list
    Index count[kSliceRows];

    // Entries that a list must have room for: all columns of all blocks and one more. An odd number
    // of cache lines, so that lists do not share cache sets.
    static LOBS_INLINE Index room(Index columns) { return (up(columns + 1, 16) / 16 | 1) * 16; }
};

template <typename V, typename X>
void fill(Lists& lists, const Product<V, X>& p, Index slice) {
    const Index K = p.blocks(), none = p.weight.width - 1;
    const unsigned char* const steps = p.weight.steps + slice * K;
    const V* values = p.values + p.weight.start[slice] * kSliceRows;
    const unsigned char* columns = p.weight.columns + p.weight.start[slice] * kSliceRows;
    Index count[kSliceRows] = {};
    for (Index k = 0; k < K; ++k)
        for (Index left = steps[k]; left > 0; --left, values += kSliceRows, columns += kSliceRows)
#pragma GCC unroll 16
            for (Index l = 0; l < kSliceRows; ++l) {
                const Index column = columns[l] & none, at = l * lists.stride + count[l];
                lists.values[at] = to_float(values[l]);
                lists.columns[at] = static_cast<std::int32_t>(k * none + column);
                count[l] += column != none ? 1 : 0;
            }
    std::memcpy(lists.count, count, sizeof count);
}

// sums[v] = sum over the list of values times rows of x, which are kVectors vectors of samples.
template <int kVectors, int kChains>
LOBS_INLINE void sum_row(float* sums, const float* x, const float* values,
                         const std::int32_t* columns, Index count) {
    constexpr Index kStride = kVectors * kLanes<float>;
    Vector<float> chain[kChains][kVectors] = {};
    Index i = 0;
    for (; i + kChains <= count; i += kChains)
#pragma GCC unroll 4
        for (int h = 0; h < kChains; ++h) {
            const float* const row = x + columns[i + h] * kStride;
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v)
                chain[h][v] += values[i + h] * load(row + v * kLanes<float>);
        }
    for (; i < count; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
            chain[0][v] += values[i] * load(x + columns[i] * kStride + v * kLanes<float>);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
        Vector<float> sum = chain[0][v];
#pragma GCC unroll 4
        for (int h = 1; h < kChains; ++h) sum += chain[h][v];
        store(sums + v * kLanes<float>, sum);
    }
}

// The samples of a tile of `samples`: as few whole vectors as hold them, a power of two.
LOBS_INLINE Index tile_width(Index samples) {
    Index width = kLanes<float> < 8 ? 8 : kLanes<float>;
    while (width < samples) width *= 2;
    return width;
}

LOBS_INLINE void sum_tile(Index width, float* sums, const float* x, const float* values,
                          const std::int32_t* columns, Index count) {
    constexpr int kLane = kLanes<float>;
    if (width == 32)
        return sum_row<32 / kLane, kLane == 4 ? 1 : 2>(sums, x, values, columns, count);
    if (width == 16) return sum_row<16 / kLane, 4 * kLane / 16>(sums, x, values, columns, count);
    if constexpr (kLane <= 8) sum_row<8 / kLane, kLane / 2>(sums, x, values, columns, count);
}

template <typename V, typename X>
Info many(const Product<V, X>& p, const X* x, const AnyMatrix& from, const Context& context) {
    const Index C = p.features, tile_bytes = C * kTile * static_cast<Index>(sizeof(float));
    const Index fit = kChunkBytes / tile_bytes;
    const Index tiles = fit < 1 ? 1 : least(fit, kMostTiles);
    const Scratch transposed(1, tiles * tile_bytes);
    const Index room = Lists::room(p.blocks() * (p.weight.width - 1));
    const Index lists_bytes = kSliceRows * room * static_cast<Index>(sizeof(float));
    const Index out = kSliceRows * kTile * static_cast<Index>(sizeof(float));
    const Scratch own(context.threads, 2 * lists_bytes + tiles * out);
    if (!transposed.ok() || !own.ok()) return {Status::out_of_memory, 0};
    float* const xt = transposed.of<float>(0);

    for (Index begun = 0; begun < p.samples; begun += tiles * kTile) {
        const Index here = least(tiles * kTile, p.samples - begun),
                    used = (here + kTile - 1) / kTile;
        constexpr Index kStrip = 64;  // columns, so that what is written stays in L1
        const Index strips = (C + kStrip - 1) / kStrip;
        auto transpose = [&](Index item, int) {
            const Index tile = item / strips, first = item % strips * kStrip;
            const Index samples = least(kTile, here - tile * kTile), width = tile_width(samples);
            float* const to = xt + tile * C * kTile;
            const Index last = least(first + kStrip, C);
            for (Index s = 0; s < width; ++s) {
                const X* const row = x + (begun + tile * kTile + s) * from.row_stride;
                for (Index c = first; c < last; ++c)
                    to[c * width + s] = s < samples ? to_float(row[c * from.column_stride]) : 0.0f;
            }
        };
        if (!parallel_items(used * strips, context, transpose)) return {Status::interrupted, 0};
        auto multiply = [&](Index slice, int worker) {
            unsigned char* const memory = own.of<unsigned char>(worker);
            Lists lists{reinterpret_cast<float*>(memory),
                        reinterpret_cast<std::int32_t*>(memory + lists_bytes),
                        room,
                        {}};
            auto* const sums = reinterpret_cast<float*>(memory + 2 * lists_bytes);
            const Index row = slice * kSliceRows, rows = least(kSliceRows, p.weight.rows - row);
            fill(lists, p, slice);
            for (Index tile = 0; tile < used; ++tile) {
                const Index width = tile_width(least(kTile, here - tile * kTile));
                for (Index l = 0; l < rows; ++l)
                    sum_tile(width, sums + (tile * kSliceRows + l) * kTile, xt + tile * C * kTile,
                             lists.values + l * room, lists.columns + l * room, lists.count[l]);
            }
            for (Index s = 0; s < here; ++s) {
                X* const to = p.y + (begun + s) * p.y_row + row;
                const float* const sum = sums + s / kTile * kSliceRows * kTile + s % kTile;
                for (Index l = 0; l < rows; ++l)
                    put(to + l, sum[l * kTile] + (p.bias != nullptr ? p.bias[row + l] : 0.0f));
            }
        };
        if (!parallel_items(p.slices(), context, multiply)) return {Status::interrupted, 0};
    }
    return {Status::ok, 0};
}

template <typename V, typename X>
Info launch(const AnyMatrix& y, const AnyMatrix& x, const SlicedWeight& weight, const float* bias,
            const Context& context) {
    const Product<V, X> p{static_cast<const V*>(weight.values),
                          weight,
                          static_cast<X*>(y.data),
                          y.row_stride,
                          bias,
                          x.rows,
                          x.columns};
    const Index entries = weight.start[p.slices()] * kSliceRows;
    const Context how{entries * x.rows < kAlone ? 1 : context.threads, context.interrupted};
    const X* const from = static_cast<const X*>(x.data);
    if (x.rows > kFewRows && x.columns > 0) return many(p, from, x, how);
    return weight.width == 64 ? few<64>(p, from, x, how) : few<16>(p, from, x, how);
}

LOBS_INLINE bool known(Dtype dtype) { return dtype == Dtype::f32 || dtype == Dtype::bf16; }

}  // namespace

Info sliced_linear(AnyMatrix y, AnyMatrix x, const SlicedWeight& weight, const float* bias,
                   const Context& context) {
    if (!known(x.dtype) || !known(weight.dtype) || y.dtype != x.dtype ||
        (weight.width != 16 && weight.width != 64))
        return {Status::unsupported, 0};
    const bool narrow = weight.dtype == Dtype::bf16;
    if (x.dtype == Dtype::bf16)
        return narrow ? launch<BFloat, BFloat>(y, x, weight, bias, context)
                      : launch<float, BFloat>(y, x, weight, bias, context);
    return narrow ? launch<BFloat, float>(y, x, weight, bias, context)
                  : launch<float, float>(y, x, weight, bias, context);
}

}  // namespace lobs::LOBS_LEVEL
