// ranking.cpp: contract in ranking.h.
//
// Each score becomes an unsigned key that orders like it; selection.h finds the key of rank `count`.
#include "ranking.h"

#include "parallel.h"
#include "selection.h"

namespace lobs::LOBS_LEVEL {
namespace {

using Key = std::uint64_t;

LOBS_INLINE Key key_of(double score) {
    const double canonical = score + 0.0;  // -0 becomes +0
    Key bits;
    std::memcpy(&bits, &canonical, sizeof bits);
    return bits >> 63 != 0 ? ~bits : bits | Key{1} << 63;
}

// Marks keys below `cut`, and the first `room` keys equal to it.
void mark(unsigned char* chosen, const double* score, Index count, Key cut, Index room) {
    for (Index i = 0; i < count; ++i) {
        const Key key = key_of(score[i]);
        const bool tie = key == cut && room > 0;
        room -= tie ? 1 : 0;
        chosen[i] = key < cut || tie ? 1 : 0;
    }
}

void lowest_of_row(unsigned char* chosen, const double* score, Index C, Index count) {
    const auto key_at = [=](Index i) { return key_of(score[i]); };
    const Ranked<Key> cut = key_of_rank<Key>(key_at, C, count - 1, 64);
    mark(chosen, score, C, cut.key, count - cut.before);
}

constexpr Index kSpan = 1 << 16;  // scores that one worker takes at a time

Info lowest_of_all(unsigned char* chosen, const double* score, Index C, Index count,
                   const Context& context) {
    const Index spans = (C + kSpan - 1) / kSpan;
    Scratch histograms(context.threads, kHistogramBytes);
    Scratch scratch(1, spans * static_cast<Index>(sizeof(Index)));
    if (!histograms.ok() || !scratch.ok()) return {Status::out_of_memory, 0};
    auto visit = [&](Index span, int, auto take) {
        const Index last = least((span + 1) * kSpan, C);
        for (Index i = span * kSpan; i < last; ++i) take(key_of(score[i]));
    };
    Ranked<Key> cut;
    if (!key_of_rank_in_parallel(&cut, spans, count - 1, 64, histograms, context, visit))
        return {Status::interrupted, 0};
    // Ties go to the lowest columns, so every span needs the number of ties before it.
    Index* ties = scratch.of<Index>(0);
    auto count_ties = [&](Index span, int) {
        const Index last = least((span + 1) * kSpan, C);
        Index found = 0;
        for (Index i = span * kSpan; i < last; ++i) found += key_of(score[i]) == cut.key ? 1 : 0;
        ties[span] = found;
    };
    if (!parallel_items(spans, context, count_ties)) return {Status::interrupted, 0};
    Index room = count - cut.before;
    for (Index span = 0; span < spans; ++span) {
        const Index found = ties[span];
        ties[span] = room;
        room = room > found ? room - found : 0;
    }
    auto fill = [&](Index span, int) {
        const Index last = least((span + 1) * kSpan, C);
        const Index first = span * kSpan;
        mark(chosen + first, score + first, last - first, cut.key, ties[span]);
    };
    return {parallel_items(spans, context, fill) ? Status::ok : Status::interrupted, 0};
}

struct Entry {
    Key key;
    std::int32_t column;
};

// Stable radix sort by key, lowest digit first; digits that are the same in all keys are skipped.
// Returns the array that is sorted.
Entry* sort(Entry* from, Entry* to, Index count) {
    Index histogram[8][256] = {};
    for (Index i = 0; i < count; ++i)
        for (int d = 0; d < 8; ++d) ++histogram[d][from[i].key >> 8 * d & 255];
    for (int d = 0; d < 8; ++d) {
        if (histogram[d][from[0].key >> 8 * d & 255] == count) continue;
        Index place[256];
        Index sum = 0;
        for (int b = 0; b < 256; ++b) {
            place[b] = sum;
            sum += histogram[d][b];
        }
        for (Index i = 0; i < count; ++i) to[place[from[i].key >> 8 * d & 255]++] = from[i];
        Entry* other = from;
        from = to;
        to = other;
    }
    return from;
}

}  // namespace

Info rank_lowest(unsigned char* chosen, const double* score, Index R, Index C, Index count,
                 const Context& context) {
    if (count == 0 || count == C) {
        std::memset(chosen, count == 0 ? 0 : 1, static_cast<std::size_t>(R * C));
        return {Status::ok, 0};
    }
    if (R == 1) return lowest_of_all(chosen, score, C, count, context);
    auto body = [&](Index r, int) { lowest_of_row(chosen + r * C, score + r * C, C, count); };
    return {parallel_items(R, context, body) ? Status::ok : Status::interrupted, 0};
}

Info rank_rows(std::int32_t* order, const Index* start, const unsigned char* chosen,
               const double* score, Index R, Index C, const Context& context) {
    Index bytes = 0;
    if (__builtin_mul_overflow(2 * C, static_cast<Index>(sizeof(Entry)), &bytes))
        return {Status::out_of_memory, 0};
    Scratch scratch(context.threads, bytes);
    if (!scratch.ok()) return {Status::out_of_memory, 0};
    auto body = [&](Index r, int worker) {
        Entry* entries = scratch.of<Entry>(worker);
        Index count = 0;
        for (Index q = 0; q < C; ++q)
            if (chosen[r * C + q] != 0)
                entries[count++] = {key_of(score[r * C + q]), static_cast<std::int32_t>(q)};
        if (count == 0) return;
        const Entry* sorted = sort(entries, entries + C, count);
        for (Index p = 0; p < count; ++p) order[start[r] + p] = sorted[p].column;
    };
    return {parallel_items(R, context, body) ? Status::ok : Status::interrupted, 0};
}

}  // namespace lobs::LOBS_LEVEL
