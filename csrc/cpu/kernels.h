// The kernels of one CPU capability, as a table. Each kernel works on one chunk: a fixed range of rows or of tiles of a
// plane, that depends on the problem alone, never on the number of threads; sums of chunks are added in order. So a
// result is the same, bit for bit, for any number of threads.
#pragma once

#include "../problem.h"

namespace nllx {

struct ChunkResult {
  double loss = 0;
  double weight = 0;        // sum of the weights of the targets present; number of rows for probabilities
  int64_t bad_target = -1;  // the first row whose index names no class
};

// Partition of a problem into chunks. Units are rows (Layout::kRows) or tiles of up to kTile neighbouring rows of one
// plane.
struct Chunks {
  static constexpr int64_t kTile = 512;            // neighbouring rows of a plane that a kernel takes at a time
  static constexpr int64_t kElements = 16 * 1024;  // logits in a chunk, if a unit is smaller: some 5 µs of work

  int64_t units, units_per_chunk, count, elements_per_chunk;

  Chunks(const Extent& extent, Layout layout) {
    const int64_t width = layout == Layout::kRows ? 1 : (extent.inner < kTile ? extent.inner : kTile);
    units = layout == Layout::kRows ? extent.rows() : extent.outer * tiles_per_plane(extent);
    const int64_t unit_elements = extent.classes * width > 0 ? extent.classes * width : 1;
    units_per_chunk = kElements / unit_elements > 0 ? kElements / unit_elements : 1;
    count = (units + units_per_chunk - 1) / units_per_chunk;
    elements_per_chunk = unit_elements * units_per_chunk;
  }
  static int64_t tiles_per_plane(const Extent& extent) { return (extent.inner + kTile - 1) / kTile; }
  int64_t begin(int64_t chunk) const { return chunk * units_per_chunk; }
  int64_t end(int64_t chunk) const {
    const int64_t e = (chunk + 1) * units_per_chunk;
    return e < units ? e : units;
  }
};

struct CpuKernels {
  template <typename Problem>
  using LossKernel = void (*)(const Problem&, const Chunks&, int64_t chunk, ChunkResult&);
  template <typename Problem>
  using MapKernel = void (*)(const Problem&, const Chunks&, int64_t chunk);

  // Indexed by FloatType of the logits.
  LossKernel<CrossEntropyForward> cross_entropy_forward[4];
  LossKernel<CrossEntropyBackward> cross_entropy_backward[4];
  LossKernel<NllLossForward> nll_loss_forward[4];
  LossKernel<NllLossBackward> nll_loss_backward[4];
  MapKernel<LogSoftmaxForward> log_softmax_forward[4];
  MapKernel<LogSoftmaxBackward> log_softmax_backward[4];
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
