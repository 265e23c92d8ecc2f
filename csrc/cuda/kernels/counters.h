// By what the blocks of a launch find out which of them is the last.
#pragma once

#include <cuda_runtime_api.h>

namespace nllx {

// kCounters zeros, in memory of the current device, that belong to the launches on `stream` for as long as the process
// lives: they run one after the other, and each leaves zeros behind. One that is refused has run no block, and one that
// an error cuts off takes its context along, and with it this memory. Not for launches that are captured, or of
// cudaStreamPerThread, which run at once.
//
// The memory is cudaMalloc's and no tensor's. torch's allocator may be told to take it from a pool
// (torch.cuda.use_mem_pool; torch.compile(mode="reduce-overhead") does so when it runs a function before it captures
// it), which gives the memory to others when the pool's owner goes on.
//
// A stream that is destroyed with work pending and another one that gets its handle share them; torch's streams live as
// long as the process.
cudaError_t counters_of_stream(int device, cudaStream_t stream, unsigned** counters);

}  // namespace nllx
