// common.cuh: shared by all CUDA files of this backend. Nothing here throws or waits.
//
// Kernels are compiled twice: by nvcc for devices, and with LOBS_EMULATE by the host's compiler
// against tests/emulator/emulator.h, which runs them one block after another. To make that possible
//   - all shared memory is dynamic, with the size given at the launch (shared(), Carver);
//   - blocks are one-dimensional, of whole warps, and every thread reaches every barrier;
//   - instructions without a C++ equivalent are wrapped here, once.
// Floating-point numbers are never added atomically: the same input gives the same bytes.
#pragma once

#if defined(LOBS_EMULATE)
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include "dispatch.h"

namespace lobs::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- launching ----------------------------------------------------------------------------------

#define LOBS_TRY(call)                                          \
    do {                                                        \
        const ::lobs::Info tried_ = (call);                     \
        if (tried_.status != ::lobs::Status::ok) return tried_; \
    } while (0)

inline Info device_info(cudaError_t error) {
    return error == cudaSuccess ? Info{Status::ok, 0}
                                : Info{Status::device_failed, static_cast<Index>(error)};
}

inline cudaStream_t stream_of(const Context& context) {
    return static_cast<cudaStream_t>(context.device->stream);
}

// Enqueues the kernel with `grid` blocks of `threads` threads and `shared_bytes` of dynamic memory.
template <typename... Parameters, typename... Arguments>
Info launch(const Context& context, const char* name, void (*kernel)(Parameters...), dim3 grid,
            unsigned threads, std::size_t shared_bytes, Arguments... arguments) {
#if defined(LOBS_EMULATE)
    (void)context;
    emulator::run(kernel, name, grid, threads, shared_bytes, arguments...);
    return {Status::ok, 0};
#else
    (void)name;
    if (const cudaError_t error = cudaSetDevice(context.device->ordinal); error != cudaSuccess)
        return device_info(error);
    if (shared_bytes > 48 * 1024)
        if (const cudaError_t error =
                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared_bytes));
            error != cudaSuccess)
            return device_info(error);
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_of(context);
    return device_info(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
#endif
}

// Device memory for the kernels of the call, aligned to 256 bytes; null if none is left.
template <typename T>
T* allocate(const Context& context, Index count) {
    return static_cast<T*>(
        context.device->allocate(context.device->owner, count * static_cast<Index>(sizeof(T))));
}

inline int processors(const Context& context) {  // streaming multiprocessors
#if defined(LOBS_EMULATE)
    (void)context;
    return 2;
#else
    int count = 1;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, context.device->ordinal);
    return count;
#endif
}

inline Index shared_limit(const Context& context) {  // the most shared memory of a block, in bytes
#if defined(LOBS_EMULATE)
    (void)context;
    return 99 * 1024;
#else
    int bytes = 48 * 1024;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                           context.device->ordinal);
    return bytes;
#endif
}

// ---- in kernels ---------------------------------------------------------------------------------

__device__ __forceinline__ unsigned char* shared() {
#if defined(LOBS_EMULATE)
    return emulator::shared_memory();
#else
    extern __shared__ __align__(128) unsigned char lobs_shared[];
    return lobs_shared;
#endif
}

// Tells the compiler that a pointer it has read from memory points to global memory, so that loads
// and stores through it need no test of the address.
template <typename T>
__device__ __forceinline__ T* global(T* p) {
#if !defined(LOBS_EMULATE)
    __builtin_assume(__isGlobal(p));
#endif
    return p;
}

// Keeps the lowest failure in *report.
__device__ __forceinline__ void report_failure(std::uint64_t* report, Status status, Index where) {
    atomicMin(reinterpret_cast<unsigned long long*>(report),
              static_cast<unsigned long long>(reported(status, where)));
}

__device__ __forceinline__ float fused(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
}
__device__ __forceinline__ double fused(double a, double b, double c) {
    return __builtin_fma(a, b, c);
}
__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

template <typename T>
__device__ __forceinline__ T infinity();
template <>
__device__ __forceinline__ float infinity<float>() {
    return __builtin_huge_valf();
}
template <>
__device__ __forceinline__ double infinity<double>() {
    return __builtin_huge_val();
}

__device__ __forceinline__ bool finite(float x) { return fabsf(x) < infinity<float>(); }
__device__ __forceinline__ bool finite(double x) { return fabs(x) < infinity<double>(); }

// Copies 16 bytes from global to shared memory asynchronously: `bytes` of them are read, the others
// become zero. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_16(void* to, const void* from, int bytes = 16) {
#if defined(LOBS_EMULATE)
    emulator::Fiber& f = *emulator::machine().current;
    f.copies.push_back({to, from, static_cast<std::size_t>(bytes), 16, f.open_group});
#else
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from),
                 "r"(bytes)
                 : "memory");
#endif
}

// Closes the group of this thread's copies since the last call.
__device__ __forceinline__ void commit_copies() {
#if defined(LOBS_EMULATE)
    ++emulator::machine().current->open_group;
#else
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most kLeft of this thread's groups are pending. A barrier makes the copies of
// other threads visible.
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
#if defined(LOBS_EMULATE)
    emulator::land_copies(kLeft);
#else
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
#endif
}

// Loads four 8 x 8 matrices of 16-bit values from shared memory, each transposed. Lane l passes the
// address of row l % 8 of matrix l / 8; r[i] holds elements (2 (l % 4), l / 4) and (2 (l % 4) + 1,
// l / 4) of matrix i.
__device__ __forceinline__ void load_transposed(unsigned (&r)[4], const void* row) {
#if defined(LOBS_EMULATE)
    emulator::load_transposed(r, row);
#else
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}

// d += a b on tensor cores. a is 16 x 16 by rows, b 16 x 8 by columns, d 16 x 8 in float32, in the
// fragment layout of mma.m16n8k16.
template <Dtype kType>
__device__ __forceinline__ void multiply_16(float (&d)[4], const unsigned (&a)[4], unsigned b0,
                                            unsigned b1) {
#if defined(LOBS_EMULATE)
    emulator::multiply_16(d, a, b0, b1, kType == Dtype::bf16);
#else
    if constexpr (kType == Dtype::bf16)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// ---- the row's operations -----------------------------------------------------------------------

HessianAccumulateFn hessian_accumulate;
InverseUpdateFn inverse_update;
SaliencyArgminFn saliency_argmin;
StaticOrderPruneFn static_order_prune;
RankLowestFn rank_lowest;
ExactTraceFn exact_trace;
ExactBytes exact_bytes;
SweepBlockFn sweep_block;
AdmmStepFn admm_step;
ConjugateStepFn conjugate_step;
ColumnsTraceFn columns_trace;
ColumnsBytes columns_bytes;

}  // namespace lobs::cuda
