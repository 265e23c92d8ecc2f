// The entries of cross_entropy on any device, as those of nll_loss.
#pragma once

#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>

#include "../loss_problem.h"

namespace nllx {

template <typename Device>
struct CrossEntropyEntries {
  using Tensor = at::Tensor;

  static std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target,
                                                    const OptionalTensor& weight, const OptionalTensor& sample_weight,
                                                    const OptionalTensor& logit_scale,
                                                    const OptionalTensor& temperature, const OptionalTensor& divisor,
                                                    int64_t reduction, int64_t ignore_index, double label_smoothing,
                                                    double scale, double sharpness, double softcap, double z_loss,
                                                    OptionalDtype dtype) {
    return losses({arguments(logits, target, weight, reduction, ignore_index, label_smoothing),
                   {sample_weight, logit_scale, temperature, scale, sharpness, softcap, z_loss},
                   divisor},
                  dtype);
  }

  static std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                                             const OptionalTensor& weight, const OptionalTensor& sample_weight,
                                             const OptionalTensor& logit_scale, const OptionalTensor& temperature,
                                             const OptionalTensor& divisor, const Tensor& row_stats,
                                             const Tensor& total_weight, int64_t reduction, int64_t ignore_index,
                                             double label_smoothing, double scale, double sharpness, double softcap,
                                             double z_loss, std::array<bool, 2> output_mask) {
    return gradients(grad_output,
                     {arguments(logits, target, weight, reduction, ignore_index, label_smoothing),
                      {sample_weight, logit_scale, temperature, scale, sharpness, softcap, z_loss},
                      divisor},
                     row_stats, total_weight, output_mask, Tensor());
  }
  static Tensor& backward_out(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                              const OptionalTensor& weight, const OptionalTensor& sample_weight,
                              const OptionalTensor& logit_scale, const OptionalTensor& temperature,
                              const OptionalTensor& divisor, const Tensor& row_stats, const Tensor& total_weight,
                              int64_t reduction, int64_t ignore_index, double label_smoothing, double scale,
                              double sharpness, double softcap, double z_loss, Tensor& out) {
    gradients(grad_output,
              {arguments(logits, target, weight, reduction, ignore_index, label_smoothing),
               {sample_weight, logit_scale, temperature, scale, sharpness, softcap, z_loss},
               divisor},
              row_stats, total_weight, {true, false}, out);
    return out;
  }

  static std::tuple<Tensor, Tensor> value_and_grad(const Tensor& logits, const Tensor& target,
                                                   const OptionalTensor& weight, const OptionalTensor& sample_weight,
                                                   const OptionalTensor& logit_scale, const OptionalTensor& temperature,
                                                   const OptionalTensor& divisor, int64_t reduction,
                                                   int64_t ignore_index, double label_smoothing, double scale,
                                                   double sharpness, double softcap, double z_loss,
                                                   OptionalDtype dtype) {
    return both({arguments(logits, target, weight, reduction, ignore_index, label_smoothing),
                 {sample_weight, logit_scale, temperature, scale, sharpness, softcap, z_loss},
                 divisor},
                dtype, Tensor());
  }
  static Tensor value_and_grad_out(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                   const OptionalTensor& sample_weight, const OptionalTensor& logit_scale,
                                   const OptionalTensor& temperature, const OptionalTensor& divisor, int64_t reduction,
                                   int64_t ignore_index, double label_smoothing, double scale, double sharpness,
                                   double softcap, double z_loss, OptionalDtype dtype, Tensor& out) {
    return std::get<0>(both({arguments(logits, target, weight, reduction, ignore_index, label_smoothing),
                             {sample_weight, logit_scale, temperature, scale, sharpness, softcap, z_loss},
                             divisor},
                            dtype, out));
  }

  static void implement(torch::Library& m) {
    m.impl("cross_entropy_forward", &forward);
    m.impl("cross_entropy_backward", &backward);
    m.impl("cross_entropy_backward.out", &backward_out);
    m.impl("cross_entropy_value_and_grad", &value_and_grad);
    m.impl("cross_entropy_value_and_grad_out", &value_and_grad_out);
  }

 private:
  struct All {
    LossArguments args;
    LossOptions options;
    const OptionalTensor& divisor;
  };

  static LossArguments arguments(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                 int64_t reduction, int64_t ignore_index, double label_smoothing) {
    return {"cross_entropy", "logits", true, logits, target, weight, reduction, ignore_index, label_smoothing};
  }
  static LossProblem problem(const All& all, OptionalDtype dtype) {
    LossProblem loss = make_loss_problem(all.args, dtype);
    take_options(loss, all.args.op, all.options);
    take_divisor(loss, all.args.op, all.divisor, all.args.reduction);
    return loss;
  }

  static std::tuple<Tensor, Tensor, Tensor> losses(const All& all, OptionalDtype dtype) {
    const Tensor& logits = all.args.input;
    const int64_t reduction = all.args.reduction;
    const Device device(logits);
    LossProblem loss = problem(all, dtype);
    Tensor result = empty_loss(loss, reduction), row_stats = empty_beside(logits, loss.stats_sizes(), loss.acc_dtype),
           total_weight = empty_beside(logits, {}, loss.acc_dtype);
    // A sum over no classes is zero, though its log-sum-exp is -inf.
    if (loss.rows() == 0 || (loss.probabilities_given && logits.numel() == 0)) {
      row_stats.zero_();
      fill_empty(loss, reduction, result, total_weight);
      return {result, row_stats, total_weight};
    }
    CrossEntropyForward p = forward_problem(loss, share_layout(loss, nullptr), row_stats);
    if (is_per_row(reduction)) p.row_loss = result.mutable_data_ptr();
    p.row_loss_is_acc = loss.loss_is_acc();
    device.forward(p, all.args, loss, result, total_weight);
    return {result, row_stats, total_weight};
  }

  // A gradient's memory: that of `out`, if it is given, has the dtype that is computed in, and can be written.
  static Tensor empty_gradient(const Device& device, const LossProblem& loss, const Tensor& out) {
    const bool direct = out.defined() && out.scalar_type() == loss.input.scalar_type() && is_aligned(out);
    return direct ? out : device.empty_like(loss.input);
  }
  static void check_all_out(const All& all, const Tensor& out) {
    if (!out.defined()) return;
    const LossArguments& a = all.args;
    check_out(a.op, out, a.input, a.target, a.weight);
    check_apart(a.op, out, "sample_weight", all.options.sample_weight);
    check_apart(a.op, out, "logit_scale", all.options.logit_scale);
    check_apart(a.op, out, "temperature", all.options.temperature);
    check_apart(a.op, out, "divisor", all.divisor);
  }

  // The gradients of the logits, in `out` where that is defined, and of logit_scale.
  static std::tuple<Tensor, Tensor> gradients(const Tensor& grad_output, const All& all, const Tensor& row_stats,
                                              const Tensor& total_weight, std::array<bool, 2> output_mask,
                                              const Tensor& out) {
    const LossArguments& args = all.args;
    const Device device(args.input);
    LossProblem loss = problem(all, std::nullopt);
    const void* incoming = nullptr;
    int64_t incoming_stride = 0;
    const Tensor g =
        incoming_gradient(apart_from(grad_output, out), loss, args.op, args.reduction, incoming, incoming_stride);
    check_saved(args.op, "row_stats", row_stats, loss.acc_dtype, 2 * loss.rows(), args.input);
    check_saved(args.op, "total_weight", total_weight, loss.acc_dtype, 1, args.input);
    check_all_out(all, out);
    Tensor grad_scale;
    if (output_mask[1] && loss.logit_scale.defined()) grad_scale = at::zeros_like(loss.logit_scale);
    Tensor grad = empty_gradient(device, loss, out), computed = grad;
    if (grad.numel() > 0) {
      const Arrays arrays = share_layout(loss, &computed);
      const Tensor contiguous_stats = aligned(apart_from(row_stats, out).contiguous()),
                   divisor = aligned(apart_from(total_weight, out));
      CrossEntropyBackward p = backward_problem(loss, arrays, computed, contiguous_stats);
      if (is_mean(static_cast<Reduction>(args.reduction))) p.total_weight = divisor.const_data_ptr();
      p.grad_output = incoming;
      p.grad_output_stride = incoming_stride;
      device.backward(p, args, loss, computed, grad_scale);
    }
    Tensor grad_logits;
    if (output_mask[0]) grad_logits = finish_gradient(computed, grad, args.input.scalar_type(), out);
    if (grad_scale.defined()) grad_scale = grad_scale.to(all.options.logit_scale->scalar_type());
    return {grad_logits, grad_scale};
  }

  // The loss and its gradient, that in `out` where it is defined; the logits are read once where the row fits the chip.
  static std::tuple<Tensor, Tensor> both(const All& all, OptionalDtype dtype, const Tensor& out) {
    const LossArguments& args = all.args;
    check_reduced(args.op, args.reduction);
    const Device device(args.input);
    LossProblem loss = problem(all, dtype);
    check_all_out(all, out);
    Tensor grad = empty_gradient(device, loss, out), computed = grad;
    if (loss.rows() == 0 || loss.input.numel() == 0) {  // rows without classes have a loss, and no gradient
      const Tensor value = std::get<0>(losses(all, dtype));
      return {value, finish_gradient(computed, grad, args.input.scalar_type(), out)};
    }
    Tensor value = empty_loss(loss, args.reduction);
    const Tensor row_stats = empty_beside(args.input, loss.stats_sizes(), loss.acc_dtype);
    const Arrays arrays = share_layout(loss, &computed);
    const CrossEntropyForward f = forward_problem(loss, arrays, row_stats);
    CrossEntropyBackward b = backward_problem(loss, arrays, computed, row_stats);
    device.value_and_grad(f, b, args, loss, computed, value);
    return {value, finish_gradient(computed, grad, args.input.scalar_type(), out)};
  }
};

}  // namespace nllx
