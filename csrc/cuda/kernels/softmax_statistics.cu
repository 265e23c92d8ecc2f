#include "dispatch.cuh"
#include "plan.h"
#include "softmax_statistics.cuh"

namespace nllx {

cudaError_t launch_softmax_statistics_forward(const SoftmaxStatisticsForward& p, FloatType type, BadTarget* bad,
                                              cudaStream_t stream) {
  const int threads = threads_of_row(p.extent.classes, element_bytes(type));
  const dim3 grid = grid_for_rows(p.extent, p.layout, threads), block = block_of(kStatisticsThreads);
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const KernelOptions<typename AccOf<T>::type> options(p.options);
    if (p.layout == Layout::kPlanes) {
      CUDA_LAUNCH((softmax_statistics_planes_kernel<T>), grid, block, 0, stream, p, options, bad);
    } else {
      CUDA_LAUNCH((softmax_statistics_rows_kernel<T>), grid, block, 0, stream, p, options, threads, bad);
    }
  });
  return cudaGetLastError();
}

cudaError_t launch_softmax_statistics_backward(const SoftmaxStatisticsBackward& p, FloatType type, BadTarget* bad,
                                               cudaStream_t stream) {
  const int threads = threads_of_row(p.extent.classes, element_bytes(type));
  const dim3 grid = grid_for_rows(p.extent, p.layout, threads), block = block_of(kStatisticsThreads);
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const KernelOptions<typename AccOf<T>::type> options(p.options);
    if (p.layout == Layout::kPlanes) {
      CUDA_LAUNCH((softmax_statistics_backward_planes_kernel<T>), grid, block, 0, stream, p, options, bad);
    } else {
      CUDA_LAUNCH((softmax_statistics_backward_rows_kernel<T>), grid, block, 0, stream, p, options, threads, bad);
    }
  });
  return cudaGetLastError();
}

}  // namespace nllx
