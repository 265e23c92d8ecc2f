#include "dispatch.cuh"
#include "plan.h"
#include "softmax_statistics.cuh"

namespace nllx {

namespace {

// The threads of a row: as many as have a few vectors each, up to a warp, or the block.
int threads_of_row(int64_t classes, int element_bytes) {
  const int64_t vectors = classes * element_bytes / 16;
  int threads = 1;
  while (threads < 32 && threads * kVectorsAtOnce < vectors) threads *= 2;
  return vectors > 32 * kVectorsAtOnce * 2 ? kStatisticsThreads : threads;
}

dim3 grid_for(const Extent& extent, Layout layout, int threads_per_row) {
  if (layout == Layout::kPlanes) {
    return grid_of(extent.outer * ((extent.inner + kStatisticsThreads - 1) / kStatisticsThreads));
  }
  const int rows_at_once = kStatisticsThreads / threads_per_row;
  return grid_of((extent.rows() + rows_at_once - 1) / rows_at_once);
}

}  // namespace

cudaError_t launch_softmax_statistics_forward(const SoftmaxStatisticsForward& p, FloatType type, BadTarget* bad,
                                              cudaStream_t stream) {
  const int threads = threads_of_row(p.extent.classes, element_bytes(type));
  const dim3 grid = grid_for(p.extent, p.layout, threads), block = block_of(kStatisticsThreads);
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.layout == Layout::kPlanes) {
      CUDA_LAUNCH((softmax_statistics_planes_kernel<T>), grid, block, 0, stream, p, bad);
    } else {
      CUDA_LAUNCH((softmax_statistics_rows_kernel<T>), grid, block, 0, stream, p, threads, bad);
    }
  });
  return cudaGetLastError();
}

cudaError_t launch_softmax_statistics_backward(const SoftmaxStatisticsBackward& p, FloatType type, BadTarget* bad,
                                               cudaStream_t stream) {
  const int threads = threads_of_row(p.extent.classes, element_bytes(type));
  const dim3 grid = grid_for(p.extent, p.layout, threads), block = block_of(kStatisticsThreads);
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.layout == Layout::kPlanes) {
      CUDA_LAUNCH((softmax_statistics_backward_planes_kernel<T>), grid, block, 0, stream, p, bad);
    } else {
      CUDA_LAUNCH((softmax_statistics_backward_rows_kernel<T>), grid, block, 0, stream, p, threads, bad);
    }
  });
  return cudaGetLastError();
}

}  // namespace nllx
