// errors.h: what an operation reports. Exceptions never leave an operation.
#pragma once

#include "types.h"

namespace lobs {

// Python has the same enum: _core.Status.
enum class Status : int {
    ok = 0,
    not_finite = 1,     // an input holds a NaN or an infinity; `where` is its flat index
    not_positive = 2,   // a pivot is not positive; the contract says what `where` is
    out_of_memory = 3,  // scratch could not be allocated; outputs are untouched
    interrupted = 4,    // Context::interrupted() returned true; outputs mix old and new
    unsupported = 5,    // the backend lacks the operation for this dtype or size
    bad_order = 6,      // a column is out of range or occurs twice; `where` is its position
    device_failed = 7,  // the device's runtime failed; `where` is its error code
};

struct Info {
    Status status;
    Index where;
};

// A failure as one number, of which the lowest has the lowest `where`: what Device::report holds.
LOBS_HD LOBS_INLINE std::uint64_t reported(Status status, Index where) {
    return static_cast<std::uint64_t>(where) * 16 + static_cast<std::uint64_t>(status);
}

// The way back from Device::report.
LOBS_INLINE Info info_of(std::uint64_t report) {
    if (report == kNothing) return {Status::ok, 0};
    return {static_cast<Status>(report % 16), static_cast<Index>(report / 16)};
}

}  // namespace lobs
