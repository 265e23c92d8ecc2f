// Autocast: torch computes these losses in float32 there. nllx does so anyway, so half-precision logits go in as they
// are, without a float32 copy, and only the loss comes out in float32. Weights of another precision are cast, as torch
// casts them. log_softmax is cast on CUDA alone, as in torch.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops.h"

namespace nllx {

using at::Tensor;

namespace {

OptionalDtype float32_loss(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                           OptionalDtype dtype) {
  const at::ScalarType t = input.scalar_type();
  const bool half = t == at::kHalf || t == at::kBFloat16;
  const bool is_double = target.scalar_type() == at::kDouble ||
                         (at::isFloatingType(target.scalar_type()) && weight.has_value() && weight->defined() &&
                          weight->scalar_type() == at::kDouble);  // probabilities promote the loss to float64
  return !dtype.has_value() && half && !is_double ? OptionalDtype(at::kFloat) : dtype;
}

OptionalTensor cast_weight(const OptionalTensor& weight, c10::DeviceType device) {
  if (!weight.has_value() || !weight->defined()) return weight;
  return at::autocast::cached_cast(at::kFloat, *weight, device);
}

template <c10::DeviceType device>
Tensor cross_entropy(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                     int64_t ignore_index, double label_smoothing, OptionalDtype dtype) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("nllx::cross_entropy", "")
                             .typed<decltype(cross_entropy<device>)>();
  return op.call(logits, target, cast_weight(weight, device), reduction, ignore_index, label_smoothing,
                 float32_loss(logits, target, weight, dtype));
}

template <c10::DeviceType device>
Tensor nll_loss(const Tensor& log_probs, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                int64_t ignore_index, OptionalDtype dtype) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("nllx::nll_loss", "").typed<decltype(nll_loss<device>)>();
  return op.call(log_probs, target, cast_weight(weight, device), reduction, ignore_index,
                 float32_loss(log_probs, target, weight, dtype));
}

Tensor log_softmax_cuda(const Tensor& input, int64_t dim, OptionalDtype dtype) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(c10::kCUDA));
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("nllx::log_softmax", "").typed<decltype(log_softmax_cuda)>();
  return op.call(input, dim, float32_loss(input, input, std::nullopt, dtype));
}

}  // namespace

TORCH_LIBRARY_IMPL(nllx, AutocastCPU, m) {
  m.impl("cross_entropy", &cross_entropy<c10::kCPU>);
  m.impl("nll_loss", &nll_loss<c10::kCPU>);
}
TORCH_LIBRARY_IMPL(nllx, AutocastCUDA, m) {
  m.impl("cross_entropy", &cross_entropy<c10::kCUDA>);
  m.impl("nll_loss", &nll_loss<c10::kCUDA>);
  m.impl("log_softmax", &log_softmax_cuda);
}

}  // namespace nllx
