#include "softmax_statistics.h"

namespace nllx {

using at::Tensor;

namespace {

struct SoftmaxStatisticsOperators : Differentiable {
  static constexpr const char* kNode = "NllxSoftmaxStatisticsBackward";

  // row_stats: (..., 3), the maximum, the logarithm of the sum and the mean of x - maximum under the softmax.
  struct Forward {
    static constexpr const char* kSchema =
        "softmax_statistics_forward(Tensor logits, Tensor? target=None, int dim=-1, SymInt ignore_index=-100, bool "
        "with_entropy=True, bool with_prediction=True) -> (Tensor log_prob, Tensor logsumexp, Tensor entropy, Tensor "
        "prediction, Tensor row_stats)";
    using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor& logits,
                                                                         const OptionalTensor& target, int64_t dim,
                                                                         c10::SymInt ignore_index, bool with_entropy,
                                                                         bool with_prediction);
  };
  struct Backward {
    static constexpr const char* kSchema =
        "softmax_statistics_backward(Tensor? grad_log_prob, Tensor? grad_logsumexp, Tensor? grad_entropy, Tensor "
        "logits, Tensor? target, Tensor row_stats, int dim, SymInt ignore_index, bool with_entropy, bool "
        "with_prediction) -> Tensor grad_logits";
    using Signature = Tensor(const OptionalTensor& grad_log_prob, const OptionalTensor& grad_logsumexp,
                             const OptionalTensor& grad_entropy, const Tensor& logits, const OptionalTensor& target,
                             const Tensor& row_stats, int64_t dim, c10::SymInt ignore_index, bool with_entropy,
                             bool with_prediction);
  };
};

const Registration<SoftmaxStatistics, SoftmaxStatisticsOperators> registration(__FILE__, __LINE__);

}  // namespace

}  // namespace nllx
