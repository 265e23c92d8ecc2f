// Autograd of an operator whose first derivative is another operator, in C++, so that a training step runs no Python.
//
// An operator `Op` has two: Op::Forward and Op::Backward (operator.h), whose schemas say by their names
//   X_forward(Tensor a, Tensor b, ..., options) -> (Tensor y, ..., Tensor s, ...)
//   X_backward(Tensor grad_y, ..., Tensor b, ..., Tensor s, ..., options, bool[n] output_mask) -> (Tensor grad_a, ...)
// which outputs have derivatives (those the backward takes first, as grad_*, are the forward's first results), with
// respect to which inputs (the backward's results), and what is saved (the backward's other tensors: arguments and
// results of the forward). The options are the forward's first. With several inputs the last argument says which
// gradients are wanted, and the others are undefined; with several outputs each grad_* is a Tensor?, none where nobody
// has asked for that output. Every other derivative (of higher order, forward, with respect to other inputs) comes from
// the definitions in nllx/_operators, which torch differentiates.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <string>
#include <typeinfo>
#include <vector>

#include "../saved_tensor.h"
#include "operator.h"

namespace nllx {

inline bool requires_grad(const at::Tensor& t) { return at::GradMode::is_enabled() && t.requires_grad(); }
inline bool has_tangent(const at::Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }

// Of tensors that may be undefined.
template <typename Tensors>
bool any_has_tangent(const Tensors& tensors) {
  for (const at::Tensor* t : tensors) {
    if (t->defined() && has_tangent(*t)) return true;
  }
  return false;
}
template <typename Tensors>
bool any_requires_grad(const Tensors& tensors) {
  for (const at::Tensor* t : tensors) {
    if (t->defined() && requires_grad(*t)) return true;
  }
  return false;
}

// functorch differentiates operators, not nodes of C++; its calls go another way (nllx/_operators/functorch.py).
inline void check_no_functorch() {
  if (const auto& functorch = at::functorch::functorchTLSAccessor()) functorch->checkSupportsCppAutogradFunction();
}

template <typename Pointer, typename Node, typename... Args>
Pointer make_node(Args&&... args) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    // torch's deleter frees a long graph without recursion.
    return Pointer(new Node(std::forward<Args>(args)...), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Node>(std::forward<Args>(args)...);
  }
}

// The types of the nodes, and their names, for the classes that Python has of them.
struct NodeType {
  const std::type_info* type;
  const char* name;
};
inline std::vector<NodeType>& node_types() {
  static std::vector<NodeType> types;
  return types;
}

// What the schemas say.
template <typename Op>
struct Derivative {
  using Forward = Function<typename Op::Forward::Signature>;
  using Backward = Function<typename Op::Backward::Signature>;
  using BackwardArguments = typename Backward::Arguments;
  static constexpr Schema kForward = parse_schema(Op::Forward::kSchema);
  static constexpr Schema kBackward = parse_schema(Op::Backward::kSchema);

  static constexpr size_t count_outputs() {
    size_t count = 0;
    while (kBackward.arguments[count].substr(0, 5) == "grad_") ++count;
    return count;
  }
  static constexpr size_t kOutputs = count_outputs(), kInputs = kBackward.result_count;
  static constexpr size_t kSaved = Backward::kTensors - kOutputs;

  using Mask = std::array<bool, kInputs>;
  static constexpr bool kHasMask =
      std::is_same_v<std::decay_t<std::tuple_element_t<Backward::kArguments - 1, BackwardArguments>>, Mask>;
  static constexpr size_t kOptions = Backward::kArguments - Backward::kTensors - kHasMask;
  static_assert(kHasMask || kInputs == 1, "a backward of several inputs is told which gradients are wanted");

  // Where a saved tensor comes from.
  struct Source {
    bool is_result = false;  // of the forward; else an argument
    size_t place = 0;
    bool is_output = false;  // a result that has a derivative
    bool is_read = true;     // by the backward; of an argument that is not, the shape and dtype may be all that matters
  };
  static constexpr std::array<Source, kSaved> find_saved() {
    std::array<Source, kSaved> saved{};
    for (size_t i = 0; i < kSaved; ++i) {
      const std::string_view name = kBackward.arguments[kOutputs + i];
      const size_t result = kForward.result(name);
      if (result != Schema::kMost) {
        saved[i] = {true, result, result < kOutputs, true};
      } else {
        saved[i] = {false, kForward.argument(name), false, name != std::string_view(Op::kUnread)};
      }
    }
    return saved;
  }
  static constexpr std::array<Source, kSaved> kSources = find_saved();

  static constexpr std::array<size_t, kInputs> find_inputs() {
    std::array<size_t, kInputs> inputs{};
    for (size_t i = 0; i < kInputs; ++i) inputs[i] = kForward.argument(kBackward.results[i].substr(5));
    return inputs;
  }
  static constexpr std::array<size_t, kInputs> kDifferentiable = find_inputs();

  static constexpr bool is_consistent() {
    for (const Source& source : kSources) {
      if (source.place >= (source.is_result ? kForward.result_count : Forward::kTensors)) return false;
    }
    for (const size_t input : kDifferentiable) {
      if (input >= Forward::kTensors) return false;
    }
    for (size_t i = 0; i < kOptions; ++i) {
      if (kBackward.arguments[Backward::kTensors + i] != kForward.arguments[Forward::kTensors + i]) return false;
    }
    for (size_t i = 0; kOutputs > 1 && i < kOutputs; ++i) {
      if (kBackward.arguments[i].substr(5) != kForward.results[i]) return false;
    }
    return kForward.argument_count == Forward::kArguments && kBackward.argument_count == Backward::kArguments;
  }
  static_assert(is_consistent(), "every saved tensor, input and option of the backward has the forward's name");

  // The first result that is saved: what the versions of the arguments are remembered by.
  static constexpr size_t find_key() {
    for (size_t i = 0; i < kSaved; ++i) {
      if (kSources[i].is_result) return i;
    }
    return kSaved;
  }
  static constexpr size_t kKey = find_key();
  static_assert(kKey < kSaved, "a backward gets a result of its forward");

  template <typename Indices>
  struct OptionTypes;
  template <size_t... I>
  struct OptionTypes<std::index_sequence<I...>> {
    using Type = std::tuple<std::decay_t<std::tuple_element_t<Backward::kTensors + I, BackwardArguments>>...>;
  };
  using Options = typename OptionTypes<std::make_index_sequence<kOptions>>::Type;

  template <typename Indices>
  struct ForwardOptionTypes;
  template <size_t... I>
  struct ForwardOptionTypes<std::index_sequence<I...>> {
    using Type = std::tuple<std::decay_t<std::tuple_element_t<Forward::kTensors + I, typename Forward::Arguments>>...>;
  };
  static_assert(std::is_same_v<Options, typename ForwardOptionTypes<std::make_index_sequence<kOptions>>::Type>,
                "an option of the backward has the forward's type");
  using Grads = std::array<at::Tensor, kOutputs>;
  using Saved = std::array<at::Tensor, kSaved>;
};

namespace autograd_details {

// A tensor, undefined for none, as a parameter of a signature takes it.
template <typename Parameter>
decltype(auto) as(const at::Tensor& t) {
  if constexpr (std::is_same_v<std::decay_t<Parameter>, OptionalTensor>) {
    return t.defined() ? OptionalTensor(t) : OptionalTensor();
  } else {
    return static_cast<const at::Tensor&>(t);
  }
}

template <typename Op, size_t... G, size_t... S, size_t... O>
auto call_backward(const typename Derivative<Op>::Grads& grads, const typename Derivative<Op>::Saved& saved,
                   const typename Derivative<Op>::Options& options, const typename Derivative<Op>::Mask& mask,
                   std::index_sequence<G...>, std::index_sequence<S...>, std::index_sequence<O...>) {
  using D = Derivative<Op>;
  using A = typename D::BackwardArguments;
  if constexpr (D::kHasMask) {
    return call<typename Op::Backward>(as<std::tuple_element_t<G, A>>(grads[G])...,
                                       as<std::tuple_element_t<D::kOutputs + S, A>>(saved[S])...,
                                       std::get<O>(options)..., mask);
  } else {
    return call<typename Op::Backward>(as<std::tuple_element_t<G, A>>(grads[G])...,
                                       as<std::tuple_element_t<D::kOutputs + S, A>>(saved[S])...,
                                       std::get<O>(options)...);
  }
}

template <typename Result>
torch::autograd::variable_list as_list(Result result) {
  if constexpr (std::is_same_v<Result, at::Tensor>) {
    return {std::move(result)};
  } else {
    return std::apply([](auto&&... t) { return torch::autograd::variable_list{std::move(t)...}; }, std::move(result));
  }
}

inline std::array<const at::Tensor*, 1> results_of(const at::Tensor& result) { return {&result}; }
template <typename... T>
std::array<const at::Tensor*, sizeof...(T)> results_of(const std::tuple<T...>& results) {
  return std::apply([](const auto&... t) { return std::array<const at::Tensor*, sizeof...(T)>{&t...}; }, results);
}

}  // namespace autograd_details

// The gradients of a node, by the backward operator.
template <typename Op>
struct ByOperator {
  using D = Derivative<Op>;
  static torch::autograd::variable_list gradients(const typename D::Grads& grads, const typename D::Saved& saved,
                                                  const typename D::Options& options, const typename D::Mask& mask) {
    return autograd_details::as_list(autograd_details::call_backward<Op>(
        grads, saved, options, mask, std::make_index_sequence<D::kOutputs>(), std::make_index_sequence<D::kSaved>(),
        std::make_index_sequence<D::kOptions>()));
  }
};

// The node of the autograd graph behind an operator. torch::autograd::Function would do for any function, with maps
// from names to options and sets of tensors, which take longer than the kernels of a small problem; this holds what one
// backward needs in plain members, as the nodes of torch's own losses do.
template <typename Op, typename Gradients = ByOperator<Op>>
class BackwardNode final : public torch::autograd::Node {
 public:
  using D = Derivative<Op>;
  using variable_list = torch::autograd::variable_list;

  explicit BackwardNode(typename D::Options options) : options_(std::move(options)) {}

  void save(const std::array<const at::Tensor*, D::kSaved>& tensors) {
    for (size_t i = 0; i < D::kSaved; ++i) {
      constexpr auto sources = D::kSources;
      if (!tensors[i]->defined()) continue;  // as they begin
      saved_[i] = SavedTensor(*tensors[i], sources[i].is_output, !sources[i].is_result && sources[i].is_read);
    }
  }

  std::string name() const override { return Op::kNode; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    typename D::Saved tensors;
    // Last what the backward does not read: an error that is about what it does read comes first.
    for (const bool read : {true, false}) {
      for (size_t i = 0; i < D::kSaved; ++i) {
        if (D::kSources[i].is_read == read) tensors[i] = saved_[i].unpack(saved_for(i));
      }
    }
    const NodeUnderWay checked;
    return differentiate(grads, tensors, options_, mask());
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& saved : saved_) saved.release();
  }

  // Compiled autograd: what the compiled graph depends on, and the backward as a function of what is saved.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (size_t i = 0; i < D::kSaved; ++i) {
      saved_[i].check();
      args.collect(saved_[i].variable(), D::kSources[i].is_output);
    }
    std::apply([&](const auto&... option) { (args.collect(option), ...); }, options_);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (auto& saved : saved_) swap.before(saved.variable());
    std::apply([&](auto&... option) { (swap.before(option), ...); }, options_);
    variable_list tensors;
    for (size_t i = 0; i < D::kSaved; ++i) tensors.push_back(saved_[i].variable().unpack(saved_for(i)));
    torch::dynamo::autograd::PackedArgs packed;
    packed.pack(tensors);
    std::apply([&](const auto&... option) { (packed.pack(option), ...); }, options_);
    for (const bool wanted : mask()) packed.pack(wanted);
    std::vector<at::TypePtr> schema;
    for (const auto& value : packed.vec()) {
      schema.push_back(value.isTensor() ? at::TypePtr(at::TensorType::get()) : value.type());
    }
    namespace compiled = torch::dynamo::autograd;
    const auto metadata = compiled::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
        compiled::get_input_metadata(next_edges()));
    const auto& compiler = compiled::getPyCompilerInterface();
    const std::string function =
        compiler->bind_function(swap.get_py_compiler(), name(), &apply_functional, schema, /*is_custom_function=*/true,
                                /*is_traceable=*/true);
    variable_list result =
        compiler->call_function(swap.get_py_compiler(), "apply_functional", function, grads, packed.vec(), metadata);
    for (auto& saved : saved_) swap.after(saved.variable());
    std::apply([&](auto&... option) { (swap.after(option), ...); }, options_);
    return result;
  }

 private:
  NodePointer saved_for(size_t i) {
    if (D::kSources[i].is_output) return getptr();
    return nullptr;
  }

  typename D::Mask mask() const {
    typename D::Mask mask{};
    for (size_t i = 0; i < D::kInputs; ++i) mask[i] = task_should_compute_output(i);
    return mask;
  }

  static variable_list differentiate(const variable_list& grads, const typename D::Saved& saved,
                                     const typename D::Options& options, const typename D::Mask& mask) {
    typename D::Grads given;
    bool any = false;
    for (size_t i = 0; i < D::kOutputs; ++i) any |= (given[i] = grads[i]).defined();
    return any ? Gradients::gradients(given, saved, options, mask) : variable_list(D::kInputs);
  }

  static variable_list apply_functional(const variable_list& grads, const std::vector<c10::IValue>& values) {
    torch::dynamo::autograd::PackedArgs packed(values);
    const auto tensors = packed.unpack<variable_list>();
    typename D::Saved saved;
    std::copy(tensors.begin(), tensors.end(), saved.begin());
    typename D::Options options;
    std::apply([&](auto&... option) { ((option = packed.unpack<std::decay_t<decltype(option)>>()), ...); }, options);
    typename D::Mask mask{};
    for (bool& wanted : mask) wanted = packed.unpack<bool>();
    return differentiate(grads, saved, options, mask);
  }

  std::array<SavedTensor, D::kSaved> saved_;
  typename D::Options options_;
};

// Python's class for the node: as a member of a static object, before Python's module is made.
template <typename Op, typename Gradients = ByOperator<Op>>
struct NodeClass {
  NodeClass() { node_types().push_back({&typeid(BackwardNode<Op, Gradients>), Op::kNode}); }
};

// The two operators as autograd sees them.
template <typename Op, typename Forward = typename Op::Forward::Signature,
          typename Backward = typename Op::Backward::Signature>
struct Autograd;
template <typename Op, typename R, typename... A, typename BackwardR, typename... BackwardA>
struct Autograd<Op, R(A...), BackwardR(BackwardA...)> {
  using D = Derivative<Op>;

  static R forward(A... args) {
    Op::check(args...);
    const auto tensors = tensors_of<R(A...)>(args...);
    if (needs_definition(tensors)) return call_definition<typename Op::Forward>(args...);
    for (const size_t input : D::kDifferentiable) {
      if (tensors[input]->defined() && requires_grad(*tensors[input])) return with_node<ByOperator<Op>>(args...);
    }
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    R result = call<typename Op::Forward>(args...);
    if (has_default_hooks() || versions_are_remembered()) {
      const auto saved = saved_tensors(tensors, autograd_details::results_of(result));
      remember_versions(*saved[D::kKey], read_tensors(saved));
    }
    return result;
  }

  // The forward below autograd, and the node of its backward.
  template <typename Gradients>
  static R with_node(A... args) {
    check_no_functorch();
    R result = [&] {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      return call<typename Op::Forward>(args...);
    }();
    const auto tensors = tensors_of<R(A...)>(args...);
    const auto node = make_node<NodePointer, BackwardNode<Op, Gradients>>(options_of(std::tie(args...)));
    node->set_next_edges(next_edges(tensors, std::make_index_sequence<D::kInputs>()));
    set_outputs(result, node);
    static_cast<BackwardNode<Op, Gradients>*>(node.get())
        ->save(saved_tensors(tensors, autograd_details::results_of(result)));
    return result;
  }

  static BackwardR backward(BackwardA... args) {
    const auto tensors = tensors_of<BackwardR(BackwardA...)>(args...);
    check_saved_versions(tensors);
    if (any_has_tangent(tensors) || any_requires_grad(tensors)) return call_definition<typename Op::Backward>(args...);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call<typename Op::Backward>(args...);
  }

  // For the backward as an operator: of its tensors, in the order of its schema.
  static void check_saved_versions(const std::array<const at::Tensor*, D::kOutputs + D::kSaved>& tensors) {
    if (!versions_are_remembered()) return;
    std::array<const at::Tensor*, D::kSaved> saved;
    std::copy(tensors.begin() + D::kOutputs, tensors.end(), saved.begin());
    check_versions(*saved[D::kKey], read_tensors(saved));
  }

  // Whether a derivative is asked for that the backward does not have.
  static bool needs_definition(const std::array<const at::Tensor*, D::Forward::kTensors>& tensors) {
    if (any_has_tangent(tensors)) return true;
    for (size_t i = 0; i < tensors.size(); ++i) {
      bool has_kernel = false;
      for (const size_t input : D::kDifferentiable) has_kernel |= input == i;
      if (!has_kernel && tensors[i]->defined() && requires_grad(*tensors[i])) return true;
    }
    return false;
  }

 private:
  template <typename Tensors, typename Results>
  static std::array<const at::Tensor*, D::kSaved> saved_tensors(const Tensors& tensors, const Results& results) {
    std::array<const at::Tensor*, D::kSaved> saved{};
    for (size_t i = 0; i < D::kSaved; ++i) {
      const auto& source = D::kSources[i];
      saved[i] = source.is_result ? results[source.place] : tensors[source.place];
    }
    return saved;
  }

  // What must not change until the backward: arguments that it reads, and outputs, which users have.
  static std::vector<at::Tensor> read_tensors(const std::array<const at::Tensor*, D::kSaved>& saved) {
    std::vector<at::Tensor> read;
    for (size_t i = 0; i < D::kSaved; ++i) {
      const auto& source = D::kSources[i];
      if (source.is_output || (!source.is_result && source.is_read)) read.push_back(*saved[i]);
    }
    return read;
  }

  template <size_t... I, typename Arguments>
  static typename D::Options options_at(const Arguments& arguments, std::index_sequence<I...>) {
    return {std::get<D::Forward::kTensors + I>(arguments)...};
  }
  template <typename Arguments>
  static typename D::Options options_of(const Arguments& arguments) {
    return options_at(arguments, std::make_index_sequence<D::kOptions>());
  }

  template <typename Tensors, size_t... I>
  static torch::autograd::edge_list next_edges(const Tensors& tensors, std::index_sequence<I...>) {
    return torch::autograd::collect_next_edges(*tensors[D::kDifferentiable[I]]...);
  }

  static void set_outputs(const R& result, const NodePointer& node) {
    const auto results = autograd_details::results_of(result);
    for (size_t i = 0; i < D::kOutputs; ++i) torch::autograd::set_history(*results[i], node);
  }
};

// Defaults of what an operator says beside its schemas.
struct Differentiable {
  static constexpr const char* kUnread = "";  // an argument that is saved and whose values the backward does not read
  template <typename... A>
  static void check(const A&...) {}  // raises before the forward, whatever will differentiate it
};

}  // namespace nllx
