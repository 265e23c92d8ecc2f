#pragma once

#include "loss.h"

namespace nllx {

// Functions of the softmax of each row along `dim`, of logits that the options map as those of cross_entropy. What is
// not asked for has no elements: log_prob without a target, entropy and prediction without their flags.
struct SoftmaxStatistics {
  static constexpr const char* kSchema =
      "softmax_statistics(Tensor logits, Tensor? target=None, Tensor? logit_scale=None, Tensor? temperature=None, int "
      "dim=-1, SymInt ignore_index=-100, float scale=1.0, float sharpness=1.0, float softcap=0.0, bool "
      "with_entropy=True, bool with_prediction=True) -> (Tensor log_prob, Tensor logsumexp, Tensor entropy, Tensor "
      "prediction)";
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor& logits, const OptionalTensor& target, const OptionalTensor& logit_scale,
      const OptionalTensor& temperature, int64_t dim, c10::SymInt ignore_index, double scale, double sharpness,
      double softcap, bool with_entropy, bool with_prediction);

  template <typename Forward, typename... A>
  static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> apply(const Forward& forward,
                                                                          const A&... arguments) {
    auto [log_prob, logsumexp, entropy, prediction, row_stats] = forward(arguments...);
    return {log_prob, logsumexp, entropy, prediction};
  }

  // Its results are float32 or wider anyway.
  static constexpr bool kCpuAutocast = false;
  template <typename Arguments>
  static void autocast(Arguments& /*arguments*/, c10::DeviceType /*device*/) {}
};

}  // namespace nllx
