// backend.cu: the C entry of the CUDA object, which fills the backend's row for dispatch.cpp.
//
// The object links the static CUDA runtime and nothing else: no driver, no cuBLAS, no torch.
// Without a driver it still loads, and says so in `detail`. Operations that torch does as well on a
// device (sorting a row, solving for many supports) have no entry here: lobs_native.ops calls torch
// instead.
#include <cstdio>

#include "common.cuh"

extern "C" __attribute__((visibility("default"))) int lobs_backend(int version,
                                                                   lobs::Backend* row) {
    if (version != lobs::kBackendVersion) return 1;
    *row = lobs::Backend{};
#if defined(LOBS_EMULATE)
    row->name = "emulated";
    row->detail = "the CUDA kernels, run on the host: for tests";
    row->ready = true;
#else
    static char detail[256];
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    row->name = "cuda";
    row->detail = detail;
    row->ready = error == cudaSuccess && devices > 0;
    if (row->ready)
        std::snprintf(detail, sizeof detail, "CUDA runtime %d, %d device(s)", CUDART_VERSION,
                      devices);
    else
        std::snprintf(detail, sizeof detail, "CUDA runtime %d, no usable device: %s (error %d)",
                      CUDART_VERSION, cudaGetErrorString(error), static_cast<int>(error));
#endif
    row->device = true;
    row->hessian_accumulate = lobs::cuda::hessian_accumulate;
    row->inverse_update = lobs::cuda::inverse_update;
    row->saliency_argmin = lobs::cuda::saliency_argmin;
    row->static_order_prune = lobs::cuda::static_order_prune;
    row->rank_lowest = lobs::cuda::rank_lowest;
    row->exact_trace = lobs::cuda::exact_trace;
    row->exact_bytes = lobs::cuda::exact_bytes;
    row->sweep_block = lobs::cuda::sweep_block;
    row->admm_step = lobs::cuda::admm_step;
    row->conjugate_step = lobs::cuda::conjugate_step;
    row->columns_trace = lobs::cuda::columns_trace;
    row->columns_bytes = lobs::cuda::columns_bytes;
    return 0;
}
