#include "cross_entropy.h"

#include <ATen/ops/ones_like.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "../checks.h"
#include "weight_gradient.h"

namespace nllx {

using at::Tensor;

namespace {

struct CrossEntropyOperators : Differentiable {
  static constexpr const char* kNode = "NllxCrossEntropyBackward";

  // row_stats: (..., 2), for each row its maximum m and log Σ exp(x - m); zeros for ignored rows. float64 for float64
  // logits, else float32; so is total_weight, the divisor of the mean. Neither has a derivative.
  // reduction: 0 none, 1 mean, 2 sum, 3 the mean that is 0 over nothing.
  struct Forward {
    static constexpr const char* kSchema =
        "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight=None, int reduction=1, SymInt "
        "ignore_index=-100, float label_smoothing=0.0, ScalarType? dtype=None) -> (Tensor loss, Tensor row_stats, "
        "Tensor total_weight)";
    using Signature = std::tuple<Tensor, Tensor, Tensor>(const Tensor& logits, const Tensor& target,
                                                         const OptionalTensor& weight, int64_t reduction,
                                                         c10::SymInt ignore_index, double label_smoothing,
                                                         OptionalDtype dtype);
  };
  struct Backward {
    static constexpr const char* kSchema =
        "cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, Tensor row_stats, "
        "Tensor total_weight, int reduction, SymInt ignore_index, float label_smoothing) -> Tensor grad_logits";
    using Signature = Tensor(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                             const OptionalTensor& weight, const Tensor& row_stats, const Tensor& total_weight,
                             int64_t reduction, c10::SymInt ignore_index, double label_smoothing);
  };

  template <typename... A>
  static void check(const Tensor& /*logits*/, const Tensor& target, const OptionalTensor& weight, const A&...) {
    check_weight_gradient("cross_entropy", target, weight);
  }
};

// ---- inplace_backward ----

// The gradient is written to `out`, which may be the logits.
struct CrossEntropyBackwardOut {
  static constexpr const char* kSchema =
      "cross_entropy_backward.out(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, Tensor row_stats, "
      "Tensor total_weight, int reduction, SymInt ignore_index, float label_smoothing, *, Tensor(a!) out) -> "
      "Tensor(a!)";
  using Signature = Tensor&(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                            const OptionalTensor& weight, const Tensor& row_stats, const Tensor& total_weight,
                            int64_t reduction, c10::SymInt ignore_index, double label_smoothing, Tensor& out);
};

// Seen by a compiler or another mode, which need not have the memory that is written to.
bool is_traced(const Tensor& t) {
  return t.key_set().has_any(c10::python_ks | c10::DispatchKeySet(c10::DispatchKey::Functionalize)) ||
         c10::impl::TorchDispatchModeTLS::any_modes_set();
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

// Autograd refuses to write into such a view, and could not tell of it where an operator does so behind its back.
bool is_view_of_leaf(const Tensor& t) {
  const auto* meta = torch::autograd::impl::get_view_autograd_meta(t);
  if (!meta || !meta->has_bw_view()) return false;
  const Tensor& base = meta->get_backward_view().base_;
  return base.is_leaf() && base.requires_grad();
}

// The gradient over the logits, where nothing else needs them.
struct OverLogits {
  using D = Derivative<CrossEntropyOperators>;

  static torch::autograd::variable_list gradients(const D::Grads& grads, const D::Saved& saved,
                                                  const D::Options& options, const D::Mask& mask) {
    const auto& [logits, target, weight, row_stats, total_weight] = saved;
    // A gradient that is itself differentiated needs the logits.
    if (at::GradMode::is_enabled() || is_traced(logits) || is_traced(grads[0]) ||
        any_has_tangent(std::array{&grads[0], &logits, &target}) || !is_alone_in_memory(logits)) {
      return ByOperator<CrossEntropyOperators>::gradients(grads, saved, options, mask);
    }
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor out = logits.detach();
    logits.unsafeGetTensorImpl()->bump_version();  // whoever saved them, a second backward too, notices
    const auto& [reduction, ignore_index, label_smoothing] = options;
    return {call<CrossEntropyBackwardOut>(grads[0], out, target,
                                          weight.defined() ? OptionalTensor(weight) : std::nullopt, row_stats,
                                          total_weight, reduction, ignore_index, label_smoothing, out)};
  }
};
const NodeClass<CrossEntropyOperators, OverLogits> over_logits;

Tensor cross_entropy(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                     c10::SymInt ignore_index, double label_smoothing, OptionalDtype dtype, bool inplace_backward) {
  using Forward = Autograd<CrossEntropyOperators>;
  // Compilers plan the memory themselves; other derivatives need the logits; and hooks may hand out what they were
  // given, or what a checkpoint has computed again, to any number of backwards, none of which compares versions.
  if (!inplace_backward || !requires_grad(logits) || is_traced(logits) || has_default_hooks() ||
      Forward::needs_definition({&logits, &target, &tensor_of(weight)})) {
    return std::get<0>(
        Forward::forward(logits, target, weight, reduction, std::move(ignore_index), label_smoothing, dtype));
  }
  TORCH_CHECK(!logits.is_leaf(),
              "cross_entropy: inplace_backward writes the gradient over the logits, but logits is "
              "a leaf Variable that requires grad; call cross_entropy without inplace_backward, or give it the output "
              "of a layer");
  TORCH_CHECK(!is_view_of_leaf(logits),
              "cross_entropy: inplace_backward writes the gradient over the logits, but logits is a view of a leaf "
              "Variable that requires grad, which would lose its values; call cross_entropy without inplace_backward");
  check_no_internal_overlap("cross_entropy", "logits", logits);
  return std::get<0>(Forward::with_node<OverLogits>(logits, target, weight, reduction, std::move(ignore_index),
                                                    label_smoothing, dtype));
}

// ---- cross_entropy_value_and_grad ----

// Loss and gradient of the logits at once, for training steps without autograd's graph: the results have none.
struct ValueAndGrad : Float32Loss {
  static constexpr const char* kSchema =
      "cross_entropy_value_and_grad(Tensor logits, Tensor target, Tensor? weight=None, int reduction=1, SymInt "
      "ignore_index=-100, float label_smoothing=0.0, ScalarType? dtype=None) -> (Tensor loss, Tensor grad)";
  using Signature = std::tuple<Tensor, Tensor>(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                               int64_t reduction, c10::SymInt ignore_index, double label_smoothing,
                                               OptionalDtype dtype);

  static std::tuple<Tensor, Tensor> autograd(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                             int64_t reduction, c10::SymInt ignore_index, double label_smoothing,
                                             OptionalDtype dtype) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call<ValueAndGrad>(logits, target, weight, reduction, std::move(ignore_index), label_smoothing, dtype);
  }

  static std::tuple<Tensor, Tensor> functorch(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                              int64_t reduction, c10::SymInt ignore_index, double label_smoothing,
                                              OptionalDtype dtype) {
    if (Autocast<ValueAndGrad>::is_wanted(logits)) {
      return Autocast<ValueAndGrad>::call_on(logits, logits, target, weight, reduction, std::move(ignore_index),
                                             label_smoothing, dtype);
    }
    check_reduced("cross_entropy", reduction);
    const Tensor x = logits.detach(), y = target.detach();
    const OptionalTensor w = tensor_of(weight).defined() ? OptionalTensor(weight->detach()) : std::nullopt;
    auto [loss, row_stats, total_weight] =
        call<CrossEntropyOperators::Forward>(x, y, w, reduction, ignore_index, label_smoothing, dtype);
    Tensor grad = call<CrossEntropyOperators::Backward>(at::ones_like(loss), x, y, w, row_stats, total_weight,
                                                        reduction, ignore_index, label_smoothing);
    return {std::move(loss), std::move(grad)};
  }
};

// The gradient goes to `out`, which may be the logits.
struct ValueAndGradOut : Float32Loss {
  static constexpr const char* kSchema =
      "cross_entropy_value_and_grad_out(Tensor logits, Tensor target, Tensor? weight, int reduction, SymInt "
      "ignore_index, float label_smoothing, ScalarType? dtype, Tensor(a!) out) -> Tensor loss";
  using Signature = Tensor(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                           c10::SymInt ignore_index, double label_smoothing, OptionalDtype dtype, Tensor& out);

  static Tensor autograd(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                         c10::SymInt ignore_index, double label_smoothing, OptionalDtype dtype, Tensor& out) {
    TORCH_CHECK(!(requires_grad(out) && out.is_leaf()),
                "cross_entropy_value_and_grad: out is a leaf Variable that requires grad; it would lose its values: "
                "give out.detach(), or another tensor");
    TORCH_CHECK(
        !out.is_neg() && !out.is_conj(),
        "cross_entropy_value_and_grad: out is a negated view, whose memory holds other numbers; give another tensor");
    TORCH_CHECK(!(requires_grad(out) && is_view_of_leaf(out)),
                "cross_entropy_value_and_grad: out is a view of a leaf Variable that requires grad, which would lose "
                "its values: give out.detach(), or another tensor");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor loss =
        call<ValueAndGradOut>(logits, target, weight, reduction, std::move(ignore_index), label_smoothing, dtype, out);
    if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
    return loss;
  }

  static Tensor functorch(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                          c10::SymInt ignore_index, double label_smoothing, OptionalDtype dtype, Tensor& out) {
    // The gradient is copied there when all is read, so it may lie anywhere.
    TORCH_CHECK(out.sym_sizes() == logits.sym_sizes() && out.scalar_type() == logits.scalar_type() &&
                    out.device() == logits.device(),
                "cross_entropy: out must have shape ", logits.sym_sizes(), " and dtype ", logits.scalar_type(), " on ",
                logits.device().str(), ", as logits has, but got ", out.sym_sizes(), " and ", out.scalar_type(), " on ",
                out.device().str());
    auto [loss, grad] =
        ValueAndGrad::functorch(logits, target, weight, reduction, std::move(ignore_index), label_smoothing, dtype);
    const at::NoGradGuard no_grad;
    out.copy_(grad);
    return loss;
  }
};

const Registration<CrossEntropy, CrossEntropyOperators> registration(__FILE__, __LINE__, &cross_entropy);

}  // namespace

TORCH_LIBRARY_FRAGMENT(nllx, m) {
  m.def(CrossEntropyBackwardOut::kSchema);
  m.def(ValueAndGrad::kSchema);
  m.def(ValueAndGradOut::kSchema);
}

TORCH_LIBRARY_IMPL(nllx, Autograd, m) {
  m.impl("cross_entropy_value_and_grad", &ValueAndGrad::autograd);
  m.impl("cross_entropy_value_and_grad_out", &ValueAndGradOut::autograd);
}

TORCH_LIBRARY_IMPL(nllx, AutocastCPU, m) {
  m.impl("cross_entropy_value_and_grad", &Autocast<ValueAndGrad>::call<c10::kCPU>);
  m.impl("cross_entropy_value_and_grad_out", &Autocast<ValueAndGradOut>::call<c10::kCPU>);
}

TORCH_LIBRARY_IMPL(nllx, AutocastCUDA, m) {
  m.impl("cross_entropy_value_and_grad", &Autocast<ValueAndGrad>::call<c10::kCUDA>);
  m.impl("cross_entropy_value_and_grad_out", &Autocast<ValueAndGradOut>::call<c10::kCUDA>);
}

TORCH_LIBRARY_IMPL(nllx, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("cross_entropy_value_and_grad", &ValueAndGrad::functorch);
  m.impl("cross_entropy_value_and_grad_out", &ValueAndGradOut::functorch);
}

}  // namespace nllx
