#include "counters.h"

#include <map>
#include <mutex>
#include <utility>

#include "launches.h"

namespace nllx {

cudaError_t counters_of_stream(int device, cudaStream_t stream, unsigned** counters) {
  static std::mutex mutex;
  static auto& known = *new std::map<std::pair<int, cudaStream_t>, unsigned*>;  // never destroyed: nor is its memory
  const std::lock_guard<std::mutex> lock(mutex);
  unsigned*& of_stream = known[{device, stream}];
  if (!of_stream) {
    // Another stream may be captured meanwhile, of which this allocation is no part.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaError_t status = cudaThreadExchangeStreamCaptureMode(&mode);
    if (status != cudaSuccess) return status;
    void* memory = nullptr;
    status = cudaMalloc(&memory, kCounters * sizeof(unsigned));
    if (status == cudaSuccess) status = cudaMemsetAsync(memory, 0, kCounters * sizeof(unsigned), stream);
    const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
    if (status == cudaSuccess) status = restored;
    if (status != cudaSuccess) {
      cudaFree(memory);
      return status;
    }
    of_stream = static_cast<unsigned*>(memory);
  }
  *counters = of_stream;
  return cudaSuccess;
}

}  // namespace nllx
