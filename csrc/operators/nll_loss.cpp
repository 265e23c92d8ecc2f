#include "nll_loss.h"

#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "weight_gradient.h"

namespace nllx {

using at::Tensor;

namespace {

struct NllLossOperators : Differentiable {
  static constexpr const char* kNode = "NllxNllLossBackward";

  struct Forward {
    static constexpr const char* kSchema =
        "nll_loss_forward(Tensor log_probs, Tensor target, Tensor? weight=None, int reduction=1, SymInt "
        "ignore_index=-100, ScalarType? dtype=None) -> (Tensor loss, Tensor total_weight)";
    using Signature = std::tuple<Tensor, Tensor>(const Tensor& log_probs, const Tensor& target,
                                                 const OptionalTensor& weight, int64_t reduction,
                                                 c10::SymInt ignore_index, OptionalDtype dtype);
  };
  struct Backward {
    static constexpr const char* kSchema =
        "nll_loss_backward(Tensor grad_output, Tensor log_probs, Tensor target, Tensor? weight, Tensor total_weight, "
        "int reduction, SymInt ignore_index) -> Tensor grad_log_probs";
    using Signature = Tensor(const Tensor& grad_output, const Tensor& log_probs, const Tensor& target,
                             const OptionalTensor& weight, const Tensor& total_weight, int64_t reduction,
                             c10::SymInt ignore_index);
  };

  static constexpr const char* kUnread = "log_probs";

  template <typename... A>
  static void check(const Tensor& /*log_probs*/, const Tensor& target, const OptionalTensor& weight, const A&...) {
    check_weight_gradient("nll_loss", target, weight);
  }
};

// The backward is linear in the incoming gradient and constant in the log-probabilities.
struct BackwardOfNllLoss {
  static Tensor backward(const Tensor& grad_output, const Tensor& log_probs, const Tensor& target,
                         const OptionalTensor& weight, const Tensor& total_weight, int64_t reduction,
                         c10::SymInt ignore_index) {
    Autograd<NllLossOperators>::check_saved_versions(
        {&grad_output, &log_probs, &target, &tensor_of(weight), &total_weight});
    if (has_tangent(grad_output) || requires_grad(grad_output)) {
      return call_definition<NllLossOperators::Backward>(grad_output, log_probs, target, weight, total_weight,
                                                         reduction, ignore_index);
    }
    Tensor grad;
    {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      grad = call<NllLossOperators::Backward>(grad_output, log_probs, target, weight, total_weight, reduction,
                                              ignore_index);
    }
    // A derivative of zero, which is not the same as none.
    return requires_grad(log_probs) ? at::where(at::zeros({}, grad.options().dtype(at::kBool)), log_probs, grad) : grad;
  }
};

// reduction: 0 none, 1 mean, 2 sum, 3 the mean that is 0 over nothing. total_weight: the divisor of the mean.
const Registration<NllLoss, NllLossOperators, BackwardOfNllLoss> registration(__FILE__, __LINE__);

}  // namespace

}  // namespace nllx
