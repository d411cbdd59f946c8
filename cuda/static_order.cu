// static_order.cu: contract in static_order.h.
#include "common.cuh"

namespace lobs::cuda {

Info static_order_prune(AnyMatrix, const void*, const std::int32_t*, const Index*, const Context&) {
    return {Status::unsupported, 0};
}

}  // namespace lobs::cuda
