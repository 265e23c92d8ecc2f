#include "mse_loss.h"

namespace nllx {

using at::Tensor;

namespace {

struct MseLossOperators : Differentiable {
  static constexpr const char* kNode = "NllxMseLossBackward";

  // reduction: 0 none, 1 mean, 2 sum. total_weight: the divisor of the mean, the number of elements or the sum of the
  // weights, whatever the reduction is.
  struct Forward {
    static constexpr const char* kSchema =
        "mse_loss_forward(Tensor input, Tensor target, Tensor? weight=None, int reduction=1, ScalarType? dtype=None) "
        "-> (Tensor loss, Tensor total_weight)";
    using Signature = std::tuple<Tensor, Tensor>(const Tensor& input, const Tensor& target,
                                                 const OptionalTensor& weight, int64_t reduction, OptionalDtype dtype);
  };
  struct Backward {
    static constexpr const char* kSchema =
        "mse_loss_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor total_weight, int "
        "reduction, bool[2] output_mask) -> (Tensor grad_input, Tensor grad_target)";
    using Signature = std::tuple<Tensor, Tensor>(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                                 const OptionalTensor& weight, const Tensor& total_weight,
                                                 int64_t reduction, std::array<bool, 2> output_mask);
  };
};

const Registration<MseLoss, MseLossOperators> registration(__FILE__, __LINE__);

}  // namespace

}  // namespace nllx
