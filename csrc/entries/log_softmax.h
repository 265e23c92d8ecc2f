// The entries of log_softmax on any device, as those of nll_loss.
#pragma once

#include <ATen/WrapDimUtils.h>
#include <torch/library.h>

#include "../checks.h"
#include "../layout.h"

namespace nllx {

template <typename Device>
struct LogSoftmaxEntries {
  static at::Tensor forward(const at::Tensor& input, int64_t dim) {
    const Device device(input);
    const FloatType type = float_type("log_softmax", "input", input.scalar_type());
    dim = at::maybe_wrap_dim(dim, input.dim());
    // Contiguous as torch has it: users call view() on it.
    at::Tensor output = device.empty_like(input, at::MemoryFormat::Contiguous);
    if (input.numel() == 0) return output;
    check_memory("log_softmax", "input", input);
    if (input.dim() == 0) return output.copy_(input.sub(input));  // one class: log 1, and NaN for what has no logarithm
    at::Tensor source = aligned(input), computed = output;
    const Arrays arrays = arrays_of_one_layout({&source}, computed, dim);
    device.forward(LogSoftmaxForward{arrays.extent, arrays.layout, source.const_data_ptr(), arrays.strides[0],
                                     computed.mutable_data_ptr(), arrays.strides[1]},
                   type, computed);
    return computed.is_same(output) ? output : output.copy_(computed);
  }

  static at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim) {
    const Device device(output);
    const FloatType type = check_log_softmax_backward(grad_output, output);
    dim = at::maybe_wrap_dim(dim, output.dim());
    at::Tensor grad = device.empty_like(output);
    if (output.numel() == 0) return grad;
    check_memory("log_softmax", "grad_output", grad_output);
    check_memory("log_softmax", "output", output);
    if (output.dim() == 0) return grad.copy_(grad_output.sub(output.exp().mul(grad_output)));
    at::Tensor g = aligned(grad_output), y = aligned(output), computed = grad;
    const Arrays arrays = arrays_of_one_layout({&g, &y}, computed, dim);
    device.backward(
        LogSoftmaxBackward{arrays.extent, arrays.layout, g.const_data_ptr(), arrays.strides[0], y.const_data_ptr(),
                           arrays.strides[1], computed.mutable_data_ptr(), arrays.strides[2]},
        type, computed);
    return computed.is_same(grad) ? grad : grad.copy_(computed);
  }

  static void implement(torch::Library& m) {
    m.impl("log_softmax_forward", &forward);
    m.impl("log_softmax_backward", &backward);
  }
};

}  // namespace nllx
