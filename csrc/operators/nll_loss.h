#pragma once

#include "loss.h"

namespace nllx {

struct NllLoss : Float32Loss {
  static constexpr const char* kSchema =
      "nll_loss(Tensor log_probs, Tensor target, Tensor? weight=None, int reduction=1, SymInt ignore_index=-100, "
      "ScalarType? dtype=None) -> Tensor loss";
  using Signature = at::Tensor(const at::Tensor& log_probs, const at::Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, c10::SymInt ignore_index, OptionalDtype dtype);

  template <typename Forward, typename... A>
  static at::Tensor apply(const Forward& forward, const A&... arguments) {
    return std::get<0>(forward(arguments...));
  }
};

}  // namespace nllx
