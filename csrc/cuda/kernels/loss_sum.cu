#include "dispatch.cuh"
#include "loss_sum.cuh"

namespace nllx {

namespace {

// As many threads as a block of the launch before: the same order.
template <typename T>
__global__ void __launch_bounds__(512, 1) loss_sum_kernel(LossReduction r, Targets targets, int64_t chunks) {
  SHARED_ARRAY(double, scratch, 32);
  add_chunks<T>(r, targets, chunks, scratch);
}

}  // namespace

void launch_loss_sum(const LossReduction& r, const Targets& targets, int64_t chunks, FloatType type, int threads,
                     cudaStream_t stream) {
  if (chunks == 1 || r.counters != nullptr) return;
  with_element_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    CUDA_LAUNCH((loss_sum_kernel<T>), grid_of(1), block_of(threads), 0, stream, r, targets, chunks);
  });
}

}  // namespace nllx
