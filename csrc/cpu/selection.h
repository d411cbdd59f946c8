// selection.h: the key of a given rank among many, exactly, by counting digits from the top.
//
// Keys are unsigned or not negative. Counts are integers, so the sum of the workers' histograms is
// the same for any number of threads.
#pragma once

#include <cstring>

#include "errors.h"
#include "parallel.h"
#include "types.h"

namespace lobs::LOBS_LEVEL {
namespace {

// The key of rank `rank` (from 0). `before` keys are lower, `ties` are equal to it.
template <typename Key>
struct Ranked {
    Key key;
    Index before, ties;
};

// Finds the digit at `shift` of the wanted key, from the number of keys with each digit.
template <typename Key>
LOBS_INLINE void take_digit(Ranked<Key>& found, const Index* histogram, Index rank, int shift) {
    Index digit = 0;
    while (rank >= found.before + histogram[digit]) found.before += histogram[digit++];
    found.key |= static_cast<Key>(digit) << shift;
    found.ties = histogram[digit];
}

// Among key_at(0) .. key_at(n - 1), which have `bits` bits, on this thread.
template <typename Key, typename KeyAt>
LOBS_INLINE Ranked<Key> key_of_rank(KeyAt key_at, Index n, Index rank, int bits) {
    Ranked<Key> found{0, 0, n};
    for (int shift = (bits - 1) / 8 * 8; shift >= 0; shift -= 8) {
        Index histogram[256] = {};
        for (Index i = 0; i < n; ++i) {
            const Key key = key_at(i);
            // All digits above this one. In two steps, because a shift by 64 is undefined.
            if (((key ^ found.key) >> shift) >> 8 == 0) ++histogram[key >> shift & 255];
        }
        take_digit(found, histogram, rank, shift);
    }
    return found;
}

constexpr Index kBins = 1 << 16;
constexpr Index kHistogramBytes = kBins * static_cast<Index>(sizeof(Index));

// Among all keys that visit(item, worker, take) passes to `take`, for items 0 .. items - 1, on all
// threads, each with its own histogram. It reads them once for every 16 bits. Returns false if it
// was interrupted.
template <typename Key, typename Visit>
LOBS_INLINE bool key_of_rank_in_parallel(Ranked<Key>* found, Index items, Index rank, int bits,
                                         const Scratch& histograms, const Context& context,
                                         Visit& visit) {
    *found = {0, 0, 0};
    for (int shift = (bits - 1) / 16 * 16; shift >= 0; shift -= 16) {
        for (int w = 0; w < context.threads; ++w)
            std::memset(histograms.of<Index>(w), 0, static_cast<std::size_t>(kHistogramBytes));
        const Key prefix = found->key;
        auto tally = [&](Index item, int worker) {
            Index* histogram = histograms.of<Index>(worker);
            visit(item, worker, [=](Key key) {
                if (((key ^ prefix) >> shift) >> 16 == 0) ++histogram[key >> shift & (kBins - 1)];
            });
        };
        if (!parallel_items(items, context, tally)) return false;
        Index* total = histograms.of<Index>(0);
        for (int w = 1; w < context.threads; ++w)
            for (Index b = 0; b < kBins; ++b) total[b] += histograms.of<Index>(w)[b];
        take_digit(*found, total, rank, shift);
    }
    return true;
}

}  // namespace
}  // namespace lobs::LOBS_LEVEL
