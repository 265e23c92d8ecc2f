// Every check of an input and its message, shared by the CPU and CUDA entries, autograd and autocast. A message names
// the operator and the argument, what it got, what it takes, and the fix; where torch has a sentence for the same
// mistake that sentence is in it, and the exception has torch's type.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "problem.h"

namespace nllx {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalDtype = std::optional<at::ScalarType>;

inline bool is_per_row(int64_t reduction) { return static_cast<Reduction>(reduction) == Reduction::kNone; }

struct LossArguments {
  const char* op;            // "cross_entropy" or "nll_loss"
  const char* input_name;    // "logits" or "log_probs"
  bool takes_probabilities;  // cross_entropy: a target of the input's shape holds class probabilities
  const at::Tensor& input;
  const at::Tensor& target;
  const OptionalTensor& weight;
  int64_t reduction;
  int64_t ignore_index;
  double label_smoothing = 0;
};

// What a row's logits are before they are compared, and its loss is multiplied with and divided by: see RowOptions.
struct LossOptions {
  const OptionalTensor& sample_weight;
  const OptionalTensor& logit_scale;
  const OptionalTensor& temperature;
  double scale = 1, sharpness = 1, softcap = 0, z_loss = 0;
};

bool targets_are_probabilities(const LossArguments& args);

// Checks all but the values of the target, in torch's order: input, shapes, dtypes, options, weight, devices.
void check_loss_arguments(const LossArguments& args);

// Each tensor of the options: one number per row, or one in all (but for sample_weight), and the numbers.
void check_options(const char* op, const LossOptions& options, at::IntArrayRef row_sizes, const at::Tensor& input);
// What a mean is divided by, of any other reduction an error; undefined for none.
void check_divisor(const char* op, const OptionalTensor& divisor, int64_t reduction, const at::Tensor& input);

// softmax_statistics: logits along `dim`, and an index for each row or none. Returns `dim`, counted from the first.
int64_t check_statistics_arguments(const char* op, const at::Tensor& logits, const OptionalTensor& target, int64_t dim,
                                   int64_t ignore_index);

// An index that is neither a class nor ignore_index; `row` counts through the target in row-major order.
[[noreturn]] void raise_bad_target(const char* op, at::IntArrayRef target_sizes, int64_t row, int64_t value,
                                   int64_t classes, int64_t ignore_index);

// Raises where the elements of t do not lie in its storage, which whoever holds it may free or shrink
// (t.untyped_storage().resize_(0)). For every tensor whose memory a kernel gets.
void check_memory(const char* op, const char* name, const at::Tensor& t);

// For the backward operators: tensors that the forward has made must still fit.
void check_saved(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType dtype, int64_t numel,
                 const at::Tensor& input);
void check_grad_output(const char* op, const at::Tensor& grad_output, int64_t numel, const at::Tensor& input);

// Raises where elements of t, which is to be written, may share memory with each other.
void check_no_internal_overlap(const char* op, const char* name, const at::Tensor& t);
// The tensor that a gradient is written to: shape, dtype and device of the input, every element once; it may be the
// input, but not a part of it, and not one of the other tensors.
void check_out(const char* op, const at::Tensor& out, const at::Tensor& input, const at::Tensor& target,
               const OptionalTensor& weight);
// …for another tensor that is read while `out` is written.
void check_apart(const char* op, const at::Tensor& out, const char* name, const OptionalTensor& t);
// t, or a copy of it where it shares memory with `out`, if that is given: what is read while out is written.
at::Tensor apart_from(const at::Tensor& t, const at::Tensor& out);

// Loss and gradient at once: one loss per row has no gradient.
void check_reduced(const char* op, int64_t reduction);

// The dtypes that have kernels: float32, float64, bfloat16, float16; anything else raises NotImplementedError.
FloatType float_type(const char* op, const char* name, at::ScalarType dtype);
// Index targets: int64, int32, int16, int8, uint8.
IndexType index_type(at::ScalarType dtype);

// Incoming gradient and output of log_softmax must match; the kernels' element type.
FloatType check_log_softmax_backward(const at::Tensor& grad_output, const at::Tensor& output);

}  // namespace nllx
