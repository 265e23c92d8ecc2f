#pragma once

#include <ATen/native/TypeProperties.h>

#include "loss.h"

namespace nllx {

// Input, target and weight have one shape: nllx.functional broadcasts.
struct MseLoss {
  static constexpr const char* kSchema =
      "mse_loss(Tensor input, Tensor target, Tensor? weight=None, int reduction=1, ScalarType? dtype=None) -> Tensor "
      "loss";
  using Signature = at::Tensor(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, OptionalDtype dtype);

  // That of the loss, as torch's operators promote.
  static at::ScalarType promoted(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight) {
    const at::ScalarType type = at::result_type(input, target);
    const at::Tensor& w = tensor_of(weight);
    return w.defined() ? c10::promoteTypes(type, w.scalar_type()) : type;
  }

  // Input and target in one dtype, the weight in it or in the one that sums are made in. Half precision stays as it is
  // beside a weight of float32.
  template <typename Forward>
  static at::Tensor apply(const Forward& forward, const at::Tensor& input, const at::Tensor& target,
                          const OptionalTensor& weight, int64_t reduction, OptionalDtype dtype) {
    const at::ScalarType loss = promoted(input, target, weight);
    at::ScalarType type = at::result_type(input, target);
    if (loss == at::kDouble && at::isFloatingType(type)) type = loss;
    // Integers are not rounded to half precision where autocast asks for float32.
    const bool has_integers = !at::isFloatingType(input.scalar_type()) || !at::isFloatingType(target.scalar_type());
    if (has_integers && dtype.has_value() && (type == at::kHalf || type == at::kBFloat16)) type = *dtype;
    OptionalTensor w;
    if (tensor_of(weight).defined()) {
      const bool is_taken = weight->scalar_type() == type || at::isComplexType(weight->scalar_type());
      w = is_taken ? *weight : weight->to(type == at::kDouble ? at::kDouble : at::kFloat);
    }
    const auto as = [&](const at::Tensor& t) { return t.scalar_type() == type ? t : t.to(type); };
    if (!dtype.has_value() && loss != type) dtype = loss;
    return std::get<0>(forward(as(input), as(target), w, reduction, dtype));
  }

  // float32, as torch has it, of which only the loss is made.
  static constexpr bool kCpuAutocast = true;
  template <typename Arguments>
  static void autocast(Arguments& arguments, c10::DeviceType /*device*/) {
    OptionalDtype& dtype = std::get<OptionalDtype>(arguments);
    const at::ScalarType loss = promoted(std::get<0>(arguments), std::get<1>(arguments), std::get<2>(arguments));
    if (!dtype.has_value() && (loss == at::kHalf || loss == at::kBFloat16)) dtype = at::kFloat;
  }
};

}  // namespace nllx
