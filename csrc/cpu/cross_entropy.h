// The chunks of what is made of the rows of logits on torch's thread pool. Without tensors, so that tests/fuzz runs it
// too.
#pragma once

#include <vector>

#include "parallel.h"

namespace nllx {

// Long rows that are few are summed in segments, and then merged.
template <typename Problem>
ChunkResult run_forward(CpuKernels::LossKernel<Problem> whole, CpuKernels::SegmentKernel<Problem> segment,
                        CpuKernels::MergeKernel<Problem> merge, const Problem& p) {
  const Chunks chunks(p.extent, p.layout, /*split_rows=*/true);
  if (chunks.segments == 1) {
    return sum_over_chunks(chunks, [&](int64_t chunk, ChunkResult& r) { whole(p, chunks, chunk, r); });
  }
  std::vector<RowPart> parts(static_cast<size_t>(chunks.units));
  for_each_chunk(chunks, [&](int64_t chunk) {
    for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
      segment(p, chunks, unit, parts[static_cast<size_t>(unit)]);
    }
  });
  ChunkResult total;
  for (int64_t row = 0; row < p.extent.rows(); ++row) {
    merge(p, row, &parts[static_cast<size_t>(row * chunks.segments)], chunks.segments, total);
  }
  return total;
}

// type: FloatType of the logits.
inline ChunkResult run_cross_entropy_forward(const CpuKernels& kernels, const CrossEntropyForward& p, int type) {
  return run_forward(kernels.cross_entropy_forward[type], kernels.cross_entropy_forward_segment[type],
                     kernels.cross_entropy_forward_merge[type], p);
}
inline ChunkResult run_softmax_statistics_forward(const CpuKernels& kernels, const SoftmaxStatisticsForward& p,
                                                  int type) {
  return run_forward(kernels.softmax_statistics_forward[type], kernels.softmax_statistics_forward_segment[type],
                     kernels.softmax_statistics_forward_merge[type], p);
}

// The losses, and the gradient as for an incoming gradient of one, with a divisor that is known: the forward and the
// backward kernel take turns, so that the second finds in the cache what the first has read. Rows are split unless
// targets are probabilities, whose backward kernel takes whole rows.
inline ChunkResult run_cross_entropy_value_and_grad(const CpuKernels& kernels, const CrossEntropyForward& f,
                                                    const CrossEntropyBackward& b, const Chunks& chunks, int type) {
  if (chunks.segments > 1) {  // a row's sums are known when all its segments are
    const ChunkResult total = run_cross_entropy_forward(kernels, f, type);
    sum_over_chunks(chunks,
                    [&](int64_t chunk, ChunkResult& r) { kernels.cross_entropy_backward[type](b, chunks, chunk, r); });
    return total;
  }
  return sum_over_chunks(chunks, [&](int64_t chunk, ChunkResult& r) {
    kernels.cross_entropy_forward[type](f, chunks, chunk, r);
    ChunkResult same_targets;
    kernels.cross_entropy_backward[type](b, chunks, chunk, same_targets);
  });
}

}  // namespace nllx
