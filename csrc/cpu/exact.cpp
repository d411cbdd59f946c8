// exact.cpp: contract in exact.h, decisions shared with cuda/exact.cu in exact_policy.h.
//
// One row is one item of work. Its live columns sit in slots, in tiles of kTile slots. The factor V
// is stored as [panel of kPanel steps][tile][step][slot in tile], so that the part of V that one
// tile needs is contiguous. All dense work is one of two passes over the tiles:
//
//   refill  Bring the `ahead` cheapest columns up to date together: cached column -= V * (its
//           entries of V), a product of 6 columns by kTile slots in registers. Nearly all flops are
//           here. The next removals are almost certainly among these columns, because saliencies
//           change slowly.
//   remove  Apply the few steps since the last refill to one cached column. It becomes the new
//           column of V and updates weights, diagonal and saliencies. The same pass finds the next
//           argmin.
//
// The argmin is always over all eligible columns, with exact values. If it is not in the cache, a
// refill comes first. So prefetching changes when columns are computed, but never which one is
// removed. At the start of a panel and before a refill, if at least an eighth of the tiles could be
// given up, dead slots are squeezed out of V and of all vectors.
//
// With AVX2 and half of 2048 columns, one core went from 60 to 71 GFLOP/s when V was read panel by
// panel, as one stream, when the groups of a refill became of like size and a removal got eight
// chains of sums (together 60 to 64), and when eight steps were squeezed at a time, because tiles are
// 8 KB apart (64 to 71). With all of 768 columns, products are a good half of the time; they run at
// 128 of at most 137 GFLOP/s.
#include "exact.h"

#include <limits>

#include "exact_policy.h"
#include "parallel.h"
#include "vector.h"

namespace lobs::LOBS_LEVEL {
namespace {

using namespace exact;

constexpr int kVectors = kManyRegisters ? 4 : 2;
constexpr int kRows = 6;  // 24 accumulators in 32 registers, or 12 in 16
template <typename T>
constexpr Index kTile = kVectors * kLanes<T>;
constexpr Index kLines = 8;  // steps of a tile that are squeezed together; they are contiguous
constexpr int kTogether = kManyRegisters ? 2 : 4;  // tiles of a removal: 8 chains of sums

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <typename T>
struct IntegersOf;
template <>
struct IntegersOf<float> {
    typedef std::int32_t type __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct IntegersOf<double> {
    typedef std::int64_t type __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <typename T>
using Integers = typename IntegersOf<T>::type;  // as many lanes as Vector<T>

// The lanes of one vector that are kept when many rows are squeezed alike, and where the first of
// them goes. Lanes are counted and, with AVX2, permutations looked up once, not for every row.
template <typename T>
struct Kept {
#if defined(__AVX2__) && !defined(__AVX512F__)
    __m256i lane;
#endif
    unsigned lanes;
    std::int32_t from, to;

    LOBS_INLINE void set(unsigned keep, Index source, Index place) {
        lanes = keep;
        from = static_cast<std::int32_t>(source);
        to = static_cast<std::int32_t>(place);
#if defined(__AVX2__) && !defined(__AVX512F__)
        lane = kept_lanes<T>(keep);
#endif
    }
    // May write a whole vector.
    LOBS_INLINE void move(T* out, const T* in) const {
#if defined(__AVX2__) && !defined(__AVX512F__)
        const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + to),
                            _mm256_permutevar8x32_epi32(values, lane));
#else
        compress(out + to, in, lanes);
#endif
    }
};

// Numbers of elements in a worker's buffers.
template <typename T>
struct Sizes {
    Index slots, ahead, rows, stride, factor, coefficients, blocks;

    Sizes(Index C, const ExactPlan& plan) {
        slots = up(C, kTile<T>);
        ahead = columns_ahead(C / 32, slots, plan);  // long rows gain more from wide products
        rows = cache_rows(ahead);
        stride = slots + kTile<T>;
        coefficients = (ahead + kRows) * (up(plan.limit, kPanel) + kPanel);
        blocks = plan.block > 1 ? C / plan.block * plan.block * plan.block : 0;
        // Slots are squeezed once an eighth of the tiles is spare. So a panel begins with at most
        // 8/7 of the tiles that its live columns need.
        factor = 0;
        for (Index p = 0; p * kPanel < plan.limit; ++p) {
            const Index left = C - p * kPanel + plan.block - 1;
            const Index live = up(left < C ? left : C, kTile<T>) / kTile<T>;
            const Index tiles = least(slots / kTile<T>, (8 * live + 6) / 7);
            const Index held = (p + 1) * kPanel * tiles * kTile<T>;
            factor = held > factor ? held : factor;
        }
    }

    static Index vectors(Index C) { return up(C, kLanes<T>) / kLanes<T>; }

    Index bytes(Index C, const ExactPlan& plan) const {
        const Index values =
            factor + rows * stride + 5 * slots + coefficients + blocks + kLines * stride;
        const Index integers =
            4 * slots + C + 2 * rows + 2 * ahead + kBins + (plan.group > 0 ? C / plan.group : 0);
        const Index squeezing = (slots / kLanes<T> + vectors(C)) * Index{sizeof(Kept<T>)};
        return values * static_cast<Index>(sizeof(T)) + integers * 4 + squeezing + slots + 64 * 24;
    }
};

template <typename T>
class Row {
   public:
    Row(unsigned char* memory, const T* A, Index C, const ExactPlan& plan)
        : A_(A), C_(C), plan_(plan), size_(C, plan) {
        Carver carve(memory);
        carve.take(V_, size_.factor);
        carve.take(cache_, size_.rows * size_.stride);
        carve.take(w_, size_.slots);
        carve.take(diag_, size_.slots);
        carve.take(bar_, size_.slots);
        carve.take(cost_, size_.slots);
        carve.take(coefficient_, size_.coefficients);
        carve.take(block_, size_.blocks);
        carve.take(first_diag_, size_.slots);
        carve.take(column_, size_.slots);
        carve.take(cached_, size_.slots);
        carve.take(slot_, C);
        carve.take(row_slot_, size_.rows);
        carve.take(row_stamp_, size_.rows);
        carve.take(chosen_, size_.ahead);
        carve.take(members_, size_.ahead);
        carve.take(bins_, kBins);
        carve.take(taken_, plan.group > 0 ? C / plan.group : 0);
        carve.take(present_, Sizes<T>::vectors(C));
        carve.take(keep_, size_.slots / kLanes<T>);
        carve.take(line_, kLines * size_.stride);
        carve.take(kind_, size_.slots);
    }

    // Returns the number of removals. *lost = 1 if rounding ended the row early.
    Index run(std::int32_t* order, T* loss, T* W, const unsigned char* state, Interrupt& interrupt,
              int worker, unsigned char* lost) {
        *lost = 0;
        begin(W, state);
        Index best = plan_.block > 1 ? cheapest_block() : cheapest();
        while (best >= 0 && j_ + plan_.block <= plan_.limit) {
            if (first_left_ == 0 && static_cast<double>(lowest_) > plan_.stop) break;
            const Index panel = panel_of(j_, plan_.block);
            const bool stale = !ready(best);
            if ((panel != panel_ || stale) &&
                worth_squeezing(up(live_, kTile<T>) / kTile<T>, tiles_))
                squeeze(&best);
            panel_ = panel;
            if (stale) {
                if (interrupt.asked(worker)) return 0;
                refill(best);
            }
            const Index begun = j_;
            Index q = best;
            const bool last = j_ + plan_.block == plan_.limit && !plan_.update;
            for (Index b = 0; b < plan_.block; ++b, ++q) {
                if (exact::lost(diag_[q], first_diag_[q], plan_)) {
                    *lost = 1;
                    return begun;
                }
                order[j_] = column_[q];
                loss[j_] = saliency(w_[q], diag_[q]);
                drop(q);
                if (!last || plan_.block > 1) best = remove(q);
                ++j_;
            }
            if (first_left_ == 0 && waiting_) release(), best = -2;
            if (plan_.block > 1)
                best = cheapest_block();
            else if (best < 0 || last)
                best = cheapest();
        }
        if (plan_.update) write(W);
        return j_;
    }

   private:
    LOBS_INLINE T* factor(Index tile, Index step) const {
        return V_ + ((step / kPanel * tiles_ + tile) * kPanel + step % kPanel) * kTile<T>;
    }
    LOBS_INLINE T* row(Index r) const { return cache_ + r * size_.stride; }

    void begin(const T* W, const unsigned char* state) {
        const Index whole = whole_columns(C_, plan_);
        slots_ = 0;
        first_left_ = 0;
        for (Index i = 0; i < C_; ++i) {
            const auto asked = static_cast<WeightState>(state == nullptr ? 0 : state[i]);
            const Kind kind = kind_of(asked, i < whole);
            slot_[i] = -1;
            if (kind == kStays && !plan_.update) continue;
            const Index s = slots_++;
            slot_[i] = static_cast<std::int32_t>(s);
            column_[s] = static_cast<std::int32_t>(i);
            kind_[s] = kind;
            first_left_ += kind == kFirst;
            w_[s] = W[i];
            diag_[s] = first_diag_[s] = A_[i * C_ + i];
        }
        tiles_ = up(slots_, kTile<T>) / kTile<T>;
        for (Index s = slots_; s < tiles_ * kTile<T>; ++s) {
            column_[s] = 0;
            kind_[s] = kGone;
            w_[s] = 0;
            diag_[s] = first_diag_[s] = 1;
        }
        waiting_ = first_left_ > 0;
        for (Index s = 0; s < tiles_ * kTile<T>; ++s) {
            cached_[s] = -1;
            bar_[s] = eligible(kind_[s], waiting_) ? T(0) : kInfinity<T>;
        }
        for (Index r = 0; r < size_.rows; ++r) row_slot_[r] = -1;
        for (Index g = 0; plan_.group > 0 && g < C_ / plan_.group; ++g) taken_[g] = 0;
        if (plan_.group > 0 && plan_.per_group == 0)
            for (Index s = 0; s < slots_; ++s) close(s);
        note_present();
        live_ = slots_;
        j_ = 0;
        panel_ = 0;
        refilled_ = 0;
        if (plan_.block > 1) begin_blocks();
    }

    // Whether the last refill brought the column at s and all columns of its block up to date.
    bool ready(Index s) const {
        for (Index b = 0; b < plan_.block; ++b)
            if (cached_[s + b] < 0 || row_stamp_[cached_[s + b]] < refilled_) return false;
        return true;
    }

    // Takes q out of the row, and closes its group if that is now full.
    void drop(Index q) {
        first_left_ -= kind_[q] == kFirst;
        kind_[q] = kGone;
        bar_[q] = kInfinity<T>;
        slot_[column_[q]] = -1;
        --live_;
        if (cached_[q] >= 0)
            row_slot_[cached_[q]] = -1;  // its values last until this removal is done
        if (plan_.group == 0) return;
        const Index g = column_[q] / plan_.group;
        if (++taken_[g] < plan_.per_group) return;
        for (Index i = g * plan_.group; i < (g + 1) * plan_.group; ++i)
            if (slot_[i] >= 0) close(slot_[i]);
    }

    void close(Index s) {
        if (kind_[s] != kFree) return;
        bar_[s] = kInfinity<T>;
        kind_[s] = closed(plan_);
        if (plan_.update) return;
        slot_[column_[s]] = -1;
        --live_;
        if (cached_[s] >= 0) row_slot_[cached_[s]] = -1;
        cached_[s] = -1;
    }

    // Makes free columns eligible, once all that go first have gone.
    void release() {
        waiting_ = false;
        for (Index s = 0; s < slots_; ++s)
            if (kind_[s] == kFree) bar_[s] = 0;
    }

    // Computes the cost of every slot. Returns the cheapest slot.
    Index cheapest() {
        lowest_ = kInfinity<T>;
        Index best = -1;
        for (Index s = 0; s < slots_; ++s) {
            cost_[s] = cost_of(w_[s], diag_[s], first_diag_[s], bar_[s], plan_);
            if (cost_[s] < lowest_) lowest_ = cost_[s], best = s;
        }
        return best;
    }

    // ---- the dense passes -----------------------------------------------------------------------

    // Removes q: completes its column and updates everything. Returns the next cheapest slot.
    Index remove(Index q) {
        const std::int32_t r = cached_[q];
        const Index from = row_stamp_[r];
        const T* column = row(r);
        T* coefficient = coefficient_;
        for (Index i = from; i < j_; ++i)
            coefficient[i - from] = -factor(q / kTile<T>, i)[q % kTile<T>];
        const T scale = 1 / root(diag_[q]);
        const T z = w_[q] * scale;
        Cheapest cheap{Vector<T>{} + kInfinity<T>, Integers<T>{} - 1, {}};
        for (int l = 0; l < kLanes<T>; ++l) cheap.lane[l] = l;
        const Steps steps{column, coefficient, from, scale, z};
        Index t = 0;
        for (; t + kTogether <= tiles_; t += kTogether) finish<kTogether>(steps, t, &cheap);
        for (; t < tiles_; ++t) finish<1>(steps, t, &cheap);
        cached_[q] = -1;
        if (plan_.block > 1) update_blocks();
        Index best = -1;
        lowest_ = kInfinity<T>;
        for (int l = 0; l < kLanes<T>; ++l)
            if (cheap.where[l] >= 0 && (cheap.lowest[l] < lowest_ ||
                                        (cheap.lowest[l] == lowest_ && cheap.where[l] < best)))
                lowest_ = cheap.lowest[l], best = cheap.where[l];
        return best;
    }

    struct Steps {
        const T *column, *coefficient;
        Index from;  // the step that the column is at
        T scale, z;
    };
    struct Cheapest {  // in each lane, so far
        Vector<T> lowest;
        Integers<T> where, lane;
    };

    // The part of remove() for kTiles tiles. One tile alone would wait for its sums: they are only
    // kVectors chains.
    template <int kTiles>
    LOBS_INLINE void finish(const Steps& steps, Index t, Cheapest* cheap) {
        Vector<T> v[kTiles][kVectors];
#pragma GCC unroll 8
        for (int q = 0; q < kTiles; ++q)
#pragma GCC unroll 4
            for (int k = 0; k < kVectors; ++k)
                v[q][k] = load(steps.column + (t + q) * kTile<T> + k * kLanes<T>);
        for (Index i = steps.from; i < j_;) {
            const Index end = least(j_, (i / kPanel + 1) * kPanel);
            const T* V = factor(t, i);
            for (; i < end; ++i, V += kTile<T>) {
                const T c = steps.coefficient[i - steps.from];
#pragma GCC unroll 8
                for (int q = 0; q < kTiles; ++q)
#pragma GCC unroll 4
                    for (int k = 0; k < kVectors; ++k)
                        v[q][k] += c * load(V + q * kPanel * kTile<T> + k * kLanes<T>);
            }
        }
#pragma GCC unroll 8
        for (int q = 0; q < kTiles; ++q) {
            T* out = factor(t + q, j_);
#pragma GCC unroll 4
            for (int k = 0; k < kVectors; ++k) {
                const Index at = (t + q) * kTile<T> + k * kLanes<T>;
                const Vector<T> step = v[q][k] * steps.scale;
                const Vector<T> w = load(w_ + at) - steps.z * step;
                const Vector<T> d = load(diag_ + at) - step * step;
                store(out + k * kLanes<T>, step);
                store(w_ + at, w);
                store(diag_ + at, d);
                const Vector<T> cost = barred(saliency(w, d), load(bar_ + at));
                const Integers<T> better = cost < cheap->lowest;
                cheap->lowest = better ? cost : cheap->lowest;
                cheap->where = better ? cheap->lane : cheap->where;
                cheap->lane += kLanes<T>;
            }
        }
    }

    void refill(Index best) {
        if (plan_.block == 1) cheapest();
        const Index count = choose(best, columns_wanted(size_.ahead, j_, plan_));
        // Assign cache rows to columns without one: free rows first, then those of columns not
        // chosen.
        Index fresh = 0, kept = 0, r = 0;
        for (Index m = 0; m < count; ++m)
            if (cached_[chosen_[m]] >= 0) members_[count - ++kept] = chosen_[m];
        for (Index m = 0; m < kept; ++m) row_slot_[cached_[members_[count - 1 - m]]] = -2;
        for (Index m = 0; m < count; ++m) {
            const Index s = chosen_[m];
            if (cached_[s] >= 0) continue;
            while (r < size_.rows && row_slot_[r] != -1) ++r;
            if (r == size_.rows) {
                for (Index e = 0; e < size_.rows; ++e)  // evict what is not chosen
                    if (row_slot_[e] >= 0) cached_[row_slot_[e]] = -1, row_slot_[e] = -1;
                r = 0;
                while (row_slot_[r] != -1) ++r;
            }
            row_slot_[r] = -2;
            cached_[s] = static_cast<std::int32_t>(r);
            row_stamp_[r] = 0;
            members_[fresh++] = static_cast<std::int32_t>(s);
            fetch(s, row(r));
        }
        for (Index m = 0; m < count; ++m) row_slot_[cached_[members_[m]]] = members_[m];
        // Sort by stamp, because a group starts at the step of its oldest column.
        for (Index m = fresh + 1; m < count; ++m) {
            const std::int32_t s = members_[m];
            Index i = m;
            for (; i > fresh && row_stamp_[cached_[members_[i - 1]]] > row_stamp_[cached_[s]]; --i)
                members_[i] = members_[i - 1];
            members_[i] = s;
        }
        if (j_ > 0) advance(fresh, count);
        for (Index m = 0; m < count; ++m)
            row_stamp_[cached_[members_[m]]] = static_cast<std::int32_t>(j_);
        refilled_ = j_;
    }

    // out = A[:, column of s], at the columns that have slots.
    void fetch(Index s, T* out) const {
        const T* a = A_ + static_cast<Index>(column_[s]) * C_;
        for (Index v = 0; v < vectors_; ++v) present_[v].move(out, a + present_[v].from);
        Index slot = slots_;
        while (slot > 0 && column_[slot - 1] >= C_ / kLanes<T> * kLanes<T>) --slot;
        for (; slot < slots_; ++slot) out[slot] = a[column_[slot]];
        for (; slot < tiles_ * kTile<T>; ++slot) out[slot] = 0;
    }

    // Notes in present_ which columns have a slot, except those behind the last whole vector.
    void note_present() {
        vectors_ = 0;
        for (Index s = 0; s < slots_;) {
            const Index first = column_[s] / kLanes<T> * kLanes<T>, place = s;
            unsigned lanes = 0;
            for (; s < slots_ && column_[s] < first + kLanes<T>; ++s)
                lanes |= 1u << (column_[s] - first);
            if (first + kLanes<T> <= C_) present_[vectors_++].set(lanes, first, place);
        }
    }

    // Brings all members to step j. members_[0 .. fresh) are at step 0, the others at later steps.
    void advance(Index fresh, Index count) {
        Index groups = 0;
        Group group[kMostAhead / kRows + 4];
        T* coefficient = coefficient_;
        for (Index m = 0; m < count;) {
            // Groups of like size: the last one alone would be too small to hide latencies.
            const Index left = (m < fresh ? fresh : count) - m;
            const Index end = m + (left + up(left, kRows) / kRows - 1) / (up(left, kRows) / kRows);
            Group& g = group[groups++];
            g.size = static_cast<int>(end - m);
            g.from = row_stamp_[cached_[members_[m]]];
            g.coefficient = coefficient;
            for (int r = 0; r < g.size; ++r) {
                const Index s = members_[m + r];
                g.row[r] = row(cached_[s]);
                gather(s, g.from, row_stamp_[cached_[s]], coefficient + r, g.size);
            }
            coefficient += (j_ - g.from) * g.size;
            m = end;
        }
        // Tile after tile of a panel: V is read as one stream, and the coefficients of the panel
        // stay in cache.
        for (Index p = 0; p < j_; p += kPanel)
            for (Index t = 0; t < tiles_; ++t)
                for (Index g = 0; g < groups; ++g) {
                    const Index from = group[g].from > p ? group[g].from : p;
                    const Index to = least(j_, p + kPanel);
                    if (from >= to) continue;
                    const T* c = group[g].coefficient + (from - group[g].from) * group[g].size;
                    const T* V = factor(t, from);
                    switch (group[g].size) {
                        case 6:
                            product<6>(group[g], t, c, V, to - from);
                            break;
                        case 5:
                            product<5>(group[g], t, c, V, to - from);
                            break;
                        case 4:
                            product<4>(group[g], t, c, V, to - from);
                            break;
                        case 3:
                            product<3>(group[g], t, c, V, to - from);
                            break;
                        case 2:
                            product<2>(group[g], t, c, V, to - from);
                            break;
                        default:
                            product<1>(group[g], t, c, V, to - from);
                    }
                }
    }

    struct Group {
        int size;
        Index from;
        const T* coefficient;
        T* row[kRows];
    };

    template <int kCount>
    LOBS_INLINE static void product(const Group& g, Index t, const T* c, const T* V, Index steps) {
        Vector<T> sum[kCount][kVectors];
#pragma GCC unroll 6
        for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 4
            for (int k = 0; k < kVectors; ++k)
                sum[r][k] = load(g.row[r] + t * kTile<T> + k * kLanes<T>);
        multiply<T, kCount, kVectors>(sum, steps, c, kCount, 1, V, kTile<T>);
#pragma GCC unroll 6
        for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 4
            for (int k = 0; k < kVectors; ++k)
                store(g.row[r] + t * kTile<T> + k * kLanes<T>, sum[r][k]);
    }

    // out[(i - from) * stride] = -V[i][s] for stamp <= i < j, and zero for i < stamp.
    void gather(Index s, Index from, Index stamp, T* out, int stride) const {
        for (Index i = from; i < stamp; ++i) *out = 0, out += stride;
        for (Index i = stamp; i < j_;) {
            const Index end = least(j_, (i / kPanel + 1) * kPanel);
            const T* V = factor(s / kTile<T>, i) + s % kTile<T>;
            for (; i < end; ++i, V += kTile<T>) *out = -*V, out += stride;
        }
    }

    // Chooses about `wanted` of the cheapest eligible slots: first the block at `best`, then the
    // others by rising slot. Returns their number.
    Index choose(Index best, Index wanted) {
        const Index slots = tiles_ * kTile<T>;
        const auto key = [&](Index s) { return sort_key(static_cast<float>(cost_[s])); };
        std::uint32_t low = 0;
        Index below = 0;
        for (int shift = kFirstShift; shift >= kLastShift; shift -= kBinBits) {
            std::memset(bins_, 0, kBins * sizeof *bins_);
            for (Index s = 0; s < slots; ++s) {
                const std::uint32_t k = key(s);
                if (counts(k, low, shift)) ++bins_[bin_of(k, shift)];
            }
            Index b = 0;
            while (b < kBins - 1 && below + bins_[b] < wanted) below += bins_[b++];
            low |= static_cast<std::uint32_t>(b) << shift;
        }
        Index count = 0;
        for (Index b = 0; b < plan_.block; ++b)
            chosen_[count++] = static_cast<std::int32_t>(best + b);
        Index spare = wanted - below;
        for (Index s = 0; s < slots && count < wanted; ++s) {
            const std::uint32_t k = key(s);
            if (!within_reach(k, low) || (s >= best && s < best + plan_.block)) continue;
            if (k >= low && --spare < 0) continue;
            chosen_[count++] = static_cast<std::int32_t>(s);
        }
        return count;
    }

    // ---- squeezing ------------------------------------------------------------------------------

    void squeeze(Index* best) {
        const Index padded = up(live_, kTile<T>), after = padded / kTile<T>, before = tiles_;
        Index n = 0, vectors = 0;
        for (Index s = 0; s < slots_;) {
            const Index first = s, place = n;
            unsigned lanes = 0;
            for (; s < least(first + kLanes<T>, slots_); ++s) {
                if (kind_[s] == kGone) continue;
                lanes |= 1u << (s - first);
                if (s == *best) *best = n;
                slot_[column_[s]] = static_cast<std::int32_t>(n);
                w_[n] = w_[s], diag_[n] = diag_[s], bar_[n] = bar_[s], cost_[n] = cost_[s];
                first_diag_[n] = first_diag_[s];
                column_[n] = column_[s], kind_[n] = kind_[s], cached_[n] = cached_[s];
                if (cached_[n] >= 0) row_slot_[cached_[n]] = static_cast<std::int32_t>(n);
                ++n;
            }
            if (lanes != 0) keep_[vectors++].set(lanes, first, place);
        }
        slots_ = n;
        for (; n < padded; ++n) {
            w_[n] = 0, diag_[n] = first_diag_[n] = 1, bar_[n] = cost_[n] = kInfinity<T>;
            column_[n] = 0, kind_[n] = kGone, cached_[n] = -1;
        }
        note_present();
        for (Index r = 0; r < size_.rows; ++r) {
            if (row_slot_[r] < 0) continue;
            for (Index v = 0; v < vectors; ++v) keep_[v].move(line_, row(r) + keep_[v].from);
            for (Index s = slots_; s < padded; ++s) line_[s] = 0;
            std::memcpy(row(r), line_, static_cast<std::size_t>(padded) * sizeof(T));
        }
        // In place: all lines of kLines steps are read before one is written, and lines of different
        // steps never overlap. Offsets are relative to the first tile.
        for (Index v = 0; v < vectors; ++v) {
            const Index from = keep_[v].from;
            keep_[v].from =
                static_cast<std::int32_t>(from / kTile<T> * kPanel * kTile<T> + from % kTile<T>);
        }
        for (Index i = 0; i < j_; i += kLines) {
            const Index count = least(j_ - i, kLines), panel = i / kPanel * kPanel;
            const T* in = V_ + (panel * before + i - panel) * kTile<T>;
            T* out = V_ + (panel * after + i - panel) * kTile<T>;
            for (Index v = 0; v < vectors; ++v)
                for (Index r = 0; r < count; ++r)
                    keep_[v].move(line_ + r * size_.stride, in + keep_[v].from + r * kTile<T>);
            // The last vectors may have written behind the slots.
            for (Index r = 0; r < count; ++r)
                for (Index s = slots_; s < padded; ++s) line_[r * size_.stride + s] = 0;
            for (Index t = 0; t < after; ++t, out += kPanel * kTile<T>)
                for (Index r = 0; r < count; ++r)
                    std::memcpy(out + r * kTile<T>, line_ + r * size_.stride + t * kTile<T>,
                                sizeof(T) * kTile<T>);
        }
        tiles_ = after;
    }

    // ---- blocks of columns ----------------------------------------------------------------------

    void begin_blocks() {
        const Index b = plan_.block;
        for (Index g = 0; g < C_ / b; ++g)
            for (Index i = 0; i < b; ++i)
                for (Index k = 0; k <= i; ++k)
                    block_[(g * b + i) * b + k] = A_[(g * b + i) * C_ + g * b + k];
    }

    // Downdates the diagonal blocks by the newest column of V.
    void update_blocks() {
        const Index b = plan_.block;
        T v[kMaxBlock];
        for (Index g = 0; g < C_ / b; ++g) {
            const Index s = slot_[g * b + b - 1];  // the last of its columns to go
            if (s < 0 || kind_[s] == kStays) continue;
            const Index first =
                slot_[g * b] >= 0 ? 0 : b;  // a block that is going needs no more updates
            for (Index i = first; i < b; ++i) {
                const Index at = s - (b - 1) + i;
                v[i] = factor(at / kTile<T>, j_)[at % kTile<T>];
                for (Index k = 0; k <= i; ++k) block_[(g * b + i) * b + k] -= v[i] * v[k];
            }
        }
    }

    // Puts the cost of every eligible block into cost_. Returns the first slot of the cheapest.
    Index cheapest_block() {
        const Index b = plan_.block;
        for (Index s = 0; s < tiles_ * kTile<T>; ++s) cost_[s] = kInfinity<T>;
        lowest_ = kInfinity<T>;
        Index best = -1;
        for (Index g = 0; g < C_ / b; ++g) {
            const Index s = slot_[g * b];
            if (s < 0 || bar_[s] > 0) continue;
            T L[kMaxBlock * kMaxBlock], y[kMaxBlock], sum = 0;
            for (Index i = 0; i < b; ++i) {
                y[i] = w_[s + i];
                for (Index k = 0; k <= i; ++k) {
                    T l = block_[(g * b + i) * b + k];
                    for (Index m = 0; m < k; ++m) l -= L[i * b + m] * L[k * b + m];
                    if (k < i) {
                        L[i * b + k] = l / L[k * b + k];
                        y[i] -= L[i * b + k] * y[k];
                    } else {
                        L[i * b + i] = root(l);
                        y[i] /= L[i * b + i];
                    }
                }
                sum += y[i] * y[i];
            }
            if (!(sum >= 0)) sum = 0;  // a lost pivot: chosen next, and reported
            for (Index i = 0; i < b; ++i) cost_[s + i] = sum;
            if (sum < lowest_) lowest_ = sum, best = s;
        }
        return best;
    }

    void write(T* W) const {
        for (Index i = 0; i < C_; ++i) {
            const Index s = slot_[i];
            W[i] = s >= 0 ? w_[s] : T(0);
        }
    }

    const T* A_;
    Index C_;
    const ExactPlan& plan_;
    Sizes<T> size_;

    T *V_, *cache_, *w_, *diag_, *bar_, *cost_, *coefficient_, *block_, *first_diag_;
    std::int32_t *column_, *cached_, *slot_, *row_slot_, *row_stamp_, *chosen_, *members_, *bins_,
        *taken_;
    Kept<T>*present_, *keep_;
    Index vectors_ = 0;  // of present_
    T* line_;
    unsigned char* kind_;

    Index slots_ = 0, tiles_ = 0, live_ = 0, j_ = 0, refilled_ = 0, first_left_ = 0, panel_ = 0;
    bool waiting_ = false;
    T lowest_ = 0;
};

template <typename T>
Info launch(const ExactOut& out, AnyMatrix W, const T* A, const unsigned char* state,
            const ExactPlan& plan, const Context& context) {
    const Index R = W.rows, C = W.columns;
    for (Index q = 0; q < C; ++q)
        if (!(A[q * C + q] > 0)) return {Status::not_positive, q};
    Scratch scratch(R < context.threads ? R : context.threads, Sizes<T>(C, plan).bytes(C, plan));
    if (!scratch.ok()) return {Status::out_of_memory, 0};
    Interrupt interrupt(context);
    auto body = [&](Index r, int worker) {
        if (interrupt.asked(worker)) return;
        Row<T> row(scratch.of<unsigned char>(worker), A, C, plan);
        out.count[r] =
            row.run(out.order + r * plan.limit, static_cast<T*>(out.loss) + r * plan.limit,
                    static_cast<T*>(W.data) + r * W.row_stride,
                    state == nullptr ? nullptr : state + r * C, interrupt, worker, out.lost + r);
    };
    const bool whole = parallel_items(R, context, body);
    return {whole && !interrupt.raised() ? Status::ok : Status::interrupted, 0};
}

}  // namespace

Info exact_trace(const ExactOut& out, AnyMatrix W, const void* A, const unsigned char* state,
                 const ExactPlan& plan, const Context& context) {
    switch (W.dtype) {
        case Dtype::f64:
            return launch(out, W, static_cast<const double*>(A), state, plan, context);
        case Dtype::f32:
            return launch(out, W, static_cast<const float*>(A), state, plan, context);
        default:
            return {Status::unsupported, 0};
    }
}

Index exact_bytes(Dtype dtype, Index C, const ExactPlan& plan) {
    return dtype == Dtype::f64 ? Sizes<double>(C, plan).bytes(C, plan)
                               : Sizes<float>(C, plan).bytes(C, plan);
}

}  // namespace lobs::LOBS_LEVEL
