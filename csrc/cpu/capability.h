#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

#ifdef NLLX_HAS_X86_CAPABILITIES
#include <cpuid.h>
#endif

namespace nllx {

struct CpuCapability {
  std::string name;
  const CpuKernels* kernels;
};

// All that this CPU runs, narrowest first. What is asked of the CPU is what the units are compiled for.
inline std::vector<CpuCapability> runnable_cpu_capabilities() {
  std::vector<CpuCapability> runs{{"default", &default_capability::kernels}};
#ifdef NLLX_HAS_X86_CAPABILITIES
  __builtin_cpu_init();
  // Not every clang knows the name f16c.
  unsigned eax, ebx, ecx, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  if (avx2) runs.push_back({"avx2", &avx2::kernels});
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    runs.push_back({"avx512", &avx512::kernels});
  }
#endif
  return runs;
}

// The widest vector instructions that this CPU and the environment variable NLLX_CPU_CAPABILITY ("default", "avx2" or
// "avx512") allow; decided once. Raises RuntimeError for a name that is unknown or that this CPU cannot run.
const CpuCapability& cpu_capability();

}  // namespace nllx
