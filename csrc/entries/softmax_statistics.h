// The entries of softmax_statistics on any device, as those of nll_loss.
#pragma once

#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>

#include "../loss_problem.h"

namespace nllx {

template <typename Device>
struct SoftmaxStatisticsEntries {
  using Tensor = at::Tensor;

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, const OptionalTensor& target,
                                                                    const OptionalTensor& logit_scale,
                                                                    const OptionalTensor& temperature, int64_t dim,
                                                                    int64_t ignore_index, double scale,
                                                                    double sharpness, double softcap, bool with_entropy,
                                                                    bool with_prediction) {
    const Device device(logits);
    static const OptionalTensor none;
    LossProblem loss =
        problem(logits, target, dim, ignore_index, {none, logit_scale, temperature, scale, sharpness, softcap});
    const auto numbers = [&](bool wanted, at::ScalarType dtype) {
      return empty_beside(logits, wanted ? at::IntArrayRef(loss.row_sizes) : at::IntArrayRef({0}), dtype);
    };
    at::DimVector stats_sizes = loss.row_sizes;
    stats_sizes.push_back(3);
    Tensor log_prob = numbers(loss.targets.index, loss.acc_dtype), logsumexp = numbers(true, loss.acc_dtype),
           entropy = numbers(with_entropy, loss.acc_dtype), prediction = numbers(with_prediction, at::kLong),
           row_stats = empty_beside(logits, stats_sizes, loss.acc_dtype);
    if (loss.rows() > 0) {
      const Arrays arrays = share_layout(loss, nullptr);
      auto p = problem_of<SoftmaxStatisticsForward>(loss, arrays);
      if (loss.targets.index) p.log_prob = log_prob.mutable_data_ptr();
      p.logsumexp = logsumexp.mutable_data_ptr();
      if (with_entropy) p.entropy = entropy.mutable_data_ptr();
      if (with_prediction) p.prediction = prediction.mutable_data_ptr<int64_t>();
      p.row_stats = row_stats.mutable_data_ptr();
      device.forward(p, arguments(logits, target, ignore_index), loss);
    }
    return {log_prob, logsumexp, entropy, prediction, row_stats};
  }

  static std::tuple<Tensor, Tensor> backward(const OptionalTensor& grad_log_prob, const OptionalTensor& grad_logsumexp,
                                             const OptionalTensor& grad_entropy, const Tensor& logits,
                                             const OptionalTensor& target, const OptionalTensor& logit_scale,
                                             const OptionalTensor& temperature, const Tensor& row_stats, int64_t dim,
                                             int64_t ignore_index, double scale, double sharpness, double softcap,
                                             bool with_entropy, bool /*with_prediction*/,
                                             std::array<bool, 2> output_mask) {
    const Device device(logits);
    static const OptionalTensor none;
    LossProblem loss =
        problem(logits, target, dim, ignore_index, {none, logit_scale, temperature, scale, sharpness, softcap});
    check_saved("softmax_statistics", "row_stats", row_stats, loss.acc_dtype, 3 * loss.rows(), logits);
    const auto incoming = [&](const OptionalTensor& g, bool wanted) {
      if (!wanted || !g.has_value() || !g->defined()) return Tensor();
      check_grad_output("softmax_statistics", *g, loss.rows(), logits);
      return aligned(g->to(loss.acc_dtype).contiguous());
    };
    const Tensor log_prob = incoming(grad_log_prob, loss.targets.index), logsumexp = incoming(grad_logsumexp, true),
                 entropy = incoming(grad_entropy, with_entropy);
    Tensor grad_scale;
    if (output_mask[1] && loss.logit_scale.defined()) grad_scale = at::zeros_like(loss.logit_scale);
    Tensor grad = device.empty_like(loss.input), computed = grad;
    if (grad.numel() > 0) {
      const Arrays arrays = share_layout(loss, &computed);
      const Tensor stats = aligned(row_stats.contiguous());
      auto p = problem_of<SoftmaxStatisticsBackward>(loss, arrays);
      p.row_stats = stats.const_data_ptr();
      if (log_prob.defined()) p.grad_log_prob = log_prob.const_data_ptr();
      if (logsumexp.defined()) p.grad_logsumexp = logsumexp.const_data_ptr();
      if (entropy.defined()) p.grad_entropy = entropy.const_data_ptr();
      p.grad_logits = computed.mutable_data_ptr();
      p.grad_strides = arrays.strides[1];
      device.backward(p, arguments(logits, target, ignore_index), loss, computed, grad_scale);
    }
    Tensor grad_logits;
    if (output_mask[0]) grad_logits = finish_gradient(computed, grad, logits.scalar_type());
    if (grad_scale.defined()) grad_scale = grad_scale.to(logit_scale->scalar_type());
    return {grad_logits, grad_scale};
  }

  static void implement(torch::Library& m) {
    m.impl("softmax_statistics_forward", &forward);
    m.impl("softmax_statistics_backward", &backward);
  }

 private:
  static LossProblem problem(const Tensor& logits, const OptionalTensor& target, int64_t dim, int64_t ignore_index,
                             const LossOptions& options) {
    LossProblem loss = make_statistics_problem("softmax_statistics", logits, target, dim, ignore_index);
    take_options(loss, "softmax_statistics", options);
    return loss;
  }

  // What an index out of range is reported with.
  static LossArguments arguments(const Tensor& logits, const OptionalTensor& target, int64_t ignore_index) {
    static const OptionalTensor none;
    return {"softmax_statistics", "logits", false, logits, target.has_value() ? *target : logits, none, 0,
            ignore_index};
  }
};

}  // namespace nllx
