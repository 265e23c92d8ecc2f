// The kernels of one CPU capability, as a table. Each kernel works on one chunk: a fixed range of rows or of tiles of a
// plane, that depends on the problem alone, never on the number of threads; sums of chunks are added in order. So a
// result is the same, bit for bit, for any number of threads.
#pragma once

#include "../../problem.h"

namespace nllx {

struct ChunkResult {
  double loss = 0;
  double weight = 0;          // sum of the weights of the targets present; number of rows for probabilities
  int64_t bad_target = -1;    // the first row whose index names no class
  double scale_gradient = 0;  // what the rows give to one logit_scale of all
};

// Sums over a segment of a row, see rows.inl.
struct RowPart {
  double max, sum, dot, mass;
};

// Partition of a problem into chunks. Units are rows (Layout::kRows), segments of rows where the rows are few and long,
// or tiles of up to kTile neighbouring rows of one plane.
struct Chunks {
  static constexpr int64_t kTile = 512;            // neighbouring rows of a plane that a kernel takes at a time
  static constexpr int64_t kElements = 16 * 1024;  // logits in a chunk, if a unit is smaller: some 5 µs of work
  static constexpr int64_t kRowGroup = 64;         // rows of few classes are taken in groups of this many
  static constexpr int64_t kSegment = 16 * 1024;   // classes; a row is always summed in segments, in a fixed order
  static constexpr int64_t kFewRows = 64;          // with fewer, segments of a row go to different threads

  int64_t units, units_per_chunk, count, elements_per_chunk;
  int64_t segments = 1;  // units in a row
  bool stream = false;   // results go past the caches

  constexpr Chunks(const Extent& extent, Layout layout, bool split_rows = false)
      : units(0), units_per_chunk(0), count(0), elements_per_chunk(0) {
    const bool rows = layout == Layout::kRows;
    if (rows && split_rows && extent.rows() < kFewRows) segments = (extent.classes + kSegment - 1) / kSegment;
    if (segments < 1) segments = 1;
    const int64_t width = rows ? 1 : (extent.inner < kTile ? extent.inner : kTile);
    units = rows ? extent.rows() * segments : extent.outer * tiles_per_plane(extent);
    int64_t unit_elements = segments > 1 ? kSegment : extent.classes * width;
    if (unit_elements < 1) unit_elements = 1;
    units_per_chunk = kElements / unit_elements > 0 ? kElements / unit_elements : 1;
    if (rows && units_per_chunk > kRowGroup) units_per_chunk = units_per_chunk / kRowGroup * kRowGroup;
    count = (units + units_per_chunk - 1) / units_per_chunk;
    elements_per_chunk = unit_elements * units_per_chunk;
  }
  explicit constexpr Chunks(const Elements& elements) : Chunks(Extent{elements.count, 1, 1}, Layout::kRows) {}
  static constexpr int64_t tiles_per_plane(const Extent& extent) { return (extent.inner + kTile - 1) / kTile; }
  constexpr int64_t begin(int64_t chunk) const { return chunk * units_per_chunk; }
  constexpr int64_t end(int64_t chunk) const {
    const int64_t e = (chunk + 1) * units_per_chunk;
    return e < units ? e : units;
  }
};

// More rows than a 32-bit index names: every one of them is in a chunk, and the last ones in the last.
constexpr int64_t kManyRows = (int64_t{1} << 40) + 1;
constexpr bool covers_all(const Extent& extent, Layout layout, int64_t units) {
  const Chunks chunks(extent, layout);
  return chunks.units == units && chunks.begin(0) == 0 && chunks.end(chunks.count - 1) == units &&
         chunks.begin(chunks.count - 1) < units && chunks.end(chunks.count - 2) == chunks.begin(chunks.count - 1);
}
static_assert(covers_all({kManyRows, 2, 1}, Layout::kRows, kManyRows));
static_assert(covers_all({1, 2, kManyRows}, Layout::kPlanes, (kManyRows - 1) / Chunks::kTile + 1));
static_assert(covers_all({kManyRows, 2, 1}, Layout::kPlanes, kManyRows));
static_assert(covers_all({3, kManyRows, 1}, Layout::kRows, 3));

struct CpuKernels {
  template <typename Problem>
  using LossKernel = void (*)(const Problem&, const Chunks&, int64_t chunk, ChunkResult&);
  template <typename Problem>
  using MapKernel = void (*)(const Problem&, const Chunks&, int64_t chunk);

  template <typename Problem>
  using SegmentKernel = void (*)(const Problem&, const Chunks&, int64_t unit, RowPart&);
  template <typename Problem>
  using MergeKernel = void (*)(const Problem&, int64_t row, const RowPart*, int64_t count, ChunkResult&);

  // Indexed by FloatType of the logits. Where rows are split, the forward is the segment kernel for each unit, then the
  // merge kernel for each row.
  LossKernel<CrossEntropyForward> cross_entropy_forward[4];
  SegmentKernel<CrossEntropyForward> cross_entropy_forward_segment[4];
  MergeKernel<CrossEntropyForward> cross_entropy_forward_merge[4];
  LossKernel<CrossEntropyBackward> cross_entropy_backward[4];
  LossKernel<NllLossForward> nll_loss_forward[4];
  LossKernel<NllLossBackward> nll_loss_backward[4];
  LossKernel<SoftmaxStatisticsForward> softmax_statistics_forward[4];
  SegmentKernel<SoftmaxStatisticsForward> softmax_statistics_forward_segment[4];
  MergeKernel<SoftmaxStatisticsForward> softmax_statistics_forward_merge[4];
  LossKernel<SoftmaxStatisticsBackward> softmax_statistics_backward[4];
  MapKernel<LogSoftmaxForward> log_softmax_forward[4];
  MapKernel<LogSoftmaxBackward> log_softmax_backward[4];
  LossKernel<ElementwiseForward> mse_loss_forward[4];
  MapKernel<ElementwiseBackward> mse_loss_backward[4];
};

namespace default_capability {
extern const CpuKernels kernels;
}
#if defined(__x86_64__) || defined(_M_X64)
#define NLLX_HAS_X86_CAPABILITIES 1
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
#endif

}  // namespace nllx
