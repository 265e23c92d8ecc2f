// An operator in C++: a type `Op` with
//   kSchema     its schema, in which every result has a name
//   Signature   the type of the C++ function that it stands for
// From them come its calls through the dispatcher, its definition and its vector-Jacobian product.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/jit/frontend/function_schema_parser.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../checks.h"
#include "schema.h"

namespace nllx {

template <typename T>
inline constexpr bool kIsTensor =
    std::is_same_v<std::decay_t<T>, at::Tensor> || std::is_same_v<std::decay_t<T>, OptionalTensor>;

template <typename Signature>
struct Function;
template <typename R, typename... A>
struct Function<R(A...)> {
  using Result = R;
  using Arguments = std::tuple<A...>;
  static constexpr size_t kArguments = sizeof...(A);
  static constexpr size_t kTensors = (size_t{kIsTensor<A>} + ... + 0);

 private:
  static constexpr bool tensors_come_first() {
    constexpr bool is_tensor[] = {kIsTensor<A>..., false};
    for (size_t i = 0; i < kTensors; ++i) {
      if (!is_tensor[i]) return false;
    }
    return true;
  }
  static_assert(tensors_come_first(), "the options of an operator come after its tensors");
};

// The tensor of an argument; an undefined one for none.
inline const at::Tensor& tensor_of(const at::Tensor& t) { return t; }
inline const at::Tensor& tensor_of(const OptionalTensor& t) {
  static const at::Tensor none;
  return t.has_value() ? *t : none;
}

// The arguments before the options, in order.
template <typename Signature, typename... A>
std::array<const at::Tensor*, Function<Signature>::kTensors> tensors_of(const A&... arguments) {
  constexpr size_t kTensors = Function<Signature>::kTensors;
  std::array<const at::Tensor*, kTensors> tensors{};
  size_t place = 0;
  const auto take = [&](const auto& argument) {
    if constexpr (kIsTensor<decltype(argument)>) tensors[place++] = &tensor_of(argument);
  };
  (take(arguments), ...);
  return tensors;
}

// The dispatcher's entry of "nllx::" + prefix + name + suffix.
template <typename Op>
auto find_operator(const char* prefix = "", const char* suffix = "") {
  constexpr Schema schema = parse_schema(Op::kSchema);
  const std::string full = "nllx::" + std::string(prefix) + std::string(schema.name) + suffix;
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(full.c_str(), std::string(schema.overload).c_str())
      .template typed<typename Op::Signature>();
}

template <typename Op, typename... Args>
decltype(auto) call(Args&&... args) {
  static const auto op = find_operator<Op>();
  return op.call(std::forward<Args>(args)...);
}

// The same in differentiable torch operations (nllx/_operators).
template <typename Op, typename... Args>
decltype(auto) call_definition(Args&&... args) {
  static const auto op = find_operator<Op>("_", "_definition");
  return op.call(std::forward<Args>(args)...);
}

// The operator of that schema, whose kernels are registered elsewhere, and for the derivatives that no kernel has
// (nllx/_operators registers them)
//   _NAME_definition   the same in differentiable torch operations
//   _NAME_vjp          the gradients of the arguments at the places `which`, from those of the results that have one
inline void define(torch::Library& m, const char* text) {
  const c10::FunctionSchema schema = torch::jit::parseSchema(text);
  const std::string& name = schema.name();
  m.def(text);
  m.def(c10::FunctionSchema("nllx::_" + name + "_definition", "", schema.arguments(), schema.returns()));
  std::vector<c10::Argument> arguments{
      c10::Argument("grad_outputs", c10::ListType::create(c10::OptionalType::ofTensor()))};
  for (const c10::Argument& argument : schema.arguments()) {
    arguments.push_back(c10::Argument(argument.name(), argument.type(), argument.real_type(), argument.N()));
  }
  arguments.emplace_back("which", c10::ListType::ofInts());
  m.def(c10::FunctionSchema("nllx::_" + name + "_vjp", "", std::move(arguments),
                            {c10::Argument("gradients", c10::ListType::ofTensors())}));
}

}  // namespace nllx
