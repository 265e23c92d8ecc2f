#include "cross_entropy_planes.cuh"
#include "dispatch.cuh"
#include "plan.h"

namespace nllx {

namespace {

// How the divisor is summed before the losses are known. Its partial sums are overwritten by those of the losses.
LossReduction divisor_of(const LossReduction& r, void* divisor) {
  LossReduction only = r;
  only.reduction = Reduction::kNone;
  only.loss = nullptr;
  only.total_weight = divisor;
  return only;
}

int64_t divisor_chunks(int64_t rows) { return (rows + kDivisorRowsPerChunk - 1) / kDivisorRowsPerChunk; }

// Whether the gradient comes from the kernel of the forward: not where threads do not keep what they read (planes), or
// the plan says so.
bool gradient_in_forward(const CudaPlan& plan) {
  return plan.family != CudaFamily::kPlanes && (plan.family != CudaFamily::kBlockRows || plan.shared_bytes > 0);
}

}  // namespace

ClusterBlocks most_cluster_blocks(const CudaDevice& device) {
  // The kernel that takes the most of a multiprocessor, with the most shared memory that a plan gives it.
  auto* const kernel = &cross_entropy_value_and_grad_block_rows_kernel<double, true>;
  ClusterBlocks blocks;
  blocks.most = most_cluster_blocks(reinterpret_cast<const void*>(kernel), 256, device.shared_bytes / 3,
                                    most_shared_bytes(device), blocks.error);
  return blocks;
}

LossWorkspace cross_entropy_workspace(CudaOp op, const CrossEntropyForward& p, const CrossEntropyBackward* gradient,
                                      FloatType type, const CudaDevice& device) {
  const CudaProblem problem = cuda_problem(p, gradient, type);
  const CudaPlan plan = cuda_plan(op, problem, device), forward = cuda_plan(CudaOp::kForward, problem, device);
  LossWorkspace w;
  int64_t chunks = plan.chunks > forward.chunks ? plan.chunks : forward.chunks;
  if (gradient && divisor_chunks(p.extent.rows()) > chunks) chunks = divisor_chunks(p.extent.rows());
  if (chunks > 1) w.partials = 2 * chunks;
  const int acc_bytes = type == FloatType::kFloat64 ? 8 : 4;
  if (forward.splits > 1) w.row_part_bytes = p.extent.rows() * forward.splits * 4 * acc_bytes;
  w.counters = chunks > 1 || forward.splits > 1;
  return w;
}

cudaError_t launch_cross_entropy_forward(const CrossEntropyForward& problem, const LossReduction& r, FloatType type,
                                         const CudaDevice& device, BadTarget* bad, cudaStream_t stream) {
  const CrossEntropyForward p = with_float_coefficients(problem);
  const CudaPlan plan = cuda_plan(CudaOp::kForward, cuda_problem(p, nullptr, type), device);
  const dim3 grid = grid_of(plan.blocks()), block = block_of(plan.threads);
  const CrossEntropyBackward none;
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (plan.family == CudaFamily::kPlanes && plan.vector_elements > 1) {
      const auto shared = static_cast<size_t>(plan.shared_bytes);
      ALLOW_SHARED((cross_entropy_planes_kernel<T, kNeighbours<T>, false>), plan.shared_bytes,
                   most_shared_bytes(device));
      CUDA_LAUNCH((cross_entropy_planes_kernel<T, kNeighbours<T>, false>), grid, block, shared, stream, p, r,
                  plan.threads_per_row, plan.ahead, plan.rows_per_chunk, bad);
      return;
    }
    with_terms(p.targets, [&](auto terms) {
      constexpr bool kTerms = decltype(terms)::value;
      if (plan.family == CudaFamily::kTileRows) {
        ALLOW_SHARED((cross_entropy_tile_rows_kernel<T, kTerms>), plan.shared_bytes, most_shared_bytes(device));
        CUDA_LAUNCH((cross_entropy_tile_rows_kernel<T, kTerms>), grid, block, static_cast<size_t>(plan.shared_bytes),
                    stream, p, none, r, plan.ahead, plan.rows_per_chunk, bad);
      } else if (plan.family == CudaFamily::kPlanes) {
        CUDA_LAUNCH((cross_entropy_planes_kernel<T, 1, kTerms>), grid, block, 0, stream, p, r, plan.threads_per_row, 0,
                    plan.rows_per_chunk, bad);
      } else if (plan.family == CudaFamily::kRegisterRows) {
        CUDA_LAUNCH((cross_entropy_register_rows_kernel<T, kTerms, false>), grid, block, 0, stream, p, none, r,
                    plan.threads_per_row, plan.rows_per_chunk, bad);
      } else {
        const auto shared = static_cast<size_t>(plan.shared_bytes);
        ALLOW_SHARED((cross_entropy_block_rows_kernel<T, kTerms>), plan.shared_bytes, most_shared_bytes(device));
        // Of small blocks, whose rows take no longer than the fence and the atomic at their end.
        const int64_t blocks = plan.threads < 256 && plan.splits * plan.cluster == 1
                                   ? RESIDENT_BLOCKS((cross_entropy_block_rows_kernel<T, kTerms>), plan.blocks(),
                                                     plan.threads, plan.shared_bytes, device.multiprocessors)
                                   : plan.blocks();
        CUDA_LAUNCH_CLUSTERS((cross_entropy_block_rows_kernel<T, kTerms>), plan.cluster, grid_of(blocks, plan.cluster),
                             block, shared, stream, p, r, plan.splits, plan.ahead, plan.rows_per_chunk, bad);
      }
    });
  });
  launch_loss_sum(r, p.targets, plan.chunks, type, plan.threads, stream);
  return cudaGetLastError();
}

cudaError_t launch_cross_entropy_value_and_grad(const CrossEntropyForward& problem,
                                                const CrossEntropyBackward& gradient, const LossReduction& r,
                                                FloatType type, const CudaDevice& device, void* mass, BadTarget* bad,
                                                cudaStream_t stream) {
  const CrossEntropyForward p = with_float_coefficients(problem);
  const CudaPlan plan = cuda_plan(CudaOp::kValueAndGrad, cuda_problem(p, &gradient, type), device);
  CrossEntropyBackward b = gradient;
  const bool mean = is_mean(r.reduction);
  if (!gradient_in_forward(plan)) {
    cudaError_t status = launch_cross_entropy_forward(p, r, type, device, bad, stream);
    if (mean) b.total_weight = r.total_weight;
    if (status == cudaSuccess) status = launch_cross_entropy_backward(b, type, device, mass, bad, stream);
    return status;
  }
  const dim3 grid = grid_of(plan.blocks()), block = block_of(plan.threads);
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (mean) {
      const LossReduction divisor = divisor_of(r, r.divisor);
      const int64_t chunks = divisor_chunks(p.extent.rows());
      CUDA_LAUNCH((cross_entropy_divisor_kernel<T>), grid_of(chunks), block_of(512), 0, stream, p, divisor);
      launch_loss_sum(divisor, p.targets, chunks, type, 512, stream);
      b.total_weight = r.divisor;
    }
    with_terms(p.targets, [&](auto terms) {
      constexpr bool kTerms = decltype(terms)::value;
      if (plan.family == CudaFamily::kTileRows) {
        ALLOW_SHARED((cross_entropy_tile_rows_kernel<T, kTerms>), plan.shared_bytes, most_shared_bytes(device));
        CUDA_LAUNCH((cross_entropy_tile_rows_kernel<T, kTerms>), grid, block, static_cast<size_t>(plan.shared_bytes),
                    stream, p, b, r, plan.ahead, plan.rows_per_chunk, bad);
      } else if (plan.family == CudaFamily::kRegisterRows) {
        CUDA_LAUNCH((cross_entropy_register_rows_kernel<T, kTerms, true>), grid, block, 0, stream, p, b, r,
                    plan.threads_per_row, plan.rows_per_chunk, bad);
      } else {
        const auto shared = static_cast<size_t>(plan.shared_bytes);
        ALLOW_SHARED((cross_entropy_value_and_grad_block_rows_kernel<T, kTerms>), plan.shared_bytes,
                     most_shared_bytes(device));
        CUDA_LAUNCH_CLUSTERS((cross_entropy_value_and_grad_block_rows_kernel<T, kTerms>), plan.cluster, grid, block,
                             shared, stream, p, b, r, plan.shared_bytes / 16, plan.ahead, plan.rows_per_chunk, bad);
      }
    });
  });
  launch_loss_sum(r, p.targets, plan.chunks, type, plan.threads, stream);
  return cudaGetLastError();
}

}  // namespace nllx
