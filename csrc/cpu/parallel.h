// Runs the chunks of a problem on torch's thread pool. Without tensors, so that tests/fuzz runs it too.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "kernels/kernels.h"

namespace nllx {

// Below this number of logits for a thread, waking it costs more than it saves.
constexpr int64_t kElementsPerThread = 32 * 1024;

template <typename Body>
void for_each_chunk(const Chunks& chunks, const Body& body) {
  const int64_t grain = (kElementsPerThread + chunks.elements_per_chunk - 1) / chunks.elements_per_chunk;
  at::parallel_for(0, chunks.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) body(chunk);
  });
}

// Results are added chunk by chunk in order, whoever computed them.
template <typename Body>
ChunkResult sum_over_chunks(const Chunks& chunks, const Body& body) {
  if (chunks.count == 1) {
    ChunkResult only;
    body(int64_t{0}, only);
    return only;
  }
  std::vector<ChunkResult> results(static_cast<size_t>(chunks.count));
  for_each_chunk(chunks, [&](int64_t chunk) {
    ChunkResult local;  // on the thread's own stack: neighbours in `results` share a cache line
    body(chunk, local);
    results[static_cast<size_t>(chunk)] = local;
  });
  ChunkResult total;
  for (const ChunkResult& r : results) {
    total.loss += r.loss;
    total.weight += r.weight;
    total.scale_gradient += r.scale_gradient;
    if (total.bad_target < 0) total.bad_target = r.bad_target;
  }
  return total;
}

}  // namespace nllx
