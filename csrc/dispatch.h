// dispatch.h: the backend table. One row per backend, one column per operation.
#pragma once

#include "admm.h"
#include "columns.h"
#include "conjugate.h"
#include "exact.h"
#include "exchange.h"
#include "hessian.h"
#include "inverse.h"
#include "ranking.h"
#include "saliency.h"
#include "sliced.h"
#include "solve.h"
#include "static_order.h"
#include "sweep.h"

namespace lobs {

// The columns: each function's type, and its name in every language.
#define LOBS_OPERATIONS(COLUMN)                     \
    COLUMN(HessianAccumulateFn, hessian_accumulate) \
    COLUMN(InverseUpdateFn, inverse_update)         \
    COLUMN(SaliencyArgminFn, saliency_argmin)       \
    COLUMN(StaticOrderPruneFn, static_order_prune)  \
    COLUMN(RankLowestFn, rank_lowest)               \
    COLUMN(RankRowsFn, rank_rows)                   \
    COLUMN(ExactTraceFn, exact_trace)               \
    COLUMN(ExactBytes, exact_bytes)                 \
    COLUMN(SupportSolveFn, support_solve)           \
    COLUMN(ExchangeFn, exchange)                    \
    COLUMN(SweepBlockFn, sweep_block)               \
    COLUMN(AdmmStepFn, admm_step)                   \
    COLUMN(ConjugateStepFn, conjugate_step)         \
    COLUMN(ColumnsTraceFn, columns_trace)           \
    COLUMN(ColumnsBytes, columns_bytes)             \
    COLUMN(SlicedLinearFn, sliced_linear)

// A null entry means that the backend lacks the operation. Calling it anyway is an error: nothing
// is rerouted silently. Callers ask backend_has first and say which backend they used instead.
struct Backend {
    const char* name = "";
    const char* detail = "";  // one line for people
    bool ready = false;       // may be called on this machine
    bool device = false;      // needs Context::device
#define LOBS_ENTRY(Function, operation) Function* operation = nullptr;
    LOBS_OPERATIONS(LOBS_ENTRY)
#undef LOBS_ENTRY
};

// The C entry of a backend that lives in a shared object of its own (`lobs_backend`). It fills *row
// and returns 0, or returns non-zero if `version` is not the one it was built for.
constexpr int kBackendVersion = 6;
using BackendEntry = int(int version, Backend* row);

// All rows, the fastest first among those that run here. The first call looks for the CUDA object.
const Backend* backend_rows(int* count);

// Adds the row of another object that has such an entry. Returns its name, or null with *why set.
const char* backend_load(const char* file, const char** why);

// The row called `name`, or null. "cpu" stands for the fastest level of this machine, or for the
// one that LOBS_CPU_LEVEL names.
const Backend* backend_row(const char* name);

// Whether the row has the operation. *known is false if the table has no column of that name.
bool backend_has(const Backend& row, const char* operation, bool* known);

}  // namespace lobs
