#pragma once

#include "loss.h"

namespace nllx {

// Loss of logits z = sharpness / temperature softcap tanh(scale logit_scale x / softcap), without a softcap (0) of
// z = sharpness / temperature scale logit_scale x; times sample_weight, with z_loss times the square of the log-sum-exp
// added before.
struct CrossEntropy : Float32Loss {
  // dtype: that of the loss, by default torch's; float32 keeps the loss of half-precision logits from being rounded to
  // half precision. inplace_backward: the gradient may be written over the logits.
  static constexpr const char* kSchema =
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight=None, Tensor? sample_weight=None, Tensor? "
      "logit_scale=None, Tensor? temperature=None, Tensor? divisor=None, int reduction=1, SymInt ignore_index=-100, "
      "float label_smoothing=0.0, float scale=1.0, float sharpness=1.0, float softcap=0.0, float z_loss=0.0, "
      "ScalarType? dtype=None, bool inplace_backward=False) -> Tensor loss";
  using Signature = at::Tensor(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                               const OptionalTensor& sample_weight, const OptionalTensor& logit_scale,
                               const OptionalTensor& temperature, const OptionalTensor& divisor, int64_t reduction,
                               c10::SymInt ignore_index, double label_smoothing, double scale, double sharpness,
                               double softcap, double z_loss, OptionalDtype dtype, bool inplace_backward);

  template <typename Forward>
  static at::Tensor apply(const Forward& forward, const at::Tensor& logits, const at::Tensor& target,
                          const OptionalTensor& weight, const OptionalTensor& sample_weight,
                          const OptionalTensor& logit_scale, const OptionalTensor& temperature,
                          const OptionalTensor& divisor, int64_t reduction, c10::SymInt ignore_index,
                          double label_smoothing, double scale, double sharpness, double softcap, double z_loss,
                          OptionalDtype dtype, bool /*inplace_backward*/) {
    return std::get<0>(forward(logits, target, weight, sample_weight, logit_scale, temperature, divisor, reduction,
                               ignore_index, label_smoothing, scale, sharpness, softcap, z_loss, dtype));
  }
};

}  // namespace nllx
