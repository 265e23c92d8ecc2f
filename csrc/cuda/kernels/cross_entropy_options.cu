#include "cross_entropy_options.cuh"
#include "dispatch.cuh"

namespace nllx {

cudaError_t launch_cross_entropy_options_forward(const CrossEntropyForward& problem, void* row_weight, FloatType type,
                                                 BadTarget* bad, cudaStream_t stream) {
  const CrossEntropyForward p = with_float_coefficients(problem);
  const int threads = threads_of_row(p.extent.classes, element_bytes(type));
  const dim3 grid = grid_for_rows(p.extent, p.layout, threads), block = block_of(kStatisticsThreads);
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const KernelOptions<typename AccOf<T>::type> options(p.options);
    if (p.layout == Layout::kPlanes) {
      CUDA_LAUNCH((cross_entropy_options_planes_kernel<T>), grid, block, 0, stream, p, options, row_weight, bad);
    } else {
      CUDA_LAUNCH((cross_entropy_options_rows_kernel<T>), grid, block, 0, stream, p, options, row_weight, threads, bad);
    }
  });
  return cudaGetLastError();
}

cudaError_t launch_cross_entropy_options_backward(const CrossEntropyBackward& problem, FloatType type, BadTarget* bad,
                                                  cudaStream_t stream) {
  const CrossEntropyBackward p = with_float_coefficients(problem);
  const int threads = threads_of_row(p.extent.classes, element_bytes(type));
  const dim3 grid = grid_for_rows(p.extent, p.layout, threads), block = block_of(kStatisticsThreads);
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const KernelOptions<typename AccOf<T>::type> options(p.options);
    if (p.layout == Layout::kPlanes) {
      CUDA_LAUNCH((cross_entropy_options_backward_planes_kernel<T>), grid, block, 0, stream, p, options, bad);
    } else {
      CUDA_LAUNCH((cross_entropy_options_backward_rows_kernel<T>), grid, block, 0, stream, p, options, threads, bad);
    }
  });
  return cudaGetLastError();
}

}  // namespace nllx
