// Memory for gradients and log-probabilities that are larger than the caches. A fresh one costs more in page faults
// than in arithmetic, step after step, so it is asked for in huge pages, and kept when the tensor dies.
#pragma once

#include <ATen/core/Tensor.h>

namespace nllx {

// From this size on results bypass the caches (streaming stores): whoever reads them next would not find them there.
constexpr size_t kStreamBytes = size_t{24} << 20;

inline bool is_streamed(const at::Tensor& t) { return t.nbytes() >= kStreamBytes; }

// As at::empty_like. From 4 MiB on, on Linux, the memory is mapped apart, aligned to huge pages (MADV_HUGEPAGE where
// the system allows it), and when the tensor dies it is kept for the next one: what is kept and what lives together are
// never more than what lived at once before, and the system takes kept pages back when it needs memory (MADV_FREE).
// With the environment variable NLLX_CPU_KEEP_MEMORY=0 nothing is kept.
at::Tensor empty_like_large(const at::Tensor& like, std::optional<at::MemoryFormat> format = std::nullopt);

}  // namespace nllx
