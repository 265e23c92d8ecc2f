#include "cross_entropy_backward.cuh"
#include "dispatch.cuh"
#include "plan.h"

namespace nllx {

cudaError_t launch_cross_entropy_backward(const CrossEntropyBackward& p, FloatType type, void* mass, BadTarget* bad,
                                          cudaStream_t stream) {
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.targets.probabilities) {
      const CudaPlan plan = cuda_plan_rows(p.extent, p.layout);
      const dim3 grid = grid_of(plan.blocks), block = block_of(plan.threads);
      if (plan.family == CudaFamily::kPlanes) {
        CUDA_LAUNCH((probability_mass_planes_kernel<T>), grid, block, 0, stream, p.extent, p.targets, mass);
      } else {
        CUDA_LAUNCH((probability_mass_rows_kernel<T>), grid, block, 0, stream, p.extent, p.targets,
                    plan.threads_per_row, mass);
      }
    }
    const CudaPlan plan = cuda_plan_streaming(p.extent, p.layout, static_cast<int>(sizeof(T)));
    const dim3 grid = grid_of(plan.blocks), block = block_of(plan.threads);
    const void* read_mass = mass;
    if (plan.family == CudaFamily::kPlanes) {
      CUDA_LAUNCH((cross_entropy_backward_planes_kernel<T>), grid, block, 0, stream, p, read_mass, bad);
    } else {
      CUDA_LAUNCH((cross_entropy_backward_rows_kernel<T>), grid, block, 0, stream, p, plan.threads_per_row, read_mass,
                  bad);
    }
  });
  return cudaGetLastError();
}

}  // namespace nllx
