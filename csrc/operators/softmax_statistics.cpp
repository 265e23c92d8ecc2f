#include "softmax_statistics.h"

namespace nllx {

using at::Tensor;

namespace {

struct SoftmaxStatisticsOperators : Differentiable {
  static constexpr const char* kNode = "NllxSoftmaxStatisticsBackward";

  // row_stats: (..., 3), the maximum, the logarithm of the sum and the mean of x - maximum under the softmax.
  struct Forward {
    static constexpr const char* kSchema =
        "softmax_statistics_forward(Tensor logits, Tensor? target=None, Tensor? logit_scale=None, Tensor? "
        "temperature=None, int dim=-1, SymInt ignore_index=-100, float scale=1.0, float sharpness=1.0, float "
        "softcap=0.0, bool with_entropy=True, bool with_prediction=True) -> (Tensor log_prob, Tensor logsumexp, Tensor "
        "entropy, Tensor prediction, Tensor row_stats)";
    using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
        const Tensor& logits, const OptionalTensor& target, const OptionalTensor& logit_scale,
        const OptionalTensor& temperature, int64_t dim, c10::SymInt ignore_index, double scale, double sharpness,
        double softcap, bool with_entropy, bool with_prediction);
  };
  struct Backward {
    static constexpr const char* kSchema =
        "softmax_statistics_backward(Tensor? grad_log_prob, Tensor? grad_logsumexp, Tensor? grad_entropy, Tensor "
        "logits, Tensor? target, Tensor? logit_scale, Tensor? temperature, Tensor row_stats, int dim, SymInt "
        "ignore_index, float scale, float sharpness, float softcap, bool with_entropy, bool with_prediction, bool[2] "
        "output_mask) -> (Tensor grad_logits, Tensor grad_logit_scale)";
    using Signature = std::tuple<Tensor, Tensor>(
        const OptionalTensor& grad_log_prob, const OptionalTensor& grad_logsumexp, const OptionalTensor& grad_entropy,
        const Tensor& logits, const OptionalTensor& target, const OptionalTensor& logit_scale,
        const OptionalTensor& temperature, const Tensor& row_stats, int64_t dim, c10::SymInt ignore_index, double scale,
        double sharpness, double softcap, bool with_entropy, bool with_prediction, std::array<bool, 2> output_mask);
  };
};

const Registration<SoftmaxStatistics, SoftmaxStatisticsOperators> registration(__FILE__, __LINE__);

}  // namespace

}  // namespace nllx
