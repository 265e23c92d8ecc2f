// Stands in for torch's header, so that csrc/cpu/parallel.h is fuzzed as it is, without torch: every index once, on one
// thread, or with NLLX_THREADS on three at once, whatever the grain.
#pragma once

#include <cstdint>
#ifdef NLLX_THREADS
#include <thread>
#include <vector>
#endif

namespace at {

template <typename Body>
void parallel_for(int64_t begin, int64_t end, [[maybe_unused]] int64_t grain, const Body& body) {
#ifdef NLLX_THREADS
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < begin + 3; ++first) {
    threads.emplace_back([&, first] {
      for (int64_t i = first; i < end; i += 3) body(i, i + 1);
    });
  }
  for (std::thread& thread : threads) thread.join();
#else
  for (int64_t i = begin; i < end; ++i) body(i, i + 1);
#endif
}

}  // namespace at
