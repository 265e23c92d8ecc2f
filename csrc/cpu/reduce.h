// From the sums over the chunks of a loss to its result.
#pragma once

#include "../loss_problem.h"
#include "../online_softmax.h"
#include "parallel.h"

namespace nllx {

// `value` to a tensor of one element. Without the dispatcher but for half types: it takes as long as a small problem.
inline void set_scalar(at::Tensor& t, double value) {
  if (t.scalar_type() == at::kDouble) {
    *t.mutable_data_ptr<double>() = value;
  } else if (t.scalar_type() == at::kFloat) {
    *t.mutable_data_ptr<float>() = static_cast<float>(value);
  } else {
    t.fill_(value);
  }
}

inline void raise_if_bad(const ChunkResult& result, const LossArguments& a, const LossProblem& loss) {
  if (result.bad_target < 0) return;
  raise_bad_target(a.op, a.target.sizes(), result.bad_target,
                   load_index(loss.targets.index, loss.targets.index_type, result.bad_target),
                   a.input.size(loss.class_dim), a.ignore_index);
}

// The mean over nothing is NaN, as torch has it, unless zero is asked for.
inline void reduce(const ChunkResult& result, const LossProblem& loss, int64_t reduction, at::Tensor& loss_tensor,
                   at::Tensor& total_weight) {
  const double weight = loss.probabilities_given ? loss.probability_rows() : index_divisor(loss.targets, result.weight);
  set_scalar(total_weight, weight);
  if (static_cast<Reduction>(reduction) == Reduction::kSum) set_scalar(loss_tensor, result.loss);
  if (is_mean(static_cast<Reduction>(reduction))) set_scalar(loss_tensor, result.loss / weight);
}

}  // namespace nllx
