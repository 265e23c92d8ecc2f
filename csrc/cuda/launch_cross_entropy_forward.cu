#include "cross_entropy_forward.cuh"
#include "dispatch.cuh"
#include "plan.h"

namespace nllx {

cudaError_t launch_cross_entropy_forward(const CrossEntropyForward& p, FloatType type, BadTarget* bad,
                                         cudaStream_t stream) {
  const CudaPlan plan = cuda_plan_reduction(p.extent, p.layout);
  const dim3 grid = grid_of(plan.blocks), block = block_of(plan.threads);
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (plan.family == CudaFamily::kPlanes) {
      CUDA_LAUNCH((cross_entropy_forward_planes_kernel<T>), grid, block, 0, stream, p, bad);
    } else if (plan.family == CudaFamily::kBlockRows) {
      CUDA_LAUNCH((cross_entropy_forward_block_rows_kernel<T>), grid, block, 0, stream, p, bad);
    } else if (plan.values_per_thread == 1) {
      CUDA_LAUNCH((cross_entropy_forward_register_rows_kernel<T, 1>), grid, block, 0, stream, p, plan.threads_per_row,
                  bad);
    } else if (plan.values_per_thread == 2) {
      CUDA_LAUNCH((cross_entropy_forward_register_rows_kernel<T, 2>), grid, block, 0, stream, p, plan.threads_per_row,
                  bad);
    } else if (plan.values_per_thread == 4) {
      CUDA_LAUNCH((cross_entropy_forward_register_rows_kernel<T, 4>), grid, block, 0, stream, p, plan.threads_per_row,
                  bad);
    } else {
      CUDA_LAUNCH((cross_entropy_forward_register_rows_kernel<T, 8>), grid, block, 0, stream, p, plan.threads_per_row,
                  bad);
    }
  });
  return cudaGetLastError();
}

}  // namespace nllx
