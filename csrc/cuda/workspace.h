// Memory of the device that launches need for a moment.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include "kernels/launches.h"

namespace nllx {

CudaDevice current_cuda_device();

// kCounters zeros for launches on `stream`. Outside of a stream capture they are the stream's own (kernels/counters.h).
// A captured launch, which may be replayed on any stream, has its own, which the capture sets to zero; `owner` keeps
// those alive.
unsigned* zero_counters(const at::TensorOptions& options, cudaStream_t stream, at::Tensor& owner);

}  // namespace nllx
