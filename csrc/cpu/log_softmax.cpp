// CPU entries of log_softmax.
#include <ATen/WrapDimUtils.h>
#include <torch/library.h>

#include "../checks.h"
#include "../layout.h"
#include "capability.h"
#include "large_memory.h"
#include "parallel.h"

namespace nllx {

using at::Tensor;

Tensor log_softmax_forward_cpu(const Tensor& input, int64_t dim) {
  const FloatType type = float_type("log_softmax", "input", input.scalar_type());
  dim = at::maybe_wrap_dim(dim, input.dim());
  Tensor output = empty_like_large(input, at::MemoryFormat::Contiguous);  // as torch has it: users call view() on it
  if (input.numel() == 0) return output;
  check_memory("log_softmax", "input", input);
  if (input.dim() == 0) return output.copy_(input.sub(input));  // one class: log 1, and NaN for what has no logarithm
  Tensor source = aligned(input), computed = output;
  const Arrays arrays = arrays_of_one_layout({&source}, computed, dim);
  LogSoftmaxForward p{
      arrays.extent,    arrays.layout, source.const_data_ptr(), arrays.strides[0], computed.mutable_data_ptr(),
      arrays.strides[1]};
  Chunks chunks(p.extent, p.layout);
  chunks.stream = is_streamed(computed);
  const auto kernel = cpu_capability().kernels->log_softmax_forward[static_cast<int>(type)];
  for_each_chunk(chunks, [&](int64_t chunk) { kernel(p, chunks, chunk); });
  return computed.is_same(output) ? output : output.copy_(computed);
}

Tensor log_softmax_backward_cpu(const Tensor& grad_output, const Tensor& output, int64_t dim) {
  const FloatType type = check_log_softmax_backward(grad_output, output);
  dim = at::maybe_wrap_dim(dim, output.dim());
  Tensor grad = empty_like_large(output);
  if (output.numel() == 0) return grad;
  check_memory("log_softmax", "grad_output", grad_output);
  check_memory("log_softmax", "output", output);
  if (output.dim() == 0) return grad.copy_(grad_output.sub(output.exp().mul(grad_output)));
  Tensor g = aligned(grad_output), y = aligned(output), computed = grad;
  const Arrays arrays = arrays_of_one_layout({&g, &y}, computed, dim);
  LogSoftmaxBackward p{arrays.extent,      arrays.layout,     g.const_data_ptr(),          arrays.strides[0],
                       y.const_data_ptr(), arrays.strides[1], computed.mutable_data_ptr(), arrays.strides[2]};
  Chunks chunks(p.extent, p.layout);
  chunks.stream = is_streamed(computed);
  const auto kernel = cpu_capability().kernels->log_softmax_backward[static_cast<int>(type)];
  for_each_chunk(chunks, [&](int64_t chunk) { kernel(p, chunks, chunk); });
  return computed.is_same(grad) ? grad : grad.copy_(computed);
}

TORCH_LIBRARY_IMPL(nllx, CPU, m) {
  m.impl("log_softmax_forward", &log_softmax_forward_cpu);
  m.impl("log_softmax_backward", &log_softmax_backward_cpu);
}

}  // namespace nllx
