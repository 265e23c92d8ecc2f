// Every operator's schema, and the calls to them through the dispatcher.
//
// reduction: 0 none, 1 mean, 2 sum, 3 the mean that is 0 over nothing. Shapes, dtypes and errors are those of the
// public functions in nllx/functional.py.
#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>
#include <vector>

#ifdef NLLX_WITH_CUDA
#include "cuda/bad_target.h"
#endif

namespace nllx {

using at::Tensor;

TORCH_LIBRARY(nllx, m) {
  // The losses: what users call. `dtype` is that of the loss, by default torch's; float32 keeps the loss of
  // half-precision logits from being rounded to half precision. `inplace_backward`: the gradient may be written over
  // the logits.
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight=None, int reduction=1, SymInt ignore_index=-100, "
      "float label_smoothing=0.0, ScalarType? dtype=None, bool inplace_backward=False) -> Tensor");
  m.def(
      "nll_loss(Tensor log_probs, Tensor target, Tensor? weight=None, int reduction=1, SymInt ignore_index=-100, "
      "ScalarType? dtype=None) -> Tensor");
  m.def("log_softmax(Tensor input, int dim, ScalarType? dtype=None) -> Tensor");

  // Loss and gradient of the logits at once, for training steps without autograd's graph. The gradient goes to `out`,
  // which may be the logits.
  m.def(
      "cross_entropy_value_and_grad(Tensor logits, Tensor target, Tensor? weight=None, int reduction=1, SymInt "
      "ignore_index=-100, float label_smoothing=0.0, ScalarType? dtype=None) -> (Tensor loss, Tensor grad)");
  m.def(
      "cross_entropy_value_and_grad_out(Tensor logits, Tensor target, Tensor? weight, int reduction, SymInt "
      "ignore_index, float label_smoothing, ScalarType? dtype, Tensor(a!) out) -> Tensor loss");

  // What they are made of: forward kernels with what the backward needs, and the backward kernels.
  // row_stats: (..., 2), for each row its maximum m and log Σ exp(x - m); zeros for ignored rows. float64 for float64
  // logits, else float32; so is total_weight.
  // total_weight: the divisor of the mean.
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight=None, int reduction=1, "
      "SymInt ignore_index=-100, "
      "float label_smoothing=0.0, ScalarType? dtype=None) -> (Tensor loss, Tensor row_stats, Tensor total_weight)");
  m.def(
      "cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, Tensor row_stats, "
      "Tensor total_weight, int reduction, SymInt ignore_index, float label_smoothing) -> Tensor");
  m.def(
      "cross_entropy_backward.out(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, Tensor row_stats, "
      "Tensor total_weight, int reduction, SymInt ignore_index, float label_smoothing, *, Tensor(a!) out) -> "
      "Tensor(a!)");
  m.def(
      "nll_loss_forward(Tensor log_probs, Tensor target, Tensor? weight=None, int reduction=1, SymInt "
      "ignore_index=-100, "
      "ScalarType? dtype=None) -> (Tensor loss, Tensor total_weight)");
  m.def(
      "nll_loss_backward(Tensor grad_output, Tensor log_probs, Tensor target, Tensor? weight, Tensor total_weight, "
      "int reduction, SymInt ignore_index) -> Tensor");
  m.def("log_softmax_forward(Tensor input, int dim) -> Tensor");
  m.def("log_softmax_backward(Tensor grad_output, Tensor output, int dim) -> Tensor");

  // The same six by their definition in differentiable torch operations (nllx/_reference.py): where a gradient of
  // higher order, a forward derivative, or the gradient of probabilities or weights is asked for.
  m.def(
      "_cross_entropy_forward_definition(Tensor logits, Tensor target, Tensor? weight, int reduction, "
      "SymInt ignore_index, "
      "float label_smoothing, ScalarType? dtype) -> (Tensor loss, Tensor row_stats, Tensor total_weight)");
  m.def(
      "_cross_entropy_backward_definition(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, Tensor "
      "row_stats, "
      "Tensor total_weight, int reduction, SymInt ignore_index, float label_smoothing) -> Tensor");
  m.def(
      "_nll_loss_forward_definition(Tensor log_probs, Tensor target, Tensor? weight, int reduction, SymInt "
      "ignore_index, "
      "ScalarType? dtype) -> (Tensor loss, Tensor total_weight)");
  m.def(
      "_nll_loss_backward_definition(Tensor grad_output, Tensor log_probs, Tensor target, Tensor? weight, "
      "Tensor total_weight, int reduction, SymInt ignore_index) -> Tensor");
  m.def("_log_softmax_forward_definition(Tensor input, int dim) -> Tensor");
  m.def("_log_softmax_backward_definition(Tensor grad_output, Tensor output, int dim) -> Tensor");

  // The gradients of the arguments at the places `which`, by the definition: for torch.func.grad.
  for (const std::string name : kOperations) {
    const c10::FunctionSchema& schema =
        c10::Dispatcher::singleton().findSchemaOrThrow(("nllx::" + name).c_str(), "").schema();
    std::vector<c10::Argument> arguments{c10::Argument("grad_loss", c10::TensorType::get())};
    arguments.insert(arguments.end(), schema.arguments().begin(), schema.arguments().end());
    arguments.emplace_back("which", c10::ListType::ofInts());
    m.def(c10::FunctionSchema("nllx::_" + name + "_vjp", "", std::move(arguments),
                              {c10::Argument("gradients", c10::ListType::ofTensors())}));
  }

  // For the definitions: the classes of `target` as int64, 0 where it is ignore_index; IndexError where it is neither.
  // A check that Python made would be removed by torch.compile.
  m.def("_checked_target(Tensor target, SymInt classes, SymInt ignore_index, str op) -> Tensor");

  // Raises IndexError for a class index out of range that a kernel has met on a GPU and nothing has raised yet.
  m.def("_check_errors() -> ()", [] {
#ifdef NLLX_WITH_CUDA
    raise_pending_bad_target();
#endif
  });
}

Tensor cross_entropy(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                     c10::SymInt ignore_index, double label_smoothing, OptionalDtype dtype, bool inplace_backward) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("nllx::cross_entropy", "").typed<decltype(cross_entropy)>();
  return op.call(logits, target, weight, reduction, ignore_index, label_smoothing, dtype, inplace_backward);
}

Tensor nll_loss(const Tensor& log_probs, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                c10::SymInt ignore_index, OptionalDtype dtype) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("nllx::nll_loss", "").typed<decltype(nll_loss)>();
  return op.call(log_probs, target, weight, reduction, ignore_index, dtype);
}

Tensor log_softmax(const Tensor& input, int64_t dim, OptionalDtype dtype) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("nllx::log_softmax", "").typed<decltype(log_softmax)>();
  return op.call(input, dim, dtype);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                         const OptionalTensor& weight, int64_t reduction,
                                                         c10::SymInt ignore_index, double label_smoothing,
                                                         OptionalDtype dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("nllx::cross_entropy_forward", "")
                             .typed<decltype(cross_entropy_forward)>();
  return op.call(logits, target, weight, reduction, ignore_index, label_smoothing, dtype);
}

Tensor cross_entropy_backward(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                              const OptionalTensor& weight, const Tensor& row_stats, const Tensor& total_weight,
                              int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("nllx::cross_entropy_backward", "")
                             .typed<decltype(cross_entropy_backward)>();
  return op.call(grad_output, logits, target, weight, row_stats, total_weight, reduction, ignore_index,
                 label_smoothing);
}

Tensor& cross_entropy_backward_out(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                                   const OptionalTensor& weight, const Tensor& row_stats, const Tensor& total_weight,
                                   int64_t reduction, c10::SymInt ignore_index, double label_smoothing, Tensor& out) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("nllx::cross_entropy_backward", "out")
                             .typed<decltype(cross_entropy_backward_out)>();
  return op.call(grad_output, logits, target, weight, row_stats, total_weight, reduction, ignore_index, label_smoothing,
                 out);
}

std::tuple<Tensor, Tensor> nll_loss_forward(const Tensor& log_probs, const Tensor& target, const OptionalTensor& weight,
                                            int64_t reduction, c10::SymInt ignore_index, OptionalDtype dtype) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("nllx::nll_loss_forward", "").typed<decltype(nll_loss_forward)>();
  return op.call(log_probs, target, weight, reduction, ignore_index, dtype);
}

Tensor nll_loss_backward(const Tensor& grad_output, const Tensor& log_probs, const Tensor& target,
                         const OptionalTensor& weight, const Tensor& total_weight, int64_t reduction,
                         c10::SymInt ignore_index) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("nllx::nll_loss_backward", "")
                             .typed<decltype(nll_loss_backward)>();
  return op.call(grad_output, log_probs, target, weight, total_weight, reduction, ignore_index);
}

Tensor log_softmax_forward(const Tensor& input, int64_t dim) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("nllx::log_softmax_forward", "")
                             .typed<decltype(log_softmax_forward)>();
  return op.call(input, dim);
}

Tensor log_softmax_backward(const Tensor& grad_output, const Tensor& output, int64_t dim) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("nllx::log_softmax_backward", "")
                             .typed<decltype(log_softmax_backward)>();
  return op.call(grad_output, output, dim);
}

namespace {

Tensor cross_entropy_composite(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                               int64_t reduction, c10::SymInt ignore_index, double label_smoothing, OptionalDtype dtype,
                               bool inplace_backward) {
  if (inplace_backward) {
    return cross_entropy_inplace_backward(logits, target, weight, reduction, std::move(ignore_index), label_smoothing,
                                          dtype);
  }
  return std::get<0>(cross_entropy_forward_autograd(logits, target, weight, reduction, std::move(ignore_index),
                                                    label_smoothing, dtype));
}

Tensor nll_loss_composite(const Tensor& log_probs, const Tensor& target, const OptionalTensor& weight,
                          int64_t reduction, c10::SymInt ignore_index, OptionalDtype dtype) {
  return std::get<0>(nll_loss_forward_autograd(log_probs, target, weight, reduction, std::move(ignore_index), dtype));
}

Tensor log_softmax_composite(const Tensor& input, int64_t dim, OptionalDtype dtype) {
  return log_softmax_forward_autograd(dtype.has_value() ? input.to(*dtype) : input, dim);
}

}  // namespace

TORCH_LIBRARY_IMPL(nllx, CompositeImplicitAutograd, m) {
  m.impl("cross_entropy", &cross_entropy_composite);
  m.impl("nll_loss", &nll_loss_composite);
  m.impl("log_softmax", &log_softmax_composite);
}

}  // namespace nllx
