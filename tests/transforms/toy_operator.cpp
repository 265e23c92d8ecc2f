// An operator of three inputs, one of them optional, and two outputs, as small as one can be: what csrc/operators makes
// of its schemas is tested with it. y = scale a b / n and z = Σ c a / n (c = 1 where it is none), n = the elements of
// a.
#include <ATen/ATen.h>

#include "operators/loss.h"

namespace nllx {

using at::Tensor;

namespace {

struct Toy {
  static constexpr const char* kSchema =
      "toy(Tensor a, Tensor b, Tensor? c=None, float scale=1.0) -> (Tensor y, Tensor z)";
  using Signature = std::tuple<Tensor, Tensor>(const Tensor& a, const Tensor& b, const OptionalTensor& c, double scale);

  template <typename Forward>
  static std::tuple<Tensor, Tensor> apply(const Forward& forward, const Tensor& a, const Tensor& b,
                                          const OptionalTensor& c, double scale) {
    auto [y, z, n] = forward(a, b, c, scale);
    return {y, z};
  }

  static constexpr bool kCpuAutocast = false;
  template <typename Arguments>
  static void autocast(Arguments& /*arguments*/, c10::DeviceType /*device*/) {}
};

struct ToyOperators : Differentiable {
  static constexpr const char* kNode = "ToyBackward";

  struct Forward {
    static constexpr const char* kSchema =
        "toy_forward(Tensor a, Tensor b, Tensor? c=None, float scale=1.0) -> (Tensor y, Tensor z, Tensor n)";
    using Signature = std::tuple<Tensor, Tensor, Tensor>(const Tensor& a, const Tensor& b, const OptionalTensor& c,
                                                         double scale);
  };
  struct Backward {
    static constexpr const char* kSchema =
        "toy_backward(Tensor? grad_y, Tensor? grad_z, Tensor a, Tensor b, Tensor? c, Tensor n, float scale, bool[3] "
        "output_mask) -> (Tensor grad_a, Tensor grad_b, Tensor grad_c)";
    using Signature = std::tuple<Tensor, Tensor, Tensor>(const OptionalTensor& grad_y, const OptionalTensor& grad_z,
                                                         const Tensor& a, const Tensor& b, const OptionalTensor& c,
                                                         const Tensor& n, double scale,
                                                         std::array<bool, 3> output_mask);
  };
};

std::tuple<Tensor, Tensor, Tensor> toy_forward_cpu(const Tensor& a, const Tensor& b, const OptionalTensor& c,
                                                   double scale) {
  const Tensor n = at::full({}, a.numel(), a.options());
  return {a * b * scale / n, (c.has_value() ? *c * a : a).sum() / n, n};
}

int64_t backward_calls = 0;

std::tuple<Tensor, Tensor, Tensor> toy_backward_cpu(const OptionalTensor& grad_y, const OptionalTensor& grad_z,
                                                    const Tensor& a, const Tensor& b, const OptionalTensor& c,
                                                    const Tensor& n, double scale, std::array<bool, 3> output_mask) {
  ++backward_calls;
  TORCH_CHECK(grad_y.has_value() || grad_z.has_value(), "toy: no gradient came");
  TORCH_CHECK(output_mask[0] || output_mask[1] || output_mask[2], "toy: no gradient is wanted");
  Tensor grad_a, grad_b, grad_c;
  if (output_mask[0]) {
    grad_a = at::zeros_like(a);
    if (grad_y.has_value()) grad_a += *grad_y * b * scale / n;
    if (grad_z.has_value()) grad_a += *grad_z * (c.has_value() ? *c : at::ones_like(a)) / n;
  }
  if (output_mask[1]) grad_b = grad_y.has_value() ? *grad_y * a * scale / n : at::zeros_like(b);
  if (output_mask[2] && c.has_value()) grad_c = grad_z.has_value() ? *grad_z * a / n : at::zeros_like(*c);
  return {grad_a, grad_b, grad_c};
}

const Registration<Toy, ToyOperators> registration(__FILE__, __LINE__);

}  // namespace

TORCH_LIBRARY_FRAGMENT(nllx, m) {
  m.def("toy_backward_calls() -> int", [] { return std::exchange(backward_calls, 0); });
}

TORCH_LIBRARY_IMPL(nllx, CPU, m) {
  m.impl("toy_forward", &toy_forward_cpu);
  m.impl("toy_backward", &toy_backward_cpu);
}

}  // namespace nllx
