// Memory of the device that launches need for a moment.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include "kernels/launches.h"

namespace nllx {

// What the current device has answered: of the whole of it, also in a green context, which has a part. The kernels are
// right on any number of multiprocessors, and the launch of a cluster that the part has no room for raises.
struct CudaDeviceAnswers {
  CudaDevice device;
  const char* cluster_error;  // why clusters have no more blocks; empty where they have kMostClusterBlocks
};
CudaDeviceAnswers current_cuda_device_answers();

// What its plans are made for.
CudaDevice current_cuda_device();

// kCounters zeros for launches on `stream`. Outside of a stream capture they are the stream's own (kernels/counters.h).
// A captured launch, which may be replayed on any stream, has its own, which the capture sets to zero; `owner` keeps
// those alive.
unsigned* zero_counters(const at::TensorOptions& options, cudaStream_t stream, at::Tensor& owner);

}  // namespace nllx
