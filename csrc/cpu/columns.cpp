// columns.cpp: contract in columns.h.
//
// As in exact.cpp, a layer's columns sit in slots, in tiles of kTile slots, and rows of A and B are
// brought up to date for many columns together, because the next units to go are almost certainly
// among those that cost least now. V and P are stored as [panel of kPanel steps][tile][step][V, P]
// [slot in tile], W as [tile][row][slot in tile]: whatever one tile needs is one stream. A step of V
// and P serves the rows of A and B of three columns at once. At the start of a panel and before rows
// are computed ahead, if at least an eighth of the tiles could be given up, the slots of units that
// have gone are squeezed out of all that is held.
//
// All loops run over tiles or units, which are independent: items of work for the threads.
#include "columns.h"

#include <limits>

#include "column_layer.h"

namespace lobs::LOBS_LEVEL {
namespace {

// All layers, and which units may go. Lives at the start of `memory`, between calls too.
template <typename T>
struct Removal {
    Layer<T>* layers;
    double *total, *rank;  // (units): the cost in all layers, and what decides
    Index* left;           // (sets): units that have not gone
    unsigned char* gone;   // (units)

    template <typename Carve>
    void carve(Carve& carve, const ColumnLayer* of, Index count, Index units, Index sets) {
        Removal* self = nullptr;
        carve.take(self, 1);
        carve.take(layers, count);
        carve.take(total, units);
        carve.take(rank, units);
        carve.take(left, sets);
        carve.take(gone, units);
        for (Index m = 0; m < count; ++m) {
            Layer<T> unused;
            Layer<T>& layer = Carve::kCounts ? unused : layers[m];
            layer.carve(carve, Sizes<T>(of[m], units));
        }
    }
};

// Ranks of all units: `first` where that is below zero, else the cost; infinite where a unit has
// gone or is the last of a set. Returns the lowest, or -1 if none is eligible.
template <typename T>
Index cheapest(const Removal<T>& all, Index count, const ColumnsPlan& plan) {
    constexpr double kNever = std::numeric_limits<double>::infinity();
    for (Index u = 0; u < plan.units; ++u) all.total[u] = 0;
    for (Index m = 0; m < count; ++m) all.layers[m].add_costs(all.total);
    for (Index u = 0; u < plan.units; ++u)
        all.rank[u] = all.gone[u] != 0 ? kNever : plan.first[u] < 0 ? plan.first[u] : all.total[u];
    for (Index s = 0; s < plan.sets; ++s)
        for (Index i = plan.set_start[s]; all.left[s] == 1 && i < plan.set_start[s + 1]; ++i)
            all.rank[plan.set_unit[i]] = kNever;
    Index best = -1;
    for (Index u = 0; u < plan.units; ++u)
        if (all.rank[u] < (best < 0 ? kNever : all.rank[best])) best = u;
    return best;
}

template <typename T>
Info begin(Removal<T>* all, const ColumnLayer* layers, Index count, const ColumnsPlan& plan,
           const Context& context) {
    for (Index u = 0; u < plan.units; ++u) all->gone[u] = 0;
    for (Index s = 0; s < plan.sets; ++s) all->left[s] = plan.set_start[s + 1] - plan.set_start[s];
    for (Index m = 0; m < count; ++m) {
        Layer<T>& layer = all->layers[m];
        if (!layer.begin(layers[m], plan, context)) return {Status::interrupted, 0};
        const Index lost = layer.first_lost();
        if (lost >= 0) return {Status::not_positive, m * plan.units + lost};
    }
    return {Status::ok, 0};
}

template <typename T>
Info run(const ColumnsOut& out, const ColumnLayer* layers, Index count, const ColumnsPlan& plan,
         void* memory, const Context& context) {
    auto* const kept = static_cast<Removal<T>*>(memory);
    if (plan.done == 0) {
        Carver carver(static_cast<unsigned char*>(memory));
        Removal<T> fresh{};
        Carving carving{carver};
        fresh.carve(carving, layers, count, plan.units, plan.sets);
        *kept = fresh;
    }
    Index widest = 1, longest = 1;
    for (Index m = 0; m < count; ++m) {
        widest = widest < layers[m].widest ? layers[m].widest : widest;
        longest = longest < layers[m].W.columns ? layers[m].W.columns : longest;
    }
    const Rooms<T> rooms(context.threads, widest, longest);
    if (!rooms.ok()) return {Status::out_of_memory, 0};
    for (Index m = 0; m < count; ++m) kept->layers[m].use(&rooms, layers[m]);
    if (plan.done == 0) {
        *out.count = 0;
        const Info info = begin(kept, layers, count, plan, context);
        if (info.status != Status::ok) return info;
    }
    for (Index done = plan.done; done < plan.limit; ++done) {
        const Index u = cheapest(*kept, count, plan);
        if (u < 0) break;
        double cost = 0;
        for (Index m = 0; m < count; ++m)
            if (!kept->layers[m].prepare(u, &cost))
                return {Status::not_positive, m * plan.units + u};
        for (Index m = 0; m < count; ++m)
            if (!kept->layers[m].remove(u, kept->rank, plan.limit - done, context))
                return {Status::interrupted, 0};
        kept->gone[u] = 1;
        for (Index s = 0; s < plan.sets; ++s)
            for (Index i = plan.set_start[s]; i < plan.set_start[s + 1]; ++i)
                kept->left[s] -= plan.set_unit[i] == u;
        out.order[done] = static_cast<std::int32_t>(u);
        out.cost[done] = cost;
        *out.count = done + 1;
    }
    return {Status::ok, 0};
}

template <typename T>
Index bytes(const ColumnLayer* layers, Index count, Index units, Index sets) {
    Counting counted;
    Removal<T> unused{};
    unused.carve(counted, layers, count, units, sets);
    return counted.bytes;
}

}  // namespace

Info columns_trace(const ColumnsOut& out, const ColumnLayer* layers, Index count,
                   const ColumnsPlan& plan, void* memory, const Context& context) {
    return layers[0].W.dtype == Dtype::f64 ? run<double>(out, layers, count, plan, memory, context)
                                           : run<float>(out, layers, count, plan, memory, context);
}

Index columns_bytes(const ColumnLayer* layers, Index count, Index units, Index sets) {
    return layers[0].W.dtype == Dtype::f64 ? bytes<double>(layers, count, units, sets)
                                           : bytes<float>(layers, count, units, sets);
}

}  // namespace lobs::LOBS_LEVEL
