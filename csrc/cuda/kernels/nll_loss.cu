#include "dispatch.cuh"
#include "nll_loss.cuh"
#include "plan.h"

namespace nllx {

namespace {

constexpr int kThreads = 256;
// A thread of the last block adds a few partial sums, one of the others a few rows.
constexpr int64_t kRowsPerChunk = 1024, kMostChunks = 4096;

int64_t rows_per_chunk(int64_t rows) {
  const int64_t groups = (rows + kRowsPerChunk - 1) / kRowsPerChunk;
  return kRowsPerChunk * ((groups + kMostChunks - 1) / kMostChunks);
}
int64_t chunks(int64_t rows) { return (rows + rows_per_chunk(rows) - 1) / rows_per_chunk(rows); }

// A thread per element, walking on beyond a million blocks.
dim3 grid_for(int64_t n) {
  const int64_t blocks = (n + kThreads - 1) / kThreads;
  return grid_of(blocks<1 ? 1 : blocks>(1 << 20) ? 1 << 20 : blocks);
}

}  // namespace

LossWorkspace nll_loss_workspace(const NllLossForward& p) {
  LossWorkspace w;
  const int64_t n = chunks(p.extent.rows());
  if (n > 1) w.partials = 2 * n;
  w.counters = n > 1;
  return w;
}

cudaError_t launch_nll_loss_forward(const NllLossForward& p, const LossReduction& r, FloatType type, BadTarget* bad,
                                    cudaStream_t stream) {
  const int64_t rows = p.extent.rows();
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    CUDA_LAUNCH((nll_loss_forward_kernel<T>), grid_of(chunks(rows)), block_of(kThreads), 0, stream, p, r,
                rows_per_chunk(rows), bad);
  });
  launch_loss_sum(r, p.targets, chunks(rows), type, kThreads, stream);
  return cudaGetLastError();
}

cudaError_t launch_nll_loss_backward(const NllLossBackward& p, FloatType type, const CudaDevice& device, BadTarget* bad,
                                     cudaStream_t stream) {
  const CudaProblem problem = cuda_problem(p.extent, p.layout, p.grad_log_probs, p.grad_strides, type);
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    int per_row = 1;
    int64_t units;
    if (p.layout == Layout::kPlanes) {
      units = p.extent.outer * ((p.extent.inner + kThreads - 1) / kThreads);
    } else {
      per_row = cuda_plan(CudaOp::kBackward, problem, device).threads_per_row;
      units = (p.extent.rows() + kThreads / per_row - 1) / (kThreads / per_row);
    }
    CUDA_LAUNCH((nll_loss_backward_kernel<T>), grid_of(units), block_of(kThreads), 0, stream, p, per_row, bad);
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
