// The Python module nllx._C: what was built and what was chosen at run time. The operators are torch.ops.nllx.*.
#include <c10/macros/Macros.h>
#include <pybind11/pybind11.h>

#include "cpu/capability.h"
#include "python_calls.h"

#ifndef NLLX_CUDA_ARCHITECTURES
#define NLLX_CUDA_ARCHITECTURES ""
#endif

// Read from the file by nllx/_library.py before it is loaded: a binary built for another torch may not load at all.
extern "C" __attribute__((used, visibility("default"))) const char nllx_torch_version_mark[] =
    "NLLX_TORCH_VERSION=" NLLX_TORCH_VERSION;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = NLLX_TORCH_VERSION;  // the version built against, with its local part
  info["compiler"] = compiler();
#ifdef NLLX_WITH_CUDA
  info["cuda"] = NLLX_CUDA_VERSION;
#else
  info["cuda"] = pybind11::none();
#endif
  info["cuda_architectures"] = NLLX_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of nllx. Loading it registers the operators torch.ops.nllx.*.";
  nllx::add_python_calls(m.ptr());
  m.def("build_info", &build_info, "What this binary was built with: torch, compiler, cuda, cuda_architectures.");
  m.def(
      "cpu_capability", [] { return nllx::cpu_capability().name; },
      "The vector instructions that the CPU kernels use: 'default', 'avx2' or 'avx512'. Raises RuntimeError where the "
      "environment variable NLLX_CPU_CAPABILITY names another one, or one that this CPU cannot run.");
}
