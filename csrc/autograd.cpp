// Autograd of every operator, in C++, so that a training step runs no Python. The kernels give the first derivative
// with respect to logits or log-probabilities; every other derivative (of higher order, forward, with respect to
// probability targets or weights) comes from the definition in nllx/_reference.py, which torch differentiates.
#include <ATen/FuncTorchTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "backward_node.h"
#include "checks.h"
#include "ops.h"

namespace nllx {

using at::Tensor;

namespace {

bool defined(const OptionalTensor& t) { return t.has_value() && t->defined(); }

bool requires_grad(const Tensor& t) { return at::GradMode::is_enabled() && t.requires_grad(); }
bool requires_grad(const OptionalTensor& t) { return defined(t) && requires_grad(*t); }

bool has_tangent(const Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); }
bool has_tangent(const OptionalTensor& t) { return defined(t) && has_tangent(*t); }

template <typename... Tensors>
bool any_requires_grad(const Tensors&... tensors) {
  return (requires_grad(tensors) || ...);
}
template <typename... Tensors>
bool any_has_tangent(const Tensors&... tensors) {
  return (has_tangent(tensors) || ...);
}

// Seen by a compiler or another mode, which need not have the memory that is written to.
bool is_traced(const Tensor& t) {
  return t.key_set().has_any(c10::python_ks | c10::DispatchKeySet(c10::DispatchKey::Functionalize)) ||
         c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// functorch differentiates operators, not nodes of C++; its calls go another way (nllx/_transforms.py).
void check_no_functorch() {
  if (const auto& functorch = at::functorch::functorchTLSAccessor()) functorch->checkSupportsCppAutogradFunction();
}

// Whether no other tensor lies in the memory of t, but the one that it is a view of, which autograd keeps and whose
// version is that of t. Others (t.detach(), t.data, an array of NumPy) may be read later, and need not notice a change.
bool is_alone_in_memory(const Tensor& t) {
  const c10::Storage& storage = t.storage();
  if (!storage.resizable()) return false;  // of NumPy, or of another process: not torch's own
  const auto* meta = torch::autograd::impl::get_view_autograd_meta(t);
  const bool of_base = meta && meta->has_bw_view() && storage.is_alias_of(meta->get_backward_view().base_.storage());
  return storage.use_count() <= (of_base ? 2 : 1);
}

Tensor or_undefined(const OptionalTensor& t) { return t.value_or(Tensor()); }
OptionalTensor or_none(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

}  // namespace

void check_weight_gradient(const char* op, const Tensor& target, const OptionalTensor& weight) {
  TORCH_CHECK(
      at::isFloatingType(target.scalar_type()) || !(requires_grad(weight) || has_tangent(weight)), "The function '", op,
      "' is not differentiable with respect to argument 'weight' for targets that are class indices. This input "
      "cannot have requires_grad True: call weight.detach()");
}

// ---- cross_entropy ----
//
// The statistics (of the rows, and the divisor of the mean) go to the backward and to the caller, but are no outputs of
// the autograd node: they have no derivative.

struct CrossEntropyBackwardOp {
  static constexpr const char* kName = "NllxCrossEntropyBackward";
  static constexpr size_t kSaved = 5;  // logits, target, weight, row_stats, total_weight
  static constexpr size_t kArguments = 3;
  static constexpr bool kSavesOutput = false;

  int64_t reduction = 0;
  c10::SymInt ignore_index;
  double label_smoothing = 0;
  bool inplace_backward = false;

  template <typename F>
  void visit(const F& f) {
    f(reduction), f(ignore_index), f(label_smoothing), f(inplace_backward);
  }
  template <typename F>
  void visit(const F& f) const {
    f(reduction), f(ignore_index), f(label_smoothing), f(inplace_backward);
  }

  Tensor backward(const Tensor& grad_output, const std::array<Tensor, kSaved>& saved) const {
    // A gradient that is itself differentiated needs the logits.
    if (inplace_backward && !at::GradMode::is_enabled() && !is_traced(saved[0]) && !is_traced(grad_output) &&
        !any_has_tangent(grad_output, saved[0], saved[1]) && is_alone_in_memory(saved[0])) {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      Tensor logits = saved[0].detach();
      saved[0].unsafeGetTensorImpl()->bump_version();  // whoever saved them, a second backward too, notices
      return cross_entropy_backward_out(grad_output, logits, saved[1], or_none(saved[2]), saved[3], saved[4], reduction,
                                        ignore_index, label_smoothing, logits);
    }
    return cross_entropy_backward(grad_output, saved[0], saved[1], or_none(saved[2]), saved[3], saved[4], reduction,
                                  ignore_index, label_smoothing);
  }
};

namespace {

// The forward below autograd, and the node of its backward.
std::tuple<Tensor, Tensor, Tensor> cross_entropy_with_backward(const Tensor& logits, const Tensor& target,
                                                               const OptionalTensor& weight, int64_t reduction,
                                                               c10::SymInt ignore_index, double label_smoothing,
                                                               OptionalDtype dtype, bool inplace_backward) {
  check_no_functorch();
  std::tuple<Tensor, Tensor, Tensor> result;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = cross_entropy_forward(logits, target, weight, reduction, ignore_index, label_smoothing, dtype);
  }
  const auto& [loss, row_stats, total_weight] = result;
  set_backward(logits, loss,
               CrossEntropyBackwardOp{reduction, std::move(ignore_index), label_smoothing, inplace_backward},
               {logits, target, or_undefined(weight), row_stats, total_weight});
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_autograd(const Tensor& logits, const Tensor& target,
                                                                  const OptionalTensor& weight, int64_t reduction,
                                                                  c10::SymInt ignore_index, double label_smoothing,
                                                                  OptionalDtype dtype) {
  check_weight_gradient("cross_entropy", target, weight);
  if (any_has_tangent(logits, target, weight) || any_requires_grad(target, weight)) {
    static const auto definition = c10::Dispatcher::singleton()
                                       .findSchemaOrThrow("nllx::_cross_entropy_forward_definition", "")
                                       .typed<decltype(cross_entropy_forward)>();
    return definition.call(logits, target, weight, reduction, ignore_index, label_smoothing, dtype);
  }
  if (!requires_grad(logits)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto result = cross_entropy_forward(logits, target, weight, reduction, ignore_index, label_smoothing, dtype);
    if (has_default_hooks() || versions_are_remembered())
      remember_versions(std::get<1>(result), {logits, target, or_undefined(weight)});
    return result;
  }
  return cross_entropy_with_backward(logits, target, weight, reduction, std::move(ignore_index), label_smoothing, dtype,
                                     /*inplace_backward=*/false);
}

// Autograd refuses to write into such a view, and could not tell of it where an operator does so behind its back.
bool is_view_of_leaf(const Tensor& t) {
  const auto* meta = torch::autograd::impl::get_view_autograd_meta(t);
  if (!meta || !meta->has_bw_view()) return false;
  const Tensor& base = meta->get_backward_view().base_;
  return base.is_leaf() && base.requires_grad();
}

Tensor cross_entropy_inplace_backward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                      int64_t reduction, c10::SymInt ignore_index, double label_smoothing,
                                      OptionalDtype dtype) {
  // Compilers plan the memory themselves; other derivatives need the logits; and hooks may hand out what they were
  // given, or what a checkpoint has computed again, to any number of backwards, none of which compares versions.
  if (!requires_grad(logits) || is_traced(logits) || has_default_hooks() || any_has_tangent(logits, target, weight) ||
      any_requires_grad(target, weight)) {
    return std::get<0>(cross_entropy_forward_autograd(logits, target, weight, reduction, std::move(ignore_index),
                                                      label_smoothing, dtype));
  }
  TORCH_CHECK(!logits.is_leaf(),
              "cross_entropy: inplace_backward writes the gradient over the logits, but logits is "
              "a leaf Variable that requires grad; call cross_entropy without inplace_backward, or give it the output "
              "of a layer");
  TORCH_CHECK(!is_view_of_leaf(logits),
              "cross_entropy: inplace_backward writes the gradient over the logits, but logits is a view of a leaf "
              "Variable that requires grad, which would lose its values; call cross_entropy without inplace_backward");
  check_no_internal_overlap("cross_entropy", "logits", logits);
  return std::get<0>(cross_entropy_with_backward(logits, target, weight, reduction, std::move(ignore_index),
                                                 label_smoothing, dtype, /*inplace_backward=*/true));
}

// The gradient is computed at once; results have no graph.
std::tuple<Tensor, Tensor> cross_entropy_value_and_grad_autograd(const Tensor& logits, const Tensor& target,
                                                                 const OptionalTensor& weight, int64_t reduction,
                                                                 c10::SymInt ignore_index, double label_smoothing,
                                                                 OptionalDtype dtype) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("nllx::cross_entropy_value_and_grad", "")
                             .typed<decltype(cross_entropy_value_and_grad_autograd)>();
  return op.call(logits, target, weight, reduction, std::move(ignore_index), label_smoothing, dtype);
}

Tensor cross_entropy_value_and_grad_out_autograd(const Tensor& logits, const Tensor& target,
                                                 const OptionalTensor& weight, int64_t reduction,
                                                 c10::SymInt ignore_index, double label_smoothing, OptionalDtype dtype,
                                                 Tensor& out) {
  TORCH_CHECK(!(requires_grad(out) && out.is_leaf()),
              "cross_entropy_value_and_grad: out is a leaf Variable that requires grad; it would lose its values: give "
              "out.detach(), or another tensor");
  TORCH_CHECK(
      !out.is_neg() && !out.is_conj(),
      "cross_entropy_value_and_grad: out is a negated view, whose memory holds other numbers; give another tensor");
  TORCH_CHECK(!(requires_grad(out) && is_view_of_leaf(out)),
              "cross_entropy_value_and_grad: out is a view of a leaf Variable that requires grad, which would lose its "
              "values: give out.detach(), or another tensor");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("nllx::cross_entropy_value_and_grad_out", "")
                             .typed<decltype(cross_entropy_value_and_grad_out_autograd)>();
  Tensor loss = op.call(logits, target, weight, reduction, std::move(ignore_index), label_smoothing, dtype, out);
  if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
  return loss;
}

Tensor cross_entropy_backward_autograd(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                                       const OptionalTensor& weight, const Tensor& row_stats,
                                       const Tensor& total_weight, int64_t reduction, c10::SymInt ignore_index,
                                       double label_smoothing) {
  if (versions_are_remembered()) check_versions(row_stats, {logits, target, or_undefined(weight)});
  if (any_has_tangent(grad_output, logits, target, weight) || any_requires_grad(grad_output, logits, target, weight)) {
    static const auto definition = c10::Dispatcher::singleton()
                                       .findSchemaOrThrow("nllx::_cross_entropy_backward_definition", "")
                                       .typed<decltype(cross_entropy_backward)>();
    return definition.call(grad_output, logits, target, weight, row_stats, total_weight, reduction, ignore_index,
                           label_smoothing);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return cross_entropy_backward(grad_output, logits, target, weight, row_stats, total_weight, reduction, ignore_index,
                                label_smoothing);
}

// ---- nll_loss ----

struct NllLossBackwardOp {
  static constexpr const char* kName = "NllxNllLossBackward";
  static constexpr size_t kSaved = 4;  // target, weight, log_probs (whose memory is not read), total_weight
  static constexpr size_t kArguments = 2;
  static constexpr bool kSavesOutput = false;

  int64_t reduction = 0;
  c10::SymInt ignore_index;

  template <typename F>
  void visit(const F& f) {
    f(reduction), f(ignore_index);
  }
  template <typename F>
  void visit(const F& f) const {
    f(reduction), f(ignore_index);
  }

  Tensor backward(const Tensor& grad_output, const std::array<Tensor, kSaved>& saved) const {
    return nll_loss_backward(grad_output, saved[2], saved[0], or_none(saved[1]), saved[3], reduction, ignore_index);
  }
};

std::tuple<Tensor, Tensor> nll_loss_forward_autograd(const Tensor& log_probs, const Tensor& target,
                                                     const OptionalTensor& weight, int64_t reduction,
                                                     c10::SymInt ignore_index, OptionalDtype dtype) {
  check_weight_gradient("nll_loss", target, weight);
  if (any_has_tangent(log_probs)) {
    static const auto definition = c10::Dispatcher::singleton()
                                       .findSchemaOrThrow("nllx::_nll_loss_forward_definition", "")
                                       .typed<decltype(nll_loss_forward)>();
    return definition.call(log_probs, target, weight, reduction, ignore_index, dtype);
  }
  if (!requires_grad(log_probs)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto result = nll_loss_forward(log_probs, target, weight, reduction, ignore_index, dtype);
    if (has_default_hooks() || versions_are_remembered())
      remember_versions(std::get<1>(result), {target, or_undefined(weight)});
    return result;
  }
  check_no_functorch();
  std::tuple<Tensor, Tensor> result;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = nll_loss_forward(log_probs, target, weight, reduction, ignore_index, dtype);
  }
  const auto& [loss, total_weight] = result;
  set_backward(log_probs, loss, NllLossBackwardOp{reduction, std::move(ignore_index)},
               {target, or_undefined(weight), log_probs, total_weight});
  return result;
}

Tensor nll_loss_backward_autograd(const Tensor& grad_output, const Tensor& log_probs, const Tensor& target,
                                  const OptionalTensor& weight, const Tensor& total_weight, int64_t reduction,
                                  c10::SymInt ignore_index) {
  if (versions_are_remembered()) check_versions(total_weight, {target, or_undefined(weight)});
  // Linear in the incoming gradient.
  if (any_has_tangent(grad_output) || any_requires_grad(grad_output)) {
    static const auto definition = c10::Dispatcher::singleton()
                                       .findSchemaOrThrow("nllx::_nll_loss_backward_definition", "")
                                       .typed<decltype(nll_loss_backward)>();
    return definition.call(grad_output, log_probs, target, weight, total_weight, reduction, ignore_index);
  }
  Tensor grad;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    grad = nll_loss_backward(grad_output, log_probs, target, weight, total_weight, reduction, ignore_index);
  }
  // Constant in the log-probabilities: its derivative is zero, which is not the same as none.
  return requires_grad(log_probs) ? at::where(at::zeros({}, grad.options().dtype(at::kBool)), log_probs, grad) : grad;
}

// ---- log_softmax ----

struct LogSoftmaxBackwardOp {
  static constexpr const char* kName = "NllxLogSoftmaxBackward";
  static constexpr size_t kSaved = 1;
  static constexpr size_t kArguments = 0;
  static constexpr bool kSavesOutput = true;

  int64_t dim = 0;

  template <typename F>
  void visit(const F& f) {
    f(dim);
  }
  template <typename F>
  void visit(const F& f) const {
    f(dim);
  }

  Tensor backward(const Tensor& grad_output, const std::array<Tensor, kSaved>& saved) const {
    return log_softmax_backward(grad_output, saved[0], dim);
  }
};

Tensor log_softmax_forward_autograd(const Tensor& input, int64_t dim) {
  if (has_tangent(input)) {
    static const auto definition = c10::Dispatcher::singleton()
                                       .findSchemaOrThrow("nllx::_log_softmax_forward_definition", "")
                                       .typed<decltype(log_softmax_forward)>();
    return definition.call(input, dim);
  }
  if (!requires_grad(input)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor output = log_softmax_forward(input, dim);
    if (has_default_hooks() || versions_are_remembered()) remember_versions(output, {output});
    return output;
  }
  check_no_functorch();
  Tensor output;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    output = log_softmax_forward(input, dim);
  }
  set_backward(input, output, LogSoftmaxBackwardOp{dim}, {output});
  return output;
}

Tensor log_softmax_backward_autograd(const Tensor& grad_output, const Tensor& output, int64_t dim) {
  if (versions_are_remembered()) check_versions(output, {output});
  if (any_has_tangent(grad_output, output) || any_requires_grad(grad_output, output)) {
    static const auto definition = c10::Dispatcher::singleton()
                                       .findSchemaOrThrow("nllx::_log_softmax_backward_definition", "")
                                       .typed<decltype(log_softmax_backward)>();
    return definition.call(grad_output, output, dim);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return log_softmax_backward(grad_output, output, dim);
}

std::vector<NodeType> node_types() {
  return {{&typeid(BackwardNode<CrossEntropyBackwardOp>), CrossEntropyBackwardOp::kName},
          {&typeid(BackwardNode<NllLossBackwardOp>), NllLossBackwardOp::kName},
          {&typeid(BackwardNode<LogSoftmaxBackwardOp>), LogSoftmaxBackwardOp::kName}};
}

TORCH_LIBRARY_IMPL(nllx, Autograd, m) {
  m.impl("cross_entropy_forward", &cross_entropy_forward_autograd);
  m.impl("cross_entropy_backward", &cross_entropy_backward_autograd);
  m.impl("cross_entropy_value_and_grad", &cross_entropy_value_and_grad_autograd);
  m.impl("cross_entropy_value_and_grad_out", &cross_entropy_value_and_grad_out_autograd);
  m.impl("nll_loss_forward", &nll_loss_forward_autograd);
  m.impl("nll_loss_backward", &nll_loss_backward_autograd);
  m.impl("log_softmax_forward", &log_softmax_forward_autograd);
  m.impl("log_softmax_backward", &log_softmax_backward_autograd);
}

}  // namespace nllx
