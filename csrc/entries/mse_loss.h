// The entries of mse_loss on any device, as those of nll_loss.
#pragma once

#include <torch/library.h>

#include <array>
#include <limits>

#include "../elementwise.h"
#include "../loss_problem.h"

namespace nllx {

template <typename Device>
struct MseLossEntries {
  static std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& input, const at::Tensor& target,
                                                    const OptionalTensor& weight, int64_t reduction,
                                                    OptionalDtype dtype) {
    const Device device(input);
    const ElementwiseArguments args{"mse_loss", input, target, weight, reduction};
    ElementwiseLoss loss = make_elementwise_loss(args, dtype);
    const bool per_element = is_per_row(reduction);
    at::Tensor result = device.written(empty_elementwise_loss(loss, reduction)),
               total_weight = empty_beside(input, {}, loss.acc_dtype);
    if (input.numel() == 0) {
      total_weight.zero_();
      result.fill_(is_mean(static_cast<Reduction>(reduction)) ? std::numeric_limits<double>::quiet_NaN() : 0.);
      return {result, total_weight};
    }
    at::Tensor computed = per_element ? result : at::Tensor();
    const ElementwiseForward p = elementwise_forward(loss, computed);
    device.forward(p, args, loss, computed, result, total_weight);
    if (per_element && !computed.is_same(result)) result.copy_(computed);
    return {result, total_weight};
  }

  static std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                     const at::Tensor& target, const OptionalTensor& weight,
                                                     const at::Tensor& total_weight, int64_t reduction,
                                                     std::array<bool, 2> output_mask) {
    const Device device(input);
    const ElementwiseArguments args{"mse_loss", input, target, weight, reduction};
    ElementwiseLoss loss = make_elementwise_loss(args, std::nullopt);
    at::Tensor g = elementwise_grad_output(args, loss, grad_output);
    check_saved(args.op, "total_weight", total_weight, loss.acc_dtype, 1, input);
    const at::Tensor divisor = is_mean(static_cast<Reduction>(reduction)) ? aligned(total_weight) : at::Tensor();
    at::Tensor grad_input, grad_target;
    if (output_mask[0]) grad_input = device.empty_like(input);
    if (output_mask[1]) grad_target = device.empty_like(target);
    if (input.numel() == 0 || !(output_mask[0] || output_mask[1])) return {grad_input, grad_target};
    at::Tensor computed_input = grad_input, computed_target = grad_target;
    device.backward(elementwise_backward(loss, g, divisor, computed_input, computed_target), loss);
    if (!computed_input.is_same(grad_input)) grad_input.copy_(computed_input);
    if (!computed_target.is_same(grad_target)) grad_target.copy_(computed_target);
    return {grad_input, grad_target};
  }

  static void implement(torch::Library& m) {
    m.impl("mse_loss_forward", &forward);
    m.impl("mse_loss_backward", &backward);
  }
};

}  // namespace nllx
