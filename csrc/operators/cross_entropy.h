#pragma once

#include "loss.h"

namespace nllx {

struct CrossEntropy : Float32Loss {
  // dtype: that of the loss, by default torch's; float32 keeps the loss of half-precision logits from being rounded to
  // half precision. inplace_backward: the gradient may be written over the logits.
  static constexpr const char* kSchema =
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight=None, int reduction=1, SymInt ignore_index=-100, "
      "float label_smoothing=0.0, ScalarType? dtype=None, bool inplace_backward=False) -> Tensor loss";
  using Signature = at::Tensor(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, c10::SymInt ignore_index, double label_smoothing, OptionalDtype dtype,
                               bool inplace_backward);

  template <typename Forward>
  static at::Tensor apply(const Forward& forward, const at::Tensor& logits, const at::Tensor& target,
                          const OptionalTensor& weight, int64_t reduction, c10::SymInt ignore_index,
                          double label_smoothing, OptionalDtype dtype, bool /*inplace_backward*/) {
    return std::get<0>(forward(logits, target, weight, reduction, ignore_index, label_smoothing, dtype));
  }
};

}  // namespace nllx
