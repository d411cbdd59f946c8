#include "exchange.h"

#include "vector.h"

namespace lobs::LOBS_LEVEL {
Info exchange(const ExchangeOut&, AnyMatrix, const double*, const unsigned char*, Index, Index, const Context&) { return {Status::unsupported, 0}; }
}  // namespace lobs::LOBS_LEVEL
