// column_layer.h: what columns.cpp keeps of one layer: its units, V and P, and the rows of A and B
// that are computed ahead.
#pragma once

#include "column_sizes.h"

namespace lobs::LOBS_LEVEL {
namespace {

template <typename T>
class Layer {
   public:
    template <typename Carve>
    void carve(Carve& carve, const Sizes<T>& sizes) {
        size_ = sizes;
        carve.take(W_, sizes.R * sizes.slots);
        carve.take(factor_, sizes.factor);
        carve.take(rows_, 2 * sizes.rows * sizes.stride);
        carve.take(a_, sizes.blocks);
        carve.take(b_, sizes.blocks);
        carve.take(origin_, sizes.stride);
        carve.take(cost_, sizes.slots);
        carve.take(coefficient_, 2 * sizes.C * (sizes.ahead + kRows));
        carve.take(gram_, sizes.R * (sizes.ahead + kGrams));
        carve.take(newest_, sizes.widest > 1 ? 2 * sizes.widest * sizes.stride : 0);
        if (sizes.widest > 1) reduced_.carve(carve, Block<T>(sizes.widest));
        carve.take(block_, sizes.units);
        carve.take(at_, sizes.units);
        carve.take(unit_, sizes.units);
        carve.take(chosen_, kMost);
        carve.take(column_, sizes.slots);
        carve.take(row_, sizes.slots);
        carve.take(row_slot_, sizes.rows);
        carve.take(stamp_, sizes.rows);
        carve.take(members_, sizes.ahead);
        carve.take(groups_, sizes.ahead);
        carve.take(keep_, sizes.slots / kLanes<T>);
    }

    // What lasts only for a call.
    void use(const Rooms<T>* rooms, const ColumnLayer& of) {
        rooms_ = rooms;
        start_ = of.start;
        A_ = static_cast<const T*>(of.A);
        scale_ = of.scale;
    }

    bool begin(const ColumnLayer& of, const ColumnsPlan& plan, const Context& context) {
        floor_ = static_cast<T>(plan.floor);
        steps_ = refilled_ = panel_ = units_ = 0;
        slots_ = size_.C;
        tiles_ = size_.slots / kTile<T>;
        Index blocks = 0;
        for (Index u = 0; u < plan.units; ++u) {
            const Index columns = width(u);
            at_[u] = columns == 0 ? -1 : start_[u];
            if (columns == 0) continue;
            unit_[units_++] = u;
            block_[u] = blocks;
            blocks += up(Block<T>(columns).elements(), kLanes<T>);
        }
        for (Index s = 0; s < tiles_ * kTile<T>; ++s) {
            column_[s] = static_cast<std::int32_t>(s < slots_ ? s : 0);
            row_[s] = -1;
            origin_[s] = s < slots_ ? A_[s * size_.C + s] : T(1);
        }
        for (Index r = 0; r < size_.rows; ++r) row_slot_[r] = kEmpty;
        const auto* const W = static_cast<const T*>(of.W.data);
        const bool packed = each_tile(size_.R, context, [&](Index t, int) {
            const Index first = t * kTile<T>, count = least(size_.C - first, kTile<T>);
            for (Index r = 0; r < size_.R; ++r) {
                T* const to = W_ + (t * size_.R + r) * kTile<T>;
                const T* const from = W + r * of.W.row_stride + first;
                for (Index i = 0; i < count; ++i) to[i] = from[i];
                for (Index i = count; i < kTile<T>; ++i) to[i] = 0;
            }
        });
        return packed && (single() ? begin_single(context) : begin_blocks(context));
    }

    // The lowest unit whose pivots are lost, or -1.
    Index first_lost() const {
        for (Index n = 0; n < units_; ++n)
            if (cost_[at_[unit_[n]]] < 0) return unit_[n];
        return -1;
    }

    void add_costs(double* total) const {
        for (Index n = 0; n < units_; ++n) {
            const T cost = cost_[at_[unit_[n]]];
            total[unit_[n]] += cost > 0 ? scale_ * static_cast<double>(cost) : 0.0;
        }
    }

    // Adds what the removal of u costs. False if a pivot is lost.
    bool prepare(Index u, double* cost) {
        if (at_[u] < 0) return true;
        T own = cost_[at_[u]];
        if (!single() && own >= 0)
            own = reduce(reduced_, Block<T>(width(u)), a_ + block_[u], b_ + block_[u],
                         origin_ + at_[u], floor_);
        *cost += own > 0 ? scale_ * static_cast<double>(own) : 0.0;
        return own >= 0;
    }

    // Removes u, after prepare(). `left` removals were left before it. False if interrupted.
    bool remove(Index u, const double* rank, Index left, const Context& context) {
        if (at_[u] < 0) return true;
        const Index columns = width(u), panel = (steps_ + columns - 1) / kPanel;
        const bool stale = row_[at_[u]] < 0 || stamp_[row_[at_[u]]] < refilled_;
        if ((panel != panel_ || stale) &&
            exact::worth_squeezing(up(size_.C - steps_, kTile<T>) / kTile<T>, tiles_) &&
            !squeeze(context))
            return false;
        panel_ = panel;
        if (stale && !look_ahead(u, rank, left, context)) return false;
        if (!(single() ? remove_single(u, context) : remove_block(u, context))) return false;
        for (Index s = at_[u]; s < at_[u] + columns; ++s) row_slot_[row_[s]] = kEmpty, row_[s] = -1;
        at_[u] = -1;
        steps_ += columns;
        Index n = 0;
        while (unit_[n] != u) ++n;
        for (--units_; n < units_; ++n) unit_[n] = unit_[n + 1];
        return single() || update_blocks(context);
    }

   private:
    static constexpr std::int32_t kEmpty = -1, kChosen = -2;  // in row_slot_

    LOBS_INLINE bool single() const { return size_.widest <= 1; }
    LOBS_INLINE Index width(Index u) const { return start_[u + 1] - start_[u]; }
    LOBS_INLINE T* factor(Index tile, Index step) const {  // a line of V, and behind it that of P
        return factor_ + ((step / kPanel * tiles_ + tile) * kPanel + step % kPanel) * 2 * kTile<T>;
    }
    LOBS_INLINE T* row_of_a(Index row) const { return rows_ + 2 * row * size_.stride; }
    LOBS_INLINE T* row_of_b(Index row) const { return row_of_a(row) + size_.stride; }

    // Calls body(first, end, worker) for all tiles, many together if `work`, per column, is little.
    template <typename Body>
    LOBS_INLINE bool each_span(Index work, const Context& context, Body body) {
        const Index little = Index{1} << 14;  // multiplications that are not worth a thread's start
        Index few = little / (kTile<T> * (work + 1)) + 1;
        few = least(few < kAtOnce ? kAtOnce : few, tiles_ < 1 ? 1 : tiles_);
        auto item = [&](Index i, int worker) {
            body(i * few, least((i + 1) * few, tiles_), worker);
        };
        return parallel_items(up(tiles_, few) / few, context, item);
    }
    template <typename Body>
    LOBS_INLINE bool each_tile(Index work, const Context& context, Body body) {
        return each_span(work, context, [&](Index first, Index end, int worker) {
            for (Index t = first; t < end; ++t) body(t, worker);
        });
    }

    // ---- blocks of A and B -----------------------------------------------------------------------

    // Diagonals and costs of the slots of a tile, from there on.
    LOBS_INLINE void store_single(Index at, Vector<T> a, Vector<T> b) {
        const Vector<T> own = b / a, zero = {};
        const Vector<T> cost = own > zero ? own : zero;
        store(a_ + at, a);
        store(b_ + at, b);
        store(cost_ + at, a > floor_ * load(origin_ + at) ? cost : zero - T(1));
    }

    bool begin_single(const Context& context) {
        return each_tile(size_.R, context, [&](Index t, int) {
            Vector<T> b[kVectors] = {};
            const T* w = W_ + t * size_.R * kTile<T>;
            for (Index r = 0; r < size_.R; ++r, w += kTile<T>)
#pragma GCC unroll 4
                for (int k = 0; k < kVectors; ++k) {
                    const Vector<T> own = load(w + k * kLanes<T>);
                    b[k] += own * own;
                }
            for (int k = 0; k < kVectors; ++k) {
                const Index at = t * kTile<T> + k * kLanes<T>;
                store_single(at, load(origin_ + at), b[k]);
            }
        });
    }

    bool begin_blocks(const Context& context) {
        auto body = [&](Index n, int worker) {
            const Index u = unit_[n], at = at_[u];
            const Block<T> block(width(u));
            const Room<T> room = rooms_->of(worker);
            T *const a = a_ + block_[u], *const b = b_ + block_[u];
            std::memset(a, 0, static_cast<std::size_t>(block.elements()) * sizeof(T));
            std::memset(b, 0, static_cast<std::size_t>(block.elements()) * sizeof(T));
            for (Index i = 0; i < block.size; ++i)
                std::memcpy(a + i * block.stride, A_ + (at + i) * size_.C + at,
                            static_cast<std::size_t>(block.size) * sizeof(T));
            std::memset(room.line, 0, static_cast<std::size_t>(kDepth * block.stride) * sizeof(T));
            for (Index r = 0; r < size_.R; r += kDepth) {
                const Index lines = least(size_.R - r, kDepth);
                for (Index l = 0; l < lines; ++l)
                    for (Index i = 0; i < block.size; ++i)
                        room.line[l * block.stride + i] = weight(r + l, at + i);
                add_products(b, block, room.line, room.line, block.stride, lines, T(1));
            }
            cost_[at] = reduce(room.reduced, block, a, b, origin_ + at, floor_);
        };
        return parallel_items(units_, context, body);
    }

    LOBS_INLINE T weight(Index r, Index s) const {
        return W_[(s / kTile<T> * size_.R + r) * kTile<T> + s % kTile<T>];
    }

    // After a removal, whose lines of V and P are `newest_`.
    bool update_blocks(const Context& context) {
        const Index stride = size_.stride;
        auto body = [&](Index n, int worker) {
            const Index u = unit_[n], at = at_[u];
            const Block<T> block(width(u));
            const T *const v = newest_ + at, *const p = v + size_.widest * stride;
            T *const a = a_ + block_[u], *const b = b_ + block_[u];
            add_products(a, block, v, v, stride, newest_lines_, T(-1));
            add_products(b, block, p, v, stride, newest_lines_, T(-1));
            add_products(b, block, v, p, stride, newest_lines_, T(-1));
            const Room<T> room = rooms_->of(worker);
            cost_[at] = reduce(room.reduced, block, a, b, origin_ + at, floor_);
        };
        return parallel_items(units_, context, body);
    }

    // ---- removal ---------------------------------------------------------------------------------

    // out[0], out[1] = -V, -P of a slot at the steps from `stamp` on, and zero at those from `from`
    // on before it. Steps are 2 * `apart` apart.
    LOBS_INLINE void gather(Index slot, Index from, Index stamp, T* out, Index apart) const {
        for (; from < stamp; ++from, out += 2 * apart) out[0] = out[1] = 0;
        for (Index i = from; i < steps_; ++i, out += 2 * apart) {
            const T* const line = factor(slot / kTile<T>, i) + slot % kTile<T>;
            out[0] = -line[0];
            out[1] = -line[kTile<T>];
        }
    }

    bool remove_single(Index u, const Context& context) {
        const Index q = at_[u], row = row_[q], from = stamp_[row];
        const T scale = 1 / root(a_[q]), half = T(0.5) * b_[q] / a_[q];
        gather(q, from, from, coefficient_, 1);
        return each_span(3 * (steps_ - from) + 8, context, [&](Index t, Index end, int) {
            constexpr int kTogether = kManyRegisters ? 2 : 4;  // chains of sums
            for (; t + kTogether <= end; t += kTogether)
                finish<kTogether>(row, from, t, scale, half);
            for (; t < end; ++t) finish<1>(row, from, t, scale, half);
        });
    }

    // Brings a row of A and B up to date, which become lines of V and P, and updates the diagonals.
    template <int kTiles>
    LOBS_INLINE void finish(Index row, Index from, Index t, T scale, T half) {
        Vector<T> a[kTiles][kVectors], b[kTiles][kVectors];
#pragma GCC unroll 4
        for (int q = 0; q < kTiles; ++q)
#pragma GCC unroll 4
            for (int k = 0; k < kVectors; ++k) {
                a[q][k] = load(row_of_a(row) + (t + q) * kTile<T> + k * kLanes<T>);
                b[q][k] = load(row_of_b(row) + (t + q) * kTile<T> + k * kLanes<T>);
            }
        const T* c = coefficient_;
        for (Index i = from; i < steps_;) {
            const T* line = factor(t, i);
            for (Index end = least(steps_, (i / kPanel + 1) * kPanel); i < end; ++i, c += 2) {
#pragma GCC unroll 4
                for (int q = 0; q < kTiles; ++q)
#pragma GCC unroll 4
                    for (int k = 0; k < kVectors; ++k) {
                        const T* const at = line + q * kPanel * 2 * kTile<T> + k * kLanes<T>;
                        const Vector<T> v = load(at);
                        a[q][k] += c[0] * v;
                        b[q][k] += c[1] * v;
                        b[q][k] += c[0] * load(at + kTile<T>);
                    }
                line += 2 * kTile<T>;
            }
        }
#pragma GCC unroll 4
        for (int q = 0; q < kTiles; ++q)
#pragma GCC unroll 4
            for (int k = 0; k < kVectors; ++k) {
                const Index at = (t + q) * kTile<T> + k * kLanes<T>;
                const Vector<T> v = a[q][k] * scale, p = b[q][k] * scale - half * v;
                T* const line = factor(t + q, steps_) + k * kLanes<T>;
                store(line, v);
                store(line + kTile<T>, p);
                store_single(at, load(a_ + at) - v * v, load(b_ + at) - (p * v + p * v));
            }
    }

    bool remove_block(Index u, const Context& context) {
        const Block<T> block(width(u));
        const Index q = at_[u], stride = size_.stride;
        for (Index i = 0; i < block.size; ++i) members_[i] = static_cast<std::int32_t>(q + i);
        newest_lines_ = block.size;
        if (!advance(block.size, context)) return false;
        return each_tile(2 * block.size, context, [&](Index t, int worker) {
            T *const v = rooms_->of(worker).tile, *const p = v + block.rows * kTile<T>;
            std::memset(v, 0, static_cast<std::size_t>(2 * block.rows * kTile<T>) * sizeof(T));
            for (Index i = 0; i < block.size; ++i) {
                const Index row = row_[q + i];
                std::memcpy(v + i * kTile<T>, row_of_a(row) + t * kTile<T>, sizeof(T) * kTile<T>);
                std::memcpy(p + i * kTile<T>, row_of_b(row) + t * kTile<T>, sizeof(T) * kTile<T>);
            }
            substitute<T, kVectors>(v, kTile<T>, block.rows, reduced_.U, block.stride, 1,
                                    reduced_.inverse, 1);
            substitute<T, kVectors>(p, kTile<T>, block.rows, reduced_.U, block.stride, 1,
                                    reduced_.inverse, 1);
            for (Index i = 0; i < block.size; i += 4) {
                Vector<T> sum[4][kVectors] = {};
                multiply<T, 4, kVectors>(sum, block.size, reduced_.M + i, block.stride, 1, v,
                                         kTile<T>);
                for (int l = 0; l < 4; ++l)
                    for (int k = 0; k < kVectors; ++k) {
                        T* const at = p + (i + l) * kTile<T> + k * kLanes<T>;
                        store(at, load(at) - T(0.5) * sum[l][k]);
                    }
            }
            for (Index i = 0; i < block.size; ++i) {
                T *const line = factor(t, steps_ + i), *const newest = newest_ + t * kTile<T>;
                std::memcpy(line, v + i * kTile<T>, sizeof(T) * kTile<T>);
                std::memcpy(line + kTile<T>, p + i * kTile<T>, sizeof(T) * kTile<T>);
                std::memcpy(newest + i * stride, line, sizeof(T) * kTile<T>);
                std::memcpy(newest + (size_.widest + i) * stride, line + kTile<T>,
                            sizeof(T) * kTile<T>);
            }
        });
    }

    // ---- rows of A and B, ahead ------------------------------------------------------------------

    // Computes the rows of u and of other units that rank low. `left` units will go, at most.
    bool look_ahead(Index u, const double* rank, Index left, const Context& context) {
        const Index units = choose(u, rank, least(kMost, 8 + left * 5 / 4));
        refilled_ = steps_;
        Index fresh = 0, known = size_.ahead;
        for (Index n = 0; n < units; ++n)
            for (Index s = at_[chosen_[n]], end = s + width(chosen_[n]); s < end; ++s)
                members_[row_[s] < 0 ? fresh++ : --known] = static_cast<std::int32_t>(s);
        Index count = fresh;
        // By stamp, because a group starts at the step of its oldest row.
        for (; known < size_.ahead; ++known, ++count) {
            const std::int32_t s = members_[known];
            Index i = count;
            for (; i > fresh && stamp_[row_[members_[i - 1]]] > stamp_[row_[s]]; --i)
                members_[i] = members_[i - 1];
            members_[i] = s;
        }
        for (Index m = fresh; m < count; ++m) row_slot_[row_[members_[m]]] = kChosen;
        for (Index m = 0, r = 0; m < fresh; ++m) {
            while (r < size_.rows && row_slot_[r] != kEmpty) ++r;
            if (r == size_.rows) r = evict();
            row_slot_[r] = kChosen;
            row_[members_[m]] = static_cast<std::int32_t>(r);
            stamp_[r] = 0;
        }
        for (Index m = 0; m < count; ++m) row_slot_[row_[members_[m]]] = members_[m];
        if (!fetch(fresh, context) || !advance(count, context)) return false;
        for (Index m = 0; m < count; ++m) stamp_[row_[members_[m]]] = steps_;
        return true;
    }

    // Forgets all rows that have not been chosen. Returns the first that is free.
    Index evict() {
        for (Index r = 0; r < size_.rows; ++r)
            if (row_slot_[r] >= 0) row_[row_slot_[r]] = -1, row_slot_[r] = kEmpty;
        Index r = 0;
        while (row_slot_[r] != kEmpty) ++r;
        return r;
    }

    // Chooses u and other units by rank, `most` at most, whose rows there is room for.
    Index choose(Index u, const double* rank, Index most) {
        constexpr double kNever = std::numeric_limits<double>::infinity();
        Index count = 1;
        chosen_[0] = u;
        for (Index n = 0; n < units_; ++n) {
            const double own = rank[unit_[n]];
            if (unit_[n] == u || own == kNever) continue;
            if (count == most && (most == 1 || own >= rank[chosen_[count - 1]])) continue;
            Index i = count < most ? count++ : count - 1;
            for (; i > 1 && rank[chosen_[i - 1]] > own; --i) chosen_[i] = chosen_[i - 1];
            chosen_[i] = unit_[n];
        }
        Index columns = width(u), n = 1;
        while (n < count && columns + width(chosen_[n]) <= size_.ahead)
            columns += width(chosen_[n++]);
        return n;
    }

    // Puts A and B of the columns members_[0 .. count) into their rows, as they were at first.
    bool fetch(Index count, const Context& context) {
        auto of_a = [&](Index m, int) {
            const Index s = members_[m];
            T* const out = row_of_a(row_[s]);
            const T* const a = A_ + static_cast<Index>(column_[s]) * size_.C;
            for (Index i = 0; i < slots_; ++i) out[i] = a[column_[i]];
            for (Index i = slots_; i < tiles_ * kTile<T>; ++i) out[i] = 0;
            std::memset(row_of_b(row_[s]), 0, sizeof(T) * static_cast<std::size_t>(size_.slots));
            const Index group = m / kGrams * kGrams, size = least(count - group, kGrams);
            for (Index r = 0; r < size_.R; ++r)
                gram_[group * size_.R + r * size + m - group] = weight(r, s);
        };
        if (!parallel_items(count, context, of_a)) return false;
        return each_tile(size_.R * count, context, [&](Index t, int) {
            for (Index r = 0; r < size_.R; r += kDepth)
                for (Index m = 0; m < count; m += kGrams) {
                    const Index size = least(count - m, kGrams);
                    const T* const c = gram_ + m * size_.R + r * size;
                    const T* const w = W_ + (t * size_.R + r) * kTile<T>;
                    const Index depth = least(size_.R - r, kDepth);
                    switch (size) {
                        case 6:
                            add_gram<6>(m, t, c, w, depth);
                            break;
                        case 5:
                            add_gram<5>(m, t, c, w, depth);
                            break;
                        case 4:
                            add_gram<4>(m, t, c, w, depth);
                            break;
                        case 3:
                            add_gram<3>(m, t, c, w, depth);
                            break;
                        case 2:
                            add_gram<2>(m, t, c, w, depth);
                            break;
                        default:
                            add_gram<1>(m, t, c, w, depth);
                    }
                }
        });
    }

    template <int kCount>
    LOBS_INLINE void add_gram(Index m, Index t, const T* c, const T* w, Index depth) {
        Vector<T> sum[kCount][kVectors];
        T* row[kCount];
#pragma GCC unroll 6
        for (int i = 0; i < kCount; ++i) row[i] = row_of_b(row_[members_[m + i]]) + t * kTile<T>;
#pragma GCC unroll 6
        for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
            for (int k = 0; k < kVectors; ++k) sum[i][k] = load(row[i] + k * kLanes<T>);
        multiply<T, kCount, kVectors>(sum, depth, c, kCount, 1, w, kTile<T>);
#pragma GCC unroll 6
        for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
            for (int k = 0; k < kVectors; ++k) store(row[i] + k * kLanes<T>, sum[i][k]);
    }

    struct Group {
        Index size, from;
        const T* coefficient;
        T *a[kRows], *b[kRows];
    };

    // Brings the rows of members_[0 .. count), of rising stamps, up to date.
    bool advance(Index count, const Context& context) {
        Index groups = 0, work = 0;
        T* coefficient = coefficient_;
        for (Index m = 0; m < count;) {
            Group& g = groups_[groups];
            g.size = least(count - m, kRows);
            g.from = stamp_[row_[members_[m]]];
            g.coefficient = coefficient;
            for (Index i = 0; i < g.size; ++i, ++m) {
                const Index s = members_[m];
                g.a[i] = row_of_a(row_[s]);
                g.b[i] = row_of_b(row_[s]);
                gather(s, g.from, stamp_[row_[s]], coefficient + 2 * i, g.size);
            }
            coefficient += 2 * (steps_ - g.from) * g.size;
            work += 3 * (steps_ - g.from) * g.size;
            ++groups;
        }
        return each_span(work, context, [&](Index first, Index end, int) {
            for (Index p = 0; p < steps_; p += kPanel)
                for (Index t = first; t < end; ++t)
                    for (Index n = 0; n < groups; ++n) {
                        const Group& g = groups_[n];
                        const Index from = g.from > p ? g.from : p;
                        const Index to = least(steps_, p + kPanel);
                        if (from >= to) continue;
                        const T* const c = g.coefficient + 2 * (from - g.from) * g.size;
                        if (g.size == 3)
                            product<3>(g, t, c, factor(t, from), to - from);
                        else if (g.size == 2)
                            product<2>(g, t, c, factor(t, from), to - from);
                        else
                            product<1>(g, t, c, factor(t, from), to - from);
                    }
        });
    }

    template <int kCount>
    LOBS_INLINE static void product(const Group& g, Index t, const T* c, const T* line,
                                    Index steps) {
        Vector<T> a[kCount][kVectors], b[kCount][kVectors];
#pragma GCC unroll 3
        for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
            for (int k = 0; k < kVectors; ++k) {
                a[i][k] = load(g.a[i] + t * kTile<T> + k * kLanes<T>);
                b[i][k] = load(g.b[i] + t * kTile<T> + k * kLanes<T>);
            }
        for (; steps > 0; --steps, c += 2 * kCount, line += 2 * kTile<T>) {
            Vector<T> v[kVectors];
#pragma GCC unroll 4
            for (int k = 0; k < kVectors; ++k) v[k] = load(line + k * kLanes<T>);
#pragma GCC unroll 3
            for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
                for (int k = 0; k < kVectors; ++k) {
                    a[i][k] += c[2 * i] * v[k];
                    b[i][k] += c[2 * i + 1] * v[k];
                }
#pragma GCC unroll 4
            for (int k = 0; k < kVectors; ++k) v[k] = load(line + kTile<T> + k * kLanes<T>);
#pragma GCC unroll 3
            for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
                for (int k = 0; k < kVectors; ++k) b[i][k] += c[2 * i] * v[k];
        }
#pragma GCC unroll 3
        for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
            for (int k = 0; k < kVectors; ++k) {
                store(g.a[i] + t * kTile<T> + k * kLanes<T>, a[i][k]);
                store(g.b[i] + t * kTile<T> + k * kLanes<T>, b[i][k]);
            }
    }

    // ---- squeezing -------------------------------------------------------------------------------

    // Leaves out the slots of units that have gone.
    bool squeeze(const Context& context) {
        const Index before = tiles_;
        for (Index v = 0; v < before * kVectors; ++v) keep_[v] = 0;
        Index n = 0;
        for (Index i = 0; i < units_; ++i) {
            const Index first = at_[unit_[i]], columns = width(unit_[i]);
            cost_[n] = cost_[first];  // those of single columns follow below
            at_[unit_[i]] = n;
            for (Index s = first; s < first + columns; ++s, ++n) {
                keep_[s / kLanes<T>] |= 1u << s % kLanes<T>;
                column_[n] = column_[s];
                origin_[n] = origin_[s];
                row_[n] = row_[s];
                if (row_[n] >= 0) row_slot_[row_[n]] = static_cast<std::int32_t>(n);
                if (single()) a_[n] = a_[s], b_[n] = b_[s];
            }
        }
        slots_ = n;
        tiles_ = up(n, kTile<T>) / kTile<T>;
        for (; n < tiles_ * kTile<T>; ++n) {
            column_[n] = 0, row_[n] = -1, origin_[n] = 1;
            if (single()) a_[n] = 1, b_[n] = 0;
        }
        for (Index r = 0; r < size_.rows; ++r)
            if (row_slot_[r] >= 0) {
                squeeze_line(row_of_a(r), row_of_a(r), kTile<T>, before, row_of_a(r));
                squeeze_line(row_of_b(r), row_of_b(r), kTile<T>, before, row_of_b(r));
            }
        const Index lines = 2 * kPanel * kTile<T>, rows = size_.R * kTile<T>;
        auto of_w = [&](Index r, int worker) {
            T* const line = W_ + r * kTile<T>;
            squeeze_line(line, line, rows, before, rooms_->of(worker).line);
        };
        if (!parallel_items(size_.R, context, of_w)) return false;
        for (Index p = 0; p * kPanel < steps_; ++p) {
            auto of_factor = [&](Index i, int worker) {
                const T* const from = factor_ + p * before * lines + i * kTile<T>;
                T* const to = factor_ + p * tiles_ * lines + i * kTile<T>;
                squeeze_line(to, from, lines, before, rooms_->of(worker).line);
            };
            if (!parallel_items(2 * least(steps_ - p * kPanel, kPanel), context, of_factor))
                return false;
        }
        return true;
    }

    // Moves the kept slots of a line, of which each tile is `apart` from the next.
    // Lines of different steps or rows never overlap, so that only this line is held meanwhile.
    void squeeze_line(T* to, const T* from, Index apart, Index before, T* held) const {
        T* end = held;
        for (Index t = 0; t < before; ++t)
            for (Index k = 0; k < kVectors; ++k)
                end = compress(end, from + t * apart + k * kLanes<T>, keep_[t * kVectors + k]);
        for (; end < held + tiles_ * kTile<T>; ++end) *end = 0;
        if (held == to) return;
        for (Index t = 0; t < tiles_; ++t)
            std::memcpy(to + t * apart, held + t * kTile<T>, sizeof(T) * kTile<T>);
    }

    Sizes<T> size_{};
    const Rooms<T>* rooms_ = nullptr;
    const Index* start_ = nullptr;
    const T* A_ = nullptr;
    double scale_ = 1;
    T floor_ = 0;

    T *W_, *factor_, *rows_;  // by tiles; V and P by panels and tiles; of A and B in turn
    T *a_, *b_, *origin_,
        *cost_;  // blocks, or diagonals by slot; A's first diagonal; by first slot
    T *coefficient_, *gram_;
    T* newest_;  // V, then P, of the latest removal, by lines
    Reduced<T> reduced_;
    Index *block_, *at_, *unit_, *chosen_;  // of units: a block's place, first slot; those left
    std::int32_t *column_, *row_, *row_slot_, *members_;
    Index* stamp_;  // of rows: the steps that they have seen
    Group* groups_;
    unsigned* keep_;
    Index slots_, tiles_, steps_, refilled_, panel_, units_, newest_lines_;
};

}  // namespace
}  // namespace lobs::LOBS_LEVEL
