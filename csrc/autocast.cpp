// Autocast: torch computes these losses in float32 there. nllx does so anyway, so half-precision logits go in as they
// are, without a float32 copy, and only the loss comes out in float32. Weights of another precision are cast, as torch
// casts them. log_softmax is cast on CUDA alone, as in torch.
#include <ATen/autocast_mode.h>
#include <ATen/ops/ones_like.h>
#include <torch/library.h>

#include "checks.h"
#include "ops.h"

namespace nllx {

using at::Tensor;

namespace {

bool is_half(const Tensor& t) { return t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16; }

OptionalDtype float32_loss(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                           OptionalDtype dtype) {
  const bool is_double = target.scalar_type() == at::kDouble ||
                         (at::isFloatingType(target.scalar_type()) && weight.has_value() && weight->defined() &&
                          weight->scalar_type() == at::kDouble);  // probabilities promote the loss to float64
  return !dtype.has_value() && is_half(input) && !is_double ? OptionalDtype(at::kFloat) : dtype;
}

OptionalTensor cast_weight(const OptionalTensor& weight, c10::DeviceType device) {
  if (!weight.has_value() || !weight->defined()) return weight;
  return at::autocast::cached_cast(at::kFloat, *weight, device);
}

template <c10::DeviceType device>
Tensor cross_entropy_autocast(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                              int64_t reduction, c10::SymInt ignore_index, double label_smoothing, OptionalDtype dtype,
                              bool inplace_backward) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  return nllx::cross_entropy(logits, target, cast_weight(weight, device), reduction, std::move(ignore_index),
                             label_smoothing, float32_loss(logits, target, weight, dtype), inplace_backward);
}

template <c10::DeviceType device>
std::tuple<Tensor, Tensor> cross_entropy_value_and_grad(const Tensor& logits, const Tensor& target,
                                                        const OptionalTensor& weight, int64_t reduction,
                                                        c10::SymInt ignore_index, double label_smoothing,
                                                        OptionalDtype dtype) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("nllx::cross_entropy_value_and_grad", "")
                             .typed<decltype(cross_entropy_value_and_grad<device>)>();
  return op.call(logits, target, cast_weight(weight, device), reduction, ignore_index, label_smoothing,
                 float32_loss(logits, target, weight, dtype));
}

template <c10::DeviceType device>
Tensor cross_entropy_value_and_grad_out(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                        int64_t reduction, c10::SymInt ignore_index, double label_smoothing,
                                        OptionalDtype dtype, Tensor& out) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("nllx::cross_entropy_value_and_grad_out", "")
                             .typed<decltype(cross_entropy_value_and_grad_out<device>)>();
  return op.call(logits, target, cast_weight(weight, device), reduction, ignore_index, label_smoothing,
                 float32_loss(logits, target, weight, dtype), out);
}

template <c10::DeviceType device>
Tensor nll_loss_autocast(const Tensor& log_probs, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                         c10::SymInt ignore_index, OptionalDtype dtype) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  return nllx::nll_loss(log_probs, target, cast_weight(weight, device), reduction, std::move(ignore_index),
                        float32_loss(log_probs, target, weight, dtype));
}

Tensor log_softmax_cuda(const Tensor& input, int64_t dim, OptionalDtype dtype) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(c10::kCUDA));
  return nllx::log_softmax(input, dim, !dtype.has_value() && is_half(input) ? OptionalDtype(at::kFloat) : dtype);
}

bool enabled(c10::DeviceType device) {
  return (device == c10::kCPU || device == c10::kCUDA) && at::autocast::is_autocast_enabled(device);
}

// functorch's front mode comes before autocast, so it applies autocast itself. Then the losses are their forward
// operator's first output: CompositeImplicitAutograd would run the C++ autograd function, which functorch cannot
// differentiate.
Tensor cross_entropy_functorch(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, c10::SymInt ignore_index, double label_smoothing, OptionalDtype dtype,
                               bool inplace_backward) {
  const c10::DeviceType device = logits.device().type();
  if (enabled(device)) {
    return (device == c10::kCPU ? cross_entropy_autocast<c10::kCPU>
                                : cross_entropy_autocast<c10::kCUDA>)(logits, target, weight, reduction,
                                                                      std::move(ignore_index), label_smoothing, dtype,
                                                                      inplace_backward);
  }
  return std::get<0>(
      cross_entropy_forward(logits, target, weight, reduction, std::move(ignore_index), label_smoothing, dtype));
}

std::tuple<Tensor, Tensor> cross_entropy_value_and_grad_functorch(const Tensor& logits, const Tensor& target,
                                                                  const OptionalTensor& weight, int64_t reduction,
                                                                  c10::SymInt ignore_index, double label_smoothing,
                                                                  OptionalDtype dtype) {
  const c10::DeviceType device = logits.device().type();
  if (enabled(device)) {
    return (device == c10::kCPU ? cross_entropy_value_and_grad<c10::kCPU>
                                : cross_entropy_value_and_grad<c10::kCUDA>)(logits, target, weight, reduction,
                                                                            std::move(ignore_index), label_smoothing,
                                                                            dtype);
  }
  check_reduced("cross_entropy", reduction);
  // The results have no graph.
  const Tensor x = logits.detach(), y = target.detach();
  const OptionalTensor w = weight.has_value() && weight->defined() ? OptionalTensor(weight->detach()) : std::nullopt;
  auto [loss, row_stats, total_weight] =
      cross_entropy_forward(x, y, w, reduction, ignore_index, label_smoothing, dtype);
  Tensor grad = cross_entropy_backward(at::ones_like(loss), x, y, w, row_stats, total_weight, reduction, ignore_index,
                                       label_smoothing);
  return {std::move(loss), std::move(grad)};
}

Tensor cross_entropy_value_and_grad_out_functorch(const Tensor& logits, const Tensor& target,
                                                  const OptionalTensor& weight, int64_t reduction,
                                                  c10::SymInt ignore_index, double label_smoothing, OptionalDtype dtype,
                                                  Tensor& out) {
  // The gradient is copied there when all is read, so it may lie anywhere.
  TORCH_CHECK(out.sym_sizes() == logits.sym_sizes() && out.scalar_type() == logits.scalar_type() &&
                  out.device() == logits.device(),
              "cross_entropy: out must have shape ", logits.sym_sizes(), " and dtype ", logits.scalar_type(), " on ",
              logits.device().str(), ", as logits has, but got ", out.sym_sizes(), " and ", out.scalar_type(), " on ",
              out.device().str());
  auto [loss, grad] = cross_entropy_value_and_grad_functorch(logits, target, weight, reduction, std::move(ignore_index),
                                                             label_smoothing, dtype);
  const at::NoGradGuard no_grad;
  out.copy_(grad);
  return loss;
}

Tensor nll_loss_functorch(const Tensor& log_probs, const Tensor& target, const OptionalTensor& weight,
                          int64_t reduction, c10::SymInt ignore_index, OptionalDtype dtype) {
  const c10::DeviceType device = log_probs.device().type();
  if (enabled(device)) {
    return (device == c10::kCPU
                ? nll_loss_autocast<c10::kCPU>
                : nll_loss_autocast<c10::kCUDA>)(log_probs, target, weight, reduction, std::move(ignore_index), dtype);
  }
  return std::get<0>(nll_loss_forward(log_probs, target, weight, reduction, std::move(ignore_index), dtype));
}

Tensor log_softmax_functorch(const Tensor& input, int64_t dim, OptionalDtype dtype) {
  if (input.is_cuda() && enabled(c10::kCUDA)) return log_softmax_cuda(input, dim, dtype);
  return log_softmax_forward(dtype.has_value() ? input.to(*dtype) : input, dim);
}

}  // namespace

TORCH_LIBRARY_IMPL(nllx, AutocastCPU, m) {
  m.impl("cross_entropy", &cross_entropy_autocast<c10::kCPU>);
  m.impl("nll_loss", &nll_loss_autocast<c10::kCPU>);
  m.impl("cross_entropy_value_and_grad", &cross_entropy_value_and_grad<c10::kCPU>);
  m.impl("cross_entropy_value_and_grad_out", &cross_entropy_value_and_grad_out<c10::kCPU>);
}
TORCH_LIBRARY_IMPL(nllx, AutocastCUDA, m) {
  m.impl("cross_entropy", &cross_entropy_autocast<c10::kCUDA>);
  m.impl("nll_loss", &nll_loss_autocast<c10::kCUDA>);
  m.impl("cross_entropy_value_and_grad", &cross_entropy_value_and_grad<c10::kCUDA>);
  m.impl("cross_entropy_value_and_grad_out", &cross_entropy_value_and_grad_out<c10::kCUDA>);
  m.impl("log_softmax", &log_softmax_cuda);
}

TORCH_LIBRARY_IMPL(nllx, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("cross_entropy", &cross_entropy_functorch);
  m.impl("cross_entropy_value_and_grad", &cross_entropy_value_and_grad_functorch);
  m.impl("cross_entropy_value_and_grad_out", &cross_entropy_value_and_grad_out_functorch);
  m.impl("nll_loss", &nll_loss_functorch);
  m.impl("log_softmax", &log_softmax_functorch);
}

}  // namespace nllx
