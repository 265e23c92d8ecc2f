#pragma once

#include "loss.h"

namespace nllx {

struct LogSoftmax {
  static constexpr const char* kSchema = "log_softmax(Tensor input, int dim, ScalarType? dtype=None) -> Tensor output";
  using Signature = at::Tensor(const at::Tensor& input, int64_t dim, OptionalDtype dtype);

  template <typename Forward>
  static at::Tensor apply(const Forward& forward, const at::Tensor& input, int64_t dim, OptionalDtype dtype) {
    return forward(dtype.has_value() ? input.to(*dtype) : input, dim);
  }

  // As torch has it: on CUDA alone.
  static constexpr bool kCpuAutocast = false;
  template <typename Arguments>
  static void autocast(Arguments& arguments, c10::DeviceType /*device*/) {
    OptionalDtype& dtype = std::get<OptionalDtype>(arguments);
    if (!dtype.has_value() && is_half(std::get<0>(arguments))) dtype = at::kFloat;
  }
};

}  // namespace nllx
