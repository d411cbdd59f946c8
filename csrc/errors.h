// errors.h: what an operation reports back. Exceptions do not cross an operation's boundary.
#pragma once

#include "types.h"

namespace lobs {

enum class Status : int {
    ok = 0,
    not_finite = 1,     // a NaN or an infinity in an input; `where` is its flat index
    not_positive = 2,   // a pivot is not positive; `where` says which, in the operation's own terms
    out_of_memory = 3,  // scratch could not be allocated; outputs untouched
    interrupted = 4,    // Context::interrupted said so; outputs hold a mixture of old and new
    unsupported = 5,    // this backend has no such operation, or not for this dtype
    bad_order = 6,      // a column is out of range or occurs twice; `where` is its position
    device_failed = 7,  // the device's runtime refused; `where` is its error code
};

struct Info {
    Status status;
    Index where;
};

// A failure as one number, so that the lowest `where` wins: what Device::report holds.
LOBS_HD LOBS_INLINE std::uint64_t reported(Status status, Index where) {
    return static_cast<std::uint64_t>(where) * 16 + static_cast<std::uint64_t>(status);
}

}  // namespace lobs
