#pragma once

#include "autograd.h"

namespace nllx {

// torch's index losses have no derivative with respect to the weights, and say so.
inline void check_weight_gradient(const char* op, const at::Tensor& target, const OptionalTensor& weight) {
  const at::Tensor& w = tensor_of(weight);
  TORCH_CHECK(
      !w.defined() || at::isFloatingType(target.scalar_type()) || !(requires_grad(w) || has_tangent(w)),
      "The function '", op,
      "' is not differentiable with respect to argument 'weight' for targets that are class indices. This input "
      "cannot have requires_grad True: call weight.detach()");
}

}  // namespace nllx
