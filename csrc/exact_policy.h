// exact_policy.h: the decisions that exact removal takes alike on the host and on a device.
//
// csrc/cpu/exact.cpp and cuda/exact.cu differ in how they work: tiles, memory, threads. What may
// go, what it costs, which columns a refill brings up to date and when dead slots are squeezed out
// is decided here, once.
#pragma once

#include <cstring>

#include "exact.h"
#include "saliency.h"

namespace lobs::exact {

// ---- what may go --------------------------------------------------------------------------------

// The columns of a row sit in slots.
enum Kind : unsigned char {
    kGone = 0,   // no column: removed, closed while nobody wants its weight, or padding
    kStays = 1,  // is never removed, but updated
    kFree = 2,   // may be removed
    kFirst = 3,  // is removed before all free ones
};

// How many columns belong to complete groups or blocks. Those behind them stay.
LOBS_HD LOBS_INLINE Index whole_columns(Index C, const ExactPlan& plan) {
    return C - C % (plan.group > 0 ? plan.group : plan.block);
}

LOBS_HD LOBS_INLINE Kind kind_of(WeightState state, bool whole) {
    if (state == WeightState::stays || !whole) return kStays;
    return state == WeightState::goes_first ? kFirst : kFree;
}

// What the free columns of a full group become.
LOBS_HD LOBS_INLINE Kind closed(const ExactPlan& plan) { return plan.update ? kStays : kGone; }

// Whether a slot may be removed now. `waiting`: some columns that go first are left.
LOBS_HD LOBS_INLINE bool eligible(unsigned char kind, bool waiting) {
    return kind == (waiting ? kFirst : kFree);
}

// ---- what it costs ------------------------------------------------------------------------------

// The cost of a slot whose bar is 0 where it is eligible and infinity elsewhere. A NaN costs as
// much as the bar. For scalars and for the host's vectors.
template <typename T>
LOBS_HD LOBS_INLINE T barred(T own, T bar) {
    return own > bar ? own : bar;
}

// Whether rounding has eaten a diagonal entry that began as `first`.
template <typename T>
LOBS_HD LOBS_INLINE bool lost(T diag, T first, const ExactPlan& plan) {
    return !(diag > static_cast<T>(plan.floor) * first);
}

// A lost entry costs nothing where it is eligible, so that it is chosen next and reported.
template <typename T>
LOBS_HD LOBS_INLINE T cost_of(T w, T diag, T first, T bar, const ExactPlan& plan) {
    const T own = saliency(w, diag);
    const bool good = !lost(diag, first, plan);
    return own > bar && good ? own : bar;
}

// ---- which columns a refill brings up to date ---------------------------------------------------

constexpr int kLeastAhead = 48, kMostAhead = 128;

// Columns of a refill, at most: the proposed number within these limits, and at least one block.
LOBS_HD LOBS_INLINE Index columns_ahead(Index proposed, Index slots, const ExactPlan& plan) {
    const Index ahead = proposed < kLeastAhead ? kLeastAhead : least(proposed, kMostAhead);
    return least(ahead < plan.block ? plan.block : ahead, slots);
}

// The cache holds the columns of one refill and as many older ones.
LOBS_HD LOBS_INLINE Index cache_rows(Index ahead) { return 2 * ahead; }

// Columns of this refill, after `done` removals: few more than there are removals left.
LOBS_HD LOBS_INLINE Index columns_wanted(Index ahead, Index done, const ExactPlan& plan) {
    const Index enough = least(ahead, 8 + (plan.limit - done) * 5 / 4);
    return enough > plan.block ? enough : plan.block;
}

// The cheapest columns are found by a histogram of their costs in float32, whose bits order like
// the costs: first by the upper 11 bits below the sign, then, within one bin, by the next 11.
constexpr int kBinBits = 11, kBins = 1 << kBinBits;
constexpr int kFirstShift = 20, kLastShift = kFirstShift - kBinBits;
constexpr std::uint32_t kNoKey = 0x7f800000u;  // of infinity: not eligible

LOBS_HD LOBS_INLINE std::uint32_t sort_key(float cost) {
    std::uint32_t bits;
    memcpy(&bits, &cost, sizeof bits);
    return bits;
}

// Whether a key counts in the round of `shift`. `low` holds the bits that earlier rounds have
// found.
LOBS_HD LOBS_INLINE bool counts(std::uint32_t key, std::uint32_t low, int shift) {
    return shift == kFirstShift ? key < kNoKey : (key ^ low) >> kFirstShift == 0;
}
LOBS_HD LOBS_INLINE std::uint32_t bin_of(std::uint32_t key, int shift) {
    return key >> shift & (kBins - 1);
}

// Whether a key is below the last bin or in it. `low` is that bin's first key.
LOBS_HD LOBS_INLINE bool within_reach(std::uint32_t key, std::uint32_t low) {
    return key < kNoKey && key < low + (1u << kLastShift);
}

// ---- squeezing ----------------------------------------------------------------------------------

constexpr int kPanel = 128;  // steps; slots are squeezed only at the start of a panel

// The panel that the next removal, of one column or block, ends in.
template <typename Integer>
LOBS_HD LOBS_INLINE Integer panel_of(Integer done, Integer block) {
    return (done + block - 1) / kPanel;
}

// Whether at least an eighth of what is held could be given up.
template <typename Integer>
LOBS_HD LOBS_INLINE bool worth_squeezing(Integer live, Integer held) {
    return 8 * live <= 7 * held;
}

}  // namespace lobs::exact
