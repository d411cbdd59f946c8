// test_kernels.cpp: tests of the kernels without Python, for sanitizers and the race detector.
//
// Every level that this machine can run is checked against plain loops in double, on sizes around
// the tile edges. Padding between rows is poisoned, so that reads and writes outside a view are
// detected.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace {

using lobs::AnyMatrix;
using lobs::Backend;
using lobs::Context;
using lobs::Dtype;
using lobs::Index;
using lobs::Info;
using lobs::Status;

int checks = 0;
int failures = 0;
std::string where;  // what is being checked, for messages

void check(bool good, const char* what) {
    ++checks;
    if (good) return;
    ++failures;
    std::printf("FAILED  %s: %s\n", where.c_str(), what);
}

double uniform() {  // -1 .. 1, from a fixed generator
    static std::uint64_t state = 88172645463325252ull;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<double>(state >> 11) * (2.0 / 9007199254740992.0) - 1.0;
}

// Runs an operation of a backend. For one that runs on a device (here: the emulated CUDA kernels)
// it provides the scratch memory, each piece of exactly the requested size, and reads the report.
template <typename Operation, typename... Arguments>
Info run(const Backend& backend, Operation* operation, int threads, Arguments&&... arguments) {
    Context context{threads, nullptr};
    if (!backend.device) return operation(std::forward<Arguments>(arguments)..., context);
    std::vector<std::unique_ptr<unsigned char[]>> scratch;
    std::uint64_t report = lobs::kNothing;
    const lobs::Device device{
        0, nullptr,
        [](void* owner, Index bytes) -> void* {
            auto& all = *static_cast<decltype(scratch)*>(owner);
            all.emplace_back(new unsigned char[static_cast<std::size_t>(bytes)]);
            std::memset(all.back().get(), 0xff, static_cast<std::size_t>(bytes));
            return all.back().get();
        },
        &scratch, &report};
    context.device = &device;
    const Info info = operation(std::forward<Arguments>(arguments)..., context);
    return info.status == Status::ok ? lobs::info_of(report) : info;
}

template <typename T>
constexpr Dtype dtype_of() {
    return sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;
}

template <typename T>
double tolerance() {
    return sizeof(T) == 8 ? 1e-12 : 3e-5;
}

template <typename T>
struct Table {  // a matrix with poisoned padding behind each row
    Index rows, columns, stride;
    std::vector<T> data;

    Table(Index r, Index c, Index padding = 3)
        : rows(r),
          columns(c),
          stride(c + padding),
          data(static_cast<std::size_t>(r * (c + padding) + 1),
               std::numeric_limits<T>::quiet_NaN()) {}
    T& at(Index r, Index c) { return data[static_cast<std::size_t>(r * stride + c)]; }
    AnyMatrix view() { return {data.data(), dtype_of<T>(), rows, columns, stride, 1}; }
    void fill() {
        for (Index r = 0; r < rows; ++r)
            for (Index c = 0; c < columns; ++c) at(r, c) = static_cast<T>(uniform());
    }
};

// ---- second moment ------------------------------------------------------------------------------

template <typename T>
void check_hessian(const Backend& backend, Index N, Index C, bool weighted, bool ones,
                   int threads) {
    const Index D = C + (ones ? 1 : 0);
    Table<T> X(N, C);
    X.fill();
    std::vector<double> t(static_cast<std::size_t>(N));
    for (Index n = 0; n < N; ++n)
        t[static_cast<std::size_t>(n)] = n % 3 == 0 ? 0.0 : uniform() + 1.0;
    if (weighted)
        for (Index n = 0; n < N; n += 3)  // rows of weight zero may hold anything
            for (Index c = 0; c < C; ++c) X.at(n, c) = std::numeric_limits<T>::quiet_NaN();
    Table<double> H(D, D, 0);
    for (Index i = 0; i < D; ++i)
        for (Index j = 0; j < D; ++j) H.at(i, j) = j <= i ? 1.0 : -7.0;
    const Info info = run(backend, backend.hessian_accumulate, threads, H.view(), X.view(),
                          weighted ? t.data() : nullptr, ones);
    check(info.status == Status::ok, "hessian status");
    double worst = 0;
    bool upper_kept = true;
    for (Index i = 0; i < D; ++i)
        for (Index j = 0; j < D; ++j) {
            if (j > i) {
                upper_kept = upper_kept && H.at(i, j) == -7.0;
                continue;
            }
            double sum = 1.0;
            for (Index n = 0; n < N; ++n) {
                const double weight = weighted ? t[static_cast<std::size_t>(n)] : 1.0;
                if (weight == 0) continue;
                const double a = i == C ? 1.0 : static_cast<double>(X.at(n, i));
                const double b = j == C ? 1.0 : static_cast<double>(X.at(n, j));
                sum += weight * a * b;
            }
            worst = std::fmax(worst, std::fabs(H.at(i, j) - sum));
        }
    check(worst <= tolerance<T>() * static_cast<double>(N + 1), "hessian values");
    check(upper_kept, "hessian leaves the upper triangle alone");
}

// 16-bit inputs, a float32 sum, strided columns, and a chunk long enough to be cut into segments.
void check_hessian_variants(const Backend& backend, Dtype dtype, Index N, Index C,
                            Index column_stride, int threads) {
    const auto width = static_cast<std::size_t>(C * column_stride);
    std::vector<std::uint16_t> bits(static_cast<std::size_t>(N) * width);
    std::vector<double> value(bits.size());
    for (std::size_t i = 0; i < bits.size(); ++i) {
        const int eighths = static_cast<int>(std::lround(uniform() * 8));  // -1 .. 1: exact in both
        const float f = static_cast<float>(eighths) / 8;
        std::uint32_t word;
        std::memcpy(&word, &f, sizeof word);
        const std::uint32_t half = f == 0 ? 0
                                          : (word >> 16 & 0x8000u) |
                                                (((word >> 23 & 0xffu) - 112) << 10) |
                                                (word >> 13 & 0x3ffu);
        bits[i] = static_cast<std::uint16_t>(dtype == Dtype::f16 ? half : word >> 16);
        value[i] = static_cast<double>(f);
    }
    Table<float> H(C, C, 0);
    for (float& h : H.data) h = 0;
    const AnyMatrix X{bits.data(), dtype, N, C, static_cast<Index>(width), column_stride};
    const Info info =
        run(backend, backend.hessian_accumulate, threads, H.view(), X, nullptr, false);
    check(info.status == Status::ok, "hessian variants status");
    bool exact = true;  // all sums are multiples of 1/64 below 2^18: float32 holds them
    for (Index i = 0; i < C; ++i)
        for (Index j = 0; j <= i; ++j) {
            double sum = 0;
            for (Index n = 0; n < N; ++n) {
                const std::size_t row = static_cast<std::size_t>(n) * width;
                sum += value[row + static_cast<std::size_t>(i * column_stride)] *
                       value[row + static_cast<std::size_t>(j * column_stride)];
            }
            exact = exact && static_cast<double>(H.at(i, j)) == sum;
        }
    check(exact, "hessian variants are exact");
}

template <typename T>
void check_hessian_refuses(const Backend& backend) {
    const int threads = 2;
    Table<T> X(40, 7);
    X.fill();
    Table<double> H(7, 7, 0), before(7, 7, 0);
    H.fill();
    before.data = H.data;
    X.at(31, 5) = std::numeric_limits<T>::infinity();
    X.at(33, 0) = std::numeric_limits<T>::quiet_NaN();
    const Info info =
        run(backend, backend.hessian_accumulate, threads, H.view(), X.view(), nullptr, false);
    check(info.status == Status::not_finite && info.where == 31 * 7 + 5,
          "hessian names the first infinity");
    check(std::memcmp(H.data.data(), before.data.data(), 49 * sizeof(double)) == 0,
          "hessian untouched");
}

// ---- inverse update -----------------------------------------------------------------------------

template <typename T>
void check_inverse(const Backend& backend, Index blocks, Index B, Index r, Index missing,
                   int threads) {
    const Index d = blocks * B - missing;
    Table<T> G(r, d);
    G.fill();
    std::vector<T> F(static_cast<std::size_t>(blocks * B * B), T(0));
    for (Index b = 0; b < blocks; ++b)
        for (Index i = 0; i < B; ++i) F[static_cast<std::size_t>((b * B + i) * B + i)] = T(2);
    std::vector<double> expected(F.begin(), F.end());
    const double m = static_cast<double>(r) + 1.0;
    for (Index b = 0; b < blocks; ++b)
        for (Index n = 0; n < r; ++n) {  // rank-1 updates, as published
            double* f = expected.data() + b * B * B;
            std::vector<double> g(static_cast<std::size_t>(B), 0.0),
                y(static_cast<std::size_t>(B), 0.0);
            for (Index i = 0; i < B && b * B + i < d; ++i)
                g[static_cast<std::size_t>(i)] = static_cast<double>(G.at(n, b * B + i));
            double scale = m;
            for (Index i = 0; i < B; ++i) {
                for (Index j = 0; j < B; ++j)
                    y[static_cast<std::size_t>(i)] += f[i * B + j] * g[static_cast<std::size_t>(j)];
                scale += y[static_cast<std::size_t>(i)] * g[static_cast<std::size_t>(i)];
            }
            for (Index i = 0; i < B; ++i)
                for (Index j = 0; j < B; ++j)
                    f[i * B + j] -=
                        y[static_cast<std::size_t>(i)] * y[static_cast<std::size_t>(j)] / scale;
        }
    const Info info = run(backend, backend.inverse_update, threads, F.data(), dtype_of<T>(), blocks,
                          B, G.view(), m);
    check(info.status == Status::ok, "inverse status");
    double worst = 0;
    bool symmetric = true;
    for (Index b = 0; b < blocks; ++b)
        for (Index i = 0; i < B; ++i)
            for (Index j = 0; j < B; ++j) {
                const auto at = static_cast<std::size_t>((b * B + i) * B + j);
                const auto mirrored = static_cast<std::size_t>((b * B + j) * B + i);
                worst = std::fmax(worst, std::fabs(static_cast<double>(F[at]) - expected[at]));
                symmetric = symmetric && F[at] == F[mirrored];
            }
    check(worst <= tolerance<T>() * static_cast<double>(B), "inverse values");
    check(symmetric, "inverse stays exactly symmetric");
}

template <typename T>
void check_inverse_refuses(const Backend& backend) {
    const int threads = 2;
    const Index B = 5, blocks = 20;
    std::vector<T> F(static_cast<std::size_t>(blocks * B * B), T(0));
    for (Index i = 0; i < blocks * B; ++i) F[static_cast<std::size_t>(i * B + i % B)] = T(1);
    for (const Index bad : {17, 11})  // negative definite, so that 1 + g F g < 0
        for (Index i = 0; i < B; ++i) F[static_cast<std::size_t>((bad * B + i) * B + i)] = T(-100);
    std::vector<T> before = F;
    Table<T> G(2, blocks * B);
    G.fill();
    Info info = run(backend, backend.inverse_update, threads, F.data(), dtype_of<T>(), blocks, B,
                    G.view(), 1.0);
    check(info.status == Status::not_positive && info.where == 11,
          "inverse names the lowest bad block");
    check(std::memcmp(&F[11 * 25], &before[11 * 25], 25 * sizeof(T)) == 0,
          "inverse leaves a bad block alone");
    F = before;
    G.at(1, 3) = std::numeric_limits<T>::quiet_NaN();
    info = run(backend, backend.inverse_update, threads, F.data(), dtype_of<T>(), blocks, B,
               G.view(), 1.0);
    check(info.status == Status::not_finite && info.where == blocks * B + 3,
          "inverse names the first NaN");
    check(std::memcmp(F.data(), before.data(), F.size() * sizeof(T)) == 0,
          "inverse untouched after a NaN");
}

// ---- saliency -----------------------------------------------------------------------------------

template <typename T>
void check_saliency(const Backend& backend, Index R, Index C, bool shared, int threads) {
    Table<T> W(R, C), diag(shared ? 1 : R, C);
    W.fill();
    diag.fill();
    for (T& d : diag.data) d = d < 0 ? -d + T(0.1) : d + T(0.1);
    std::vector<unsigned char> live(static_cast<std::size_t>(R * C));
    for (auto& l : live) l = uniform() > 0 ? 1 : 0;
    for (Index c = 0; c < C; ++c) live[static_cast<std::size_t>(c)] = 0;  // row 0: nothing live
    if (R > 1 && C > 2) {                                                 // row 1: a tie
        for (const Index c : {C - 1, C - 2}) {
            live[static_cast<std::size_t>(C + c)] = 1;
            W.at(1, c) = T(0);
        }
    }
    std::vector<Index> column(static_cast<std::size_t>(R), -9);
    std::vector<T> value(static_cast<std::size_t>(R));
    AnyMatrix d = diag.view();
    if (shared) d.row_stride = 0;
    const Info info = run(backend, backend.saliency_argmin, threads, column.data(), value.data(),
                          W.view(), d, lobs::Matrix<const unsigned char>{live.data(), R, C, C, 1});
    check(info.status == Status::ok, "saliency status");
    bool same = true;
    for (Index r = 0; r < R; ++r) {
        Index best = -1;
        T least = std::numeric_limits<T>::infinity();
        for (Index c = 0; c < C; ++c) {
            if (live[static_cast<std::size_t>(r * C + c)] == 0) continue;
            const T s = lobs::saliency(W.at(r, c), diag.at(shared ? 0 : r, c));
            if (best < 0 || s < least) best = c, least = s;
        }
        same = same && column[static_cast<std::size_t>(r)] == best &&
               value[static_cast<std::size_t>(r)] == least;
    }
    check(same, "saliency column and value, exactly");
}

template <typename T>
void check_saliency_refuses(const Backend& backend) {
    const int threads = 2;
    const Index R = 3, C = 530;  // the fault is in the second strip, after the last whole vector
    std::vector<unsigned char> live(static_cast<std::size_t>(R * C), 1);
    std::vector<Index> column(static_cast<std::size_t>(R));
    std::vector<T> value(static_cast<std::size_t>(R));
    for (const bool in_diag : {true, false}) {
        Table<T> W(R, C), diag(R, C);
        W.fill();
        for (T& d : diag.data) d = T(1);
        (in_diag ? diag : W).at(1, C - 1) = in_diag ? T(-1) : std::numeric_limits<T>::quiet_NaN();
        const Info info =
            run(backend, backend.saliency_argmin, threads, column.data(), value.data(), W.view(),
                diag.view(), lobs::Matrix<const unsigned char>{live.data(), R, C, C, 1});
        check(info.status == (in_diag ? Status::not_positive : Status::not_finite),
              "saliency refuses");
        check(info.where == C + C - 1, "saliency names the first fault");
    }
}

// ---- static order -------------------------------------------------------------------------------

template <typename T>
void check_static_order(const Backend& backend, Index R, Index C, int threads) {
    Table<T> W(R, C);
    W.fill();
    std::vector<T> A(static_cast<std::size_t>(C * C));
    for (Index i = 0; i < C; ++i)
        for (Index j = 0; j <= i; ++j) {
            const T a = i == j ? T(2) : static_cast<T>(uniform() / static_cast<double>(C));
            A[static_cast<std::size_t>(i * C + j)] = A[static_cast<std::size_t>(j * C + i)] = a;
        }
    std::vector<std::int32_t> order;
    std::vector<Index> start{0};
    for (Index r = 0; r < R; ++r) {  // row r loses r neighbouring columns, from column r on
        for (Index k = 0; k < r && k < C; ++k)
            order.push_back(static_cast<std::int32_t>((r + k) % C));
        start.push_back(static_cast<Index>(order.size()));
    }
    std::vector<double> expected;
    for (Index r = 0; r < R; ++r) {
        std::vector<double> w;
        for (Index c = 0; c < C; ++c) w.push_back(static_cast<double>(W.at(r, c)));
        for (Index p = start[static_cast<std::size_t>(r)];
             p < start[static_cast<std::size_t>(r) + 1]; ++p) {
            const Index q = order[static_cast<std::size_t>(p)];
            const double c = -w[static_cast<std::size_t>(q)] /
                             static_cast<double>(A[static_cast<std::size_t>(q * C + q)]);
            for (Index j = 0; j < C; ++j)
                w[static_cast<std::size_t>(j)] +=
                    c * static_cast<double>(A[static_cast<std::size_t>(q * C + j)]);
        }
        for (Index p = start[static_cast<std::size_t>(r)];
             p < start[static_cast<std::size_t>(r) + 1]; ++p)
            w[static_cast<std::size_t>(order[static_cast<std::size_t>(p)])] = 0;
        expected.insert(expected.end(), w.begin(), w.end());
    }
    Table<T> bad = W;
    const Info info = run(backend, backend.static_order_prune, threads, W.view(), A.data(),
                          order.data(), start.data());
    check(info.status == Status::ok, "static order status");
    double worst = 0;
    for (Index r = 0; r < R; ++r)
        for (Index c = 0; c < C; ++c)
            worst = std::fmax(worst, std::fabs(static_cast<double>(W.at(r, c)) -
                                               expected[static_cast<std::size_t>(r * C + c)]));
    check(worst <= tolerance<T>(), "static order values");
    if (C < 3) return;
    const Index q = order[1];  // the first column of row 2
    A[static_cast<std::size_t>(q * C + q)] = T(0);
    const Table<T> before = bad;
    const Info refused = run(backend, backend.static_order_prune, threads, bad.view(), A.data(),
                             order.data(), start.data());
    check(refused.status == Status::not_positive && refused.where == 1,
          "static order names a zero pivot");
    for (const std::int32_t wrong : {-1, static_cast<std::int32_t>(C), order[1]}) {
        std::vector<std::int32_t> faulty = order;
        faulty[2] = wrong;  // the second column of row 2
        A[static_cast<std::size_t>(q * C + q)] = T(2);
        const Info named = run(backend, backend.static_order_prune, threads, bad.view(), A.data(),
                               faulty.data(), start.data());
        check(named.status == Status::bad_order && named.where == 2,
              "static order names a bad column");
    }
    check(std::memcmp(bad.data.data(), before.data.data(), bad.data.size() * sizeof(T)) == 0,
          "static order untouched");
}

// ---- ranking ------------------------------------------------------------------------------------

void check_ranking(const Backend& backend, Index R, Index C, int threads) {
    std::vector<double> score(static_cast<std::size_t>(R * C));
    for (auto& s : score) s = std::round(uniform() * 20);  // many ties
    std::vector<unsigned char> chosen(score.size(), 9);
    const Index count = C / 2;
    Info info =
        run(backend, backend.rank_lowest, threads, chosen.data(), score.data(), R, C, count);
    check(info.status == Status::ok, "ranking status");
    bool exact = true;
    for (Index r = 0; r < R; ++r)
        for (Index i = 0; i < C; ++i) {
            Index before = 0;  // the number of lower scores
            const double own = score[static_cast<std::size_t>(r * C + i)];
            for (Index j = 0; j < C; ++j) {
                const double other = score[static_cast<std::size_t>(r * C + j)];
                before += other < own || (other == own && j < i) ? 1 : 0;
            }
            exact =
                exact && chosen[static_cast<std::size_t>(r * C + i)] == (before < count ? 1 : 0);
        }
    check(exact, "ranking chooses exactly the lowest");
    if (backend.rank_rows == nullptr) return;
    std::vector<Index> start;
    for (Index r = 0; r <= R; ++r) start.push_back(r * count);
    std::vector<std::int32_t> order(static_cast<std::size_t>(R * count) + 1, -7);
    info = run(backend, backend.rank_rows, threads, order.data(), start.data(), chosen.data(),
               score.data(), R, C);
    check(info.status == Status::ok && order.back() == -7, "ranking writes what it should");
    bool rising = true;
    for (Index r = 0; r < R; ++r)
        for (Index p = r * count + 1; p < (r + 1) * count; ++p) {
            const std::int32_t a = order[static_cast<std::size_t>(p - 1)],
                               b = order[static_cast<std::size_t>(p)];
            const double x = score[static_cast<std::size_t>(r * C + a)],
                         y = score[static_cast<std::size_t>(r * C + b)];
            rising = rising && (x < y || (x == y && a < b));
        }
    check(rising, "ranking puts rows in rising order");
}

// ---- ADMM's step, conjugate gradients --------------------------------------------------------------

// Costs are multiples of 1/4, so that there are many ties and every sum is exact.
template <typename T>
void check_admm(const Backend& backend, Index R, Index C, const lobs::AdmmPlan& plan, bool states,
                int threads) {
    const auto size = static_cast<std::size_t>(R * C);
    Table<T> p(R, C, 0), d(R, C, 0), x(R, C, 0);
    for (Table<T>* table : {&p, &d, &x})
        for (Index i = 0; i < R * C; ++i)
            table->data[static_cast<std::size_t>(i)] =
                static_cast<T>(std::round(uniform() * 20) / 4);
    std::vector<unsigned char> removed(size), state(size), wanted(size, 0);
    for (std::size_t i = 0; i < size; ++i) {
        removed[i] = uniform() > 0 ? 1 : 0;
        state[i] = states ? static_cast<unsigned char>(uniform() * 1.5 + 1.5) : 0;
    }
    std::vector<double> y(size);
    for (std::size_t i = 0; i < size; ++i)
        y[i] = static_cast<double>(p.data[i] + x.data[i]) -
               (removed[i] != 0 ? static_cast<double>(d.data[i] + x.data[i]) : 0.0);
    const Index span = plan.group > 0 ? plan.group : plan.unit,
                unit = plan.group > 0 ? 1 : plan.unit;
    struct Unit {
        Index first, pool;
        double cost;
        unsigned char code;
    };
    std::vector<Unit> units;
    for (Index r = 0; r < R; ++r)
        for (Index q = 0; q + unit <= C / span * span; q += unit) {
            double cost = 0;
            for (Index i = r * C + q; i < r * C + q + unit; ++i) {
                const double value = y[static_cast<std::size_t>(i)];
                cost += value * value;
            }
            const Index pool = plan.group > 0 ? r * C + q / span : plan.by_row ? r : 0;
            units.push_back({r * C + q, pool, cost, state[static_cast<std::size_t>(r * C + q)]});
        }
    for (const Unit& own : units) {
        Index before = 0;  // the number of units that go before this one
        for (const Unit& other : units) {
            if (other.pool != own.pool || other.code == 2) continue;
            const bool sooner = other.code != own.code ? other.code == 1 : other.cost < own.cost;
            const bool tied = other.code == own.code && !sooner &&
                              (own.code == 1 || other.cost == own.cost) && other.first < own.first;
            before += sooner || tied ? 1 : 0;
        }
        const bool goes =
            own.code == 1 ||
            (own.code == 0 && before < (plan.group > 0 ? plan.per_group : plan.count));
        for (Index i = own.first; i < own.first + unit; ++i)
            wanted[static_cast<std::size_t>(i)] = goes ? 1 : 0;
    }
    Index fresh = 0, changed = 0;
    for (std::size_t i = 0; i < size; ++i) fresh += wanted[i] != 0 && removed[i] == 0 ? 1 : 0;
    double cut = 0;
    const Info info = run(backend, backend.admm_step, threads, &changed, &cut, p.view(), d.view(),
                          x.view(), removed.data(), states ? state.data() : nullptr, plan);
    check(info.status == Status::ok, "admm status");
    check(removed == wanted, "admm removes exactly the lowest");
    check(changed == fresh, "admm counts what it has removed");
    bool exact = true;
    for (std::size_t i = 0; i < size; ++i)
        exact = exact && static_cast<double>(d.data[i]) ==
                             (wanted[i] != 0 ? -y[i] : y[i]) - static_cast<double>(x.data[i]);
    check(exact, "admm leaves d to the last bit");
    const Index fault = R * C / 2;
    p.data[static_cast<std::size_t>(fault)] = std::numeric_limits<T>::infinity();
    p.data[size - 1] = std::numeric_limits<T>::quiet_NaN();
    const Info refused = run(backend, backend.admm_step, threads, &changed, &cut, p.view(),
                             d.view(), x.view(), removed.data(), nullptr, plan);
    check(refused.status == Status::not_finite && refused.where == fault,
          "admm names the first y that is not finite");
}

template <typename T>
void check_admm_plans(const Backend& backend, Index R, Index C, int threads) {
    for (const bool states : {false, true})
        for (const double cut : {0.0, 1.5}) {
            check_admm<T>(backend, R, C, {R * C / 2, 1, 0, 0, false, cut}, states, threads);
            check_admm<T>(backend, R, C, {C / 4 * R / 2, 4, 0, 0, false, cut}, states, threads);
            check_admm<T>(backend, R, C, {C / 2, 1, 0, 0, true, 0}, states, threads);
            check_admm<T>(backend, R, C, {C / 4 / 2, 4, 0, 0, true, 0}, states, threads);
            for (const Index group : {3, 4, 8, 70})
                check_admm<T>(backend, R, C, {0, 1, group, group / 2, false, 0}, states, threads);
        }
}

template <typename T>
void check_conjugate(const Backend& backend, Index R, Index C, int threads) {
    Table<T> w(R, C), g(R, C), p(R, C), h(R, C);
    for (Table<T>* table : {&w, &g, &p, &h}) table->fill();
    std::vector<unsigned char> removed(static_cast<std::size_t>(R * C));
    std::vector<double> rr(static_cast<std::size_t>(R), 0.0);
    for (Index r = 0; r < R; ++r)
        for (Index c = 0; c < C; ++c) {
            unsigned char& gone = removed[static_cast<std::size_t>(r * C + c)];
            gone = c > 0 && uniform() > 0 ? 1 : 0;
            if (gone != 0) g.at(r, c) = p.at(r, c) = T(0);
            h.at(r, c) = gone != 0 ? std::numeric_limits<T>::quiet_NaN() : p.at(r, c) * T(1.5);
            rr[static_cast<std::size_t>(r)] += static_cast<double>(g.at(r, c) * g.at(r, c));
        }
    if (R > 1) rr[1] = 0;                                 // is done
    if (R > 2) p.at(2, 0) = T(1), h.at(2, 0) = T(-1000);  // q < 0
    const Table<T> w0 = w, g0 = g, p0 = p;
    const std::vector<double> before = rr;
    const Info info = run(backend, backend.conjugate_step, threads, w.view(), g.view(), p.view(),
                          h.view(), removed.data(), rr.data());
    check(info.status == Status::ok, "conjugate status");
    double worst = 0;
    for (Index r = 0; r < R; ++r) {
        const auto at = [&](const Table<T>& table, Index c) {
            return static_cast<double>(table.data[static_cast<std::size_t>(r * table.stride + c)]);
        };
        const auto kept = [&](Index c) {
            return removed[static_cast<std::size_t>(r * C + c)] == 0;
        };
        const double old = before[static_cast<std::size_t>(r)];
        double q = 0, t = 0;
        for (Index c = 0; c < C; ++c) q += kept(c) ? at(p0, c) * at(h, c) : 0.0;
        const bool goes_on = old != 0 && q > 0;
        const double a = goes_on ? old / q : 0.0;
        for (Index c = 0; c < C; ++c)
            if (kept(c)) t += std::pow(at(g0, c) - a * at(h, c), 2);
        for (Index c = 0; c < C; ++c) {
            const double residual = at(g0, c) - (goes_on && kept(c) ? a * at(h, c) : 0.0);
            worst = std::fmax(worst, std::fabs(at(g, c) - residual));
            worst = std::fmax(worst, std::fabs(at(w, c) - at(w0, c) - a * at(p0, c)));
            const double direction = goes_on ? residual + t / old * at(p0, c) : at(p0, c);
            worst = std::fmax(worst, std::fabs(at(p, c) - direction));
        }
        const double next = goes_on ? t : 0.0;
        worst = std::fmax(worst, std::fabs(rr[static_cast<std::size_t>(r)] - next) / (1 + next));
    }
    check(worst < tolerance<T>(), "conjugate step");
}

// ---- groups of columns --------------------------------------------------------------------------

// A removal from two layers, the second of which does not read every unit, against updates of W and
// A after every removal. In two calls, with memory of exactly its size.
template <typename T>
void check_columns(const Backend& backend, Index R, Index units, Index width, int threads) {
    struct Plain {
        Index C;
        std::vector<double> W, A;
    };
    const std::size_t n = static_cast<std::size_t>(units);
    std::vector<Table<T>> W;
    std::vector<std::vector<T>> A;
    std::vector<std::vector<Index>> start;
    std::vector<Plain> plain;
    for (const Index every : {1, 2}) {
        start.emplace_back(1, 0);
        for (Index u = 0; u < units; ++u)  // of width and of width + 1 columns
            start.back().push_back(start.back().back() + (u % every == 0 ? width + u % 3 / 2 : 0));
        const Index C = start.back().back();
        W.emplace_back(R, C);
        W.back().fill();
        std::vector<double> G(static_cast<std::size_t>(C * C));
        for (double& g : G) g = uniform() * 0.3;
        A.emplace_back(static_cast<std::size_t>(C * C));
        plain.push_back({C, std::vector<double>(static_cast<std::size_t>(R * C)),
                         std::vector<double>(static_cast<std::size_t>(C * C))});
        for (Index i = 0; i < C; ++i)
            for (Index j = 0; j < C; ++j) {
                double sum = i == j ? 1.0 : 0.0;
                for (Index k = 0; k < C; ++k)
                    sum += G[static_cast<std::size_t>(i * C + k)] *
                           G[static_cast<std::size_t>(j * C + k)];
                const auto at = static_cast<std::size_t>(i * C + j);
                plain.back().A[at] = static_cast<double>(A.back()[at] = static_cast<T>(sum));
            }
        for (Index r = 0; r < R; ++r)
            for (Index c = 0; c < C; ++c)
                plain.back().W[static_cast<std::size_t>(r * C + c)] =
                    static_cast<double>(W.back().at(r, c));
    }
    std::vector<lobs::ColumnLayer> layers;
    for (std::size_t m = 0; m < 2; ++m)
        layers.push_back({W[m].view(), A[m].data(), start[m].data(), 1.0, width + 1});
    const std::vector<double> first(n, 0.0);
    const std::vector<Index> set_start{0, 2};
    const std::vector<std::int32_t> set{0, 1};  // one of these stays
    std::vector<std::int32_t> order(n, -1);
    std::vector<double> cost(n, -1.0);
    const auto bytes = static_cast<std::size_t>(backend.columns_bytes(layers.data(), 2, units, 1));
    auto* const memory =
        static_cast<unsigned char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    Index count = 0;
    for (const Index limit : {units / 3, units}) {
        const lobs::ColumnsPlan plan{
            units, count, limit, 1e-12, first.data(), 1, set_start.data(), set.data()};
        const lobs::ColumnsOut out{order.data(), cost.data(), &count};
        const Info info =
            run(backend, backend.columns_trace, threads, out, layers.data(), 2, plan, memory);
        check(info.status == Status::ok, "columns status");
    }
    std::free(memory);
    check(count == units - 1, "columns count");
    double worst = 0;
    for (Index i = 0; i < count; ++i) {
        const Index u = order[static_cast<std::size_t>(i)];
        double spent = 0;
        for (std::size_t m = 0; m < 2; ++m) {  // one column of the unit after another
            Plain& p = plain[m];
            const auto a = [&](Index x, Index y) -> double& {
                return p.A[static_cast<std::size_t>(x * p.C + y)];
            };
            const auto w = [&](Index r, Index c) -> double& {
                return p.W[static_cast<std::size_t>(r * p.C + c)];
            };
            for (Index q = start[m][static_cast<std::size_t>(u)];
                 q < start[m][static_cast<std::size_t>(u) + 1]; ++q) {
                const double d = a(q, q);
                const std::vector<double> line(p.A.begin() + q * p.C, p.A.begin() + (q + 1) * p.C);
                for (Index r = 0; r < R; ++r) {
                    const double own = w(r, q);
                    spent += own * own / d;
                    for (Index c = 0; c < p.C; ++c)
                        w(r, c) -= own / d * line[static_cast<std::size_t>(c)];
                }
                for (Index x = 0; x < p.C; ++x)
                    for (Index y = 0; y < p.C; ++y)
                        a(x, y) -= line[static_cast<std::size_t>(x)] *
                                   line[static_cast<std::size_t>(y)] / d;
            }
        }
        worst = std::fmax(worst, std::fabs(spent / cost[static_cast<std::size_t>(i)] - 1));
    }
    check(worst < 1e3 * tolerance<T>(), "columns cost");
}

// ---- the product with a sparse weight -----------------------------------------------------------

// All that is stored at once lies in memory of exactly its size, so that reads beyond are detected.
void check_sliced(const Backend& backend, Index N, Index R, Index C, Index width, int threads) {
    const Index S = (R + 15) / 16, K = (C + width - 2) / (width - 1);
    std::vector<double> dense(static_cast<std::size_t>(R * C), 0.0);
    for (double& w : dense)
        if (uniform() > 0.4) w = static_cast<double>(static_cast<float>(uniform()));
    std::vector<float> values;
    std::vector<unsigned char> columns, steps;
    std::vector<Index> start{0};
    for (Index s = 0; s < S; ++s) {
        for (Index k = 0; k < K; ++k) {
            std::vector<std::vector<Index>> kept(16);
            std::size_t most = 0;
            for (Index l = 0; l < 16 && s * 16 + l < R; ++l) {
                auto& lane = kept[static_cast<std::size_t>(l)];
                for (Index c = k * (width - 1); c < std::min(C, (k + 1) * (width - 1)); ++c)
                    if (dense[static_cast<std::size_t>((s * 16 + l) * C + c)] != 0)
                        lane.push_back(c);
                most = std::max(most, lane.size());
            }
            for (std::size_t j = 0; j < most; ++j)
                for (Index l = 0; l < 16; ++l) {
                    const auto& lane = kept[static_cast<std::size_t>(l)];
                    const bool there = j < lane.size();
                    const Index c = there ? lane[j] : 0;
                    const auto at = static_cast<std::size_t>((s * 16 + l) * C + c);
                    values.push_back(there ? static_cast<float>(dense[at]) : 0.0f);
                    const Index column = there ? c - k * (width - 1) : width - 1;
                    columns.push_back(static_cast<unsigned char>(column));
                }
            steps.push_back(static_cast<unsigned char>(most));
        }
        start.push_back(static_cast<Index>(values.size()) / 16);
    }
    Table<float> x(N, C), y(N, R);
    x.fill();
    const lobs::SlicedWeight weight{values.data(), Dtype::f32, columns.data(), steps.data(),
                                    start.data(),  R,          width};
    const std::vector<float> bias(static_cast<std::size_t>(R), 0.5f);
    const Info info =
        run(backend, backend.sliced_linear, threads, y.view(), x.view(), weight, bias.data());
    check(info.status == Status::ok, "sliced status");
    double worst = 0;
    for (Index n = 0; n < N; ++n)
        for (Index r = 0; r < R; ++r) {
            double sum = 0.5;
            for (Index c = 0; c < C; ++c)
                sum += dense[static_cast<std::size_t>(r * C + c)] * static_cast<double>(x.at(n, c));
            worst = std::fmax(worst, std::fabs(sum - static_cast<double>(y.at(n, r))));
        }
    check(worst < tolerance<float>(), "sliced product");
}

// ---- the loop -----------------------------------------------------------------------------------

void check_parallel() {
    where = lobs::parallel_runtime();
    for (const int threads : {1, 2, 3, 8}) {
        std::vector<int> seen(1000, 0);
        auto body = [&](Index item, int worker) {
            seen[static_cast<std::size_t>(item)] += 1 + (worker >= threads ? 100 : 0);
        };
        check(lobs::parallel_items(1000, {threads, nullptr}, body), "every item runs");
        bool once = true;
        for (const int count : seen) once = once && count == 1;
        check(once, "each item runs exactly once, with a worker in range");
    }
    static int asked = 0;
    std::vector<double> sink(4000, 0.0);
    auto slow = [&](Index item, int) {
        for (int i = 0; i < 200000; ++i)
            sink[static_cast<std::size_t>(item)] += std::sqrt(static_cast<double>(i));
    };
    const bool finished = lobs::parallel_items(4000, {2, [] { return ++asked > 0; }}, slow);
    check(!finished && asked == 1, "an interruption ends the loop at the next item");
    const lobs::Scratch impossible(1 << 20, std::numeric_limits<Index>::max() / 2);
    check(!impossible.ok(), "scratch that cannot be had is reported");
}

// ---- exact removal, solves, exchanges, sweep ----------------------------------------------------

double correlation(Index i, Index j) {  // positive definite, and far from diagonal
    return std::pow(0.6, std::fabs(static_cast<double>(i - j))) + (i == j ? 0.2 : 0.0);
}

template <typename T>
std::vector<T> correlations(Index C) {
    std::vector<T> A(static_cast<std::size_t>(C * C));
    for (Index i = 0; i < C; ++i)
        for (Index j = 0; j < C; ++j)
            A[static_cast<std::size_t>(i * C + j)] = static_cast<T>(correlation(i, j));
    return A;
}

// One row by the plain algorithm in double. Returns the order, leaves the repaired weights in w,
// and adds the total cost to *lost.
std::vector<Index> plain_greedy(std::vector<double>& w, Index limit, Index group, Index per_group,
                                double* lost) {
    const auto C = static_cast<Index>(w.size());
    std::vector<double> D = correlations<double>(C);
    const auto d = [&](Index i, Index j) -> double& {
        return D[static_cast<std::size_t>(i * C + j)];
    };
    std::vector<Index> order;
    std::vector<Index> taken(static_cast<std::size_t>(C), 0);
    std::vector<bool> live(static_cast<std::size_t>(C), true);
    while (static_cast<Index>(order.size()) < limit) {
        Index q = -1;
        double best = 0;
        for (Index i = 0; i < C; ++i) {
            const auto at = static_cast<std::size_t>(i);
            if (!live[at]) continue;
            if (group > 0 &&
                (i >= C - C % group || taken[static_cast<std::size_t>(i / group)] == per_group))
                continue;
            const double cost = w[at] * w[at] / d(i, i);
            if (q < 0 || cost < best) best = cost, q = i;
        }
        if (q < 0) break;
        order.push_back(q);
        *lost += best;
        live[static_cast<std::size_t>(q)] = false;
        if (group > 0) ++taken[static_cast<std::size_t>(q / group)];
        const double pivot = d(q, q), z = w[static_cast<std::size_t>(q)] / pivot;
        std::vector<double> v(static_cast<std::size_t>(C));
        for (Index i = 0; i < C; ++i) v[static_cast<std::size_t>(i)] = d(i, q);
        for (Index i = 0; i < C; ++i) {
            w[static_cast<std::size_t>(i)] -= z * v[static_cast<std::size_t>(i)];
            for (Index j = 0; j < C; ++j)
                d(i, j) -= v[static_cast<std::size_t>(i)] * v[static_cast<std::size_t>(j)] / pivot;
        }
    }
    for (const Index q : order) w[static_cast<std::size_t>(q)] = 0;
    return order;
}

template <typename T>
void check_exact(const Backend& backend, Index R, Index C, Index limit, Index group,
                 Index per_group, int threads) {
    const std::vector<T> A = correlations<T>(C);
    Table<T> W(R, C);
    W.fill();
    const Table<T> before = W;
    const auto size = static_cast<std::size_t>(R * limit);
    std::vector<std::int32_t> order(size + 1, -7);
    std::vector<T> loss(size + 1, T(-7));
    std::vector<Index> count(static_cast<std::size_t>(R));
    std::vector<unsigned char> status(static_cast<std::size_t>(R), 9);
    const double infinity = std::numeric_limits<double>::infinity();
    const double floor = 8 * static_cast<double>(std::numeric_limits<T>::epsilon());
    const lobs::ExactPlan plan{limit, infinity, floor, 1, group, per_group, true};
    const Info info = run(backend, backend.exact_trace, threads,
                          lobs::ExactOut{order.data(), loss.data(), count.data(), status.data()},
                          W.view(), A.data(), nullptr, plan);
    check(info.status == Status::ok, "exact status");
    check(order[size] == -7 && loss[size] == T(-7), "exact writes within its outputs");
    bool same = true, fine = true;
    double worst = 0, lost = 0, expected_lost = 0;
    for (Index r = 0; r < R; ++r) {
        std::vector<double> w(static_cast<std::size_t>(C));
        for (Index c = 0; c < C; ++c)
            w[static_cast<std::size_t>(c)] =
                static_cast<double>(before.data[static_cast<std::size_t>(r * before.stride + c)]);
        const std::vector<Index> expected =
            plain_greedy(w, limit, group, per_group, &expected_lost);
        for (std::size_t i = 0; i < expected.size(); ++i)
            lost += static_cast<double>(loss[static_cast<std::size_t>(r * limit) + i]);
        fine = fine && status[static_cast<std::size_t>(r)] == 0 &&
               count[static_cast<std::size_t>(r)] == static_cast<Index>(expected.size());
        for (std::size_t i = 0; i < expected.size(); ++i)
            same = same && order[static_cast<std::size_t>(r * limit) + i] == expected[i];
        for (Index c = 0; c < C; ++c)
            worst = std::fmax(
                worst, std::fabs(static_cast<double>(W.at(r, c)) - w[static_cast<std::size_t>(c)]));
    }
    check(fine, "exact counts");
    if (sizeof(T) == 8) check(same, "exact order is the plain one");  // float32 has near ties
    check(std::fabs(lost - expected_lost) <= 100 * tolerance<T>() * expected_lost, "exact losses");
    if (same) check(worst < 100 * tolerance<T>(), "exact weights");
}

template <typename T>
void check_blocks(const Backend& backend, Index C, Index block) {
    const std::vector<T> A = correlations<T>(C);
    Table<T> W(3, C);
    W.fill();
    std::vector<std::int32_t> order(static_cast<std::size_t>(3 * C));
    std::vector<T> loss(order.size());
    std::vector<Index> count(3);
    std::vector<unsigned char> status(3), state(static_cast<std::size_t>(3 * C), 0);
    for (Index i = 0; i < block; ++i) state[static_cast<std::size_t>(C + i)] = 1;
    for (Index i = 0; i < block; ++i) state[static_cast<std::size_t>(2 * C + i)] = 2;
    const double infinity = std::numeric_limits<double>::infinity();
    const lobs::ExactPlan plan{C, infinity, 1e-6, block, 0, 0, true};
    const Info info = run(backend, backend.exact_trace, 2,
                          lobs::ExactOut{order.data(), loss.data(), count.data(), status.data()},
                          W.view(), A.data(), state.data(), plan);
    const Index whole = C / block * block;
    check(info.status == Status::ok, "blocks status");
    check(count[0] == whole && count[1] == whole && count[2] == whole - block, "blocks counts");
    bool together = true;
    for (std::size_t i = 0; i < static_cast<std::size_t>(whole);
         i += static_cast<std::size_t>(block))
        for (std::size_t b = 0; b < static_cast<std::size_t>(block); ++b)
            together = together && order[i + b] == order[i] + static_cast<std::int32_t>(b) &&
                       order[i] % block == 0;
    check(together, "blocks go whole");
    check(order[static_cast<std::size_t>(C)] == 0, "what must go first goes first");
}

// Without update, full groups leave the row. The order must not change.
template <typename T>
void check_closing(const Backend& backend, Index C, Index size) {
    const std::vector<T> A = correlations<T>(C);
    Table<T> W(2, C);
    W.fill();
    std::vector<std::int32_t> order[2];
    const double infinity = std::numeric_limits<double>::infinity();
    for (const int update : {0, 1}) {
        Table<T> work = W;
        order[update].resize(static_cast<std::size_t>(2 * C), -1);
        std::vector<T> loss(static_cast<std::size_t>(2 * C));
        std::vector<Index> count(2);
        std::vector<unsigned char> status(2);
        const lobs::ExactPlan plan{C, infinity, 1e-6, 1, size, 2, update == 1};
        const Info info =
            run(backend, backend.exact_trace, 1,
                lobs::ExactOut{order[update].data(), loss.data(), count.data(), status.data()},
                work.view(), A.data(), nullptr, plan);
        check(info.status == Status::ok && status[0] == 0 && status[1] == 0, "closing status");
        check(count[0] == C / size * 2 && count[1] == count[0], "closing counts");
    }
    check(order[0] == order[1], "closed groups leave without changing the order");
}

template <typename T>
void check_solve(const Backend& backend, Index R, Index C, int threads) {
    const std::vector<T> M = correlations<T>(C);
    Table<T> X(R, C);
    X.fill();
    const Table<T> before = X;
    std::vector<unsigned char> chosen(static_cast<std::size_t>(R * C));
    for (std::size_t i = 0; i < chosen.size(); ++i)
        chosen[i] = i < static_cast<std::size_t>(C) ? 0 : i % 3 != 0;
    const Info info =
        run(backend, backend.support_solve, threads, X.view(), M.data(), chosen.data());
    check(info.status == Status::ok, "solve status");
    double worst = 0;
    bool zeros = true;
    for (Index r = 0; r < R; ++r)
        for (Index i = 0; i < C; ++i) {
            if (!chosen[static_cast<std::size_t>(r * C + i)]) {
                zeros = zeros && X.at(r, i) == 0;
                continue;
            }
            double sum =
                -static_cast<double>(before.data[static_cast<std::size_t>(r * before.stride + i)]);
            for (Index j = 0; j < C; ++j)
                if (chosen[static_cast<std::size_t>(r * C + j)])
                    sum += correlation(i, j) * static_cast<double>(X.at(r, j));
            worst = std::fmax(worst, std::fabs(sum));
        }
    check(worst < 10 * tolerance<T>(), "solve residual");
    check(zeros, "solve leaves zeros outside");
    std::vector<T> indefinite(static_cast<std::size_t>(C * C), T(1));
    Table<T> Y(R, C);
    Y.fill();
    std::memset(chosen.data(), 1, chosen.size());
    const Info bad =
        run(backend, backend.support_solve, threads, Y.view(), indefinite.data(), chosen.data());
    check(C == 1 || (bad.status == Status::not_positive && bad.where == 0), "solve refuses");
}

void check_exchange(const Backend& backend, Index R, Index C, Index group, int threads) {
    const std::vector<double> A = correlations<double>(C);
    Table<double> W(R, C);
    W.fill();
    const Table<double> before = W;
    std::vector<unsigned char> kept(static_cast<std::size_t>(R * C));
    for (std::size_t i = 0; i < kept.size(); ++i) kept[i] = i % 2 == 0;
    const std::vector<unsigned char> first = kept;
    std::vector<Index> swaps(static_cast<std::size_t>(R), -1);
    std::vector<double> left(static_cast<std::size_t>(R), -1), start = left;
    auto once = first;
    Table<double> V = before;
    run(backend, backend.exchange, threads,
        lobs::ExchangeOut{once.data(), swaps.data(), start.data()}, V.view(), A.data(), nullptr,
        group, 0);
    const Info info = run(backend, backend.exchange, threads,
                          lobs::ExchangeOut{kept.data(), swaps.data(), left.data()}, W.view(),
                          A.data(), nullptr, group, 10 * C);
    check(info.status == Status::ok, "exchange status");
    bool better = true, counts = true, zeros = true;
    for (Index r = 0; r < R; ++r) {
        const auto at = static_cast<std::size_t>(r);
        better = better && left[at] <= start[at] * (1 + 1e-12);
        Index was = 0, is = 0;
        for (Index c = 0; c < C; ++c) {
            was += first[static_cast<std::size_t>(r * C + c)];
            is += kept[static_cast<std::size_t>(r * C + c)];
            if (!kept[static_cast<std::size_t>(r * C + c)]) zeros = zeros && W.at(r, c) == 0;
        }
        counts = counts && was == is;
    }
    check(better, "exchange never makes it worse");
    check(counts, "exchange keeps the counts");
    check(zeros, "exchange leaves zeros where weights are removed");
    check(once == first, "no swaps when none are allowed");
}

template <typename T>
void check_sweep(const Backend& backend, Index R, Index B, Index group, int threads) {
    Table<T> W(R, B), U(B, B), E(R, B);
    W.fill();
    for (Index i = 0; i < B; ++i)
        for (Index j = 0; j < B; ++j)
            U.at(i, j) =
                j < i ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(correlation(i, j));
    const Table<T> before = W;
    std::vector<unsigned char> gone(static_cast<std::size_t>(R * B));
    for (std::size_t i = 0; i < gone.size(); ++i) gone[i] = group > 0 ? 0 : i % 3 == 1;
    const Info info = run(backend, backend.sweep_block, threads, W.view(), U.view(), gone.data(),
                          E.view(), group, group / 2);
    check(info.status == Status::ok, "sweep status");
    double worst = 0;
    bool counts = true;
    for (Index r = 0; r < R; ++r) {
        std::vector<double> w(static_cast<std::size_t>(B));
        for (Index j = 0; j < B; ++j)
            w[static_cast<std::size_t>(j)] =
                static_cast<double>(before.data[static_cast<std::size_t>(r * before.stride + j)]);
        for (Index j = 0; j < B; ++j) {
            if (group > 0 && j % group == 0) {
                Index in_group = 0;
                for (Index i = j; i < j + group; ++i)
                    in_group += gone[static_cast<std::size_t>(r * B + i)];
                counts = counts && in_group == group / 2;
            }
            const bool goes = gone[static_cast<std::size_t>(r * B + j)] == 1;
            const double e = goes ? w[static_cast<std::size_t>(j)] / correlation(j, j) : 0.0;
            for (Index i = j; i < B; ++i) w[static_cast<std::size_t>(i)] -= e * correlation(j, i);
            if (goes) w[static_cast<std::size_t>(j)] = 0;
            worst = std::fmax(worst, std::fabs(e - static_cast<double>(E.at(r, j))));
            if (goes) counts = counts && W.at(r, j) == 0;
        }
        for (Index j = 0; j < B; ++j)
            worst = std::fmax(
                worst, std::fabs(w[static_cast<std::size_t>(j)] - static_cast<double>(W.at(r, j))));
    }
    check(worst < 100 * tolerance<T>(), "sweep weights and errors");
    check(counts, "sweep counts and zeros");
}

// ---- together -----------------------------------------------------------------------------------

template <typename T>
void check_type(const Backend& backend) {
    for (const int threads : {1, 3}) {
        for (const Index C : {1, 7, 47, 192, 193, 200})
            for (const bool ones : {false, true})
                for (const bool weighted : {false, true})
                    check_hessian<T>(backend, C == 200 ? 259 : 30, C, weighted, ones, threads);
        for (const Index B : {1, 5, 16, 33, 64, 65})
            for (const Index r : {1, 16, 19})
                check_inverse<T>(backend, 11, B, r, B > 2 ? 2 : 0, threads);
        for (const Index C : {1, 2, 511, 512, 513, 1100})
            for (const bool shared : {false, true})
                check_saliency<T>(backend, 6, C, shared, threads);
        for (const Index C : {1, 8, 15, 16, 17, 70}) check_static_order<T>(backend, 20, C, threads);
        for (const Index C : {1, 5, 16, 63, 64, 65, 150})
            for (const Index limit : {(C + 1) / 2, C}) {
                check_exact<T>(backend, 4, C, limit, 0, 0, threads);
                check_exact<T>(backend, 4, C, limit, 4, 2, threads);
            }
        if (backend.support_solve != nullptr)
            for (const Index C : {1, 15, 64, 65, 200}) check_solve<T>(backend, 5, C, threads);
        for (const Index R : {1, 17, 40})
            for (const Index B : {4, 20, 128}) {
                check_sweep<T>(backend, R, B, 0, threads);
                check_sweep<T>(backend, R, B, 4, threads);
            }
    }
    for (const int threads : {1, 3}) {
        for (const Index C : {1, 4, 37, 300}) check_admm_plans<T>(backend, 5, C, threads);
        for (const Index C : {1, 16, 37, 600}) check_conjugate<T>(backend, 5, C, threads);
        for (const Index width : {1, 4, 9})
            if (backend.columns_trace != nullptr) check_columns<T>(backend, 7, 25, width, threads);
    }
    check_exact<T>(backend, 2, 300, 300, 0, 0, 2);
    for (const Index block : {2, 5, 16})
        for (const Index C : {83, 400}) check_blocks<T>(backend, C, block);
    for (const Index size : {4, 5}) check_closing<T>(backend, 600, size);
    check_hessian_refuses<T>(backend);
    check_inverse_refuses<T>(backend);
    check_saliency_refuses<T>(backend);
}

// All operations of a backend, without Python.
void check_row(const Backend& row) {
    if (!row.ready) {
        std::printf("skipped %s: %s\n", row.name, row.detail);
        return;
    }
    where = std::string(row.name) + " float32";
    check_type<float>(row);
    where = std::string(row.name) + " float64";
    check_type<double>(row);
    for (const Dtype dtype : {Dtype::f16, Dtype::bf16})
        for (const Index N : {7, 4096, 9001})
            check_hessian_variants(row, dtype, N, 13, N == 7 ? 2 : 1, 2);
    for (const int threads : {1, 3}) {
        if (row.sliced_linear != nullptr)
            for (const Index N : {1, 7, 9, 45, 161})
                for (const Index width : {16, 64}) {
                    check_sliced(row, N, 37, 130, width, threads);
                    check_sliced(row, N, 1, 1, width, threads);
                }
        if (row.exchange != nullptr)
            for (const Index C : {2, 9, 40, 150}) {
                check_exchange(row, 3, C, 0, threads);
                check_exchange(row, 3, C, 4, threads);
            }
        for (const Index C : {1, 2, 9, 300}) check_ranking(row, C == 300 ? 1 : 5, C, threads);
    }
}

}  // namespace

#if defined(LOBS_EMULATE)
extern "C" int lobs_backend(int version, Backend* row);
#endif

int main() {
    check_parallel();
    int count = 0;
    const Backend* rows = lobs::backend_rows(&count);
    for (int i = 0; i < count; ++i) check_row(rows[i]);
#if defined(LOBS_EMULATE)
    Backend emulated;
    check(lobs_backend(lobs::kBackendVersion, &emulated) == 0,
          "the emulated row is of this version");
    check_row(emulated);
#endif
    std::printf("%d checks, %d failures, %s\n", checks, failures, lobs::parallel_runtime());
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
