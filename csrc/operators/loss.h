// A public operator, which users call, in terms of the forward operator that has the derivatives (autograd.h): under
// autograd, autocast and functorch. A type `Loss` has, beside kSchema and Signature (operator.h),
//   apply(forward, arguments...)             its result, made by `forward`
//   autocast(arguments, device)              changes the tuple of its arguments to what autocast runs
//   kCpuAutocast                             whether autocast changes it on CPUs too
#pragma once

#include <ATen/autocast_mode.h>

#include "autograd.h"
#include "operator.h"

namespace nllx {

inline bool is_half(const at::Tensor& t) { return t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16; }

// Autocast of a loss of input, target and weight: torch computes it in float32 there. nllx does so anyway, so
// half-precision inputs go in as they are, without a float32 copy, and only the loss comes out in float32. Weights of
// another precision are cast, as torch casts them.
struct Float32Loss {
  static constexpr bool kCpuAutocast = true;

  template <typename Arguments>
  static void autocast(Arguments& arguments, c10::DeviceType device) {
    const at::Tensor &input = std::get<0>(arguments), &target = std::get<1>(arguments);
    OptionalTensor& weight = std::get<2>(arguments);
    OptionalDtype& dtype = std::get<OptionalDtype>(arguments);
    const bool has_weight = weight.has_value() && weight->defined();
    const bool is_double = target.scalar_type() == at::kDouble ||
                           (at::isFloatingType(target.scalar_type()) && has_weight &&
                            weight->scalar_type() == at::kDouble);  // probabilities promote the loss to float64
    if (!dtype.has_value() && is_half(input) && !is_double) dtype = at::kFloat;
    if (has_weight) weight = at::autocast::cached_cast(at::kFloat, *weight, device);
  }
};

template <typename Op, typename Signature = typename Op::Signature>
struct Autocast;
template <typename Op, typename R, typename... A>
struct Autocast<Op, R(A...)> {
  template <c10::DeviceType device>
  static R call(A... args) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(
        at::autocast::get_autocast_dispatch_key_from_device_type(device));
    std::tuple<std::decay_t<A>...> arguments(args...);
    Op::autocast(arguments, device);
    return std::apply([](auto&... changed) { return nllx::call<Op>(changed...); }, arguments);
  }

  // Whether functorch, whose front mode comes before autocast, has to apply it itself.
  static bool is_wanted(const at::Tensor& input) {
    const c10::DeviceType device = input.device().type();
    return ((device == c10::kCPU && Op::kCpuAutocast) || device == c10::kCUDA) &&
           at::autocast::is_autocast_enabled(device);
  }
  static R call_on(const at::Tensor& input, A... args) {
    return input.is_cpu() ? call<c10::kCPU>(args...) : call<c10::kCUDA>(args...);
  }
};

template <typename Loss, typename Op, typename Signature = typename Loss::Signature>
struct PublicLoss;
template <typename Loss, typename Op, typename R, typename... A>
struct PublicLoss<Loss, Op, R(A...)> {
  static R composite(A... args) {
    return Loss::apply([](const auto&... a) { return Autograd<Op>::forward(a...); }, args...);
  }

  // CompositeImplicitAutograd would run the node of C++, which functorch cannot differentiate.
  static R functorch(A... args) {
    const at::Tensor& input = std::get<0>(std::tie(args...));
    if (Autocast<Loss>::is_wanted(input)) return Autocast<Loss>::call_on(input, args...);
    return Loss::apply([](const auto&... a) { return nllx::call<typename Op::Forward>(a...); }, args...);
  }
};

// Registers a public operator and the two that it is made of, but for their kernels and Op's backward under autograd
// where that is not Autograd<Op>::backward. As a static object, which lasts as long as the process.
template <typename Loss, typename Op, typename Backward = Autograd<Op>>
class Registration {
 public:
  Registration(const char* file, uint32_t line, typename Loss::Signature* composite = &PublicLoss<Loss, Op>::composite)
      : definitions_(torch::Library::FRAGMENT, "nllx", std::nullopt, file, line),
        composite_(implementation(c10::DispatchKey::CompositeImplicitAutograd, file, line)),
        autograd_(implementation(c10::DispatchKey::Autograd, file, line)),
        autocast_(implementation(c10::DispatchKey::AutocastCUDA, file, line)),
        autocast_cpu_(implementation(c10::DispatchKey::AutocastCPU, file, line)),
        functorch_(implementation(c10::DispatchKey::FuncTorchDynamicLayerFrontMode, file, line)) {
    const auto name = [](const char* schema) { return std::string(parse_schema(schema).name); };
    const std::string loss = name(Loss::kSchema);
    definitions_.def(Loss::kSchema);
    define(definitions_, Op::Forward::kSchema);
    define(definitions_, Op::Backward::kSchema);
    composite_.impl(loss.c_str(), composite);
    autograd_.impl(name(Op::Forward::kSchema).c_str(), &Autograd<Op>::forward);
    autograd_.impl(name(Op::Backward::kSchema).c_str(), &Backward::backward);
    autocast_.impl(loss.c_str(), &Autocast<Loss>::template call<c10::kCUDA>);
    if constexpr (Loss::kCpuAutocast) autocast_cpu_.impl(loss.c_str(), &Autocast<Loss>::template call<c10::kCPU>);
    functorch_.impl(loss.c_str(), &PublicLoss<Loss, Op>::functorch);
  }

 private:
  static torch::Library implementation(c10::DispatchKey key, const char* file, uint32_t line) {
    return torch::Library(torch::Library::IMPL, "nllx", key, file, line);
  }

  torch::Library definitions_, composite_, autograd_, autocast_, autocast_cpu_, functorch_;
  NodeClass<Op> node_;
};

}  // namespace nllx
