// vector.h: the SIMD type of the level that a file is compiled for, and the micro-kernels of all
// products and triangular solves.
//
// Every kernel file is compiled once per level (see CMakeLists.txt), into a namespace of the
// level's name. It uses portable vector extensions, not intrinsics: gcc and clang keep the
// accumulators below in registers, and the same source serves SSE2, AVX2, AVX-512 and NEON.
#pragma once

#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "types.h"

#if !defined(LOBS_LEVEL)
#error "compile through CMake, which sets LOBS_LEVEL and the instruction set that goes with it"
#endif

namespace lobs::LOBS_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr bool kManyRegisters = true;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr bool kManyRegisters = false;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr bool kManyRegisters = true;
#else
constexpr int kVectorBytes = 16;
constexpr bool kManyRegisters = false;
#endif

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
LOBS_INLINE Vector<T> load(const T* p) {
    return *reinterpret_cast<const Vector<T>*>(p);
}

template <typename T>
LOBS_INLINE void store(T* p, Vector<T> v) {
    *reinterpret_cast<Vector<T>*>(p) = v;
}

LOBS_INLINE float root(float x) { return __builtin_sqrtf(x); }
LOBS_INLINE double root(double x) { return __builtin_sqrt(x); }

LOBS_INLINE float as_float(std::uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// Exact for all 65,536 patterns, whatever the flush-to-zero mode is: a subnormal half is rebuilt as
// the difference of two normal floats.
LOBS_INLINE float to_float(Half h) {
    const std::uint32_t sign = (h.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = (h.bits & 0x7fffu) << 13;
    const std::uint32_t exponent = magnitude & 0x0f800000u;
    const float subnormal = as_float(magnitude + 0x38800000u) - as_float(0x38800000u);
    std::uint32_t subnormal_bits;
    std::memcpy(&subnormal_bits, &subnormal, sizeof subnormal_bits);
    const std::uint32_t normal_bits =
        magnitude + (exponent == 0x0f800000u ? 0x70000000u : 0x38000000u);
    return as_float(sign | (exponent == 0 ? subnormal_bits : normal_bits));
}
LOBS_INLINE float to_float(BFloat b) { return as_float(static_cast<std::uint32_t>(b.bits) << 16); }
LOBS_INLINE float to_float(float f) { return f; }
LOBS_INLINE double to_float(double d) { return d; }

// The bits of |x|, as an unsigned integer that orders like |x|, with infinity and NaN on top.
LOBS_INLINE std::uint32_t magnitude_bits(float f) {
    std::uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    return bits & 0x7fffffffu;
}
LOBS_INLINE std::uint64_t magnitude_bits(double d) {
    std::uint64_t bits;
    std::memcpy(&bits, &d, sizeof bits);
    return bits & 0x7fffffffffffffffull;
}
LOBS_INLINE bool finite_bits(std::uint32_t magnitude) { return magnitude < 0x7f800000u; }
LOBS_INLINE bool finite_bits(std::uint64_t magnitude) { return magnitude < 0x7ff0000000000000ull; }

// Bit l says whether lane l of a comparison of vectors is true.
template <typename Compared>
LOBS_INLINE unsigned bits_of(Compared mask) {
    constexpr bool kWide = sizeof(mask[0]) == 8;
#if defined(__AVX512F__)
    return static_cast<unsigned>(kWide ? _mm512_movepi64_mask(reinterpret_cast<__m512i>(mask))
                                       : _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)));
#elif defined(__AVX2__)
    return static_cast<unsigned>(kWide ? _mm256_movemask_pd(reinterpret_cast<__m256d>(mask))
                                       : _mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(__SSE2__)
    return static_cast<unsigned>(kWide ? _mm_movemask_pd(reinterpret_cast<__m128d>(mask))
                                       : _mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#else
    unsigned bits = 0;
    for (int l = 0; l < (kWide ? kLanes<double> : kLanes<float>); ++l)
        bits |= (mask[l] != 0 ? 1u : 0u) << l;
    return bits;
#endif
}

// What a comparison of vectors of T gives: integers as wide as T.
template <typename T>
using Mask = decltype(Vector<T>{} < Vector<T>{});

// Bytes as integers as wide as T. With intrinsics, because gcc converts these vectors lane by lane
// (admm_step of 16 M weights by row: 52 ms so, 30 ms with them).
template <typename T>
LOBS_INLINE Mask<T> widen(const unsigned char* bytes) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        return reinterpret_cast<Mask<T>>(_mm512_maskz_cvtepu8_epi32(
            0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
    else
        return reinterpret_cast<Mask<T>>(_mm512_maskz_cvtepu8_epi64(
            0xff, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
        return reinterpret_cast<Mask<T>>(
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
    else
        return reinterpret_cast<Mask<T>>(_mm256_cvtepu8_epi64(_mm_loadu_si32(bytes)));
#else
    typedef unsigned char Bytes __attribute__((vector_size(kLanes<T>), aligned(1), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Bytes*>(bytes), Mask<T>);
#endif
}

// Writes a byte per lane: 1 where the comparison is true, else 0.
template <typename T>
LOBS_INLINE void narrow(unsigned char* bytes, Mask<T> mask) {
#if defined(__AVX512F__)
    const __m128i ones = _mm_set1_epi8(1);
    if constexpr (sizeof(T) == 4)
        _mm_storeu_si128(
            reinterpret_cast<__m128i*>(bytes),
            _mm_and_si128(_mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(mask)),
                          ones));
    else
        _mm_storel_epi64(
            reinterpret_cast<__m128i*>(bytes),
            _mm_and_si128(_mm512_maskz_cvtepi64_epi8(0xff, reinterpret_cast<__m512i>(mask)), ones));
#elif defined(__AVX2__)
    const __m256i whole = reinterpret_cast<__m256i>(mask);
    const __m128i low = _mm256_castsi256_si128(whole), high = _mm256_extracti128_si256(whole, 1);
    const __m128 evens = _mm_shuffle_ps(_mm_castsi128_ps(low), _mm_castsi128_ps(high), 0x88);
    const __m128i words =
        sizeof(T) == 4 ? _mm_packs_epi32(low, high) : _mm_packs_epi32(_mm_castps_si128(evens), low);
    const __m128i packed = _mm_and_si128(_mm_packs_epi16(words, words), _mm_set1_epi8(1));
    if constexpr (sizeof(T) == 4)
        _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes), packed);
    else
        _mm_storeu_si32(bytes, packed);
#else
    typedef unsigned char Bytes __attribute__((vector_size(kLanes<T>), aligned(1), may_alias));
    *reinterpret_cast<Bytes*>(bytes) = __builtin_convertvector(mask, Bytes) & 1;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For every set of 8 lanes, those that are in it, the lowest first.
struct LaneSets {
    alignas(8) std::uint8_t lane[256][8] = {};
    constexpr LaneSets() {
        for (int set = 0; set < 256; ++set)
            for (int l = 0, n = 0; l < 8; ++l)
                if ((set >> l & 1) != 0) lane[set][n++] = static_cast<std::uint8_t>(l);
    }
};
constexpr LaneSets kLaneSets;

// The permutation that puts the lanes in `keep` first.
template <typename T>
LOBS_INLINE __m256i kept_lanes(unsigned keep) {
    unsigned halves = keep;  // a set of lanes of 4 bytes
    if constexpr (sizeof(T) == 8) halves = 3 * _pdep_u32(keep, 0x55);
    return _mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLaneSets.lane[halves])));
}
#endif

// Writes the lanes of `in` whose bit in `keep` is set next to each other. Returns the end of what
// it wrote. May write up to kLanes elements from `out` on.
template <typename T>
LOBS_INLINE T* compress(T* out, const T* in, unsigned keep) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        _mm512_storeu_ps(
            out, _mm512_maskz_compress_ps(static_cast<__mmask16>(keep), _mm512_loadu_ps(in)));
    else
        _mm512_storeu_pd(
            out, _mm512_maskz_compress_pd(static_cast<__mmask8>(keep), _mm512_loadu_pd(in)));
    return out + __builtin_popcount(keep);
#elif defined(__AVX2__)
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm256_permutevar8x32_epi32(values, kept_lanes<T>(keep)));
    return out + __builtin_popcount(keep);
#else
    for (int l = 0; l < kLanes<T>; ++l) {
        *out = in[l];
        out += keep >> l & 1;
    }
    return out;
#endif
}

// accumulator[i][v] += sum_k A[k][i] * B[k][v]. A has `kRows` entries per k (or more, with a
// stride) and B has kVectors vectors per k. The kRows * kVectors accumulators stay in registers.
template <typename T, int kRows, int kVectors>
LOBS_INLINE void multiply(Vector<T> (&accumulator)[kRows][kVectors], Index depth, const T* A,
                          Index a_k, Index a_i, const T* B, Index b_k) {
    for (Index k = 0; k < depth; ++k) {
        Vector<T> b[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) b[v] = load(B + k * b_k + v * kLanes<T>);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            const T a = A[k * a_k + i * a_i];
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) accumulator[i][v] += a * b[v];
        }
    }
}

// Z <- U^-T Z for kVectors vectors of each of `size` rows of Z, a multiple of 4, by forward
// substitution of four rows at a time. inverse[i * inverse_i] = 1 / U_ii.
template <typename T, int kVectors>
LOBS_INLINE void substitute(T* Z, Index z_i, Index size, const T* U, Index u_i, Index u_k,
                            const T* inverse, Index inverse_i) {
    for (Index s = 0; s < size; s += 4) {
        Vector<T> z[4][kVectors] = {};
        multiply<T, 4, kVectors>(z, s, U + s * u_k, u_i, u_k, Z, z_i);
#pragma GCC unroll 4
        for (Index i = 0; i < 4; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                T* const at = Z + (s + i) * z_i + v * kLanes<T>;
                Vector<T> sum = load(at) - z[i][v];
#pragma GCC unroll 4
                for (Index k = 0; k < i; ++k) sum -= U[(s + k) * u_i + (s + i) * u_k] * z[k][v];
                z[i][v] = sum * inverse[(s + i) * inverse_i];
                store(at, z[i][v]);
            }
    }
}

}  // namespace
}  // namespace lobs::LOBS_LEVEL
