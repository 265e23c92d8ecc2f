#include "capability.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <vector>

namespace nllx {

namespace {

CpuCapability choose() {
  std::vector<CpuCapability> runs{{"default", &default_capability::kernels}};  // narrowest first
#ifdef NLLX_HAS_X86_CAPABILITIES
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) runs.push_back({"avx2", &avx2::kernels});
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    runs.push_back({"avx512", &avx512::kernels});
  }
#endif
  const char* wanted = std::getenv("NLLX_CPU_CAPABILITY");
  if (!wanted || !*wanted) return runs.back();
  std::string names;
  for (const CpuCapability& c : runs) {
    if (c.name == wanted) return c;
    names += (names.empty() ? "" : ", ") + c.name;
  }
  TORCH_CHECK(false, "NLLX_CPU_CAPABILITY is \"", wanted, "\"; this CPU runs: ", names);
}

}  // namespace

const CpuCapability& cpu_capability() {
  static const CpuCapability chosen = choose();
  return chosen;
}

}  // namespace nllx
