#include "workspace.h"

#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <mutex>
#include <vector>

#include "kernels/counters.h"

namespace nllx {

namespace {

// Asked once for a device, since it takes microseconds, by whatever context comes first.
const ClusterBlocks& cluster_blocks_of(int device, const CudaDevice& properties) {
  struct Answer {
    std::once_flag asked;
    ClusterBlocks blocks;
  };
  static std::vector<Answer> answers(static_cast<size_t>(c10::cuda::device_count()));
  Answer& answer = answers[static_cast<size_t>(device)];
  std::call_once(answer.asked, [&] { answer.blocks = most_cluster_blocks(properties); });
  return answer.blocks;
}

}  // namespace

CudaDeviceAnswers current_cuda_device_answers() {
  const int device = c10::cuda::current_device();
  CudaDevice properties;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&properties.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&properties.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  int major = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  properties.async_copies = major >= 8;
  const ClusterBlocks& clusters = cluster_blocks_of(device, properties);
  properties.cluster_blocks = clusters.most;
  return {properties, clusters.error};
}

CudaDevice current_cuda_device() {
  const CudaDevice device = current_cuda_device_answers().device;
  return plans_are_conservative() ? conservative(device) : device;
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
