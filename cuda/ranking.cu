// ranking.cu: contract in ranking.h. rank_rows has no entry here: torch sorts on a device.
//
// Each score becomes an unsigned key that orders like it; selection.cuh finds the lowest. A block
// that takes a row keeps its keys in shared memory if they fit, so that scores are read once.
#include "selection.cuh"

namespace lobs::cuda {
namespace {

__device__ __forceinline__ Bits key_of(double score) {
    const double canonical = score + 0.0;  // -0 becomes +0
    const Bits bits = static_cast<Bits>(__double_as_longlong(canonical));
    return bits >> 63 != 0 ? ~bits : bits | Bits{1} << 63;
}

// ---- a block of threads for a row ---------------------------------------------------------------

template <bool kShared>
__global__ void __launch_bounds__(kThreads)
    row_kernel(unsigned char* all_chosen, const double* all_scores, Index R, Index C, Index count) {
    Carver carve(shared());
    Bits* keys = nullptr;
    RowSpace space{};
    space.take(carve);
    if constexpr (kShared) carve.take(keys, C);
    for (Index r = blockIdx.x; r < R; r += gridDim.x) {
        const double* score = all_scores + r * C;
        unsigned char* chosen = all_chosen + r * C;
        const auto key_at = [=](Index i) {
            if constexpr (kShared)
                return keys[i];
            else
                return key_of(score[i]);
        };
        if constexpr (kShared)
            for (Index i = threadIdx.x; i < C; i += kThreads) keys[i] = key_of(score[i]);
        const Cut cut = cut_of_row(key_at, C, count, 64, space);
        mark_row([=](Index i, Bits, bool goes) { chosen[i] = goes ? 1 : 0; }, key_at, C, cut,
                 space);
        __syncthreads();
    }
}

// ---- all blocks for a row -----------------------------------------------------------------------

__global__ void __launch_bounds__(kLong)
    tally_kernel(const double* all_scores, Work work, int shift, int bits) {
    Carver carve(shared());
    unsigned* histogram = nullptr;
    carve.take(histogram, kBins);
    for (Index r = blockIdx.y; r < work.rows; r += gridDim.y) {
        const double* score = all_scores + r * work.columns;
        tally_row([=](Index i) { return key_of(score[i]); }, r, work, shift, bits, histogram);
    }
}

__global__ void __launch_bounds__(kThreads, 4) ties_kernel(const double* all_scores, Work work) {
    for (Index r = blockIdx.y; r < work.rows; r += gridDim.y) {
        const double* score = all_scores + r * work.columns;
        ties_of_segments([=](Index i) { return key_of(score[i]); }, r, work);
    }
}

__global__ void __launch_bounds__(kThreads)
    mark_kernel(unsigned char* all_chosen, const double* all_scores, Work work) {
    for (Index r = blockIdx.y; r < work.rows; r += gridDim.y) {
        const double* score = all_scores + r * work.columns;
        unsigned char* chosen = all_chosen + r * work.columns;
        mark_segments([=](Index i, Bits, bool goes) { chosen[i] = goes ? 1 : 0; },
                      [=](Index i) { return key_of(score[i]); }, r, work);
    }
}

__global__ void __launch_bounds__(kThreads) fill_kernel(unsigned char* p, Index count, int value) {
    const Index step = static_cast<Index>(gridDim.x) * kThreads;
    for (Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step)
        p[i] = static_cast<unsigned char>(value);
}

// ---- launching ----------------------------------------------------------------------------------

Info long_rows(unsigned char* chosen, const double* score, Index R, Index C, Index count,
               const Context& context) {
    Work work{};
    LOBS_TRY(allocate_work(&work, R, C, context));
    const Grids grids = grids_of(work, context);
    const auto tally = [&](int shift, int bits) {
        return launch(context, "rank tally", tally_kernel, grids.tallies, kLong,
                      static_cast<std::size_t>(kTallyBytes), score, work, shift, bits);
    };
    const auto ties = [&] {
        return launch(context, "rank ties", ties_kernel, grids.segments, kThreads, 0, score, work);
    };
    LOBS_TRY(find_cuts(work, count, 64, context, tally, ties));
    return launch(context, "rank mark", mark_kernel, grids.segments, kThreads, 0, chosen, score,
                  work);
}

}  // namespace

Info rank_lowest(unsigned char* chosen, const double* score, Index R, Index C, Index count,
                 const Context& context) {
    if (R == 0 || C == 0) return {Status::ok, 0};
    const Index many = processors(context);
    if (count == 0 || count == C)
        return launch(context, "rank fill", fill_kernel,
                      grid_of((R * C + kThreads - 1) / kThreads, 16 * many), kThreads, 0, chosen,
                      R * C, count == 0 ? 0 : 1);
    // One block takes a whole row if it is short, or if there are enough rows for all processors;
    // its counts have 32 bits.
    constexpr Index kShort = Index{1} << 14, kMost = Index{1} << 31;
    if (C > kShort && (R < 4 * many || C > kMost))
        return long_rows(chosen, score, R, C, count, context);
    const Index plain = RowSpace::kBytes;
    const Index bytes = plain + C * Index{sizeof(Bits)};
    const bool fits = bytes <= shared_limit(context);
    return launch(context, "rank rows", fits ? row_kernel<true> : row_kernel<false>,
                  grid_of(R, 16 * many), kThreads, static_cast<std::size_t>(fits ? bytes : plain),
                  chosen, score, R, C, count);
}

}  // namespace lobs::cuda
