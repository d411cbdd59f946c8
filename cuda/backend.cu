// backend.cu: the C entry of the CUDA object. It hands the backend's row to dispatch.cpp.
//
// The object links the static CUDA runtime and nothing else: no driver, no cuBLAS, no torch. Where
// there is no driver it still loads, and says so in `detail`. The row's operations are null until
// their kernels exist, so that a call by name fails with a message instead of taking another path.
#include <cstdio>

#include "common.cuh"

extern "C" __attribute__((visibility("default"))) int lobs_backend(int version,
                                                                   lobs::Backend* row) {
    if (version != lobs::kBackendVersion) return 1;
    static char detail[256];
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error == cudaSuccess)
        std::snprintf(detail, sizeof detail,
                      "CUDA runtime %d, %d device(s), no operations in this release",
                      CUDART_VERSION, devices);
    else
        std::snprintf(detail, sizeof detail, "CUDA runtime %d, no usable device: %s (error %d)",
                      CUDART_VERSION, cudaGetErrorString(error), static_cast<int>(error));
    *row = lobs::Backend{};
    row->name = "cuda";
    row->detail = detail;
    return 0;
}
