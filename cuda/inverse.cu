// inverse.cu: contract in inverse.h.
#include "common.cuh"

namespace lobs::cuda {

Info inverse_update(void*, Dtype, Index, Index, AnyMatrix, double, const Context&) {
    return {Status::unsupported, 0};
}

}  // namespace lobs::cuda
