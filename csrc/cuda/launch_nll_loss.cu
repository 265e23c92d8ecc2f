#include "dispatch.cuh"
#include "nll_loss.cuh"
#include "plan.h"

namespace nllx {

namespace {
constexpr int kThreads = 256;
constexpr int kReductionThreads = 512;

// A thread per element, walking on beyond a million blocks.
dim3 grid_for(int64_t n) {
  const int64_t blocks = (n + kThreads - 1) / kThreads;
  return grid_of(blocks<1 ? 1 : blocks>(1 << 20) ? 1 << 20 : blocks);
}
}  // namespace

cudaError_t launch_nll_loss_forward(const NllLossForward& p, FloatType type, BadTarget* bad, cudaStream_t stream) {
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    CUDA_LAUNCH((nll_loss_forward_kernel<T>), grid_for(p.extent.rows()), block_of(kThreads), 0, stream, p, bad);
  });
  return cudaGetLastError();
}

cudaError_t launch_nll_loss_backward(const NllLossBackward& p, FloatType type, BadTarget* bad, cudaStream_t stream) {
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const CudaPlan plan = cuda_plan_streaming(p.extent, p.layout, static_cast<int>(sizeof(T)));
    CUDA_LAUNCH((nll_loss_backward_kernel<T>), grid_of(plan.blocks), block_of(plan.threads), 0, stream, p,
                plan.threads_per_row, bad);
  });
  return cudaGetLastError();
}

cudaError_t launch_loss_reduction(const LossReduction& r, const Extent& extent, const Targets& targets,
                                  const void* row_loss, bool row_loss_is_acc, FloatType type, cudaStream_t stream) {
  const int64_t partials = loss_partials(extent.rows());
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    CUDA_LAUNCH((loss_partials_kernel<T>), grid_of(partials), block_of(kReductionThreads), 0, stream, r, extent,
                targets, row_loss, row_loss_is_acc);
    if (partials > 1)
      CUDA_LAUNCH((loss_total_kernel<T>), grid_of(1), block_of(kReductionThreads), 0, stream, r, targets, partials);
  });
  return cudaGetLastError();
}

cudaError_t launch_checked_target(const void* target, IndexType type, int64_t n, int64_t classes, int64_t ignore_index,
                                  int64_t* out, BadTarget* bad, cudaStream_t stream) {
  CUDA_LAUNCH((checked_target_kernel), grid_for(n), block_of(kThreads), 0, stream, target, type, n, classes,
              ignore_index, out, bad);
  return cudaGetLastError();
}

}  // namespace nllx
