// parallel.h: one loop over independent items, and scratch memory for its workers.
//
// Two builds of the same interface: OpenMP (wheels; shares torch's runtime) and std::thread
// (LOBS_THREADS, for the race detector and for platforms without OpenMP). Items are handed out
// dynamically, one at a time; there is no reduction across items, so results cannot depend on the
// number of threads.
#pragma once

#include "types.h"

namespace lobs {

// Calls task(arg, item, worker) for item = 0..items-1, worker in [0, context.threads). The calling
// thread takes part as worker 0. Returns false if context.interrupted() answered true, in which
// case some items never ran.
bool parallel_for(Index items, const Context& context,
                  void (*task)(void* arg, Index item, int worker), void* arg);

// The same for a callable; `body(item, worker)` must not throw. Force-inlined so that no weak
// symbol arises.
template <typename Body>
LOBS_INLINE bool parallel_items(Index items, const Context& context, Body& body) {
    return parallel_for(
        items, context,
        [](void* arg, Index item, int worker) { (*static_cast<Body*>(arg))(item, worker); }, &body);
}

// For items that take long: asks context.interrupted() on worker 0, ten times a second, and tells
// every worker. After raised(), outputs are a mixture of old and new.
class Interrupt {
   public:
    explicit Interrupt(const Context& context);
    ~Interrupt();
    Interrupt(const Interrupt&) = delete;
    Interrupt& operator=(const Interrupt&) = delete;

    bool asked(int worker);  // true: return as soon as possible
    bool raised() const;

   private:
    struct State;
    State* state_;
};

// The name of the build: "openmp" or "std::thread".
const char* parallel_runtime();

// Cache-line aligned memory for `workers` workers, `bytes` each, all from one allocation, not
// initialised.
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

// The lowest item that any worker has noted: the same however many workers there are.
class Lowest {
   public:
    Lowest(Index workers, Index none);

    bool ok() const { return noted_.ok(); }
    void note(int worker, Index item);
    Index item() const;  // `none` where nothing was noted

   private:
    Scratch noted_;
    Index workers_, none_;
};

}  // namespace lobs
