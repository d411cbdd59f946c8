// dispatch.h: the backend table. One row per backend, one column per operation.
#pragma once

#include "exact.h"
#include "exchange.h"
#include "hessian.h"
#include "inverse.h"
#include "ranking.h"
#include "saliency.h"
#include "solve.h"
#include "static_order.h"
#include "sweep.h"

namespace lobs {

struct Backend {
    const char* name = "";
    const char* detail = "";  // one line for people
    bool ready = false;       // may be called on this machine
    bool device = false;      // needs Context::device
    // A null entry means: this backend has no such operation. Calling it is an error, never a
    // silent detour.
    HessianAccumulateFn* hessian_accumulate = nullptr;
    InverseUpdateFn* inverse_update = nullptr;
    SaliencyArgminFn* saliency_argmin = nullptr;
    StaticOrderPruneFn* static_order_prune = nullptr;
    RankLowestFn* rank_lowest = nullptr;
    RankRowsFn* rank_rows = nullptr;
    ExactTraceFn* exact_trace = nullptr;
    ExactBytes* exact_bytes = nullptr;
    SupportSolveFn* support_solve = nullptr;
    ExchangeFn* exchange = nullptr;
    SweepBlockFn* sweep_block = nullptr;
};

// The C entry of a backend that lives in a shared object of its own (`lobs_backend`). Fills *row
// and returns 0, or returns non-zero if `version` is not the one it was built for.
constexpr int kBackendVersion = 3;
using BackendEntry = int(int version, Backend* row);

// All rows, fastest first among those that run here; the CUDA object is looked for once, when first
// asked.
const Backend* backend_rows(int* count);

// Adds the row of another object with that entry. Returns its name, or null with *why filled.
const char* backend_load(const char* file, const char** why);

// The row called `name`; "cpu" is the fastest level this machine has, or the one LOBS_CPU_LEVEL
// names. Null if none.
const Backend* backend_row(const char* name);

}  // namespace lobs
