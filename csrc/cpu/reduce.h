// From the sums of a kernel to the results of an operator.
#pragma once

#include <ATen/core/Tensor.h>

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

}  // namespace nllx
