#include "sweep.h"

#include "vector.h"

namespace lobs::LOBS_LEVEL {
Info sweep_block(AnyMatrix, AnyMatrix, unsigned char*, AnyMatrix, Index, Index, const Context&) { return {Status::unsupported, 0}; }
}  // namespace lobs::LOBS_LEVEL
