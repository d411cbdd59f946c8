// parallel.cpp: contract in parallel.h. Compiled once, for the baseline machine.
#include "parallel.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>

#if defined(LOBS_THREADS)
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

namespace lobs {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kOften = 100;  // ms

// Whether the calling thread should ask whether the call was interrupted, and if so, notes the time.
bool is_time(const Context& context) {
    if (context.interrupted == nullptr) return false;
    const auto since = Clock::now().time_since_epoch();
    const std::int64_t now = std::chrono::duration_cast<std::chrono::milliseconds>(since).count();
    if (context.asked == 0) context.asked = now;
    if (now - context.asked < kOften) return false;
    context.asked = now;
    return true;
}

struct Loop {
    Index items;
    const Context* context;
    void (*task)(void*, Index, int);
    void* arg;
    std::atomic<Index> next{0};
    std::atomic<bool> stop{false};

    void work(int worker) {
        while (!stop.load(std::memory_order_relaxed)) {
            if (worker == 0 && is_time(*context) && context->interrupted()) {
                stop.store(true, std::memory_order_relaxed);
                return;
            }
            const Index item = next.fetch_add(1, std::memory_order_relaxed);
            if (item >= items) return;
            task(arg, item, worker);
        }
    }
};

}  // namespace

bool parallel_for(Index items, const Context& context,
                  void (*task)(void* arg, Index item, int worker), void* arg) {
    Loop loop{items, &context, task, arg};
    const Index wanted = items < context.threads ? items : context.threads;
    if (wanted <= 1) {  // without a parallel region, which is safe in a forked child
        loop.work(0);
        return !loop.stop.load();
    }
    const int threads = static_cast<int>(wanted);
#if defined(LOBS_THREADS)
    std::vector<std::thread> team;
    for (int worker = 1; worker < threads; ++worker)
        team.emplace_back([&loop, worker] { loop.work(worker); });
    loop.work(0);
    for (auto& member : team) member.join();
#else
#pragma omp parallel num_threads(threads)
    loop.work(omp_get_thread_num());
#endif
    return !loop.stop.load();
}

struct Interrupt::State {
    const Context* context;
    std::atomic<bool> raised{false};
};

Interrupt::Interrupt(const Context& context) : state_(new (std::nothrow) State{&context}) {}

Interrupt::~Interrupt() { delete state_; }

bool Interrupt::asked(int worker) {
    if (state_ == nullptr) return false;
    if (worker == 0 && is_time(*state_->context) && state_->context->interrupted())
        state_->raised.store(true);
    return raised();
}

bool Interrupt::raised() const {
    return state_ != nullptr && state_->raised.load(std::memory_order_relaxed);
}

const char* parallel_runtime() {
#if defined(LOBS_THREADS)
    return "std::thread";
#else
    return "openmp";
#endif
}

Scratch::Scratch(Index workers, Index bytes) : base_(nullptr), stride_(0) {
    // An odd number of cache lines apart, so that workers' buffers do not share cache sets.
    if (__builtin_add_overflow(bytes, Index{63}, &stride_)) return;
    stride_ = (stride_ / 64 | 1) * 64;
    Index total = 0;
    if (__builtin_mul_overflow(workers, stride_, &total)) return;
    base_ = static_cast<unsigned char*>(std::aligned_alloc(64, static_cast<std::size_t>(total)));
}

Scratch::~Scratch() { std::free(base_); }

Lowest::Lowest(Index workers, Index none)
    : noted_(workers, sizeof(Index)), workers_(workers), none_(none) {
    for (int w = 0; ok() && w < workers_; ++w) *noted_.of<Index>(w) = none_;
}

void Lowest::note(int worker, Index item) {
    Index* lowest = noted_.of<Index>(worker);
    *lowest = least(*lowest, item);
}

Index Lowest::item() const {
    Index lowest = none_;
    for (int w = 0; w < workers_; ++w) lowest = least(lowest, *noted_.of<Index>(w));
    return lowest;
}

}  // namespace lobs
