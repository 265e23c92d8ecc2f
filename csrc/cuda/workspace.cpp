#include "workspace.h"

#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <atomic>
#include <vector>

#include "kernels/counters.h"

namespace nllx {

CudaDevice current_cuda_device() {
  const int device = c10::cuda::current_device();
  CudaDevice properties;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&properties.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&properties.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  int major = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  properties.async_copies = major >= 8;
  // Asked once, since it takes microseconds. 0: not yet.
  static std::vector<std::atomic<int>> cluster_blocks(static_cast<size_t>(c10::cuda::device_count()));
  std::atomic<int>& known = cluster_blocks[static_cast<size_t>(device)];
  if (known.load(std::memory_order_relaxed) == 0)
    known.store(most_cluster_blocks(properties), std::memory_order_relaxed);
  properties.cluster_blocks = known.load(std::memory_order_relaxed);
  return plans_are_conservative() ? conservative(properties) : properties;
}

unsigned* zero_counters(const at::TensorOptions& options, cudaStream_t stream, at::Tensor& owner) {
  // cudaStreamPerThread is one handle for a stream of each thread, whose launches run at once.
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None ||
      stream == cudaStreamPerThread) {
    owner = at::zeros({kCounters}, options.dtype(at::kInt));
    return reinterpret_cast<unsigned*>(owner.mutable_data_ptr<int>());
  }
  unsigned* counters = nullptr;
  C10_CUDA_CHECK(counters_of_stream(c10::cuda::current_device(), stream, &counters));
  return counters;
}

}  // namespace nllx
