// From the arguments of a loss operator to what the kernels take: checks, dtype promotion and the contiguous copies of
// the small tensors, the same for CPU and CUDA.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <limits>
#include <optional>

#include "checks.h"
#include "layout.h"
#include "problem.h"

namespace nllx {

struct LossProblem {
  // Owners of the memory that the problem points into.
  at::Tensor input;          // in the dtype that is computed from
  at::Tensor probabilities;  // of the shape of the input; undefined for index targets
  at::Tensor index, weight, weight_sum;
  at::Tensor sample_weight, logit_scale, temperature;
  at::Tensor divisor;  // acc; what a mean is divided by, where that was given

  bool probabilities_given = false;
  int64_t class_dim = 0;
  at::ScalarType acc_dtype, loss_dtype;
  at::DimVector row_sizes;            // the shape of an unreduced loss
  at::DimVector stats_sizes() const;  // (..., 2): maximum and log-sum of each row
  Targets targets;                    // but for probability_strides
  RowOptions options;
  const RowOptions* row_options() const { return options.any() ? &options : nullptr; }

  int64_t rows() const;
  // The divisor of the mean for probability targets: torch's numel / C, so the mean over no classes is NaN.
  double probability_rows() const {
    if (probabilities_given && input.numel() > 0) return static_cast<double>(rows());
    return targets.zero_divisor;
  }
  FloatType float_type() const { return nllx::float_type("", "", input.scalar_type()); }
  bool loss_is_acc() const { return loss_dtype == acc_dtype; }
};

// Raises for bad arguments. `loss_dtype`: that of the loss; by default torch's, which is the dtype of the input, or
// that of input, target and weight promoted for probability targets.
LossProblem make_loss_problem(const LossArguments& args, std::optional<at::ScalarType> loss_dtype);

// Adds the options, and raises for bad ones.
void take_options(LossProblem& loss, const char* op, const LossOptions& options);
// The divisor as it divides: infinite where it is 0 and the mean over nothing is to be 0.
at::Tensor given_divisor(const at::Tensor& divisor, int64_t reduction);
void take_divisor(LossProblem& loss, const char* op, const OptionalTensor& divisor, int64_t reduction);

// The rows of logits along `dim` with an index target or none, in the order of a contiguous target. Raises for bad
// arguments.
LossProblem make_statistics_problem(const char* op, const at::Tensor& logits, const OptionalTensor& target, int64_t dim,
                                    int64_t ignore_index);

// The incoming gradient in acc, one per row or one in all; sets pointer and stride.
at::Tensor incoming_gradient(const at::Tensor& grad_output, const LossProblem& loss, const char* op, int64_t reduction,
                             const void*& pointer, int64_t& stride);

// Input, probabilities and the tensors written or read beside them, in a layout that they share. Only where they share
// none they are made contiguous; `output`, if given, is then replaced by a contiguous temporary, and the caller copies
// it back. This is the one place that copies logits.
Arrays share_layout(LossProblem& loss, at::Tensor* output);

// Uninitialised memory where the input is, in another dtype.
at::Tensor empty_beside(const at::Tensor& input, at::IntArrayRef sizes, at::ScalarType dtype);
// The uninitialised result: one number, or one per row.
at::Tensor empty_loss(const LossProblem& loss, int64_t reduction);
// The loss of no rows, or of rows without classes.
void fill_empty(const LossProblem& loss, int64_t reduction, at::Tensor& result, at::Tensor& total_weight);

// What every kernel of rows of logits takes, from the problem and the layout that share_layout gave it.
template <typename Problem>
Problem problem_of(const LossProblem& loss, const Arrays& arrays) {
  Problem p;
  p.extent = arrays.extent;
  p.layout = arrays.layout;
  p.logits = loss.input.const_data_ptr();
  p.logits_strides = arrays.strides[0];
  p.targets = loss.targets;
  p.options = loss.row_options();
  return p;
}

// What the kernels take, from the problem and the layout that share_layout gave it, but for the losses of the rows
// (forward), the incoming gradient and the divisor of the mean (backward).
CrossEntropyForward forward_problem(const LossProblem& loss, const Arrays& arrays, const at::Tensor& row_stats);
CrossEntropyBackward backward_problem(const LossProblem& loss, const Arrays& arrays, const at::Tensor& grad,
                                      const at::Tensor& row_stats);

// The gradient that the kernel has written to `computed`, as the operator returns it: in `out`, if that is given.
// Copies only where the input has no layout that the kernels take, or another dtype.
at::Tensor finish_gradient(const at::Tensor& computed, at::Tensor& grad, at::ScalarType dtype,
                           const at::Tensor& out = at::Tensor());

}  // namespace nllx
