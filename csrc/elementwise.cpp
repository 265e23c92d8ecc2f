#include "elementwise.h"

#include <ATen/TensorIterator.h>
#include <ATen/ops/empty_like.h>

#include "layout.h"
#include "loss_problem.h"
#include "message.h"

namespace nllx {

using at::ScalarType;
using at::Tensor;

namespace {

// Shapes, dtypes, devices and memory are checked before.
void leave_out_checks(at::TensorIteratorConfig& config) {
  config.set_check_mem_overlap(false).check_all_same_dtype(false).check_all_same_device(false).resize_outputs(false);
}

// Without gaps and in the same order of memory: one dimension, found without the iterator.
bool have_one_order(const Tensor& a, const Tensor& b) {
  return a.strides() == b.strides() ? a.is_non_overlapping_and_dense() : a.is_contiguous() && b.is_contiguous();
}

bool is_adjacent(const Elements& e, const ElementStrides& strides) {
  int64_t stride = 1;
  for (int d = 0; d < e.dims; ++d) {
    if (e.sizes[d] != 1 && strides.of[d] != stride) return false;
    stride *= e.sizes[d];
  }
  return true;
}

// Whether all elements are the same one in memory, as in the gradient of a sum.
bool is_one_element(const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1 && t.stride(d) != 0) return false;
  }
  return true;
}

// The tensors of a problem and their strides there.
class Operands {
 public:
  // In this order; undefined tensors are left out.
  void write(Tensor& t, ElementStrides& strides) {
    if (!t.defined()) return;
    all_.push_back({&t, &strides});
    ++outputs_;
  }
  void read(Tensor& t, ElementStrides& strides) {
    if (t.defined()) all_.push_back({&t, &strides});
  }

  // Sets the strides.
  Elements share_order() {
    const Tensor& first = *all_[0].tensor;
    Elements e;
    e.count = first.numel();
    bool one_order = true;
    for (const Operand& operand : all_) one_order = one_order && have_one_order(first, *operand.tensor);
    if (one_order) {
      e.dims = 1;
      e.sizes[0] = e.count;
      for (const Operand& operand : all_) {
        operand.strides->of[0] = 1;
        operand.strides->adjacent = true;
      }
      return e;
    }
    at::TensorIteratorConfig config;
    leave_out_checks(config);
    for (size_t i = 0; i < all_.size(); ++i) {
      i < outputs_ ? config.add_output(*all_[i].tensor) : config.add_const_input(*all_[i].tensor);
    }
    at::TensorIterator iterator = config.build();
    if (iterator.ndim() > Elements::kMostDims) {
      for (size_t i = 0; i < all_.size(); ++i) {
        Tensor& t = *all_[i].tensor;
        t = i < outputs_ ? at::empty_like(t, at::MemoryFormat::Contiguous) : t.contiguous();
      }
      return share_order();
    }
    e.dims = iterator.ndim();
    for (int d = 0; d < e.dims; ++d) e.sizes[d] = iterator.shape()[static_cast<size_t>(d)];
    for (size_t i = 0; i < all_.size(); ++i) {
      const at::IntArrayRef bytes = iterator.strides(static_cast<int64_t>(i));
      const int64_t element = static_cast<int64_t>(all_[i].tensor->element_size());
      for (int d = 0; d < e.dims; ++d) all_[i].strides->of[d] = bytes[static_cast<size_t>(d)] / element;
      all_[i].strides->adjacent = is_adjacent(e, *all_[i].strides);
    }
    return e;
  }

 private:
  struct Operand {
    Tensor* tensor;
    ElementStrides* strides;
  };
  c10::SmallVector<Operand, 6> all_;
  size_t outputs_ = 0;
};

}  // namespace

ElementwiseLoss make_elementwise_loss(const ElementwiseArguments& a, std::optional<ScalarType> loss_dtype) {
  ElementwiseLoss loss;
  const ScalarType dtype = a.input.scalar_type();
  float_type(a.op, "input", dtype);
  loss.acc_dtype = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  loss.loss_dtype = loss_dtype.value_or(dtype);
  const bool weighted = a.weight.has_value() && a.weight->defined();

  const auto check = [&](const char* name, const Tensor& t, bool takes_acc) {
    TORCH_CHECK(t.sizes() == a.input.sizes(), a.op, ": ", name, " must have the shape of input, ",
                list(a.input.sizes()), ", but got ", list(t.sizes()));
    TORCH_CHECK(t.scalar_type() == dtype || (takes_acc && t.scalar_type() == loss.acc_dtype), a.op,
                ": expected scalar type ", dtype, " but found ", t.scalar_type(), " for ", name,
                "; it takes the dtype of input", takes_acc && dtype != loss.acc_dtype ? " or float32" : "");
    TORCH_CHECK(t.device() == a.input.device(), a.op,
                ": Expected all tensors to be on the same device, but found at least two devices, ",
                a.input.device().str(), " (input) and ", t.device().str(), " (", name, "); call ", name,
                ".to(input.device)");
    check_memory(a.op, name, t);
  };
  check("target", a.target, false);
  if (weighted) check("weight", *a.weight, true);
  check_memory(a.op, "input", a.input);
  TORCH_CHECK_VALUE(a.reduction >= 0 && a.reduction <= 2, a.op, ": ", number(a.reduction),
                    " is not a valid value for reduction; the operator takes 0 (none), 1 (mean) or 2 (sum)");
  TORCH_CHECK(loss.loss_dtype == dtype || loss.loss_is_acc(), a.op, ": dtype must be ", dtype, " or ", loss.acc_dtype,
              ", but got ", loss.loss_dtype);

  loss.input = aligned(a.input);
  loss.target = aligned(a.target);
  if (weighted) loss.weight = aligned(*a.weight);
  return loss;
}

Tensor empty_elementwise_loss(const ElementwiseLoss& loss, int64_t reduction) {
  if (static_cast<Reduction>(reduction) != Reduction::kNone) return empty_beside(loss.input, {}, loss.loss_dtype);
  // As the iterator has it, which would take as long as a small problem.
  if (loss.input.is_contiguous() && loss.target.is_contiguous())
    return empty_beside(loss.input, loss.input.sizes(), loss.loss_dtype);
  const Tensor unallocated;
  at::TensorIteratorConfig config;
  leave_out_checks(config);
  config.add_output(unallocated).add_const_input(loss.input).add_const_input(loss.target);
  config.declare_static_dtype_and_device(loss.loss_dtype, loss.input.device());
  return config.build().output();
}

Tensor elementwise_grad_output(const ElementwiseArguments& a, const ElementwiseLoss& loss, const Tensor& grad_output) {
  const bool per_element = static_cast<Reduction>(a.reduction) == Reduction::kNone;
  check_grad_output(a.op, grad_output, per_element ? a.input.numel() : 1, a.input);
  TORCH_CHECK(!per_element || grad_output.sizes() == a.input.sizes(), a.op,
              ": grad_output must have the shape of input, ", list(a.input.sizes()), ", but got ",
              list(grad_output.sizes()));
  const ScalarType dtype = grad_output.scalar_type();
  return aligned(dtype == a.input.scalar_type() || dtype == loss.acc_dtype ? grad_output
                                                                           : grad_output.to(loss.acc_dtype));
}

ElementwiseForward elementwise_forward(ElementwiseLoss& loss, Tensor& result) {
  ElementwiseForward p;
  Operands operands;
  operands.write(result, p.loss_strides);
  operands.read(loss.input, p.input_strides);
  operands.read(loss.target, p.target_strides);
  operands.read(loss.weight, p.weight_strides);
  p.elements = operands.share_order();
  p.input = loss.input.const_data_ptr();
  p.target = loss.target.const_data_ptr();
  if (loss.weight.defined()) p.weight = loss.weight.const_data_ptr();
  p.weight_is_acc = loss.weight_is_acc();
  if (result.defined()) p.loss = result.mutable_data_ptr();
  p.loss_is_acc = loss.loss_is_acc();
  return p;
}

ElementwiseBackward elementwise_backward(ElementwiseLoss& loss, Tensor& grad_output, const Tensor& total_weight,
                                         Tensor& grad_input, Tensor& grad_target) {
  ElementwiseBackward p;
  p.one_grad_output = is_one_element(grad_output);
  Operands operands;
  operands.write(grad_input, p.grad_input_strides);
  operands.write(grad_target, p.grad_target_strides);
  operands.read(loss.input, p.input_strides);
  operands.read(loss.target, p.target_strides);
  operands.read(loss.weight, p.weight_strides);
  if (!p.one_grad_output) operands.read(grad_output, p.grad_output_strides);
  p.elements = operands.share_order();
  p.input = loss.input.const_data_ptr();
  p.target = loss.target.const_data_ptr();
  if (loss.weight.defined()) p.weight = loss.weight.const_data_ptr();
  p.weight_is_acc = loss.weight_is_acc();
  p.grad_output = grad_output.const_data_ptr();
  p.grad_output_is_acc = grad_output.scalar_type() == loss.acc_dtype;
  if (total_weight.defined()) p.total_weight = total_weight.const_data_ptr();
  if (grad_input.defined()) p.grad_input = grad_input.mutable_data_ptr();
  if (grad_target.defined()) p.grad_target = grad_target.mutable_data_ptr();
  return p;
}

}  // namespace nllx
