// exchange.cpp: contract in exchange.h.
//
// One row is one item of work. Its columns sit in slots: the k removed ones first, then the kept
// ones, then one slot for the weights. The tableau is stored with the sign of K changed,
//
//   M = [-K  . .]
//       [ E  D .]      x = K w0[P],  w = w0[S] - E w0[P]
//       [ x  w .]
//
// because then M stays symmetric, and every pivot q, whether it adds or removes, is the same:
//   M -= m m^T / M_qq,   M[:, q] = m / |M_qq|,   M_qq = -1 / M_qq      with m = M[:, q].
// Only tiles on and below the diagonal are stored, each kTile x kTile and contiguous. Values above
// the diagonal of a diagonal tile are never read.
//
//   build  Brings all removed slots in from M = A, one tile of pivots at a time. Let
//          U^T U be that tile and B the columns of its pivots (a strip of tiles, transposed): then
//          Z = U^-T B^T, M -= Z^T Z, M[:, q] = (U^-1 Z)^T. Nearly all flops are in Z^T Z, a product
//          in registers.
//   pass   One swap is two pivots, together M += u u^T - v v^T. The slots of the pair change
//          places, so that E stays a rectangle. The same pass evaluates all pairs for the next
//          round, tile by tile, as soon as their entries of E are up to date.
//   polish Refines x once from A with M as the inverse. For two products of A[:, P] with a vector,
//          this recovers the accuracy that many pivots have lost.
#include "exchange.h"

#include <limits>

#include "parallel.h"
#include "saliency.h"
#include "vector.h"

namespace lobs::LOBS_LEVEL {
namespace {

constexpr Index kTile = 32;  // rows and columns of a tile, and pivots at a time
constexpr Index kTileValues = kTile * kTile;
constexpr int kRows = 4;  // 16 accumulators in 32 registers, or 8 in 16
constexpr int kVectors = kManyRegisters ? 4 : 2;
constexpr int kLane = kLanes<double>;
constexpr int kWide = kVectors * kLane;
static_assert(kTile % kWide == 0 && kTile % kRows == 0, "a tile holds whole register blocks");

constexpr double kLeastGain = 1e-9;  // the least share by which a swap lowers the row's error
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLargest = std::numeric_limits<double>::max();

LOBS_INLINE bool positive(double pivot) { return pivot > 0 && pivot <= kLargest; }

// Numbers of elements in a worker's buffers. They do not overflow, because A has C * C values.
struct Sizes {
    Index slots, tableau, strip;

    explicit Sizes(Index C) {
        slots = up(C + 1, kTile);
        const Index tiles = slots / kTile;
        tableau = tiles * (tiles + 1) / 2 * kTileValues;
        strip = tiles * kTileValues;
    }
    Index bytes() const {
        const Index values = tableau + strip + 2 * kTileValues + 13 * slots;
        return values * static_cast<Index>(sizeof(double)) + 2 * slots * 4 + slots + 32 * 64;
    }
};

// out = the transpose of a tile, by shuffles of 4 x 4 squares.
void transpose(double* out, const double* in) {
    typedef double Four __attribute__((vector_size(32), aligned(8), may_alias));
    for (Index i = 0; i < kTile; i += 4)
        for (Index j = 0; j < kTile; j += 4) {
            const double* from = in + i * kTile + j;
            const Four a = *reinterpret_cast<const Four*>(from);
            const Four b = *reinterpret_cast<const Four*>(from + kTile);
            const Four c = *reinterpret_cast<const Four*>(from + 2 * kTile);
            const Four d = *reinterpret_cast<const Four*>(from + 3 * kTile);
            const Four ab_even = __builtin_shufflevector(a, b, 0, 4, 2, 6);
            const Four ab_odd = __builtin_shufflevector(a, b, 1, 5, 3, 7);
            const Four cd_even = __builtin_shufflevector(c, d, 0, 4, 2, 6);
            const Four cd_odd = __builtin_shufflevector(c, d, 1, 5, 3, 7);
            double* to = out + j * kTile + i;
            *reinterpret_cast<Four*>(to) = __builtin_shufflevector(ab_even, cd_even, 0, 1, 4, 5);
            *reinterpret_cast<Four*>(to + kTile) =
                __builtin_shufflevector(ab_odd, cd_odd, 0, 1, 4, 5);
            *reinterpret_cast<Four*>(to + 2 * kTile) =
                __builtin_shufflevector(ab_even, cd_even, 2, 3, 6, 7);
            *reinterpret_cast<Four*>(to + 3 * kTile) =
                __builtin_shufflevector(ab_odd, cd_odd, 2, 3, 6, 7);
        }
}

// U <- the upper factor of U, whose U^T U is the old U; scale[i] = 1 / U_ii. False if a pivot is
// not positive.
bool factor(double* U, double* scale) {
    for (Index j = 0; j < kTile; ++j) {
        double* row = U + j * kTile;
        if (!positive(row[j])) return false;
        scale[j] = 1 / __builtin_sqrt(row[j]);
        const Index first = j / kLane * kLane;
        for (Index i = first; i < kTile; i += kLane) store(row + i, load(row + i) * scale[j]);
        for (Index k = j + 1; k < kTile; ++k) {
            const double u = row[k];
            double* other = U + k * kTile;
            for (Index i = k / kLane * kLane; i < kTile; i += kLane)
                store(other + i, load(other + i) - u * load(row + i));
        }
    }
    return true;
}

// Z <- U^-T Z for a tile Z.
void forward(const double* U, const double* scale, double* Z) {
    for (Index j = 0; j < kTile; j += kWide)
        substitute<double, kVectors>(Z + j, kTile, kTile, U, kTile, 1, scale, 1);
}

// Z <- U^-1 Z for a tile Z, four rows at a time, from the last ones up.
void backward(const double* U, const double* scale, double* Z) {
    for (Index j = 0; j < kTile; j += kWide)
        for (Index s = kTile - kRows; s >= 0; s -= kRows) {
            Vector<double> z[kRows][kVectors] = {};
            const Index next = s + kRows;
            multiply<double, kRows, kVectors>(z, kTile - next, U + s * kTile + next, 1, kTile,
                                              Z + next * kTile + j, kTile);
#pragma GCC unroll 4
            for (int i = kRows - 1; i >= 0; --i)
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                    double* at = Z + (s + i) * kTile + j + v * kLane;
                    Vector<double> sum = load(at) - z[i][v];
#pragma GCC unroll 4
                    for (int k = kRows - 1; k > i; --k) sum -= U[(s + i) * kTile + s + k] * z[k][v];
                    z[i][v] = sum * scale[s + i];
                    store(at, z[i][v]);
                }
        }
}

// M -= Zi^T Zj for one tile, `depth` rows of Z.
void subtract(double* M, const double* Zi, const double* Zj, Index depth) {
    for (Index j = 0; j < kTile; j += kWide)
        for (Index i = 0; i < kTile; i += kRows) {
            Vector<double> sum[kRows][kVectors] = {};
            multiply<double, kRows, kVectors>(sum, depth, Zi + i, kTile, 1, Zj + j, kTile);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                    double* m = M + (i + r) * kTile + j + v * kLane;
                    store(m, load(m) - sum[r][v]);
                }
        }
}

enum class Ended { well, not_positive, asked };

class Row {
   public:
    Row(unsigned char* memory, const double* A, Index C, Index group)
        : A_(A), C_(C), group_(group) {
        const Sizes size(C);
        Carver carve(memory);
        carve.take(M_, size.tableau);
        carve.take(strip_, size.strip);
        carve.take(U_, kTileValues);
        carve.take(own_, kTileValues);
        carve.take(w0_, size.slots);
        carve.take(t_, size.slots);
        carve.take(d_, size.slots);
        carve.take(u_, size.slots);
        carve.take(v_, size.slots);
        carve.take(made_, size.slots);
        carve.take(gone_, size.slots);
        carve.take(next_, size.slots);
        carve.take(ratio_, size.slots);
        carve.take(inverse_, size.slots);
        carve.take(gain_, size.slots);
        carve.take(sum_, size.slots);
        carve.take(scale_, kTile);
        carve.take(column_, size.slots);
        carve.take(slot_, size.slots);
        carve.take(fixed_, size.slots);
    }

    // Writes W, kept, *swaps and *left at the very end, and only if the row ended well.
    Ended run(double* W, unsigned char* kept, const unsigned char* fixed, Index limit, Index* swaps,
              double* left, Interrupt& interrupt, int worker) {
        begin(W, kept, fixed, limit > 0);
        for (Index q = 0; q < k_; q += kTile) {
            if (interrupt.asked(worker)) return Ended::asked;
            if (!sweep(q / kTile, least(kTile, k_ - q))) return Ended::not_positive;
        }
        for (Index s = 0; s < n_; ++s) {
            t_[s] = entry(n_, s);
            d_[s] = s < k_ ? -entry(s, s) : entry(s, s);
        }
        Index done = 0;
        if (limit > 0 && k_ > 0 && k_ < n_) {
            double error = dot(t_);
            for (Index s = 0; s < slots_; ++s) u_[s] = v_[s] = 0;
            pass();
            while (best_row_ >= 0 && done < limit && lowest_ < -kLeastGain * error) {
                if (interrupt.asked(worker)) return Ended::asked;
                double p;
                if (!prepare(best_row_, best_column_, &p)) return Ended::not_positive;
                const double lower = next_error(best_row_, best_column_);
                if (!(lower < error)) break;  // the gain in the tableau was only rounding
                exchange(best_row_, best_column_, p);
                error = lower;
                ++done;
                pass();
            }
        }
        polish(W);
        for (Index i = 0; i < C_; ++i) {
            W[i] -= sum_[i];
            kept[i] = 1;
        }
        for (Index s = 0; s < k_; ++s) {
            W[column_[s]] = 0;
            kept[column_[s]] = 0;
        }
        const double error = dot(t_);
        *left = error < 0 ? 0 : error;
        *swaps = done;
        return Ended::well;
    }

   private:
    LOBS_INLINE double* tile(Index ti, Index tj) const {
        return M_ + (ti * (ti + 1) / 2 + tj) * kTileValues;
    }
    LOBS_INLINE double& entry(Index r, Index c) const {  // c <= r
        return tile(r / kTile, c / kTile)[r % kTile * kTile + c % kTile];
    }
    double dot(const double* x) const {  // with w0, over the removed slots
        double sum = 0;
        for (Index s = 0; s < k_; ++s) sum += x[s] * w0_[s];
        return sum;
    }

    // ---- the tableau ----------------------------------------------------------------------------

    // Kept columns need slots only for swaps: their weights follow from x alone.
    void begin(const double* W, const unsigned char* kept, const unsigned char* fixed, bool whole) {
        k_ = 0;
        for (Index i = 0; i < C_; ++i)
            if (kept[i] == 0) place(k_++, i, W, fixed);
        n_ = k_;
        if (whole)
            for (Index i = 0; i < C_; ++i)
                if (kept[i] != 0) place(n_++, i, W, fixed);
        slots_ = up(n_ + 1, kTile);
        tiles_ = slots_ / kTile;
        for (Index s = n_; s < slots_; ++s) w0_[s] = t_[s] = d_[s] = 0, column_[s] = 0;
        for (Index r = 0; r < slots_; ++r)
            for (Index t = 0; t <= r / kTile; ++t) {
                double* out = &entry(r, t * kTile);
                const Index width = least(kTile, n_ - t * kTile);
                const double* a = A_ + column_[r] * C_;
                const std::int32_t* c = column_ + t * kTile;
                for (Index i = 0; i < width; ++i)
                    out[i] = r < n_ ? a[c[i]] : r == n_ ? w0_[t * kTile + i] : 0;
                for (Index i = width; i < kTile; ++i) out[i] = 0;
            }
    }

    void place(Index s, Index i, const double* W, const unsigned char* fixed) {
        column_[s] = static_cast<std::int32_t>(i);
        slot_[i] = static_cast<std::int32_t>(s);
        fixed_[s] = fixed != nullptr && fixed[i] != 0;
        w0_[s] = W[i];
    }

    // Pivots on the first b slots of tile q. False if a pivot is not positive.
    bool sweep(Index q, Index b) {
        const double* corner = tile(q, q);
        for (Index i = 0; i < kTile;
             ++i)  // beyond b the identity, so that every factor has kTile rows
            for (Index j = 0; j < kTile; ++j)
                U_[i * kTile + j] = i < b && j < b && i <= j ? corner[j * kTile + i] : i == j;
        if (!factor(U_, scale_)) return false;
        constexpr std::size_t kWhole = kTileValues * sizeof(double);
        for (Index t = 0; t < tiles_; ++t) {
            double* Z = strip_ + t * kTileValues;
            if (t < q)
                std::memcpy(Z, tile(q, t), kWhole);
            else
                transpose(Z, tile(t, q));
            for (Index i = b * kTile; i < kTileValues; ++i) Z[i] = 0;
            if (t == q)  // the pivots themselves take no part
                for (Index i = 0; i < b; ++i)
                    for (Index j = 0; j < b; ++j) Z[i * kTile + j] = 0;
            forward(U_, scale_, Z);
        }
        for (Index tj = 0; tj < tiles_; ++tj)
            for (Index ti = tj; ti < tiles_; ++ti)
                if (b < kTile || (ti != q && tj != q))
                    subtract(tile(ti, tj), strip_ + ti * kTileValues, strip_ + tj * kTileValues, b);
        for (Index i = 0; i < kTileValues; ++i) own_[i] = i / kTile == i % kTile;
        forward(U_, scale_, own_);
        backward(U_, scale_, own_);
        for (Index t = 0; t < tiles_; ++t) {
            double* Z = strip_ + t * kTileValues;
            backward(U_, scale_, Z);
            double* out = t < q ? tile(q, t) : tile(t, q);
            if (t < q)
                std::memcpy(out, Z, static_cast<std::size_t>(b * kTile) * sizeof(double));
            else if (b == kTile)
                transpose(out, Z);
            else
                for (Index r = 0; r < kTile; ++r)
                    for (Index i = 0; i < b; ++i) out[r * kTile + i] = Z[i * kTile + r];
        }
        double* out = tile(q, q);
        for (Index i = 0; i < b; ++i)
            for (Index j = 0; j < b; ++j) out[i * kTile + j] = -own_[i * kTile + j];
        return true;
    }

    // Column s of the tableau, without the slot of the weights.
    void read(Index s, double* out) const {
        const Index own = s / kTile, lane = s % kTile;
        for (Index t = 0; t < own; ++t)
            std::memcpy(out + t * kTile, tile(own, t) + lane * kTile, kTile * sizeof(double));
        for (Index c = own * kTile; c < s; ++c) out[c] = entry(s, c);
        for (Index r = s; r < slots_; ++r) out[r] = entry(r, s);
    }
    void write(Index s, const double* in) {
        const Index own = s / kTile, lane = s % kTile;
        for (Index t = 0; t < own; ++t)
            std::memcpy(tile(own, t) + lane * kTile, in + t * kTile, kTile * sizeof(double));
        for (Index c = own * kTile; c < s; ++c) entry(s, c) = in[c];
        for (Index r = s; r < slots_; ++r) entry(r, s) = in[r];
    }

    // ---- one swap -------------------------------------------------------------------------------

    // Computes all vectors for adding slot j and removing slot i, without touching the tableau.
    // False if a pivot is not positive; else *p = the second one.
    bool prepare(Index i, Index j, double* p) {
        read(j, gone_);
        read(i, made_);
        const double first = d_[j];
        if (!positive(first)) return false;
        const double e = gone_[i], share = e / first;
        const double second = d_[i] + e * share;
        if (!positive(second)) return false;
        *p = second;
        const double y = t_[j] / first, w = t_[i] + e * y, x = w / second;
        const double root_first = 1 / __builtin_sqrt(first);
        const double root_second = 1 / __builtin_sqrt(second);
        for (Index s = 0; s < slots_; ++s) {
            const double c = gone_[s], m = made_[s] + c * share;  // M[:, i] after the first pivot
            u_[s] = c * root_first;
            v_[s] = m * root_second;
            next_[s] = t_[s] + c * y - m * x;
            gone_[s] = m / second;                    // column i once it is removed
            made_[s] = c / first - share * gone_[s];  // column j once it is back
        }
        // The pair's own entries, each already in the place of the other.
        const double cross = share / second;
        next_[i] = y - share * x;
        next_[j] = x;
        made_[i] = d_[i] / (first * second);
        gone_[j] = -1 / second;
        made_[j] = gone_[i] = cross;
        u_[i] = u_[j] = v_[i] = v_[j] = 0;
        return true;
    }

    double next_error(Index i, Index j) const {
        double sum = 0;
        for (Index s = 0; s < k_; ++s) sum += next_[s] * w0_[s == j ? i : s];
        return sum;
    }

    // Carries out the prepared swap, except M += u u^T - v v^T, which pass() does. i and j, neither
    // of them fixed, change places.
    void exchange(Index i, Index j, double p) {
        for (Index s = 0; s < k_; ++s) d_[s] += v_[s] * v_[s] - u_[s] * u_[s];
        for (Index s = k_; s < n_; ++s) d_[s] += u_[s] * u_[s] - v_[s] * v_[s];
        d_[i] = made_[i];
        d_[j] = 1 / p;
        write(i, made_);
        write(j, gone_);
        double* t = t_;
        t_ = next_, next_ = t;
        const double w0 = w0_[i];
        w0_[i] = w0_[j], w0_[j] = w0;
        const std::int32_t column = column_[i];
        column_[i] = column_[j], column_[j] = column;
        slot_[column_[i]] = static_cast<std::int32_t>(i);
        slot_[column_[j]] = static_cast<std::int32_t>(j);
    }

    // M += u u^T - v v^T. Then finds the best pair: lowest_, best_row_ (kept; -1 if there is none)
    // and best_column_ (removed).
    void pass() {
        lowest_ = kInfinity;
        best_row_ = best_column_ = -1;
        for (Index s = 0; s < up(k_, kTile); ++s) {
            const bool open = s < k_ && !fixed_[s];
            inverse_[s] = s < k_ ? 1 / d_[s] : 0;
            ratio_[s] = s < k_ ? t_[s] * inverse_[s] : 0;
            gain_[s] = open ? t_[s] * ratio_[s] : -kInfinity;  // a net change of plus infinity
        }
        const bool all = group_ == 0;
        for (Index ti = 0; ti < tiles_; ++ti) {
            const Index from = k_ > ti * kTile ? least(k_ - ti * kTile, kTile) : 0;
            const Index to = all && n_ > ti * kTile ? least(n_ - ti * kTile, kTile) : 0;
            Vector<double> low[kTile];
            for (Index r = 0; r < kTile; ++r) low[r] = Vector<double>{} + kInfinity;
            for (Index tj = 0; tj <= ti; ++tj) {
                update(ti, tj);
                if (from < to && tj * kTile < k_) evaluate(ti, tj, from, to, low);
            }
            for (Index r = from; r < to; ++r) {
                const Index s = ti * kTile + r;
                if (fixed_[s]) continue;
                double value = low[r][0];
                for (int l = 1; l < kLane; ++l) value = low[r][l] < value ? low[r][l] : value;
                if (value < lowest_ ||
                    (value == lowest_ && best_row_ >= 0 && column_[s] < column_[best_row_]))
                    lowest_ = value, best_row_ = s;
            }
        }
        if (all && best_row_ >= 0) find(best_row_);
        if (!all) find_in_groups();
    }

    LOBS_INLINE void update(Index ti, Index tj) {
        double* M = tile(ti, tj);
        const double *ui = u_ + ti * kTile, *vi = v_ + ti * kTile;
        for (Index j = 0; j < kTile; j += kWide) {
            Vector<double> u[kVectors], v[kVectors];
#pragma GCC unroll 4
            for (int k = 0; k < kVectors; ++k) {
                u[k] = load(u_ + tj * kTile + j + k * kLane);
                v[k] = load(v_ + tj * kTile + j + k * kLane);
            }
            for (Index r = 0; r < kTile; ++r) {
                double* m = M + r * kTile + j;
                const double ur = ui[r], vr = vi[r];
#pragma GCC unroll 4
                for (int k = 0; k < kVectors; ++k)
                    store(m + k * kLane, load(m + k * kLane) + ur * u[k] - vr * v[k]);
            }
        }
    }

    // low[r] <- the lowest net change of the error, for rows from .. to - 1 of a tile.
    LOBS_INLINE void evaluate(Index ti, Index tj, Index from, Index to,
                              Vector<double> (&low)[kTile]) const {
        const double* M = tile(ti, tj);
        const double *w = t_ + ti * kTile, *d = d_ + ti * kTile;
        for (Index j = 0; j < kTile; j += kWide) {
            Vector<double> ratio[kVectors], inverse[kVectors], gain[kVectors];
#pragma GCC unroll 4
            for (int k = 0; k < kVectors; ++k) {
                const Index at = tj * kTile + j + k * kLane;
                ratio[k] = load(ratio_ + at);
                inverse[k] = load(inverse_ + at);
                gain[k] = load(gain_ + at);
            }
            for (Index r = from; r < to; ++r) {
                Vector<double> lowest = low[r];
#pragma GCC unroll 4
                for (int k = 0; k < kVectors; ++k) {
                    const Vector<double> e = load(M + r * kTile + j + k * kLane);
                    const Vector<double> numerator = w[r] + e * ratio[k];
                    const Vector<double> net =
                        saliency(numerator, d[r] + e * e * inverse[k]) - gain[k];
                    lowest = net < lowest ? net : lowest;
                }
                low[r] = lowest;
            }
        }
    }

    LOBS_INLINE double net(Index i, Index j) const {
        const double e = entry(i, j), numerator = t_[i] + e * ratio_[j];
        return saliency(numerator, d_[i] + e * e * inverse_[j]) - gain_[j];
    }

    // Finds the best removed slot for kept slot i, the lowest column on a tie.
    void find(Index i) {
        double lowest = kInfinity;
        for (Index j = 0; j < k_; ++j) {
            const double value = net(i, j);
            if (value < lowest ||
                (value == lowest && best_column_ >= 0 && column_[j] < column_[best_column_]))
                lowest = value, best_column_ = j;
        }
        if (best_column_ < 0) best_row_ = -1;
    }

    void find_in_groups() {
        for (Index i = 0; i < C_; ++i) {
            const Index row = slot_[i];
            if (row < k_ || fixed_[row]) continue;
            const Index first = i / group_ * group_;
            for (Index j = first; j < least(C_, first + group_); ++j) {
                if (slot_[j] >= k_) continue;
                const double value = net(row, slot_[j]);
                if (value < lowest_) lowest_ = value, best_row_ = row, best_column_ = slot_[j];
            }
        }
    }

    // ---- the weights ----------------------------------------------------------------------------

    // x += K (w0[P] - A[P, P] x), then sum_ = A[:, P] x.
    void polish(const double* W) {
        repair();
        for (Index s = 0; s < k_; ++s) u_[s] = W[column_[s]] - sum_[column_[s]], v_[s] = 0;
        for (Index r = 0; r < k_; ++r) {  // v = -K u from the lower triangle
            Vector<double> sums[kVectors] = {};
            const Index own = r / kTile;
            for (Index t = 0; t < own; ++t) {
                const double* m = &entry(r, t * kTile);
                double *v = v_ + t * kTile, *u = u_ + t * kTile;
                for (Index c = 0; c < kTile; c += kWide)
#pragma GCC unroll 4
                    for (int k = 0; k < kVectors; ++k) {
                        const Index at = c + k * kLane;
                        sums[k] += load(m + at) * load(u + at);
                        store(v + at, load(v + at) + load(m + at) * u_[r]);
                    }
            }
            double sum = entry(r, r) * u_[r];
            for (Index c = own * kTile; c < r; ++c) {
                sum += entry(r, c) * u_[c];
                v_[c] += entry(r, c) * u_[r];
            }
            for (int k = 1; k < kVectors; ++k) sums[0] += sums[k];
            for (int l = 0; l < kLane; ++l) sum += sums[0][l];
            v_[r] += sum;
        }
        for (Index s = 0; s < k_; ++s) t_[s] -= v_[s];
        repair();
    }

    // sum_ = A[:, P] x, four rows of A at a time.
    void repair() {
        for (Index i = 0; i < C_; ++i) sum_[i] = 0;
        for (Index s = 0; s < k_; s += 4) {
            const double* a[4];
            double x[4];
            for (Index r = 0; r < 4; ++r) {
                a[r] = A_ + column_[s + r < k_ ? s + r : s] * C_;
                x[r] = s + r < k_ ? t_[s + r] : 0;
            }
            for (Index i = 0; i < C_; ++i)
                sum_[i] += x[0] * a[0][i] + x[1] * a[1][i] + (x[2] * a[2][i] + x[3] * a[3][i]);
        }
    }

    const double* A_;
    Index C_, group_;

    double *M_, *strip_, *U_, *own_, *w0_, *t_, *d_, *u_, *v_, *made_, *gone_, *next_, *ratio_,
        *inverse_, *gain_, *sum_, *scale_;
    std::int32_t *column_, *slot_;
    unsigned char* fixed_;

    Index k_ = 0, n_ = 0, slots_ = 0, tiles_ = 0;  // removed; all; all with the weights and padding
    double lowest_ = 0;
    Index best_row_ = -1, best_column_ = -1;
};

}  // namespace

Info exchange(const ExchangeOut& out, AnyMatrix W, const double* A, const unsigned char* fixed,
              Index group, Index limit, const Context& context) {
    const Index R = W.rows, C = W.columns;
    if (R == 0) return {Status::ok, 0};
    const Index workers = R < context.threads ? R : context.threads;
    Scratch scratch(workers, Sizes(C).bytes());
    Lowest failed(workers, R);
    if (!scratch.ok() || !failed.ok()) return {Status::out_of_memory, 0};
    Interrupt interrupt(context);
    auto body = [&](Index r, int worker) {
        if (interrupt.asked(worker)) return;
        Row row(scratch.of<unsigned char>(worker), A, C, group);
        const Ended ended = row.run(static_cast<double*>(W.data) + r * W.row_stride,
                                    out.kept + r * C, fixed == nullptr ? nullptr : fixed + r * C,
                                    limit, out.swaps + r, out.left + r, interrupt, worker);
        if (ended == Ended::not_positive) failed.note(worker, r);
    };
    const bool whole = parallel_items(R, context, body);
    if (!whole || interrupt.raised()) return {Status::interrupted, 0};
    const Index lowest = failed.item();
    return {lowest < R ? Status::not_positive : Status::ok, lowest < R ? lowest : 0};
}

}  // namespace lobs::LOBS_LEVEL
