// parallel.h: one loop over independent items, and scratch memory for its workers.
//
// The interface has two builds: OpenMP (in wheels; shares torch's runtime) and std::thread
// (LOBS_THREADS; for the race detector and for platforms without OpenMP). Workers take items one at
// a time. Nothing is reduced across items, so results cannot depend on the number of threads.
#pragma once

#include "types.h"

namespace lobs {

// Calls task(arg, item, worker) for item = 0 .. items - 1, with worker in [0, context.threads). The
// calling thread is worker 0. Returns false if context.interrupted() returned true; then some items
// have not run.
bool parallel_for(Index items, const Context& context,
                  void (*task)(void* arg, Index item, int worker), void* arg);

// The same for a callable. `body(item, worker)` must not throw. Force-inlined, so that there is no
// weak symbol.
template <typename Body>
LOBS_INLINE bool parallel_items(Index items, const Context& context, Body& body) {
    return parallel_for(
        items, context,
        [](void* arg, Index item, int worker) { (*static_cast<Body*>(arg))(item, worker); }, &body);
}

// For long items: worker 0 asks context.interrupted() ten times a second, and every worker sees the
// answer. If raised() is true, outputs mix old and new values.
class Interrupt {
   public:
    explicit Interrupt(const Context& context);
    ~Interrupt();
    Interrupt(const Interrupt&) = delete;
    Interrupt& operator=(const Interrupt&) = delete;

    bool asked(int worker);  // if true, return as soon as possible
    bool raised() const;

   private:
    struct State;
    State* state_;
};

// The name of the build: "openmp" or "std::thread".
const char* parallel_runtime();

// Uninitialised memory for `workers` workers, `bytes` each, aligned to cache lines, from one
// allocation.
class Scratch {
   public:
    Scratch(Index workers, Index bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    bool ok() const { return base_ != nullptr; }
    template <typename T>
    LOBS_INLINE T* of(int worker) const {
        return reinterpret_cast<T*>(base_ + static_cast<Index>(worker) * stride_);
    }

   private:
    unsigned char* base_;
    Index stride_;
};

// The lowest item that any worker has noted, whatever the number of workers.
class Lowest {
   public:
    Lowest(Index workers, Index none);

    bool ok() const { return noted_.ok(); }
    void note(int worker, Index item);
    Index item() const;  // `none` if nothing was noted

   private:
    Scratch noted_;
    Index workers_, none_;
};

}  // namespace lobs
