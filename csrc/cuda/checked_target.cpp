// CUDA entry of _checked_target.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "../layout.h"
#include "bad_target.h"
#include "kernels/launches.h"

namespace nllx {

using at::Tensor;

Tensor checked_target_cuda(const Tensor& target, int64_t classes, int64_t ignore_index, std::string_view /*op*/) {
  raise_pending_bad_target();
  const c10::cuda::CUDAGuard guard(target.device());
  check_memory("nllx", "target", target);
  const Tensor source = aligned(target.contiguous());
  Tensor result = at::empty(target.sizes(), target.options().dtype(at::kLong));
  if (target.numel() == 0) return result;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(launch_checked_target(source.const_data_ptr(), index_type(source.scalar_type()), source.numel(),
                                       classes, ignore_index, result.mutable_data_ptr<int64_t>(), bad_target_record(),
                                       stream));
  raise_bad_target_if_synchronous(stream);
  return result;
}

TORCH_LIBRARY_IMPL(nllx, CUDA, m) { m.impl("_checked_target", &checked_target_cuda); }

}  // namespace nllx
