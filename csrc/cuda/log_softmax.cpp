// CUDA entries of log_softmax.
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "../layout.h"
#include "bad_target.h"
#include "workspace.h"

namespace nllx {

using at::Tensor;

Tensor log_softmax_forward_cuda(const Tensor& input, int64_t dim) {
  raise_pending_bad_target();
  const FloatType type = float_type("log_softmax", "input", input.scalar_type());
  dim = at::maybe_wrap_dim(dim, input.dim());
  const c10::cuda::CUDAGuard guard(input.device());
  Tensor output = at::empty_like(input, at::MemoryFormat::Contiguous);  // as torch has it: users call view() on it
  if (input.numel() == 0) return output;
  check_memory("log_softmax", "input", input);
  if (input.dim() == 0) return output.copy_(input.sub(input));  // one class: log 1, and NaN for what has no logarithm
  Tensor source = aligned(input), computed = output;
  const Arrays arrays = arrays_of_one_layout({&source}, computed, dim);
  LogSoftmaxForward p{
      arrays.extent,    arrays.layout, source.const_data_ptr(), arrays.strides[0], computed.mutable_data_ptr(),
      arrays.strides[1]};
  C10_CUDA_CHECK(launch_log_softmax_forward(p, type, current_cuda_device(), c10::cuda::getCurrentCUDAStream()));
  return computed.is_same(output) ? output : output.copy_(computed);
}

Tensor log_softmax_backward_cuda(const Tensor& grad_output, const Tensor& output, int64_t dim) {
  raise_pending_bad_target();
  const FloatType type = check_log_softmax_backward(grad_output, output);
  dim = at::maybe_wrap_dim(dim, output.dim());
  const c10::cuda::CUDAGuard guard(output.device());
  Tensor grad = at::empty_like(output);
  if (output.numel() == 0) return grad;
  check_memory("log_softmax", "grad_output", grad_output);
  check_memory("log_softmax", "output", output);
  if (output.dim() == 0) return grad.copy_(grad_output.sub(output.exp().mul(grad_output)));
  Tensor g = aligned(grad_output), y = aligned(output), computed = grad;
  const Arrays arrays = arrays_of_one_layout({&g, &y}, computed, dim);
  LogSoftmaxBackward p{arrays.extent,      arrays.layout,     g.const_data_ptr(),          arrays.strides[0],
                       y.const_data_ptr(), arrays.strides[1], computed.mutable_data_ptr(), arrays.strides[2]};
  C10_CUDA_CHECK(launch_log_softmax_backward(p, type, current_cuda_device(), c10::cuda::getCurrentCUDAStream()));
  return computed.is_same(grad) ? grad : grad.copy_(computed);
}

TORCH_LIBRARY_IMPL(nllx, CUDA, m) {
  m.impl("log_softmax_forward", &log_softmax_forward_cuda);
  m.impl("log_softmax_backward", &log_softmax_backward_cuda);
}

}  // namespace nllx
