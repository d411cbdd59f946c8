// admm.cpp: contract in admm.h.
//
// y goes to d, and every pass works on runs that stay in L1 or L2: keys from y, a byte per weight
// that goes from the keys, then d from y and the bytes. A key is an integer that orders like the
// cost; those that go first have the lowest, those that stay the highest.
//
// Half of 16 M float32 weights on one core of a Zen 3 that copies 15 GB/s: 32 ms (16 GB/s) with a
// good guess of the cut and 78 ms without; 28 ms by row; 24 ms for 2:4.
//
// In groups of other sizes than 4 and 8, each lane has a group of its own. Units of several columns
// are summed 16 at a time. (On one core of a Zen 5: 8 of 16 in 26 ms instead of 165, units of 4 in 43
// instead of 65; 2:4 in 17.)
//
// Groups, rows: one pass over memory. A row's cut is looked for near where it was, relative to the
// mean |y|, in the row that this thread had before: one comparison and compression of its keys
// leaves a few hundred to rank, instead of counting four digits of all.
// All rows: the first pass writes y, counts the keys below a window around the last cut and gathers
// those in it. If the cut is among these, the second pass over memory is the last. Else digits of
// all keys are counted, which reads y twice more (four times for float64), and ties that do not all
// go cost another reading.
#include "admm.h"

#include "parallel.h"
#include "selection.h"
#include "vector.h"

namespace lobs::LOBS_LEVEL {
namespace {

constexpr Index kRun = 1 << 11;    // weights that are worked on at a time: about 16 KB of L1
constexpr Index kPiece = 1 << 14;  // weights that a thread takes at a time
constexpr Index kGathered = kPiece / 8;
constexpr double kWindow = 0.05;    // half its width, relative to the cut
constexpr double kRowWindow = 0.1;  // the same where the cut is guessed from another row
constexpr Index kSmallGroup = 64;   // columns; in larger groups keys are ranked as in rows
constexpr Index kPad = 64;          // elements that vectors may reach beyond a run

// ---- keys ---------------------------------------------------------------------------------------

template <int kBytes>
struct KeyOf;
template <>
struct KeyOf<4> {
    using type = std::int32_t;
    using lane = float;
};
template <>
struct KeyOf<8> {
    using type = std::int64_t;
    using lane = double;
};

template <typename Key>
constexpr int kKeyBits = 8 * static_cast<int>(sizeof(Key)) - 1;
template <typename Key>
constexpr Key kStays = static_cast<Key>(~std::uint64_t{0} >> (64 - kKeyBits<Key>));

template <typename Key>
struct VectorsOf {
    static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(Key));
    typedef Key keys __attribute__((vector_size(kVectorBytes), aligned(sizeof(Key)), may_alias));
};
template <typename Key>
using Integers = typename VectorsOf<Key>::keys;
template <typename Key>
constexpr int kWidth = VectorsOf<Key>::kWidth;

template <typename Key>
LOBS_INLINE Integers<Key> load_keys(const Key* keys) {
    return *reinterpret_cast<const Integers<Key>*>(keys);
}

LOBS_INLINE std::int32_t cost_key(float y) {
    return static_cast<std::int32_t>(magnitude_bits(y) + 1);
}
LOBS_INLINE std::int64_t cost_key(double y) {
    return static_cast<std::int64_t>(magnitude_bits(y) + 1);
}

template <typename Key>
LOBS_INLINE Key coded(Key key, unsigned char state) {
    return state == static_cast<unsigned char>(WeightState::may_go)       ? key
           : state == static_cast<unsigned char>(WeightState::goes_first) ? Key{0}
                                                                          : kStays<Key>;
}

// The cost that a key stands for, 0 if it stands for a state.
LOBS_INLINE double cost_of(std::int32_t key) {
    if (key == 0 || key == kStays<std::int32_t>) return 0;
    return static_cast<double>(as_float(static_cast<std::uint32_t>(key) - 1));
}
LOBS_INLINE double cost_of(std::int64_t key) {
    if (key == 0 || key == kStays<std::int64_t>) return 0;
    const std::int64_t bits = key - 1;
    double cost;
    std::memcpy(&cost, &bits, sizeof cost);
    return cost;
}

// Keys of single weights.
template <typename T, typename Key>
void keys_of_weights(Key* keys, const T* y, const unsigned char* state, Index count) {
    Index q = 0;
    for (; q + kLanes<T> <= count; q += kLanes<T>) {
        const auto bits = reinterpret_cast<Integers<Key>>(load(y + q));
        Integers<Key> key = (bits & kStays<Key>)+1;
        if (state != nullptr) {
            const Integers<Key> code = widen<T>(state + q);
            key = code == 0 ? key : code == 1 ? Integers<Key>{} : Integers<Key>{} + kStays<Key>;
        }
        *reinterpret_cast<Integers<Key>*>(keys + q) = key;
    }
    for (; q < count; ++q)
        keys[q] = state == nullptr ? cost_key(y[q]) : coded(cost_key(y[q]), state[q]);
}

// Keys of units of several columns, some units at a time, so that their sums are independent. kUnit
// is the number of columns, or 0 for any number.
template <int kUnit, typename T>
void keys_of_units(std::int64_t* keys, const T* y, const unsigned char* state, Index units,
                   Index any) {
    constexpr Index kSome = 16;
    const Index unit = kUnit > 0 ? kUnit : any;
    double cost[kSome];
    for (Index u = 0; u < units; u += kSome) {
        const Index some = least(units - u, kSome);
        for (Index k = 0; k < kSome; ++k) cost[k] = 0;
        for (Index i = 0; i < unit; ++i)
            for (Index k = 0; k < some; ++k) {
                const double value = static_cast<double>(y[(u + k) * unit + i]);
                cost[k] += value * value;
            }
        for (Index k = 0; k < some; ++k)
            keys[u + k] = state == nullptr ? cost_key(cost[k])
                                           : coded(cost_key(cost[k]), state[(u + k) * unit]);
    }
}

// ---- y and d ------------------------------------------------------------------------------------

template <typename T>
struct Priced {
    double size;  // the sum of all |y|
    bool finite;
};

// d becomes y. Explicit vectors, because compilers do not vectorise selections by bytes.
template <typename T>
Priced<T> price(T* d, const T* p, const T* x, const unsigned char* removed, Index count) {
    constexpr T kInfinity = static_cast<T>(__builtin_inf());
    Vector<T> size = {};
    Mask<T> good = Vector<T>{} == Vector<T>{};
    Index q = 0;
    for (; q + kLanes<T> <= count; q += kLanes<T>) {
        const auto was = widen<T>(removed + q) != 0;
        const Vector<T> w = load(x + q), left = -(load(d + q) + w);
        const Vector<T> y = (load(p + q) + w) + (was ? left : Vector<T>{});
        store(d + q, y);
        const Vector<T> magnitude = y < 0 ? -y : y;
        good &= magnitude < kInfinity;
        size += magnitude;
    }
    Priced<T> priced{0, true};
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        priced.size += static_cast<double>(size[lane]);
        priced.finite = priced.finite && good[lane] != 0;
    }
    for (; q < count; ++q) {
        const T u = removed[q] != 0 ? -(d[q] + x[q]) : T(0);
        d[q] = (p[q] + x[q]) + u;
        priced.size += static_cast<double>(d[q] < 0 ? -d[q] : d[q]);
        priced.finite = priced.finite && finite_bits(magnitude_bits(d[q]));
    }
    return priced;
}

// d, which holds y, and `removed`. Returns the number of weights that were not removed before.
template <typename T>
Index apply(T* d, const T* x, unsigned char* removed, const unsigned char* goes, Index count) {
    Index q = 0;
    for (; q + kLanes<T> <= count; q += kLanes<T>) {
        const auto now = widen<T>(goes + q) != 0;
        const Vector<T> y = load(d + q);
        store(d + q, (now ? -y : y) - load(x + q));
    }
    for (; q < count; ++q) d[q] = (goes[q] != 0 ? -d[q] : d[q]) - x[q];
    Index changed = 0;
    for (q = 0; q + 8 <= count; q += 8) {
        std::uint64_t before, now;
        std::memcpy(&before, removed + q, 8);
        std::memcpy(&now, goes + q, 8);
        changed += __builtin_popcountll(now & ~before);
    }
    for (; q < count; ++q) changed += goes[q] & ~removed[q] & 1;
    std::memcpy(removed, goes, static_cast<std::size_t>(count));
    return changed;
}

// ---- selection ----------------------------------------------------------------------------------

// Units go whose key is below, and those whose key is equal and whose place is before `split`.
template <typename Key>
struct Cut {
    Key key;
    Index split;
};

// The cut where states decide: all that go first are removed, and none that stays.
template <typename Key>
LOBS_INLINE bool decided_by_states(Key key, Cut<Key>* cut) {
    if (key != 0 && key != kStays<Key>) return false;
    *cut = {key == 0 ? Key{1} : key, 0};
    return true;
}

// The place after the tie number `room` (from 1) in a run whose first key has place `first`.
template <typename Key>
Index split_of(const Key* keys, Index count, Index first, Key key, Index* room) {
    for (Index i = 0; i < count; ++i)
        if (keys[i] == key && --*room == 0) return first + i + 1;
    return -1;
}

// goes[i] = key i < bound. Writes whole vectors.
template <typename Key>
void mark_below(unsigned char* goes, const Key* keys, Index count, Key bound) {
    for (Index i = 0; i < count; i += kWidth<Key>) {
        const auto below = load_keys(keys + i) < bound;
        narrow<typename KeyOf<sizeof(Key)>::lane>(goes + i, below);
    }
}

// The same for a cut and a run whose first key has place `first`.
template <typename Key>
LOBS_INLINE void mark(unsigned char* goes, const Key* keys, Index count, Index first,
                      Cut<Key> cut) {
    const Index before = cut.split <= first ? 0 : least(cut.split - first, count);
    if (before > 0) mark_below(goes, keys, before, static_cast<Key>(cut.key + 1));
    mark_below(goes + before, keys + before, count - before, cut.key);
}

template <typename Key>
struct Window {
    Key low, high;

    // Around the cost `cut`, for keys of type Key; empty if there is no such cost.
    template <typename Cost>
    LOBS_INLINE static Window around(double cut, double width, Cost) {
        if (!(cut > 0)) return {0, 0};
        return {cost_key(static_cast<Cost>(cut * (1 - width))),
                cost_key(static_cast<Cost>(cut * (1 + width)))};
    }
    LOBS_INLINE bool empty() const { return high <= low; }
    LOBS_INLINE int bits() const {  // of the distance of a key from `low`
        return 64 - __builtin_clzll(static_cast<std::uint64_t>(high - low));
    }
};

// Gathers the keys in the window. Returns the end of the gathered; *below += keys below the window.
template <typename Key>
Key* sieve(Key* out, const Key* keys, Index count, Window<Key> window, Index* below) {
    Integers<Key> under = {};
    Index i = 0;
    for (; i + kWidth<Key> <= count; i += kWidth<Key>) {
        const Integers<Key> key = load_keys(keys + i);
        const auto low = key < window.low;
        under -= low;
        out = compress(out, keys + i, bits_of((key < window.high) & ~low));
    }
    for (int lane = 0; lane < kWidth<Key>; ++lane) *below += under[lane];
    for (; i < count; ++i) {
        if (keys[i] < window.low)
            ++*below;
        else if (keys[i] < window.high)
            *out++ = keys[i];
    }
    return out;
}

// In each group of kGroup keys, the lowest `per_group` go. A key is compared with its neighbours at
// each distance, which for whole groups in a vector takes two loads. Writes whole vectors, and reads
// up to a group beyond both ends of the keys.
template <int kGroup, typename Key>
void mark_in_small_groups(unsigned char* goes, const Key* keys, Index count, Index per_group) {
    Integers<Key> place;
    for (int lane = 0; lane < kWidth<Key>; ++lane) place[lane] = lane % kGroup;
    for (Index i = 0; i < count; i += kWidth<Key>) {
        const Integers<Key> key = load_keys(keys + i);
        Integers<Key> rank = {};
#pragma GCC unroll 8
        for (int by = 1; by < kGroup; ++by) {
            rank -= (load_keys(keys + i - by) <= key) & (place >= by);
            rank -= (load_keys(keys + i + by) < key) & (place < kGroup - by);
        }
        const auto gone = ((rank < static_cast<Key>(per_group)) | (key == 0)) & (key < kStays<Key>);
        narrow<typename KeyOf<sizeof(Key)>::lane>(goes + i, gone);
    }
}

// In each group, the lowest `per_group` go, by comparing all with all, a group in each lane.
// `turned` has room for a vector per column of a group.
template <typename Key>
void mark_in_groups(unsigned char* goes, const Key* keys, Index groups, Index group,
                    Index per_group, Key* turned) {
    constexpr int lanes = kWidth<Key>;
    for (Index g = 0; g < groups; g += lanes, keys += lanes * group, goes += lanes * group) {
        const Index count = least(groups - g, lanes);
        for (Index lane = 0; lane < lanes; ++lane)
            for (Index i = 0; i < group; ++i)
                turned[i * lanes + lane] = lane < count ? keys[lane * group + i] : Key{0};
        for (Index i = 0; i < group; ++i) {
            const Integers<Key> key = load_keys(turned + i * lanes);
            Integers<Key> rank = {};
            for (Index k = 0; k < i; ++k) rank -= load_keys(turned + k * lanes) <= key;
            for (Index k = i + 1; k < group; ++k) rank -= load_keys(turned + k * lanes) < key;
            const auto gone =
                ((rank < static_cast<Key>(per_group)) | (key == 0)) & (key < kStays<Key>);
            unsigned char gone_in[lanes];
            narrow<typename KeyOf<sizeof(Key)>::lane>(gone_in, gone);
            for (Index lane = 0; lane < count; ++lane) goes[lane * group + i] = gone_in[lane];
        }
    }
}

// A byte per unit becomes a byte per column. `spare` has room for the units. May write up to 8 bytes
// beyond the columns. (A call of memset for each narrow unit would cost more than all else.)
LOBS_INLINE void widen_units(unsigned char* goes, unsigned char* spare, Index units, Index unit) {
    std::memcpy(spare, goes, static_cast<std::size_t>(units));
    for (Index u = 0; u < units; ++u) {
        const std::uint64_t eight = spare[u] * std::uint64_t{0x0101010101010101};
        if (unit <= 8)
            std::memcpy(goes + u * unit, &eight, sizeof eight);
        else
            std::memset(goes + u * unit, spare[u], static_cast<std::size_t>(unit));
    }
}

// The cut that removes `count` of a run of keys. `scale` is what costs are in proportion to, and
// *ratio the cut's proportion to it: on entry that of another run, or 0.
template <typename Key, typename Cost>
Cut<Key> cut_of_run(const Key* keys, Index size, Index count, Key* gathered, double scale,
                    double* ratio, Cost) {
    if (count == 0 || size == 0) return {1, 0};
    const auto window = Window<Key>::around(*ratio * scale, kRowWindow, Cost{});
    Index below = 0, inside = 0;
    if (!window.empty()) inside = sieve(gathered, keys, size, window, &below) - gathered;
    Ranked<Key> found;
    if (below < count && count <= below + inside) {
        const auto distance = [=](Index i) { return static_cast<Key>(gathered[i] - window.low); };
        found = key_of_rank<Key>(distance, inside, count - 1 - below, window.bits());
        found.key = static_cast<Key>(found.key + window.low);
        found.before += below;
    } else {
        found = key_of_rank<Key>([=](Index i) { return keys[i]; }, size, count - 1, kKeyBits<Key>);
    }
    *ratio = scale > 0 ? cost_of(found.key) / scale : 0;
    Cut<Key> cut{found.key, size};
    Index room = count - found.before;
    if (!decided_by_states(found.key, &cut) && room < found.ties)
        cut.split = split_of(keys, size, 0, found.key, &room);
    return cut;
}

// ---- the step -----------------------------------------------------------------------------------

template <typename T, bool kWide>
struct CostOf {
    using type = T;
};
template <typename T>
struct CostOf<T, true> {
    using type = double;
};

// kWide: units of several columns.
template <typename T, bool kWide>
class Step {
    using Cost = typename CostOf<T, kWide>::type;
    using Key = typename KeyOf<sizeof(Cost)>::type;

    struct Work {  // of a worker
        Key *keys, *gathered;
        unsigned char* goes;
        Index changed, below;
        double ratio;
        bool overflow;
    };

   public:
    Step(AnyMatrix p, AnyMatrix d, AnyMatrix x, unsigned char* removed, const unsigned char* state,
         const AdmmPlan& plan, const Context& context)
        : p_(static_cast<const T*>(p.data)),
          x_(static_cast<const T*>(x.data)),
          d_(static_cast<T*>(d.data)),
          removed_(removed),
          state_(state),
          plan_(plan),
          context_(context),
          columns_(d.columns),
          weights_(d.rows * d.columns),
          by_row_(plan.group == 0 && plan.by_row && d.rows > 1),
          span_(plan.group > 0 ? plan.group : plan.unit),
          lowest_(context.threads, d.rows * d.columns) {
        if (!by_row_ && columns_ % span_ == 0) columns_ = weights_;  // rows need not be told apart
        run_ = by_row_ ? columns_ : span_ < kRun ? kRun / span_ * span_ : span_;
        piece_ = by_row_ || run_ > kPiece ? run_ : kPiece / run_ * run_;
        pieces_ = (columns_ + piece_ - 1) / piece_;  // of a row
        items_ = weights_ / columns_ * pieces_;
    }

    Info run(Index* changed, double* cut_out) {
        const Index room = run_ + 2 * kPad;
        const Index bytes =
            up(Index{sizeof(Work)}, 64) + 2 * up(room * Index{sizeof(Key)}, 64) + room;
        const Scratch scratch(context_.threads, bytes);
        if (!scratch.ok() || !lowest_.ok()) return {Status::out_of_memory, 0};
        scratch_ = &scratch;
        for (int w = 0; w < context_.threads; ++w) {
            Work& work = this->work(w);
            Carver carve(scratch.of<unsigned char>(w));
            Work* self = nullptr;
            carve.take(self, 1);
            carve.take(work.keys, room);
            carve.take(work.gathered, room);
            carve.take(work.goes, room);
            work.keys += kPad;
            work.changed = work.below = 0;
            work.ratio = 0;
            work.overflow = false;
        }
        double cut = 0;
        const auto chosen = [&] {
            if constexpr (!kWide)
                if (plan_.group > 0) return groups();
            return by_row_ ? rows() : all_rows(&cut);
        };
        const Info info = chosen();
        for (int w = 0; w < context_.threads; ++w) *changed += work(w).changed;
        if (cut_out != nullptr) *cut_out = cut;
        return info;
    }

   private:
    Work& work(int worker) const { return *scratch_->template of<Work>(worker); }

    // Calls body(first, count) for the runs of an item: weights that follow one another in a row.
    template <typename Body>
    LOBS_INLINE void each_run(Index item, Body&& body) const {
        const Index row = item / pieces_ * columns_, begin = item % pieces_ * piece_;
        const Index end = least(begin + piece_, columns_);
        for (Index q = begin; q < end; q += run_) body(row + q, least(run_, end - q));
    }

    // y of a run to d, or a note of the first that is not finite.
    bool price_run(Index first, Index count, int worker, double* size) {
        const Priced<T> priced = price(d_ + first, p_ + first, x_ + first, removed_ + first, count);
        *size = priced.size;
        if (priced.finite) return true;
        Index q = first;
        while (finite_bits(magnitude_bits(d_[q]))) ++q;
        lowest_.note(worker, q);
        return false;
    }

    // The keys of a run. Returns their number.
    Index find_keys(Index first, Index count, Key* keys) const {
        const unsigned char* state = state_ == nullptr ? nullptr : state_ + first;
        if constexpr (kWide) {
            const Index unit = plan_.unit, units = count / unit;
            if (unit == 2)
                keys_of_units<2>(keys, d_ + first, state, units, unit);
            else if (unit == 4)
                keys_of_units<4>(keys, d_ + first, state, units, unit);
            else if (unit == 8)
                keys_of_units<8>(keys, d_ + first, state, units, unit);
            else
                keys_of_units<0>(keys, d_ + first, state, units, unit);
            return units;
        } else {
            keys_of_weights(keys, d_ + first, state, count);
            return count;
        }
    }

    // From a byte for each of `units` units of a run to d and `removed`. Other columns stay.
    void finish(Index first, Index count, Index units, Work& work) {
        Index whole = units;
        if constexpr (kWide) {
            whole *= plan_.unit;
            widen_units(work.goes, reinterpret_cast<unsigned char*>(work.keys), units, plan_.unit);
        }
        std::memset(work.goes + whole, 0, static_cast<std::size_t>(count - whole));
        work.changed += apply(d_ + first, x_ + first, removed_ + first, work.goes, count);
    }

    Info ended(bool whole) const {
        if (!whole) return {Status::interrupted, 0};
        if (lowest_.item() < weights_) return {Status::not_finite, lowest_.item()};
        return {Status::ok, 0};
    }

    Info groups() {
        const Index group = plan_.group, per_group = plan_.per_group;
        auto body = [&](Index item, int worker) {
            Work& own = work(worker);
            each_run(item, [&](Index first, Index count) {
                double size = 0, none = 0;
                if (!price_run(first, count, worker, &size)) return;
                find_keys(first, count, own.keys);
                const Index groups = count / group;
                if (kWidth<Key> % 4 == 0 && group == 4)
                    mark_in_small_groups<4>(own.goes, own.keys, groups * 4, per_group);
                else if (kWidth<Key> % 8 == 0 && group == 8)
                    mark_in_small_groups<8>(own.goes, own.keys, groups * 8, per_group);
                else if (group <= kSmallGroup)
                    mark_in_groups(own.goes, own.keys, groups, group, per_group, own.gathered);
                else
                    for (Index at = 0; at < groups * group; at += group) {
                        const Cut<Key> cut = cut_of_run(own.keys + at, group, per_group,
                                                        own.gathered, 0, &none, Cost{});
                        mark(own.goes + at, own.keys + at, group, 0, cut);
                    }
                finish(first, count, groups * group, own);
            });
        };
        return ended(parallel_items(items_, context_, body));
    }

    Info rows() {
        auto body = [&](Index item, int worker) {
            Work& own = work(worker);
            double size = 0;
            if (!price_run(item * columns_, columns_, worker, &size)) return;
            const Index units = find_keys(item * columns_, columns_, own.keys);
            const double mean = size / static_cast<double>(columns_);
            const Cut<Key> cut = cut_of_run(own.keys, units, plan_.count, own.gathered,
                                            kWide ? mean * mean : mean, &own.ratio, Cost{});
            mark(own.goes, own.keys, units, 0, cut);
            finish(item * columns_, columns_, units, own);
        };
        return ended(parallel_items(items_, context_, body));
    }

    Info all_rows(double* cut_cost) {
        const auto window = Window<Key>::around(plan_.cut, kWindow, Cost{});
        // Keys in the window, by item. Memory that nothing is written to costs nothing.
        const Scratch gathered(window.empty() ? 1 : items_,
                               (kGathered + kRun + kPad) * Index{sizeof(Key)});
        const Scratch counts(1, items_ * Index{sizeof(Index)});
        const Scratch histograms(context_.threads, kHistogramBytes);
        if (!gathered.ok() || !counts.ok() || !histograms.ok()) return {Status::out_of_memory, 0};
        Index* count_of = counts.of<Index>(0);
        const auto keys_in_window = [&](Index item) {
            return gathered.of<Key>(static_cast<int>(item));
        };

        auto price_all = [&](Index item, int worker) {
            Work& own = work(worker);
            Key* const inside = window.empty() ? nullptr : keys_in_window(item);
            Key* end = inside;
            each_run(item, [&](Index first, Index count) {
                double size = 0;
                if (!price_run(first, count, worker, &size)) return;
                if (window.empty() || own.overflow) return;
                const Index units = find_keys(first, count, own.keys);
                end = sieve(end, own.keys, units, window, &own.below);
                own.overflow = end - inside > kGathered;
            });
            count_of[item] = end - inside;
        };
        const Info info = ended(parallel_items(items_, context_, price_all));
        if (info.status != Status::ok) return info;

        Cut<Key> cut{1, 0};
        if (plan_.count > 0) {
            Ranked<Key> found;
            if (!find_cut(window, keys_in_window, count_of, histograms, &found))
                return {Status::interrupted, 0};
            cut = {found.key, weights_};
            const Index room = plan_.count - found.before;
            if (decided_by_states(found.key, &cut))
                ;
            else if (room < found.ties && !split_ties(found.key, room, count_of, &cut.split))
                return {Status::interrupted, 0};
            *cut_cost = cost_of(found.key);
        }
        auto finish_all = [&](Index item, int worker) {
            Work& own = work(worker);
            each_run(item, [&](Index first, Index count) {
                const Index units = find_keys(first, count, own.keys);
                mark(own.goes, own.keys, units, first, cut);
                finish(first, count, units, own);
            });
        };
        return ended(parallel_items(items_, context_, finish_all));
    }

    // The key of the last unit that goes. False if interrupted.
    template <typename KeysOf>
    bool find_cut(Window<Key> window, KeysOf& keys_in_window, const Index* count_of,
                  const Scratch& histograms, Ranked<Key>* found) const {
        const Index rank = plan_.count - 1;
        Index below = 0, inside = 0;
        bool all = !window.empty();
        for (int w = 0; w < context_.threads; ++w) {
            below += work(w).below;
            all = all && !work(w).overflow;
        }
        for (Index item = 0; item < items_ && all; ++item) inside += count_of[item];
        if (all && below <= rank && rank < below + inside) {
            auto visit = [&](Index item, int, auto take) {
                const Key* keys = keys_in_window(item);
                for (Index i = 0; i < count_of[item]; ++i)
                    take(static_cast<Key>(keys[i] - window.low));
            };
            if (!key_of_rank_in_parallel(found, items_, rank - below, window.bits(), histograms,
                                         context_, visit))
                return false;
            found->key = static_cast<Key>(found->key + window.low);
            found->before += below;
            return true;
        }
        auto visit = [&](Index item, int worker, auto take) {
            Key* keys = work(worker).keys;
            each_run(item, [&](Index first, Index count) {
                const Index units = find_keys(first, count, keys);
                for (Index u = 0; u < units; ++u) take(keys[u]);
            });
        };
        return key_of_rank_in_parallel(found, items_, rank, kKeyBits<Key>, histograms, context_,
                                       visit);
    }

    // The place after the tie number `room`. False if interrupted.
    bool split_ties(Key key, Index room, Index* count_of, Index* split) const {
        auto count_ties = [&](Index item, int worker) {
            Key* keys = work(worker).keys;
            Index ties = 0;
            each_run(item, [&](Index first, Index count) {
                const Index units = find_keys(first, count, keys);
                for (Index u = 0; u < units; ++u) ties += keys[u] == key ? 1 : 0;
            });
            count_of[item] = ties;
        };
        if (!parallel_items(items_, context_, count_ties)) return false;
        Index item = 0;
        while (room > count_of[item]) room -= count_of[item++];
        *split = -1;
        Key* keys = work(0).keys;
        each_run(item, [&](Index first, Index count) {
            if (*split >= 0) return;
            const Index units = find_keys(first, count, keys);
            *split = split_of(keys, units, first, key, &room);
        });
        return true;
    }

    const T *p_, *x_;
    T* d_;
    unsigned char* removed_;
    const unsigned char* state_;
    const AdmmPlan& plan_;
    const Context& context_;
    Index columns_, weights_;  // columns: of a row, or all weights
    bool by_row_;
    Index span_, run_, piece_, pieces_, items_;
    Lowest lowest_;
    const Scratch* scratch_ = nullptr;
};

}  // namespace

Info admm_step(Index* changed, double* cut_out, AnyMatrix p, AnyMatrix d, AnyMatrix x,
               unsigned char* removed, const unsigned char* state, const AdmmPlan& plan,
               const Context& context) {
    const bool wide = plan.group == 0 && plan.unit > 1;
    switch (d.dtype) {
        case Dtype::f64:
            if (wide)
                return Step<double, true>(p, d, x, removed, state, plan, context)
                    .run(changed, cut_out);
            return Step<double, false>(p, d, x, removed, state, plan, context)
                .run(changed, cut_out);
        case Dtype::f32:
            if (wide)
                return Step<float, true>(p, d, x, removed, state, plan, context)
                    .run(changed, cut_out);
            return Step<float, false>(p, d, x, removed, state, plan, context).run(changed, cut_out);
        default:
            return {Status::unsupported, 0};
    }
}

}  // namespace lobs::LOBS_LEVEL
