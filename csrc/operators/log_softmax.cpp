#include "log_softmax.h"

namespace nllx {

using at::Tensor;

namespace {

struct LogSoftmaxOperators : Differentiable {
  static constexpr const char* kNode = "NllxLogSoftmaxBackward";

  struct Forward {
    static constexpr const char* kSchema = "log_softmax_forward(Tensor input, int dim) -> Tensor output";
    using Signature = Tensor(const Tensor& input, int64_t dim);
  };
  struct Backward {
    static constexpr const char* kSchema =
        "log_softmax_backward(Tensor grad_output, Tensor output, int dim) -> Tensor grad_input";
    using Signature = Tensor(const Tensor& grad_output, const Tensor& output, int64_t dim);
  };
};

const Registration<LogSoftmax, LogSoftmaxOperators> registration(__FILE__, __LINE__);

}  // namespace

}  // namespace nllx
