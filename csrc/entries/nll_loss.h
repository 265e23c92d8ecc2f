// The entries of nll_loss on any device: checks, problem, results. A Device (cpu/nll_loss.cpp, cuda/nll_loss.cpp) runs
// the kernels.
#pragma once

#include <torch/library.h>

#include "../loss_problem.h"

namespace nllx {

template <typename Device>
struct NllLossEntries {
  static std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& log_probs, const at::Tensor& target,
                                                    const OptionalTensor& weight, int64_t reduction,
                                                    int64_t ignore_index, OptionalDtype dtype) {
    const Device device(log_probs);
    const LossArguments args{"nll_loss", "log_probs", false, log_probs, target, weight, reduction, ignore_index};
    LossProblem loss = make_loss_problem(args, dtype);
    at::Tensor result = empty_loss(loss, reduction), total_weight = empty_beside(log_probs, {}, loss.acc_dtype);
    if (loss.rows() == 0) {
      fill_empty(loss, reduction, result, total_weight);
      return {result, total_weight};
    }
    NllLossForward p;
    const Arrays arrays = share_layout(loss, nullptr);
    p.extent = arrays.extent;
    p.log_probs = loss.input.const_data_ptr();
    p.strides = arrays.strides[0];
    p.targets = loss.targets;
    if (is_per_row(reduction)) p.row_loss = result.mutable_data_ptr();
    p.row_loss_is_acc = loss.loss_is_acc();
    device.forward(p, args, loss, result, total_weight);
    return {result, total_weight};
  }

  static at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& log_probs, const at::Tensor& target,
                             const OptionalTensor& weight, const at::Tensor& total_weight, int64_t reduction,
                             int64_t ignore_index) {
    const Device device(log_probs);
    const LossArguments args{"nll_loss", "log_probs", false, log_probs, target, weight, reduction, ignore_index};
    LossProblem loss = make_loss_problem(args, std::nullopt);
    NllLossBackward p;
    const at::Tensor g = incoming_gradient(grad_output, loss, args.op, reduction, p.grad_output, p.grad_output_stride);
    check_saved(args.op, "total_weight", total_weight, loss.acc_dtype, 1, log_probs);
    const at::Tensor divisor = aligned(total_weight);
    at::Tensor grad = device.empty_like(log_probs);
    if (grad.numel() == 0) return grad;
    at::Tensor computed = grad;
    const Arrays arrays = writable_arrays(computed, loss.class_dim);  // the input itself is not read
    p.extent = arrays.extent;
    p.layout = arrays.layout;
    p.targets = loss.targets;
    if (is_mean(static_cast<Reduction>(reduction))) p.total_weight = divisor.const_data_ptr();
    p.grad_log_probs = computed.mutable_data_ptr();
    p.grad_strides = arrays.strides[0];
    device.backward(p, args, loss, computed);
    return finish_gradient(computed, grad, log_probs.scalar_type());
  }

  static void implement(torch::Library& m) {
    m.impl("nll_loss_forward", &forward);
    m.impl("nll_loss_backward", &backward);
  }
};

}  // namespace nllx
