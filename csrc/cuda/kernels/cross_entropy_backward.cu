#include "cross_entropy_backward.cuh"
#include "dispatch.cuh"
#include "plan.h"

namespace nllx {

namespace {

// The sums over probabilities: a warp for a row, or a block.
constexpr int kMassThreads = 256;

}  // namespace

cudaError_t launch_cross_entropy_backward(const CrossEntropyBackward& problem, FloatType type, const CudaDevice& device,
                                          void* mass, BadTarget* bad, cudaStream_t stream) {
  const CrossEntropyBackward p = with_float_coefficients(problem);
  const CudaPlan plan = cuda_plan(CudaOp::kBackward, cuda_problem(p, type), device);
  const dim3 grid = grid_of(plan.blocks()), block = block_of(plan.threads);
  const void* read_mass = mass;
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.targets.probabilities && plan.family == CudaFamily::kPlanes) {
      const int64_t tiles = (p.extent.inner + kMassThreads - 1) / kMassThreads;
      CUDA_LAUNCH((probability_mass_planes_kernel<T>), grid_of(p.extent.outer * tiles), block_of(kMassThreads), 0,
                  stream, p.extent, p.targets, mass);
    } else if (p.targets.probabilities) {
      const int per_row = p.extent.classes > 1024 ? kMassThreads : 32;
      const int64_t rows_at_once = kMassThreads / per_row;
      CUDA_LAUNCH((probability_mass_rows_kernel<T>), grid_of((p.extent.rows() + rows_at_once - 1) / rows_at_once),
                  block_of(kMassThreads), 0, stream, p.extent, p.targets, per_row, mass);
    }
    if (plan.family == CudaFamily::kPlanes && plan.vector_elements > 1) {
      CUDA_LAUNCH((cross_entropy_backward_planes_kernel<T, kNeighbours<T>>), grid, block, 0, stream, p,
                  plan.threads_per_row, read_mass, bad);
    } else if (plan.family == CudaFamily::kPlanes) {
      CUDA_LAUNCH((cross_entropy_backward_planes_kernel<T, 1>), grid, block, 0, stream, p, plan.threads_per_row,
                  read_mass, bad);
    } else {
      // Of rows that one batch of loads covers; blocks of longer ones have enough to do.
      const bool resident = p.extent.classes <= int64_t{plan.threads_per_row} * kVectorsAtOnce * plan.vector_elements;
      with_terms(p.targets, [&](auto terms) {
        constexpr bool kTerms = decltype(terms)::value;
        if (plan.family == CudaFamily::kTileRows) {
          const auto shared = static_cast<size_t>(plan.shared_bytes);
          ALLOW_SHARED((cross_entropy_backward_tile_rows_kernel<T, kTerms>), plan.shared_bytes,
                       most_shared_bytes(device));
          CUDA_LAUNCH((cross_entropy_backward_tile_rows_kernel<T, kTerms>), grid, block, shared, stream, p, plan.ahead,
                      read_mass, bad);
          return;
        }
        const int64_t blocks = resident ? RESIDENT_BLOCKS((cross_entropy_backward_rows_kernel<T, kTerms>),
                                                          plan.blocks(), plan.threads, 0, device.multiprocessors)
                                        : plan.blocks();
        CUDA_LAUNCH((cross_entropy_backward_rows_kernel<T, kTerms>), grid_of(blocks), block, 0, stream, p,
                    plan.threads_per_row, plan.splits, read_mass, bad);
      });
    }
  });
  return cudaGetLastError();
}

}  // namespace nllx
