// The Python module nllx._C: what was built and what was chosen at run time. The operators are torch.ops.nllx.*.
#include <c10/macros/Macros.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <map>
#include <string>

#include "cpu/capability.h"
#include "cuda/kernels/plan.h"
#include "grad_level.h"
#include "python_calls.h"
#ifdef NLLX_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>

#include "cuda/bad_target.h"
#include "cuda/workspace.h"
#endif

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

#ifdef NLLX_WITH_CUDA
pybind11::dict cuda_device(c10::DeviceIndex index) {
  const c10::cuda::CUDAGuard guard(index);
  const auto [device, cluster_error] = nllx::current_cuda_device_answers();
  pybind11::dict fields;
  fields["multiprocessors"] = device.multiprocessors;
  fields["shared_bytes"] = device.shared_bytes;
  fields["cluster_blocks"] = device.cluster_blocks;
  fields["cluster_error"] = cluster_error;
  fields["async_copies"] = device.async_copies;
  return fields;
}
#endif

pybind11::dict cuda_plan(const std::string& op, int64_t outer, int64_t classes, int64_t inner, int element_bytes,
                         bool planes, bool dense, bool aligned, bool has_terms, int multiprocessors, int shared_bytes,
                         int cluster_blocks, bool async_copies, bool conservative) {
  const std::map<std::string, nllx::CudaOp> ops = {{"forward", nllx::CudaOp::kForward},
                                                   {"backward", nllx::CudaOp::kBackward},
                                                   {"value_and_grad", nllx::CudaOp::kValueAndGrad},
                                                   {"log_softmax", nllx::CudaOp::kLogSoftmax}};
  const auto found = ops.find(op);
  if (found == ops.end()) throw pybind11::value_error("nllx: no operation '" + op + "' has a plan");
  nllx::CudaProblem problem;
  problem.extent = {outer, classes, inner};
  problem.layout = planes ? nllx::Layout::kPlanes : nllx::Layout::kRows;
  problem.dense = dense;
  problem.aligned = aligned;
  problem.has_terms = has_terms;
  problem.element_bytes = element_bytes;
  const nllx::CudaDevice device{multiprocessors, shared_bytes, cluster_blocks, async_copies};
  const nllx::CudaPlan plan =
      nllx::cuda_plan(found->second, problem, conservative ? nllx::conservative(device) : device);
  const char* const families[] = {"tile_rows", "register_rows", "block_rows", "planes"};
  pybind11::dict fields;
  fields["family"] = families[static_cast<int>(plan.family)];
  fields["threads"] = plan.threads;
  fields["threads_per_row"] = plan.threads_per_row;
  fields["rows_at_once"] = plan.rows_at_once;
  fields["vector_elements"] = plan.vector_elements;
  fields["splits"] = plan.splits;
  fields["cluster"] = plan.cluster;
  fields["shared_bytes"] = plan.shared_bytes;
  fields["ahead"] = plan.ahead;
  fields["rows_per_chunk"] = plan.rows_per_chunk;
  fields["chunks"] = plan.chunks;
  fields["reason"] = plan.reason;
  return fields;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nllx, m) {
  // Raises IndexError for a class index out of range that a kernel has met on a GPU and nothing has raised yet.
  m.def("_check_errors() -> ()", [] {
#ifdef NLLX_WITH_CUDA
    nllx::raise_pending_bad_target();
#endif
  });
}

// Nothing here relies on the interpreter lock: what outlives a call is constant, atomic, or behind a mutex.
PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "The compiled part of nllx. Loading it registers the operators torch.ops.nllx.*.";
  nllx::add_python_calls(m.ptr());
  namespace py = pybind11;
  m.def(
      "cuda_plan", &cuda_plan, py::arg("op"), py::kw_only(), py::arg("outer"), py::arg("classes"), py::arg("inner") = 1,
      py::arg("element_bytes") = 4, py::arg("planes") = false, py::arg("dense") = true, py::arg("aligned") = true,
      py::arg("has_terms") = false, py::arg("multiprocessors") = 132, py::arg("shared_bytes") = 227 << 10,
      py::arg("cluster_blocks") = 8, py::arg("async_copies") = true, py::arg("conservative") = false,
      "Which CUDA kernel solves a problem, and how; see csrc/cuda/kernels/plan.h. op: 'forward', 'backward', "
      "'value_and_grad' "
      "or 'log_softmax'. The problem is an array (outer, classes, inner); dense: rows follow each other without gaps; "
      "aligned: they, or the classes of planes, begin at 16-byte boundaries; has_terms: smoothing or probabilities. "
      "multiprocessors, shared_bytes (a block's), cluster_blocks (the most of a thread-block cluster, 1 without), "
      "async_copies (from device to shared memory: from sm_80 on): of the GPU, by default an H100's. conservative: as "
      "under NLLX_CUDA_PLAN=conservative. Raises ValueError for another op.");
#ifdef NLLX_WITH_CUDA
  m.def("cuda_device", &cuda_device, py::arg("index"),
        "What a GPU has answered that cuda_plan depends on: multiprocessors, shared_bytes, cluster_blocks, "
        "cluster_error (why these are fewer than 8, else empty) and async_copies. Only in builds with CUDA.");
#endif
  m.def("differentiate_level", &nllx::differentiate_level, py::arg("name"), py::arg("arguments"), py::arg("plain"),
        py::arg("results"),
        "Makes `results` those of the operator `name` in the graph of one level of torch.func.grad.");
  m.def(
      "has_tangent", [](const at::Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }, py::arg("tensor"),
      "Whether forward mode differentiates with respect to a tensor; torch.autograd.forward_ad.unpack_dual is an "
      "operator, "
      "which vmap does not take.");
  m.def("build_info", &build_info, "What this binary was built with: torch, compiler, cuda, cuda_architectures.");
  m.def(
      "cpu_capability", [] { return nllx::cpu_capability().name; },
      "The vector instructions that the CPU kernels use: 'default', 'avx2' or 'avx512'. Raises RuntimeError where the "
      "environment variable NLLX_CPU_CAPABILITY names another one, or one that this CPU cannot run.");
  m.def(
      "cuda_plans", [] { return nllx::plans_are_conservative() ? "conservative" : "default"; },
      "What the plans of this process are, by the environment variable NLLX_CUDA_PLAN: 'default' or 'conservative', "
      "with neither clusters nor asynchronous copies, and with nothing exchanged between the blocks of a launch. "
      "Raises RuntimeError where it names another.");
}
