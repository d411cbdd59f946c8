// exact.cu: contract in exact.h, decisions shared with csrc/cpu/exact.cpp in exact_policy.h.
//
// The algorithm is that of csrc/cpu/exact.cpp: a pivoted Cholesky factorisation of the shared A
// that updates together the columns that are likely to be needed next. Here a thread block works on
// one row at a time and takes the next row when it is done, so that no row waits for another. Each
// block has its own factor V, cache of columns and vectors in scratch memory.
//
//   refill  Advances the `ahead` cheapest columns: cached -= coefficients * V, a product of 64
//           columns by 256 slots (float32) per step of the loop, 8 x 8 of them in a thread's
//           registers. V and the coefficients pass through two buffers in shared memory. Nearly all
//           flops are here: 2 * 64 * 256 for every 4 * (64 + 256) bytes read.
//   remove  Applies the steps since the last refill to one cached column. It becomes the new line
//           of V and updates weights and diagonal; the same pass finds the next argmin. Each of
//           those steps reads a line of V once: this is bound by memory.
//
// Slots are squeezed when an eighth of them are dead, at most once per panel of 128 steps.
#include "common.cuh"
#include "exact_policy.h"

namespace lobs::cuda {
namespace {

using namespace exact;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMembers = 8;       // columns of a thread's tile
constexpr int kTileMembers = 64;  // the most columns advanced together
constexpr int kPad = 16;          // slots are padded to a multiple of it

template <typename T>
constexpr int kLanes = 16 / static_cast<int>(sizeof(T));  // values in one access

template <typename T>
struct alignas(16) Pack {
    T v[kLanes<T>];
};

// The tile of kGroups * 8 columns: kThreads / kGroups threads side by side, two packs each.
template <typename T, int kGroups>
struct Tile {
    static constexpr int kAcross = kThreads / kGroups;
    static constexpr int kSlots = 2 * kAcross * kLanes<T>;
    static constexpr int kColumns = kGroups * kMembers;
    static constexpr int kSteps = kGroups == 8 ? 16 : kGroups == 4 ? 8 : 4;
    static constexpr int kBuffer = kSteps * (kSlots + kColumns);  // values
};

template <typename T>
constexpr int kBufferBytes =
    2 * static_cast<int>(sizeof(T)) *
    (Tile<T, 8>::kBuffer > Tile<T, 4>::kBuffer ? Tile<T, 8>::kBuffer : Tile<T, 4>::kBuffer);
static_assert(Tile<float, 2>::kBuffer <= Tile<float, 4>::kBuffer, "");
static_assert(Tile<double, 2>::kBuffer <= Tile<double, 4>::kBuffer, "");
static_assert(kBins * 4 <= kBufferBytes<float>, "");

// Numbers of elements in the scratch of a row.
template <typename T>
struct Sizes {
    Index stride, ahead, steps, groups, blocks;

    LOBS_HD Sizes(Index C, const ExactPlan& plan) {
        stride = up(C, kPad);
        ahead = columns_ahead(C / 8, stride, plan);
        steps = plan.limit;
        groups = plan.group > 0 ? C / plan.group : 0;
        blocks = plan.block > 1 ? C / plan.block : 0;
    }
};

template <typename T>
struct Arguments {
    ExactOut out;
    T* W;
    Index row_stride;
    const T* A;
    const unsigned char* state;
    ExactPlan plan;
    Index R, C;
    unsigned char* scratch;
    Index scratch_bytes;  // of one block
    unsigned long long* next;
    const std::uint64_t* report;
};

// The row of a thread block: in shared memory, before the buffers of the product.
template <typename T>
struct Row {
    // In scratch memory.
    T *V, *cache, *coefficient, *w, *diag, *bar, *first, *cost;
    T *blocks, *factors, *solved;  // of 1 x b patterns, [entry][block]
    std::int32_t *column, *cached, *source, *slot, *taken;
    unsigned char* kind;
    // All threads read these, after a barrier.
    Index row;
    int first_left, live, bin, below;
    int row_slot[2 * kMostAhead], row_stamp[2 * kMostAhead];
    int chosen[kMostAhead], member[kMostAhead], member_row[kMostAhead], member_stamp[kMostAhead];
    int kept_stamp[kMostAhead];
    unsigned char used[2 * kMostAhead];
    int free_row[kMostAhead];
    T step[kMostAhead];
    T warp_value[kWarps];
    int warp_slot[kWarps], warp_sum[kWarps];
};

template <typename T>
LOBS_HD void carve(Row<T>& s, unsigned char* memory, Index C, const ExactPlan& plan, Index* bytes) {
    const Sizes<T> size(C, plan);
    Carver carver(memory);
    carver.take(s.V, size.steps * size.stride);
    carver.take(s.cache, cache_rows(size.ahead) * size.stride);
    carver.take(s.coefficient, kTileMembers * size.steps);
    carver.take(s.w, size.stride);
    carver.take(s.diag, size.stride);
    carver.take(s.bar, size.stride);
    carver.take(s.first, size.stride);
    carver.take(s.cost, size.stride);
    carver.take(s.blocks, size.blocks * plan.block * plan.block);
    carver.take(s.factors, size.blocks * plan.block * plan.block);
    carver.take(s.solved, size.blocks * plan.block);
    carver.take(s.column, size.stride);
    carver.take(s.cached, size.stride);
    carver.take(s.source, size.stride);
    carver.take(s.slot, C);
    carver.take(s.taken, size.groups);
    carver.take(s.kind, size.stride);
    unsigned char* end = nullptr;
    carver.take(end, 0);
    *bytes = up(end - memory, 256);
}

// Both are functions and never passed as pointers, so that the compiler sees that this is shared
// memory.
template <typename T>
__device__ __forceinline__ Row<T>& row() {
    return *reinterpret_cast<Row<T>*>(shared());
}
template <typename T>
__device__ __forceinline__ T* buffer() {
    return reinterpret_cast<T*>(shared() + up(sizeof(Row<T>), 128));
}

// ---- operations of a whole block ----------------------------------------------------------------

template <typename T>
struct Lowest {
    T value;
    int slot;
};

// The lowest value of all threads and, among equals, the lowest slot; slot -1 if all are infinite.
template <typename T>
__device__ Lowest<T> block_lowest(T value, int slot) {
    Row<T>& s = row<T>();
    const int t = static_cast<int>(threadIdx.x);
    for (int by = kWarp / 2; by > 0; by /= 2) {
        const T other = __shfl_xor_sync(kAllLanes, value, by);
        const int at = __shfl_xor_sync(kAllLanes, slot, by);
        if (at >= 0 && (slot < 0 || other < value || (other == value && at < slot)))
            value = other, slot = at;
    }
    __syncthreads();
    if (t % kWarp == 0) s.warp_value[t / kWarp] = value, s.warp_slot[t / kWarp] = slot;
    __syncthreads();
    Lowest<T> best{infinity<T>(), -1};
    for (int i = 0; i < kWarps; ++i) {
        const T other = s.warp_value[i];
        const int at = s.warp_slot[i];
        if (at >= 0 &&
            (best.slot < 0 || other < best.value || (other == best.value && at < best.slot)))
            best = {other, at};
    }
    return best;
}

// The number of threads before this one with `flag`; *total counts all threads.
template <typename T>
__device__ int block_rank(bool flag, int* total) {
    Row<T>& s = row<T>();
    const int t = static_cast<int>(threadIdx.x);
    const unsigned flags = __ballot_sync(kAllLanes, flag);
    __syncthreads();
    if (t % kWarp == 0) s.warp_sum[t / kWarp] = __popc(flags);
    __syncthreads();
    int before = __popc(flags & ((1u << t % kWarp) - 1)), all = 0;
    for (int i = 0; i < kWarps; ++i) {
        if (i < t / kWarp) before += s.warp_sum[i];
        all += s.warp_sum[i];
    }
    *total = all;
    return before;
}

// The sum of `value` over the threads before this one.
template <typename T>
__device__ int block_sum_before(int value) {
    Row<T>& s = row<T>();
    const int t = static_cast<int>(threadIdx.x), lane = t % kWarp;
    int sum = value;
    for (int by = 1; by < kWarp; by *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, static_cast<unsigned>(by));
        if (lane >= by) sum += other;
    }
    __syncthreads();
    if (lane == kWarp - 1) s.warp_sum[t / kWarp] = sum;
    __syncthreads();
    for (int i = 0; i < t / kWarp; ++i) sum += s.warp_sum[i];
    return sum - value;
}

// ---- the product --------------------------------------------------------------------------------

// Copies kSteps lines of V and their coefficients into a buffer, with zeros after the last step and
// the last slot.
template <typename T, int kGroups>
__device__ __forceinline__ void stage(T* to, const T* V, const T* coefficient, Index stride,
                                      int left, int slots) {
    using Shape = Tile<T, kGroups>;
    const int t = static_cast<int>(threadIdx.x);
    constexpr int kAccesses = Shape::kSlots / kLanes<T>;
    static_assert(Shape::kSteps * kAccesses % kThreads == 0, "");
    constexpr int kRounds = Shape::kSteps * kAccesses / kThreads;
    const int i = t % kAccesses * kLanes<T>;
    int k = t / kAccesses;  // kThreads is a multiple of kAccesses, or the other way round
    constexpr int kStepsApart = kThreads >= kAccesses ? kThreads / kAccesses : 0;
    constexpr int kSlotsApart = kThreads >= kAccesses ? 0 : kThreads * kLanes<T>;
    static_assert(kStepsApart > 0 || kAccesses % kThreads == 0, "");
#pragma unroll
    for (int e = 0; e < kRounds; ++e) {
        const int per_line = kStepsApart > 0 ? 1 : kAccesses / kThreads;
        const int step = kStepsApart > 0 ? k + e * kStepsApart : e / per_line;
        const int slot = i + e % per_line * kSlotsApart;
        const bool there = step < left && slot < slots;
        copy_16(to + (t + e * kThreads) * kLanes<T>, there ? V + step * stride + slot : V,
                there ? 16 : 0);
    }
    constexpr int kOwn = Shape::kColumns / kLanes<T>;
    to += Shape::kSteps * Shape::kSlots;
    for (int e = t; e < Shape::kSteps * kOwn; e += kThreads) {
        const bool there = e / kOwn < left;
        copy_16(to + e * kLanes<T>, there ? coefficient + e * kLanes<T> : coefficient,
                there ? 16 : 0);
    }
    commit_copies();
}

// Brings `size` members, from `first` on, to step j. None is at an earlier step than the first. Not
// inlined, because its tile needs the registers that the rest of the row would occupy.
template <typename T, int kGroups>
__device__ __noinline__ void advance(Index stride, int first, int size, int j, int padded) {
    Row<T>& s = row<T>();
    using Shape = Tile<T, kGroups>;
    constexpr int kColumns = Shape::kColumns;
    const int t = static_cast<int>(threadIdx.x);
    const int from = s.member_stamp[first];
    if (from == j) return;
    for (int e = t; e < (j - from) * kColumns; e += kThreads) {
        const int m = e % kColumns, step = from + e / kColumns;
        const bool takes = m < size && step >= s.member_stamp[first + m];
        global(s.coefficient)[e] = takes ? -global(s.V)[step * stride + s.member[first + m]] : T(0);
    }
    __syncthreads();
    const int group = t / Shape::kAcross, across = t % Shape::kAcross;
    for (int begin = 0; begin < padded; begin += Shape::kSlots) {
        T sum[kMembers][2][kLanes<T>];
        const int own[2] = {begin + across * kLanes<T>,
                            begin + (Shape::kAcross + across) * kLanes<T>};
#pragma unroll
        for (int m = 0; m < kMembers; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                Pack<T> p{};
                if (group * kMembers + m < size && own[h] < padded)
                    p = *reinterpret_cast<const Pack<T>*>(
                        global(s.cache) + s.member_row[first + group * kMembers + m] * stride +
                        own[h]);
#pragma unroll
                for (int l = 0; l < kLanes<T>; ++l) sum[m][h][l] = p.v[l];
            }
        const T* V = global(s.V) + from * stride + begin;
        const T* coefficient = global(s.coefficient);
        int left = j - from, which = 0;
        stage<T, kGroups>(buffer<T>(), V, coefficient, stride, left, padded - begin);
        for (; left > 0; left -= Shape::kSteps, which ^= 1) {
            V += Shape::kSteps * stride;
            coefficient += Shape::kSteps * kColumns;
            if (left > Shape::kSteps)
                stage<T, kGroups>(buffer<T>() + (which ^ 1) * Shape::kBuffer, V, coefficient,
                                  stride, left - Shape::kSteps, padded - begin);
            else
                commit_copies();
            wait_copies<1>();
            __syncthreads();
            const T* at = buffer<T>() + which * Shape::kBuffer + across * kLanes<T>;
            const T* c = buffer<T>() + which * Shape::kBuffer + Shape::kSteps * Shape::kSlots +
                         group * kMembers;
#pragma unroll
            for (int k = 0; k < Shape::kSteps; ++k) {
                Pack<T> v[2], by[kMembers / kLanes<T>];
                v[0] = *reinterpret_cast<const Pack<T>*>(at + k * Shape::kSlots);
                v[1] = *reinterpret_cast<const Pack<T>*>(at + k * Shape::kSlots +
                                                         Shape::kAcross * kLanes<T>);
#pragma unroll
                for (int m = 0; m < kMembers / kLanes<T>; ++m)
                    by[m] = *reinterpret_cast<const Pack<T>*>(c + k * kColumns + m * kLanes<T>);
#pragma unroll
                for (int m = 0; m < kMembers; ++m)
#pragma unroll
                    for (int h = 0; h < 2; ++h)
#pragma unroll
                        for (int l = 0; l < kLanes<T>; ++l)
                            sum[m][h][l] =
                                fused(by[m / kLanes<T>].v[m % kLanes<T>], v[h].v[l], sum[m][h][l]);
            }
            __syncthreads();
        }
#pragma unroll
        for (int m = 0; m < kMembers; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (group * kMembers + m >= size || own[h] >= padded) continue;
                Pack<T> p;
#pragma unroll
                for (int l = 0; l < kLanes<T>; ++l) p.v[l] = sum[m][h][l];
                *reinterpret_cast<Pack<T>*>(global(s.cache) +
                                            s.member_row[first + group * kMembers + m] * stride +
                                            own[h]) = p;
            }
    }
    __syncthreads();
}

// ---- one row ------------------------------------------------------------------------------------

template <typename T>
class Worker {
   public:
    __device__ explicit Worker(const Arguments<T>& arguments)
        : a_(arguments), size_(arguments.C, arguments.plan), t_(static_cast<int>(threadIdx.x)) {}

    __device__ void run() {
        const ExactPlan& plan = a_.plan;
        const int b = static_cast<int>(plan.block), limit = static_cast<int>(plan.limit);
        std::int32_t* order = a_.out.order + s().row * plan.limit;
        T* loss = static_cast<T*>(a_.out.loss) + s().row * plan.limit;
        begin();
        Lowest<T> best = b > 1 ? cheapest_block() : cheapest();
        int panel = 0;
        while (best.slot >= 0 && j_ + b <= limit) {
            if (first_left_ == 0 && static_cast<double>(best.value) > plan.stop) break;
            if (panel_of(j_, b) != panel) squeeze(&best.slot);
            panel = panel_of(j_, b);
            if (!ready(best.slot)) refill(best.slot);
            const int begun = j_;
            const bool last = j_ + b == limit && !plan.update;
            for (int i = 0; i < b; ++i) {
                const int q = best.slot + i;
                const T d = s().diag[q], w = s().w[q];
                if (lost(d, s().first[q], plan)) {
                    finish(begun, 1);
                    return;
                }
                const T* column = cached_row(s().cached[q]);
                for (int k = t_; k < j_ - refilled_; k += kThreads)
                    s().step[k] = -line(refilled_ + k)[q];
                if (t_ == 0) {
                    order[j_] = s().column[q];
                    loss[j_] = saliency(w, d);
                    drop(q);
                }
                __syncthreads();
                first_left_ = s().first_left;
                live_ = s().live;
                if (last && b == 1) {
                    ++j_;
                    break;
                }
                const Lowest<T> found = remove(q, column, w, d);
                if (b == 1) best = found;
                ++j_;
            }
            if (last && b == 1) break;
            if (first_left_ == 0 && waiting_) {
                release();
                best.slot = -1;
            }
            if (b > 1)
                best = cheapest_block();
            else if (best.slot < 0)
                best = cheapest();
        }
        if (plan.update) {
            __syncthreads();
            T* W = a_.W + s().row * a_.row_stride;
            for (Index i = t_; i < a_.C; i += kThreads) {
                const int at = s().slot[i];
                W[i] = at >= 0 ? s().w[at] : T(0);
            }
        }
        finish(j_, 0);
    }

   private:
    __device__ static Row<T>& s() { return row<T>(); }
    __device__ T* line(int step) const { return global(s().V) + step * size_.stride; }
    __device__ T* cached_row(int r) const { return global(s().cache) + r * size_.stride; }

    __device__ void finish(int count, unsigned char lost) const {
        if (t_ != 0) return;
        a_.out.count[s().row] = count;
        a_.out.lost[s().row] = lost;
    }

    __device__ __noinline__ void begin() {
        const ExactPlan& plan = a_.plan;
        const Index C = a_.C;
        const Index whole = whole_columns(C, plan);
        const T* W = a_.W + s().row * a_.row_stride;
        const unsigned char* state = a_.state == nullptr ? nullptr : a_.state + s().row * C;
        slots_ = first_left_ = 0;
        for (Index i0 = 0; i0 < C; i0 += kThreads) {
            const Index i = i0 + t_;
            const auto asked = static_cast<WeightState>(i < C && state != nullptr ? state[i] : 0);
            const Kind kind = kind_of(asked, i < whole);
            const bool has = i < C && (kind != kStays || plan.update);
            int count = 0, first = 0;
            block_rank<T>(has && kind == kFirst, &first);
            const int at = slots_ + block_rank<T>(has, &count);
            if (i < C) s().slot[i] = has ? at : -1;
            if (has) {
                s().column[at] = static_cast<std::int32_t>(i);
                s().kind[at] = kind;
                s().w[at] = W[i];
                s().diag[at] = s().first[at] = a_.A[i * C + i];
            }
            slots_ += count;
            first_left_ += first;
        }
        __syncthreads();
        padded_ = static_cast<int>(up(slots_, kPad));
        waiting_ = first_left_ > 0;
        live_ = slots_;
        j_ = refilled_ = 0;
        const bool closed = plan.group > 0 && plan.per_group == 0;
        for (int i = t_; i < padded_; i += kThreads) {
            if (i >= slots_) blank(i);
            if (closed && s().kind[i] == kFree) s().kind[i] = kStays;
            s().cached[i] = -1;
            s().bar[i] = eligible(s().kind[i], waiting_) ? T(0) : infinity<T>();
        }
        for (int r = t_; r < cache_rows(size_.ahead); r += kThreads) s().row_slot[r] = -1;
        for (Index g = t_; g < size_.groups; g += kThreads) s().taken[g] = 0;
        if (t_ == 0) s().first_left = first_left_, s().live = live_;
        for (Index e = t_; e < size_.blocks * plan.block * plan.block; e += kThreads) {
            const Index g = e % size_.blocks, entry = e / size_.blocks;
            const Index i = g * plan.block + entry / plan.block;
            s().blocks[e] = a_.A[i * C + g * plan.block + entry % plan.block];
        }
        __syncthreads();
    }

    __device__ void blank(int i) const {  // a slot without a column
        s().column[i] = 0;
        s().kind[i] = kGone;
        s().w[i] = 0;
        s().diag[i] = s().first[i] = 1;
        s().bar[i] = s().cost[i] = infinity<T>();
        s().cached[i] = -1;
    }

    // Whether the last refill brought the column at q and all columns of its block up to date.
    __device__ bool ready(int q) const {
        for (int i = 0; i < a_.plan.block; ++i) {
            const int r = s().cached[q + i];
            if (r < 0 || s().row_stamp[r] < refilled_) return false;
        }
        return true;
    }

    // One thread: takes q out of the row, and closes its group if that is now full.
    __device__ void drop(int q) const {
        s().first_left -= s().kind[q] == kFirst;
        s().kind[q] = kGone;
        s().bar[q] = infinity<T>();
        s().slot[s().column[q]] = -1;
        --s().live;
        s().row_slot[s().cached[q]] = -1;  // its values last until this removal is done
        const Index M = a_.plan.group;
        if (M == 0) return;
        const Index g = s().column[q] / M;
        if (++s().taken[g] < a_.plan.per_group) return;
        for (Index i = g * M; i < (g + 1) * M; ++i)
            if (s().slot[i] >= 0) close(s().slot[i]);
    }

    __device__ void close(int i) const {
        if (s().kind[i] != kFree) return;
        s().bar[i] = infinity<T>();
        s().kind[i] = closed(a_.plan);
        if (a_.plan.update) return;
        s().slot[s().column[i]] = -1;
        --s().live;
        if (s().cached[i] >= 0) s().row_slot[s().cached[i]] = -1;
        s().cached[i] = -1;
    }

    // Makes free columns eligible once all columns that go first are removed.
    __device__ void release() {
        waiting_ = false;
        for (int i = t_; i < slots_; i += kThreads)
            if (s().kind[i] == kFree) s().bar[i] = 0;
        __syncthreads();
    }

    // Computes the cost of every slot. Returns the lowest.
    __device__ Lowest<T> cheapest() {
        T lowest = infinity<T>();
        int best = -1;
        for (int i = t_; i < padded_; i += kThreads) {
            const T cost = cost_of(s().w[i], s().diag[i], s().first[i], s().bar[i], a_.plan);
            s().cost[i] = cost;
            if (cost < lowest) lowest = cost, best = i;
        }
        return block_lowest<T>(lowest, best);
    }

    // Removes q, whose cached column is `column`. Returns the next cheapest slot.
    __device__ Lowest<T> remove(int q, const T* column, T wq, T dq) {
        const T scale = 1 / root(dq), z = wq * scale;
        const int steps = j_ - refilled_;
        const T* V = line(refilled_);
        T* out = line(j_);
        T lowest = infinity<T>();
        int best = -1;
        for (int i = t_ * kLanes<T>; i < padded_; i += kThreads * kLanes<T>) {
            Pack<T> v = *reinterpret_cast<const Pack<T>*>(column + i);
            const T* at = V + i;
#pragma unroll 8
            for (int k = 0; k < steps; ++k, at += size_.stride) {
                const Pack<T> p = *reinterpret_cast<const Pack<T>*>(at);
                const T c = s().step[k];
#pragma unroll
                for (int l = 0; l < kLanes<T>; ++l) v.v[l] = fused(c, p.v[l], v.v[l]);
            }
            Pack<T> w = *reinterpret_cast<const Pack<T>*>(s().w + i);
            Pack<T> d = *reinterpret_cast<const Pack<T>*>(s().diag + i);
            const Pack<T> bar = *reinterpret_cast<const Pack<T>*>(s().bar + i);
#pragma unroll
            for (int l = 0; l < kLanes<T>; ++l) {
                v.v[l] *= scale;
                w.v[l] = fused(-z, v.v[l], w.v[l]);
                d.v[l] = fused(-v.v[l], v.v[l], d.v[l]);
                const T cost = barred(saliency(w.v[l], d.v[l]), bar.v[l]);
                if (cost < lowest) lowest = cost, best = i + l;
            }
            *reinterpret_cast<Pack<T>*>(out + i) = v;
            *reinterpret_cast<Pack<T>*>(s().w + i) = w;
            *reinterpret_cast<Pack<T>*>(s().diag + i) = d;
        }
        if (t_ == 0) s().cached[q] = -1;
        const Lowest<T> found = block_lowest<T>(lowest, best);
        if (a_.plan.block > 1) update_blocks(out);
        return found;
    }

    // ---- refill ---------------------------------------------------------------------------------

    __device__ __noinline__ void refill(int best) {
        if (a_.plan.block == 1) cheapest();
        const int wanted = static_cast<int>(columns_wanted(size_.ahead, j_, a_.plan));
        __syncthreads();
        const int count = choose(best, wanted);
        // Assign cache rows to columns without one: free rows, or else those of columns not chosen.
        const int rows = static_cast<int>(cache_rows(size_.ahead));
        const int at = t_ < count ? s().chosen[t_] : -1;
        int r = at >= 0 ? s().cached[at] : -1;
        const bool fresh = at >= 0 && r < 0, kept = at >= 0 && r >= 0;
        int fresh_count = 0, kept_count = 0, free_count = 0;
        const int fresh_rank = block_rank<T>(fresh, &fresh_count);
        const int kept_rank = block_rank<T>(kept, &kept_count);
        if (t_ < rows) s().used[t_] = 0;
        __syncthreads();
        if (kept) {
            s().used[r] = 1;
            s().kept_stamp[kept_rank] = s().row_stamp[r];
        }
        int free_rank = block_rank<T>(t_ < rows && s().row_slot[t_] < 0, &free_count);
        if (free_count < fresh_count) {
            if (t_ < rows && s().row_slot[t_] >= 0 && s().used[t_] == 0) {
                s().cached[s().row_slot[t_]] = -1;
                s().row_slot[t_] = -1;
            }
            free_rank = block_rank<T>(t_ < rows && s().row_slot[t_] < 0, &free_count);
        }
        if (t_ < rows && s().row_slot[t_] < 0 && free_rank < fresh_count)
            s().free_row[free_rank] = t_;
        __syncthreads();
        int place = fresh_rank, stamp = 0;
        if (fresh) {
            r = s().free_row[fresh_rank];
            s().cached[at] = r;
            s().row_slot[r] = at;
        } else if (kept) {  // by stamp, as a tile starts at the step of its oldest column
            stamp = s().kept_stamp[kept_rank];
            place = fresh_count;
            for (int m = 0; m < kept_count; ++m) {
                const int other = s().kept_stamp[m];
                place += other < stamp || (other == stamp && m < kept_rank);
            }
        }
        if (at >= 0) {
            s().member[place] = at;
            s().member_row[place] = r;
            s().member_stamp[place] = stamp;
            s().row_stamp[r] = j_;
        }
        __syncthreads();
        for (int m = t_ / kWarp; m < fresh_count; m += kWarps) fetch(m);
        __syncthreads();
        for (int m = 0; m < count;) {
            const int end = m < fresh_count ? fresh_count : count;
            const int size = end - m < kTileMembers ? end - m : kTileMembers;
            if (size > 32)
                advance<T, 8>(size_.stride, m, size, j_, padded_);
            else if (size > 16)
                advance<T, 4>(size_.stride, m, size, j_, padded_);
            else
                advance<T, 2>(size_.stride, m, size, j_, padded_);
            m += size;
        }
        refilled_ = j_;
    }

    // One warp: copies A[:, column of member m], at the columns that have slots.
    __device__ void fetch(int m) const {
        const T* from = a_.A + s().column[s().member[m]] * a_.C;
        T* to = cached_row(s().member_row[m]);
        for (int i = t_ % kWarp; i < padded_; i += kWarp)
            to[i] = i < slots_ ? from[s().column[i]] : T(0);
    }

    // Puts about `wanted` of the cheapest eligible slots into s.chosen, after the block at `best`.
    // Returns their number.
    __device__ int choose(int best, int wanted) {
        int* bins = reinterpret_cast<int*>(buffer<T>());
        const int b = static_cast<int>(a_.plan.block);
        unsigned low = 0;
        int below = 0;
        for (int shift = kFirstShift; shift >= kLastShift; shift -= kBinBits) {
            for (int i = t_; i < kBins; i += kThreads) bins[i] = 0;
            __syncthreads();
            for (int i = t_; i < padded_; i += kThreads) {
                const unsigned key = sort_key(static_cast<float>(s().cost[i]));
                if (counts(key, low, shift)) atomicAdd(&bins[bin_of(key, shift)], 1);
            }
            __syncthreads();
            constexpr int kEach = kBins / kThreads;
            int own = 0;
            for (int i = 0; i < kEach; ++i) own += bins[t_ * kEach + i];
            int before = below + block_sum_before<T>(own);
            // The first bin that reaches `wanted`, or the last bin.
            const bool last = t_ == kThreads - 1;
            if (before < wanted && (before + own >= wanted || last)) {
                int i = t_ * kEach;
                while (i < t_ * kEach + kEach - 1 && before + bins[i] < wanted) before += bins[i++];
                s().bin = i;
                s().below = before;
            }
            __syncthreads();
            below = s().below;
            low |= static_cast<unsigned>(s().bin) << shift;
        }
        if (t_ < b) s().chosen[t_] = best + t_;
        int count = b, spare = wanted - below;
        for (int i0 = 0; i0 < padded_ && count < wanted; i0 += kThreads) {
            const int i = i0 + t_;
            const unsigned key = i < padded_ ? sort_key(static_cast<float>(s().cost[i])) : kNoKey;
            const bool may = within_reach(key, low) && !(i >= best && i < best + b);
            int ties = 0, taken = 0;
            const int tie = block_rank<T>(may && key >= low, &ties);
            const bool takes = may && (key < low || tie < spare);
            const int place = count + block_rank<T>(takes, &taken);
            if (takes && place < wanted) s().chosen[place] = i;
            count = count + taken < wanted ? count + taken : wanted;
            spare -= ties < spare ? ties : spare;
        }
        __syncthreads();
        return count;
    }

    // ---- squeezing ------------------------------------------------------------------------------

    __device__ __noinline__ void squeeze(int* best) {
        const int after = static_cast<int>(up(live_, kPad));
        if (!worth_squeezing(after, padded_)) return;
        int n = 0, moved_best = *best;
        for (int i0 = 0; i0 < slots_; i0 += kThreads) {
            const int i = i0 + t_;
            const bool keep = i < slots_ && s().kind[i] != kGone;
            int count = 0;
            const int to = n + block_rank<T>(keep, &count);
            if (keep) s().source[to] = i;
            n += count;
        }
        __syncthreads();
        const int padded = static_cast<int>(up(n, kPad));
        for (int i = t_; i < n; i += kThreads)
            if (s().source[i] == *best) s().bin = i;
        __syncthreads();
        moved_best = s().bin;
        // In place, because a source is never before its destination or before an earlier source.
        for (int i0 = 0; i0 < padded; i0 += kThreads) {
            const int i = i0 + t_;
            const bool moves = i < n;
            T w = 0, d = 1, bar = 0, first = 1;
            int column = 0, cached = -1;
            unsigned char kind = kGone;
            if (moves) {
                const int from = s().source[i];
                w = s().w[from], d = s().diag[from], bar = s().bar[from], first = s().first[from];
                column = s().column[from], cached = s().cached[from], kind = s().kind[from];
            }
            __syncthreads();
            if (moves) {
                s().w[i] = w, s().diag[i] = d, s().bar[i] = bar, s().first[i] = first;
                s().column[i] = column, s().cached[i] = cached, s().kind[i] = kind;
                s().slot[column] = i;
                if (cached >= 0) s().row_slot[cached] = i;
            } else if (i < padded) {
                blank(i);
            }
        }
        __syncthreads();
        for (int l = t_ / kWarp; l < j_; l += kWarps) squeeze_line(line(l), n, padded);
        for (int r = t_ / kWarp; r < cache_rows(size_.ahead); r += kWarps)
            if (s().row_slot[r] >= 0) squeeze_line(cached_row(r), n, padded);
        slots_ = n;
        padded_ = padded;
        *best = moved_best;
        __syncthreads();
    }

    // One warp.
    __device__ void squeeze_line(T* x, int n, int padded) const {
        constexpr int kEach = 4;
        for (int begin = t_ % kWarp; begin - t_ % kWarp < padded; begin += kEach * kWarp) {
            T value[kEach];
#pragma unroll
            for (int e = 0; e < kEach; ++e) {
                const int i = begin + e * kWarp;
                value[e] = i < n ? x[s().source[i]] : T(0);
            }
            __syncwarp();
#pragma unroll
            for (int e = 0; e < kEach; ++e)
                if (begin + e * kWarp < padded) x[begin + e * kWarp] = value[e];
            __syncwarp();
        }
    }

    // ---- blocks of columns: a thread for each ---------------------------------------------------

    // Downdates the diagonal blocks by the newest line of V.
    __device__ __noinline__ void update_blocks(const T* newest) const {
        const Index b = a_.plan.block, G = size_.blocks;
        for (Index g = t_; g < G; g += kThreads) {
            const int at = s().slot[g * b + b - 1];  // the last of its columns to go
            if (at < 0 || s().kind[at] == kStays || s().slot[g * b] < 0) continue;
            const T* v = newest + at - (b - 1);
            for (Index i = 0; i < b; ++i)
                for (Index k = 0; k <= i; ++k) {
                    T& entry = s().blocks[(i * b + k) * G + g];
                    entry = fused(-v[i], v[k], entry);
                }
        }
        __syncthreads();
    }

    // Puts the cost of every eligible block into s.cost. Returns the first slot of the cheapest.
    __device__ __noinline__ Lowest<T> cheapest_block() {
        const Index b = a_.plan.block, G = size_.blocks;
        for (int i = t_; i < padded_; i += kThreads) s().cost[i] = infinity<T>();
        __syncthreads();
        T lowest = infinity<T>();
        int best = -1;
        for (Index g = t_; g < G; g += kThreads) {
            const int at = s().slot[g * b];
            if (at < 0 || s().bar[at] > 0) continue;
            T* L = s().factors + g;
            T* y = s().solved + g;
            T sum = 0;
            for (Index i = 0; i < b; ++i) {
                T own = s().w[at + i];
                for (Index k = 0; k <= i; ++k) {
                    T l = s().blocks[(i * b + k) * G + g];
                    for (Index m = 0; m < k; ++m)
                        l = fused(-L[(i * b + m) * G], L[(k * b + m) * G], l);
                    if (k < i) {
                        l /= L[(k * b + k) * G];
                        own = fused(-l, y[k * G], own);
                    } else {
                        l = root(l);
                        own /= l;
                    }
                    L[(i * b + k) * G] = l;
                }
                y[i * G] = own;
                sum = fused(own, own, sum);
            }
            if (!(sum >= 0)) sum = 0;  // a lost pivot: chosen next, and reported
            for (Index i = 0; i < b; ++i) s().cost[at + i] = sum;
            if (sum < lowest) lowest = sum, best = at;
        }
        return block_lowest<T>(lowest, best);
    }

    const Arguments<T>& a_;
    const Sizes<T> size_;
    const int t_;
    // Equal in all threads.
    int slots_ = 0, padded_ = 0, j_ = 0, refilled_ = 0, first_left_ = 0, live_ = 0;
    bool waiting_ = false;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    exact_kernel(const __grid_constant__ Arguments<T> arguments) {
    if (*arguments.report != kNothing) return;
    Row<T>& s = row<T>();
    if (threadIdx.x == 0) {
        Index bytes = 0;
        carve(s, arguments.scratch + blockIdx.x * arguments.scratch_bytes, arguments.C,
              arguments.plan, &bytes);
    }
    for (;;) {
        __syncthreads();
        if (threadIdx.x == 0) s.row = static_cast<Index>(atomicAdd(arguments.next, 1ull));
        __syncthreads();
        if (s.row >= arguments.R) return;
        Worker<T>(arguments).run();
    }
}

template <typename T>
__global__ void diagonal_kernel(const T* A, Index C, std::uint64_t* report) {
    const Index step = static_cast<Index>(gridDim.x) * blockDim.x;
    for (Index q = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; q < C; q += step)
        if (!(A[q * C + q] > 0)) report_failure(report, Status::not_positive, q);
}

template <typename T>
Info run(const ExactOut& out, AnyMatrix W, const T* A, const unsigned char* state,
         const ExactPlan& plan, const Context& context) {
    const Index R = W.rows, C = W.columns;
    if (R == 0 || C == 0) return {Status::ok, 0};
    const auto checks = static_cast<unsigned>(least((C + kThreads - 1) / kThreads, 1024));
    LOBS_TRY(launch(context, "exact diagonal", diagonal_kernel<T>, dim3(checks), kThreads, 0, A, C,
                    context.device->report));
    const Index each = exact_bytes(W.dtype, C, plan);
    const Index blocks = least(least(R, context.threads), Index{2} * processors(context));
    auto* scratch = allocate<unsigned char>(context, blocks * each + 256);
    if (scratch == nullptr) return {Status::out_of_memory, 0};
    auto* next = reinterpret_cast<unsigned long long*>(scratch + blocks * each);
    LOBS_TRY(device_info(cudaMemsetAsync(next, 0, sizeof *next, stream_of(context))));
    const Arguments<T> arguments{
        out,  static_cast<T*>(W.data), W.row_stride, A, state, plan, R, C, scratch, each,
        next, context.device->report};
    const std::size_t bytes = static_cast<std::size_t>(up(sizeof(Row<T>), 128)) + kBufferBytes<T>;
    return launch(context, "exact", exact_kernel<T>, dim3(static_cast<unsigned>(blocks)), kThreads,
                  bytes, arguments);
}

}  // namespace

Info exact_trace(const ExactOut& out, AnyMatrix W, const void* A, const unsigned char* state,
                 const ExactPlan& plan, const Context& context) {
    switch (W.dtype) {
        case Dtype::f64:
            return run(out, W, static_cast<const double*>(A), state, plan, context);
        case Dtype::f32:
            return run(out, W, static_cast<const float*>(A), state, plan, context);
        default:
            return {Status::unsupported, 0};
    }
}

Index exact_bytes(Dtype dtype, Index C, const ExactPlan& plan) {
    Index bytes = 0;
    if (dtype == Dtype::f64) {
        Row<double> row;
        carve(row, nullptr, C, plan, &bytes);
    } else {
        Row<float> row;
        carve(row, nullptr, C, plan, &bytes);
    }
    return bytes;
}

}  // namespace lobs::cuda
