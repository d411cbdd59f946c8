// column_sizes.h: how much memory columns.cpp needs, and how it is divided.
#pragma once

#include <limits>

#include "blocks.h"
#include "columns.h"
#include "exact_policy.h"
#include "parallel.h"
#include "vector.h"

namespace lobs::LOBS_LEVEL {
namespace {

constexpr int kVectors = kManyRegisters ? 4 : 2;
constexpr int kRows = 3;   // columns whose rows of A and B are computed together: 24 sums, or 12
constexpr int kGrams = 6;  // columns whose rows of B begin together
constexpr Index kLeast = 32, kMost = 128;  // columns whose rows are brought up to date together
constexpr Index kCached = 4;               // times as many rows are held
constexpr Index kPanel = 64;
constexpr Index kDepth = 128;  // rows of W at a time, so that a tile of them stays in cache
constexpr Index kAtOnce = 8;   // tiles of an item of work, at most
template <typename T>
constexpr Index kTile = kVectors * kLanes<T>;

// Two ways through carve(): one that counts bytes, and one that hands out memory.
struct Counting {
    static constexpr bool kCounts = true;
    Index bytes = 0;

    template <typename T>
    LOBS_INLINE void take(T*&, Index count) {
        bytes += lobs::up(count * static_cast<Index>(sizeof(T)), 64);
    }
};
struct Carving {
    static constexpr bool kCounts = false;
    Carver& from;

    template <typename T>
    LOBS_INLINE void take(T*& piece, Index count) {
        from.take(piece, count);
    }
};

// A worker's scratch.
template <typename T>
struct Room {
    Reduced<T> reduced;
    T* tile;  // (2, rows of the widest block, kTile)
    T* line;  // (columns), or the columns of a unit in kDepth rows of W

    template <typename Carve>
    void carve(Carve& carve, Index widest, Index columns) {
        const Block<T> block(widest);
        reduced.carve(carve, block);
        carve.take(tile, 2 * block.rows * kTile<T>);
        const Index slots = up(columns, kTile<T>) + kTile<T>, gram = kDepth * block.stride;
        carve.take(line, slots > gram ? slots : gram);
    }
};

template <typename T>
class Rooms {
   public:
    Rooms(int workers, Index widest, Index columns)
        : widest_(widest), columns_(columns), scratch_(workers, bytes(widest, columns)) {}
    bool ok() const { return scratch_.ok(); }
    Room<T> of(int worker) const {
        Carver carver(scratch_.template of<unsigned char>(worker));
        Carving carving{carver};
        Room<T> room{};
        room.carve(carving, widest_, columns_);
        return room;
    }

   private:
    static Index bytes(Index widest, Index columns) {
        Counting counted;
        Room<T> unused{};
        unused.carve(counted, widest, columns);
        return counted.bytes;
    }
    Index widest_, columns_;
    Scratch scratch_;
};

// Numbers of elements in a layer's buffers.
template <typename T>
struct Sizes {
    Index R, C, units, widest, slots, stride, ahead, rows, factor, blocks;

    Sizes() = default;
    Sizes(const ColumnLayer& of, Index all_units)
        : R(of.W.rows), C(of.W.columns), units(all_units), widest(of.widest) {
        slots = up(C, kTile<T>);
        stride = slots + 2 * kTile<T>;  // blocks read beyond their columns
        ahead = C / 32 < kLeast ? kLeast : least(C / 32, kMost);
        ahead = ahead > widest ? ahead : widest;
        rows = least(kCached * ahead, C);
        // An eighth of the tiles that a panel begins with is spare, at most.
        factor = 0;
        for (Index p = 0; p * kPanel < C; ++p) {
            const Index left = least(C, C - p * kPanel + widest);
            const Index live = up(left, kTile<T>) / kTile<T>;
            const Index tiles = least(slots / kTile<T>, (8 * live + 6) / 7);
            const Index held = (p + 1) * 2 * kPanel * tiles * kTile<T>;
            factor = held > factor ? held : factor;
        }
        blocks = 0;
        for (Index u = 0; widest > 1 && u < units; ++u)
            blocks += up(Block<T>(of.start[u + 1] - of.start[u]).elements(), kLanes<T>);
        if (widest <= 1) blocks = slots;
    }
};

}  // namespace
}  // namespace lobs::LOBS_LEVEL
