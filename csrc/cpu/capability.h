#pragma once

#include <string>

#include "kernels.h"

namespace nllx {

// The widest vector instructions that this CPU and the environment variable NLLX_CPU_CAPABILITY ("default", "avx2" or
// "avx512") allow; decided once. Raises RuntimeError for a name that is unknown or that this CPU cannot run.
struct CpuCapability {
  std::string name;
  const CpuKernels* kernels;
};
const CpuCapability& cpu_capability();

}  // namespace nllx
