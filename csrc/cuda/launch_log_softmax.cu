#include "log_softmax.cuh"

#include "dispatch.cuh"
#include "plan.h"

namespace nllx {

cudaError_t launch_log_softmax_forward(const LogSoftmaxForward& p, FloatType type, cudaStream_t stream) {
  const CudaPlan plan = cuda_plan_rows(p.extent, p.layout);
  const dim3 grid = grid_of(plan.blocks), block = block_of(plan.threads);
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (plan.family == CudaFamily::kPlanes) {
      CUDA_LAUNCH((log_softmax_forward_planes_kernel<T>), grid, block, 0, stream, p);
    } else {
      CUDA_LAUNCH((log_softmax_forward_rows_kernel<T>), grid, block, 0, stream, p, plan.threads_per_row);
    }
  });
  return cudaGetLastError();
}

cudaError_t launch_log_softmax_backward(const LogSoftmaxBackward& p, FloatType type, cudaStream_t stream) {
  const CudaPlan plan = cuda_plan_rows(p.extent, p.layout);
  const dim3 grid = grid_of(plan.blocks), block = block_of(plan.threads);
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (plan.family == CudaFamily::kPlanes) {
      CUDA_LAUNCH((log_softmax_backward_planes_kernel<T>), grid, block, 0, stream, p);
    } else {
      CUDA_LAUNCH((log_softmax_backward_rows_kernel<T>), grid, block, 0, stream, p, plan.threads_per_row);
    }
  });
  return cudaGetLastError();
}

}  // namespace nllx
