#include "capability.h"

#include <c10/util/Exception.h>

#include <cstdlib>

namespace nllx {

namespace {

CpuCapability choose() {
  const std::vector<CpuCapability> runs = runnable_cpu_capabilities();
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
