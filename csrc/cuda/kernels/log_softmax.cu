#include "dispatch.cuh"
#include "log_softmax.cuh"
#include "plan.h"

namespace nllx {

namespace {

// Chunks are those of a sum, which there is not: a block for each group of rows.
dim3 grid_for(const CudaPlan& plan, const Extent& extent) {
  if (plan.family == CudaFamily::kPlanes)
    return grid_of(extent.outer * ((extent.inner + plan.rows_at_once - 1) / plan.rows_at_once));
  return grid_of((extent.rows() + plan.rows_at_once - 1) / plan.rows_at_once * plan.cluster, plan.cluster);
}

}  // namespace

cudaError_t launch_log_softmax_forward(const LogSoftmaxForward& p, FloatType type, const CudaDevice& device,
                                       cudaStream_t stream) {
  const CudaPlan plan =
      cuda_plan(CudaOp::kLogSoftmax, cuda_problem(p.extent, p.layout, p.input, p.input_strides, type), device);
  const dim3 grid = grid_for(plan, p.extent), block = block_of(plan.threads);
  const auto shared = static_cast<size_t>(plan.shared_bytes);
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (plan.family == CudaFamily::kPlanes) {
      CUDA_LAUNCH((log_softmax_forward_planes_kernel<T>), grid, block, 0, stream, p, plan.threads_per_row);
    } else if (plan.family == CudaFamily::kRegisterRows) {
      CUDA_LAUNCH((log_softmax_forward_register_rows_kernel<T>), grid, block, 0, stream, p, plan.threads_per_row);
    } else {
      ALLOW_SHARED((log_softmax_forward_block_rows_kernel<T>), plan.shared_bytes, most_shared_bytes(device));
      CUDA_LAUNCH_CLUSTERS((log_softmax_forward_block_rows_kernel<T>), plan.cluster, grid, block, shared, stream, p,
                           plan.shared_bytes / 16, plan.ahead);
    }
  });
  return cudaGetLastError();
}

cudaError_t launch_log_softmax_backward(const LogSoftmaxBackward& p, FloatType type, const CudaDevice& device,
                                        cudaStream_t stream) {
  const CudaPlan plan = cuda_plan(CudaOp::kLogSoftmax,
                                  cuda_problem(p.extent, p.layout, p.grad_output, p.grad_output_strides, type), device);
  const dim3 grid = grid_for(plan, p.extent), block = block_of(plan.threads);
  const auto shared = static_cast<size_t>(plan.shared_bytes);
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (plan.family == CudaFamily::kPlanes) {
      CUDA_LAUNCH((log_softmax_backward_planes_kernel<T>), grid, block, 0, stream, p, plan.threads_per_row);
    } else if (plan.family == CudaFamily::kRegisterRows) {
      CUDA_LAUNCH((log_softmax_backward_register_rows_kernel<T>), grid, block, 0, stream, p, plan.threads_per_row);
    } else {
      ALLOW_SHARED((log_softmax_backward_block_rows_kernel<T>), plan.shared_bytes, most_shared_bytes(device));
      CUDA_LAUNCH_CLUSTERS((log_softmax_backward_block_rows_kernel<T>), plan.cluster, grid, block, shared, stream, p,
                           plan.shared_bytes / 16, plan.ahead);
    }
  });
  return cudaGetLastError();
}

}  // namespace nllx
