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
        "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight=None, Tensor? sample_weight=None, Tensor? "
        "logit_scale=None, Tensor? temperature=None, Tensor? divisor=None, int reduction=1, SymInt ignore_index=-100, "
        "float label_smoothing=0.0, float scale=1.0, float sharpness=1.0, float softcap=0.0, float z_loss=0.0, "
        "ScalarType? dtype=None) -> (Tensor loss, Tensor row_stats, Tensor total_weight)";
    using Signature = std::tuple<Tensor, Tensor, Tensor>(
        const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const OptionalTensor& sample_weight,
        const OptionalTensor& logit_scale, const OptionalTensor& temperature, const OptionalTensor& divisor,
        int64_t reduction, c10::SymInt ignore_index, double label_smoothing, double scale, double sharpness,
        double softcap, double z_loss, OptionalDtype dtype);
  };
  struct Backward {
    static constexpr const char* kSchema =
        "cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, Tensor? "
        "sample_weight, Tensor? logit_scale, Tensor? temperature, Tensor? divisor, Tensor row_stats, Tensor "
        "total_weight, int reduction, SymInt ignore_index, float label_smoothing, float scale, float sharpness, float "
        "softcap, float "
        "z_loss, bool[2] output_mask) -> (Tensor grad_logits, Tensor grad_logit_scale)";
    using Signature = std::tuple<Tensor, Tensor>(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                                                 const OptionalTensor& weight, const OptionalTensor& sample_weight,
                                                 const OptionalTensor& logit_scale, const OptionalTensor& temperature,
                                                 const OptionalTensor& divisor, const Tensor& row_stats,
                                                 const Tensor& total_weight, int64_t reduction,
                                                 c10::SymInt ignore_index, double label_smoothing, double scale,
                                                 double sharpness, double softcap, double z_loss,
                                                 std::array<bool, 2> output_mask);
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
      "cross_entropy_backward.out(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, Tensor? "
      "sample_weight, Tensor? logit_scale, Tensor? temperature, Tensor? divisor, Tensor row_stats, Tensor "
      "total_weight, "
      "int reduction, SymInt ignore_index, float label_smoothing, float scale, float sharpness, float softcap, float "
      "z_loss, *, "
      "Tensor(a!) out) -> Tensor(a!)";
  using Signature = Tensor&(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                            const OptionalTensor& weight, const OptionalTensor& sample_weight,
                            const OptionalTensor& logit_scale, const OptionalTensor& temperature,
                            const OptionalTensor& divisor, const Tensor& row_stats, const Tensor& total_weight,
                            int64_t reduction, c10::SymInt ignore_index, double label_smoothing, double scale,
                            double sharpness, double softcap, double z_loss, Tensor& out);
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
    const auto& [logits, target, weight, sample_weight, logit_scale, temperature, divisor, row_stats, total_weight] =
        saved;
    // A gradient that is itself differentiated needs the logits.
    if (!mask[0] || mask[1] || at::GradMode::is_enabled() || is_traced(logits) || is_traced(grads[0]) ||
        any_has_tangent(std::array{&grads[0], &logits, &target}) || !is_alone_in_memory(logits)) {
      return ByOperator<CrossEntropyOperators>::gradients(grads, saved, options, mask);
    }
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor out = logits.detach();
    logits.unsafeGetTensorImpl()->bump_version();  // whoever saved them, a second backward too, notices
    const auto& [reduction, ignore_index, label_smoothing, scale, sharpness, softcap, z_loss] = options;
    const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    return {call<CrossEntropyBackwardOut>(grads[0], out, target, optional(weight), optional(sample_weight),
                                          optional(logit_scale), optional(temperature), optional(divisor), row_stats,
                                          total_weight, reduction, ignore_index, label_smoothing, scale, sharpness,
                                          softcap, z_loss, out),
            Tensor()};
  }
};
const NodeClass<CrossEntropyOperators, OverLogits> over_logits;

Tensor cross_entropy(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                     const OptionalTensor& sample_weight, const OptionalTensor& logit_scale,
                     const OptionalTensor& temperature, const OptionalTensor& divisor, int64_t reduction,
                     c10::SymInt ignore_index, double label_smoothing, double scale, double sharpness, double softcap,
                     double z_loss, OptionalDtype dtype, bool inplace_backward) {
  using Forward = Autograd<CrossEntropyOperators>;
  // Compilers plan the memory themselves; other derivatives need the logits; and hooks may hand out what they were
  // given, or what a checkpoint has computed again, to any number of backwards, none of which compares versions.
  if (!inplace_backward || !requires_grad(logits) || is_traced(logits) || has_default_hooks() ||
      Forward::needs_definition({&logits, &target, &tensor_of(weight), &tensor_of(sample_weight),
                                 &tensor_of(logit_scale), &tensor_of(temperature), &tensor_of(divisor)})) {
    return std::get<0>(Forward::forward(logits, target, weight, sample_weight, logit_scale, temperature, divisor,
                                        reduction, std::move(ignore_index), label_smoothing, scale, sharpness, softcap,
                                        z_loss, dtype));
  }
  TORCH_CHECK(!logits.is_leaf(),
              "cross_entropy: inplace_backward writes the gradient over the logits, but logits is "
              "a leaf Variable that requires grad; call cross_entropy without inplace_backward, or give it the output "
              "of a layer");
  TORCH_CHECK(!is_view_of_leaf(logits),
              "cross_entropy: inplace_backward writes the gradient over the logits, but logits is a view of a leaf "
              "Variable that requires grad, which would lose its values; call cross_entropy without inplace_backward");
  check_no_internal_overlap("cross_entropy", "logits", logits);
  return std::get<0>(Forward::with_node<OverLogits>(logits, target, weight, sample_weight, logit_scale, temperature,
                                                    divisor, reduction, std::move(ignore_index), label_smoothing, scale,
                                                    sharpness, softcap, z_loss, dtype));
}

// ---- cross_entropy_value_and_grad ----

// What is read of another tensor and would need a derivative that the results, which have no graph, do not carry.
void check_no_gradient(const char* name, const OptionalTensor& t) {
  TORCH_CHECK(!tensor_of(t).defined() || !(requires_grad(*t) || has_tangent(*t)),
              "cross_entropy_value_and_grad: ", name,
              " requires grad, but the loss has no graph, and the gradient is that of the logits alone: call ", name,
              ".detach(), or cross_entropy");
}

// Loss and gradient of the logits at once, for training steps without autograd's graph: the results have none. Of
// functions of the arguments of `Op`, up to `dtype`.
template <typename Op, typename Signature = typename CrossEntropyOperators::Forward::Signature>
struct WithoutGraph;
template <typename Op, typename R, typename... A>
struct WithoutGraph<Op, R(A...)> {
  static constexpr size_t kTensors = Function<R(A...)>::kTensors;

  static std::tuple<Tensor, Tensor> autograd(A... args) {
    check_gradients(args...);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call<Op>(args...);
  }

  static std::tuple<Tensor, Tensor> functorch(A... args) {
    const std::tuple<const A&...> all(args...);
    const Tensor& logits = std::get<0>(all);
    if (Autocast<Op>::is_wanted(logits)) return Autocast<Op>::call_on(logits, args...);
    check_gradients(args...);
    return by_operators(detached(args)...);
  }

  static void check_gradients(const A&... args) {
    const auto tensors = tensors_of<R(A...)>(args...);
    constexpr const char* kNames[] = {"sample_weight", "logit_scale", "temperature", "divisor"};
    for (size_t i = 3; i < kTensors; ++i) check_no_gradient(kNames[i - 3], *tensors[i]);
  }

 private:
  template <typename T>
  static std::decay_t<T> detached(const T& value) {
    if constexpr (!kIsTensor<T>) {
      return value;
    } else {
      const Tensor& t = tensor_of(value);
      return t.defined() ? std::decay_t<T>(t.detach()) : std::decay_t<T>();
    }
  }
  static std::tuple<Tensor, Tensor> by_operators(const Tensor& logits, const Tensor& target,
                                                 const OptionalTensor& weight, const OptionalTensor& sample_weight,
                                                 const OptionalTensor& logit_scale, const OptionalTensor& temperature,
                                                 const OptionalTensor& divisor, int64_t reduction,
                                                 const c10::SymInt& ignore_index, double label_smoothing, double scale,
                                                 double sharpness, double softcap, double z_loss,
                                                 const OptionalDtype& dtype) {
    check_reduced("cross_entropy", reduction);
    auto [loss, row_stats, total_weight] = call<CrossEntropyOperators::Forward>(
        logits, target, weight, sample_weight, logit_scale, temperature, divisor, reduction, ignore_index,
        label_smoothing, scale, sharpness, softcap, z_loss, dtype);
    Tensor grad = std::get<0>(call<CrossEntropyOperators::Backward>(
        at::ones_like(loss), logits, target, weight, sample_weight, logit_scale, temperature, divisor, row_stats,
        total_weight, reduction, ignore_index, label_smoothing, scale, sharpness, softcap, z_loss,
        std::array{true, false}));
    return {std::move(loss), std::move(grad)};
  }
};

struct ValueAndGrad : Float32Loss {
  static constexpr const char* kSchema =
      "cross_entropy_value_and_grad(Tensor logits, Tensor target, Tensor? weight=None, Tensor? sample_weight=None, "
      "Tensor? logit_scale=None, Tensor? temperature=None, Tensor? divisor=None, int reduction=1, SymInt "
      "ignore_index=-100, float label_smoothing=0.0, float scale=1.0, float sharpness=1.0, float softcap=0.0, float "
      "z_loss=0.0, ScalarType? dtype=None) -> (Tensor loss, Tensor grad)";
  using Signature = std::tuple<Tensor, Tensor>(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                               const OptionalTensor& sample_weight, const OptionalTensor& logit_scale,
                                               const OptionalTensor& temperature, const OptionalTensor& divisor,
                                               int64_t reduction, c10::SymInt ignore_index, double label_smoothing,
                                               double scale, double sharpness, double softcap, double z_loss,
                                               OptionalDtype dtype);
};

// The gradient goes to `out`, which may be the logits.
struct ValueAndGradOut : Float32Loss {
  static constexpr const char* kSchema =
      "cross_entropy_value_and_grad_out(Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, Tensor? "
      "logit_scale, Tensor? temperature, Tensor? divisor, int reduction, SymInt ignore_index, float label_smoothing, "
      "float scale, float sharpness, float softcap, float z_loss, ScalarType? dtype, Tensor(a!) out) -> Tensor loss";
  using Signature = Tensor(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                           const OptionalTensor& sample_weight, const OptionalTensor& logit_scale,
                           const OptionalTensor& temperature, const OptionalTensor& divisor, int64_t reduction,
                           c10::SymInt ignore_index, double label_smoothing, double scale, double sharpness,
                           double softcap, double z_loss, OptionalDtype dtype, Tensor& out);
};

template <typename Signature = CrossEntropyOperators::Forward::Signature>
struct IntoOut;
template <typename R, typename... A>
struct IntoOut<R(A...)> {
  static Tensor autograd(A... args, Tensor& out) {
    TORCH_CHECK(!(requires_grad(out) && out.is_leaf()),
                "cross_entropy_value_and_grad: out is a leaf Variable that requires grad; it would lose its values: "
                "give out.detach(), or another tensor");
    TORCH_CHECK(
        !out.is_neg() && !out.is_conj(),
        "cross_entropy_value_and_grad: out is a negated view, whose memory holds other numbers; give another tensor");
    TORCH_CHECK(!(requires_grad(out) && is_view_of_leaf(out)),
                "cross_entropy_value_and_grad: out is a view of a leaf Variable that requires grad, which would lose "
                "its values: give out.detach(), or another tensor");
    WithoutGraph<ValueAndGrad>::check_gradients(args...);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor loss = call<ValueAndGradOut>(args..., out);
    if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
    return loss;
  }

  static Tensor functorch(A... args, Tensor& out) {
    // The gradient is copied there when all is read, so it may lie anywhere.
    const Tensor& logits = std::get<0>(std::tuple<const A&...>(args...));
    TORCH_CHECK(out.sym_sizes() == logits.sym_sizes() && out.scalar_type() == logits.scalar_type() &&
                    out.device() == logits.device(),
                "cross_entropy: out must have shape ", logits.sym_sizes(), " and dtype ", logits.scalar_type(), " on ",
                logits.device().str(), ", as logits has, but got ", out.sym_sizes(), " and ", out.scalar_type(), " on ",
                out.device().str());
    auto [loss, grad] = WithoutGraph<ValueAndGrad>::functorch(args...);
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
  m.impl("cross_entropy_value_and_grad", &WithoutGraph<ValueAndGrad>::autograd);
  m.impl("cross_entropy_value_and_grad_out", &IntoOut<>::autograd);
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
  m.impl("cross_entropy_value_and_grad", &WithoutGraph<ValueAndGrad>::functorch);
  m.impl("cross_entropy_value_and_grad_out", &IntoOut<>::functorch);
}

}  // namespace nllx
