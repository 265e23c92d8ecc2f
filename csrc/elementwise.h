// Losses that compare two tensors element by element: their checks, and from tensors of any strides to few dimensions.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "checks.h"
#include "problem.h"

namespace nllx {

struct ElementwiseArguments {
  const char* op;
  const at::Tensor& input;
  const at::Tensor& target;
  const std::optional<at::Tensor>& weight;
  int64_t reduction;
};

// Owners of the memory that a problem points into, and the dtypes.
struct ElementwiseLoss {
  at::Tensor input, target, weight;  // weight: undefined where all are one
  at::ScalarType acc_dtype, loss_dtype;

  FloatType float_type() const { return nllx::float_type("", "", input.scalar_type()); }
  bool weight_is_acc() const { return weight.defined() && weight.scalar_type() == acc_dtype; }
  bool loss_is_acc() const { return loss_dtype == acc_dtype; }
};

// Raises for bad arguments: input, target and weight have one shape and lie on one device, the target has the input's
// dtype, and the weight that one or the one that is computed in. `loss_dtype`: by default the input's.
ElementwiseLoss make_elementwise_loss(const ElementwiseArguments& args, std::optional<at::ScalarType> loss_dtype);

// The uninitialised result: one number, or one for each element, with the strides that torch gives it.
at::Tensor empty_elementwise_loss(const ElementwiseLoss& loss, int64_t reduction);

// The incoming gradient in the dtype of the input or in acc, of one element for a reduced loss. Raises where it does
// not fit the loss.
at::Tensor elementwise_grad_output(const ElementwiseArguments& args, const ElementwiseLoss& loss,
                                   const at::Tensor& grad_output);
// What the kernels take, in the order in which torch's TensorIterator walks through the tensors: along the memory of
// the first ones. Tensors with more dimensions than the kernels take are replaced, what is read by copies, what is
// written by temporaries, which the caller copies back. `result`: one loss for each element, or undefined;
// `grad_input`, `grad_target`: undefined where they are not asked for. `total_weight`: the divisor of a mean, or
// undefined.
ElementwiseForward elementwise_forward(ElementwiseLoss& loss, at::Tensor& result);
ElementwiseBackward elementwise_backward(ElementwiseLoss& loss, at::Tensor& grad_output, const at::Tensor& total_weight,
                                         at::Tensor& grad_input, at::Tensor& grad_target);

}  // namespace nllx
