// inverse.cu: contract in inverse.h.
//
// A block of threads takes a block of F. It stays in shared memory, padded to multiples of 8 with
// zeros, while all samples pass in groups of 16. Per group, with S = m I + Y G^T = L L^T:
//
//   project    Y = G F         a warp: 8 samples, 32 columns; a quarter of it sums every fourth row
//   gram       S               a warp: 4 rows, 8 columns; a lane sums every sixteenth term
//   factor     L               the first warp, a column per lane; others load the next samples
//   solve      Z = L^-1 Y      a column per thread, in place
//   subtract   F -= Z^T Z      a warp: 32 rows, 32 columns
//
// Project and subtract are 4 * 16 B^2 of the flops. A lane's tile is 8 x 4 in both, so that 32
// fused steps need twelve values from shared memory; many lanes share eight of them. The order of
// the sums is specific to this kernel and the same in every run. Entries (i, j) and (j, i) of F see
// the same operations, so F stays exactly symmetric. Blocks of F that do not fit into shared memory
// are not supported (float32: up to B = 136 in 99 KB, 216 in 227 KB).
#include "common.cuh"

namespace lobs::cuda {
namespace {

constexpr int kGroup = 16;
constexpr int kLine = kGroup + 4;  // 16-byte loads from eight such lines hit different banks
constexpr int kTile = 32;          // side of a warp's tile of F
constexpr int kMostWarps = 9;
constexpr unsigned kThreads = kMostWarps * kWarp;

template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));
template <typename T>
struct alignas(16) Vector {
    T at[kVector<T>];
};

template <typename T>
__device__ __forceinline__ void load(T (&out)[4], const T* p) {
#pragma unroll
    for (int i = 0; i < 4; i += kVector<T>) {
        const Vector<T> v = *reinterpret_cast<const Vector<T>*>(p + i);
#pragma unroll
        for (int k = 0; k < kVector<T>; ++k) out[i + k] = v.at[k];
    }
}

template <typename T>
__device__ __forceinline__ void store(T* p, const T (&in)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i += kVector<T>) {
        Vector<T> v;
#pragma unroll
        for (int k = 0; k < kVector<T>; ++k) v.at[k] = in[i + k];
        *reinterpret_cast<Vector<T>*>(p + i) = v;
    }
}

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / kWarp); }
__device__ __forceinline__ int warps() { return static_cast<int>(blockDim.x / kWarp); }

template <typename T>
struct Local {  // in shared memory
    T* F;       // (P, P)
    T* Y;       // (kGroup, P): G F, then Z
    T* G;       // (P, kLine): the group's samples; zero beyond samples and columns
    T* S;       // (kGroup, kLine): S, then L with the reciprocals of its diagonal
    int* good;  // whether S was positive definite
    int P;
};

// Sums 2 * kHalf values per lane over pairs of lanes that differ in bit `by`. Each lane keeps the
// sums of one half; the lane with the bit keeps the upper one.
template <int kHalf, typename T>
__device__ __forceinline__ void fold(T* v, int by) {
    const bool upper = (lane() & by) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
        const T give = upper ? v[i] : v[i + kHalf];
        const T keep = upper ? v[i + kHalf] : v[i];
        v[i] = keep + __shfl_xor_sync(kAllLanes, give, by);
    }
}

template <typename T>
__device__ __forceinline__ void project(const Local<T>& at) {
    const int P = at.P, part = lane() / 8, tiles = 2 * ((P + kTile - 1) / kTile);
    for (int tile = warp(); tile < tiles; tile += warps()) {
        const int sample = tile % 2 * 8, column = tile / 2 * kTile + lane() % 8 * 4;
        const T* f = at.F + part * P + (column < P ? column : 0);
        const T* g = at.G + part * kLine + sample;
        T sum[8 * 4] = {};
#pragma unroll 4
        for (int k = part; k < P; k += 4, f += 4 * P, g += 4 * kLine) {
            T row[4], low[4], high[4];
            load(row, f), load(low, g), load(high, g + 4);
#pragma unroll
            for (int s = 0; s < 4; ++s)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sum[s * 4 + i] = fused(low[s], row[i], sum[s * 4 + i]);
                    sum[(s + 4) * 4 + i] = fused(high[s], row[i], sum[(s + 4) * 4 + i]);
                }
        }
        fold<16>(sum, 16);
        fold<8>(sum, 8);
        if (column >= P) continue;
        T* y = at.Y + (sample + part * 2) * P + column;
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const T values[4] = {sum[s * 4], sum[s * 4 + 1], sum[s * 4 + 2], sum[s * 4 + 3]};
            store(y + s * P, values);
        }
    }
}

template <typename T>
__device__ __forceinline__ void gram(const Local<T>& at, T m) {
    const int P = at.P, part = lane() % 16;
    for (int tile = warp(); tile < 8; tile += warps()) {
        const int row = tile / 2 * 4, column = tile % 2 * 8 + lane() / 16 * 4;
        T sum[4 * 4] = {};
        for (int k = part; k < P; k += 16) {
            T g[4];
            load(g, at.G + k * kLine + column);
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                const T y = at.Y[(row + s) * P + k];
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[s * 4 + i] = fused(y, g[i], sum[s * 4 + i]);
            }
        }
        fold<8>(sum, 8);
        fold<4>(sum, 4);
        fold<2>(sum, 2);
        fold<1>(sum, 1);
        const int i = row + part / 4, j = column + part % 4;
        at.S[i * kLine + j] = i == j ? sum[0] + m : sum[0];
    }
}

// By one warp: lanes c and c + 16 hold column c of U = L^T.
template <typename T>
__device__ __forceinline__ void factor(const Local<T>& at) {
    const int c = lane() % kGroup;
    T row[kGroup], reciprocal = 0;
    bool good = true;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) row[i] = at.S[i * kLine + c];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
        const T pivot = __shfl_sync(kAllLanes, row[j], j);
        good = good && pivot > 0 && finite(pivot);
        const T scale = 1 / root(pivot);
        if (c == j) reciprocal = scale;
        row[j] *= scale;
#pragma unroll
        for (int k = j + 1; k < kGroup; ++k)
            row[k] = fused(-__shfl_sync(kAllLanes, row[j], k), row[j], row[k]);
    }
    __syncwarp();  // all of S has been read
    if (lane() >= kGroup) return;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) at.S[c * kLine + i] = i == c ? reciprocal : row[i];
    if (c == 0) *at.good = good ? 1 : 0;
}

template <typename T>
__device__ __forceinline__ void solve(const Local<T>& at) {
    const int P = at.P;
    for (int j = static_cast<int>(threadIdx.x); j < P; j += static_cast<int>(blockDim.x)) {
        T z[kGroup];
#pragma unroll
        for (int s = 0; s < kGroup; ++s) z[s] = at.Y[s * P + j];
#pragma unroll
        for (int s = 0; s < kGroup; ++s) {
#pragma unroll
            for (int first = 0; first <= s; first += 4) {
                T line[4];
                load(line, at.S + s * kLine + first);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (first + i < s) z[s] = fused(-line[i], z[first + i], z[s]);
                    if (first + i == s) z[s] *= line[i];
                }
            }
            at.Y[s * P + j] = z[s];
        }
    }
}

template <typename T>
__device__ __forceinline__ void subtract(const Local<T>& at) {
    const int P = at.P, side = (P + kTile - 1) / kTile;
    for (int tile = warp(); tile < side * side; tile += warps()) {
        const int row = tile / side * kTile + lane() / 8 * 8;
        const int column = tile % side * kTile + lane() % 8 * 4;
        if (row >= P || column >= P) continue;
        T sum[8][4] = {};
        const T* z = at.Y;
#pragma unroll 4
        for (int s = 0; s < kGroup; ++s, z += P) {
            T low[4], high[4], right[4];
            load(low, z + row), load(high, z + row + 4), load(right, z + column);
#pragma unroll
            for (int r = 0; r < 4; ++r)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sum[r][i] = fused(low[r], right[i], sum[r][i]);
                    sum[r + 4][i] = fused(high[r], right[i], sum[r + 4][i]);
                }
        }
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            T f[4];
            load(f, at.F + (row + r) * P + column);
#pragma unroll
            for (int i = 0; i < 4; ++i) f[i] -= sum[r][i];
            store(at.F + (row + r) * P + column, f);
        }
    }
}

// Loads samples n .. n + 15 of `columns` columns, transposed, by `count` warps from `first` on.
template <typename T>
__device__ __forceinline__ void fetch_samples(const Local<T>& at, const Matrix<const T>& G, Index n,
                                              Index column, int columns, int first, int count) {
    for (int s = warp() - first; s < kGroup; s += count) {
        const T* g = G.data + (n + s) * G.row_stride + column;
        const int inside = n + s < G.rows ? columns : 0;
#pragma unroll 4
        for (int i = lane(); i < at.P; i += kWarp) at.G[i * kLine + s] = i < inside ? g[i] : T(0);
    }
}

// `wide`: rows of F are aligned and consist of whole vectors.
template <typename T>
__device__ __forceinline__ void fetch_block(const Local<T>& at, const T* F, int B, bool wide) {
    for (int i = warp(); i < at.P; i += warps()) {
        T* row = at.F + i * at.P;
        const int end = i < B ? B : 0;
        if (wide)
            for (int j = lane() * kVector<T>; j < end; j += kWarp * kVector<T>)
                copy_16(row + j, F + i * B + j);
        else
            for (int j = lane(); j < end; j += kWarp) row[j] = F[i * B + j];
        for (int j = end + lane(); j < at.P; j += kWarp) row[j] = 0;
    }
    commit_copies();
    wait_copies<0>();
}

template <typename T>
__device__ __forceinline__ void store_block(T* F, const Local<T>& at, int B, bool wide) {
    for (int i = warp(); i < B; i += warps()) {
        const T* row = at.F + i * at.P;
        if (wide)
            for (int j = lane() * kVector<T>; j < B; j += kWarp * kVector<T>)
                *reinterpret_cast<Vector<T>*>(F + i * B + j) =
                    *reinterpret_cast<const Vector<T>*>(row + j);
        else
            for (int j = lane(); j < B; j += kWarp) F[i * B + j] = row[j];
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    update_kernel(T* all, Index blocks, int B, Matrix<const T> G, T m, std::uint64_t* report) {
    // A loss of definiteness that another block has reported does not stop this one.
    if (*report % 16 == static_cast<std::uint64_t>(Status::not_finite)) return;
    Local<T> at;
    at.P = (B + 7) / 8 * 8;
    Carver carve(shared());
    carve.take(at.F, at.P * at.P);
    carve.take(at.Y, kGroup * at.P);
    carve.take(at.G, at.P * kLine);
    carve.take(at.S, kGroup * kLine);
    carve.take(at.good, 1);
    const bool wide = B % kVector<T> == 0 && reinterpret_cast<std::uintptr_t>(all) % 16 == 0;
    const int helpers = warps() > 1 ? warps() - 1 : 1;
    for (Index b = blockIdx.x; b < blocks; b += gridDim.x) {
        T* F = all + b * B * B;
        const int columns = static_cast<int>(least(G.columns - b * B, B));
        fetch_samples(at, G, 0, b * B, columns, 0, warps());
        fetch_block(at, F, B, wide);
        __syncthreads();
        bool good = true;
        for (Index n = 0; n < G.rows; n += kGroup) {
            project(at);
            __syncthreads();
            gram(at, m);
            __syncthreads();
            if (warp() == 0) factor(at);
            const int first = warps() - helpers;
            if (n + kGroup < G.rows && warp() >= first)
                fetch_samples(at, G, n + kGroup, b * B, columns, first, helpers);
            __syncthreads();
            good = *at.good != 0;
            if (!good) break;
            solve(at);
            __syncthreads();
            subtract(at);
            __syncthreads();
        }
        if (good)
            store_block(F, at, B, wide);
        else if (threadIdx.x == 0)
            report_failure(report, Status::not_positive, b);
        __syncthreads();
    }
}

constexpr unsigned kLooking = 256;

template <typename T>
__global__ void __launch_bounds__(kLooking) look_kernel(Matrix<const T> G, std::uint64_t* report) {
    const Index step = static_cast<Index>(gridDim.x) * kLooking;
    for (Index n = blockIdx.y; n < G.rows; n += gridDim.y) {
        const T* row = G.data + n * G.row_stride;
#pragma unroll 4
        for (Index i = static_cast<Index>(blockIdx.x) * kLooking + threadIdx.x; i < G.columns;
             i += step)
            if (!finite(row[i])) report_failure(report, Status::not_finite, n * G.columns + i);
    }
}

template <typename T>
Info run(T* F, Index blocks, Index B, AnyMatrix any, double m, const Context& context) {
    const Matrix<const T> G{static_cast<const T*>(any.data), any.rows, any.columns, any.row_stride,
                            1};
    const Index P = up(B, 8), size = sizeof(T), side = (P + kTile - 1) / kTile;
    if (P > shared_limit(context)) return {Status::unsupported, 0};  // so that the square fits
    const Index bytes = up(P * P * size, 64) + up(kGroup * P * size, 64) +
                        up(P * kLine * size, 64) + up(kGroup * kLine * size, 64) + 64;
    if (bytes > shared_limit(context)) return {Status::unsupported, 0};
    if (blocks == 0 || B == 0 || G.rows == 0) return {Status::ok, 0};
    const Index parts = least((G.columns + 8 * kLooking - 1) / (8 * kLooking), Index{1} << 20);
    LOBS_TRY(launch(context, "inverse look", look_kernel<T>,
                    dim3(static_cast<unsigned>(parts), static_cast<unsigned>(least(G.rows, 65535))),
                    kLooking, 0, G, context.device->report));
    const Index rounds = (side * side + kMostWarps - 1) / kMostWarps;  // of tiles of F
    const Index together = (side * side + rounds - 1) / rounds;
    return launch(context, "inverse update", update_kernel<T>,
                  dim3(static_cast<unsigned>(least(blocks, INT32_MAX))),
                  static_cast<unsigned>(together) * kWarp, static_cast<std::size_t>(bytes), F,
                  blocks, static_cast<int>(B), G, static_cast<T>(m), context.device->report);
}

}  // namespace

Info inverse_update(void* F, Dtype dtype, Index blocks, Index B, AnyMatrix G, double m,
                    const Context& context) {
    switch (dtype) {
        case Dtype::f64:
            return run(static_cast<double*>(F), blocks, B, G, m, context);
        case Dtype::f32:
            return run(static_cast<float*>(F), blocks, B, G, m, context);
        default:
            return {Status::unsupported, 0};
    }
}

}  // namespace lobs::cuda
