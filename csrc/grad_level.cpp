#include "grad_level.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "operators/autograd.h"

namespace nllx {

namespace {

using at::Tensor;
using torch::jit::Stack;

c10::OperatorHandle find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("nllx::" + name).c_str(), "");
}

size_t place_of(const std::vector<c10::Argument>& arguments, std::string_view name) {
  const auto found =
      std::find_if(arguments.begin(), arguments.end(), [&](const c10::Argument& a) { return a.name() == name; });
  return static_cast<size_t>(found - arguments.begin());
}

// What the names in the schemas say of an operator with derivatives (operators/autograd.h).
struct Operation {
  explicit Operation(const std::string& name)
      : name(name), schema(find(name).schema()), vjp(find("_" + name + "_vjp")) {
    outputs = schema.returns().size();
    const std::string forward = "_forward";
    if (name.size() < forward.size() || name.substr(name.size() - forward.size()) != forward) return;
    backward = find(name.substr(0, name.size() - forward.size()) + "_backward");
    const c10::FunctionSchema& of = backward->schema();
    outputs = 0;
    while (of.arguments()[outputs].name().substr(0, 5) == "grad_") ++outputs;
    for (const c10::Argument& result : of.returns()) {
      inputs.push_back(place_of(schema.arguments(), result.name().substr(5)));
    }
  }

  bool has_kernel(size_t argument) const { return std::count(inputs.begin(), inputs.end(), argument) > 0; }
  // The argument of the backward at that place is the result of that number; as many as there are for none.
  size_t result_at(size_t place) const {
    return place_of(schema.returns(), backward->schema().arguments()[place].name());
  }

  std::string name;
  const c10::FunctionSchema& schema;
  size_t outputs;                               // the first results, which have derivatives
  std::optional<c10::OperatorHandle> backward;  // none where no kernel has the derivatives
  std::vector<size_t> inputs;                   // the arguments with respect to which it has them
  c10::OperatorHandle vjp;                      // every other derivative, by the definition
};

// An argument for the backward. A wrapper does not count the changes of the tensor that it wraps, which the caller of a
// transform still has.
class SavedArgument {
 public:
  SavedArgument(const Tensor& wrapper, Tensor plain)
      : wrapper_(wrapper, /*is_output=*/false), plain_(std::move(plain)), version_(version()), memory_(plain_) {}

  Tensor unpack() const {
    Tensor wrapper = wrapper_.unpack();
    check_version(version(), version_);
    if (plain_.defined()) memory_.check(plain_);
    return wrapper;
  }

  void release() {
    wrapper_.reset_data();
    plain_.reset();
  }

 private:
  int64_t version() const { return !plain_.defined() || plain_.is_inference() ? 0 : plain_._version(); }

  torch::autograd::SavedVariable wrapper_;
  Tensor plain_;
  int64_t version_;
  Memory memory_;
};

// The derivatives of one level of grad, of whatever argument: the kernel's where there is one. The graph of grad is
// always one that can be differentiated again, so that the gradients of gradients are worked out only when they are
// asked for.
class LevelNode final : public torch::autograd::Node {
 public:
  using variable_list = torch::autograd::variable_list;

  // tensors: which of the arguments are.
  LevelNode(const Operation& operation, Stack arguments, std::vector<size_t> tensors, const std::vector<Tensor>& plain)
      : operation_(operation), arguments_(std::move(arguments)), tensors_(std::move(tensors)) {
    // The definition needs all of them, the kernel what it takes.
    const bool all = std::any_of(tensors_.begin(), tensors_.end(), [&](size_t i) { return !operation.has_kernel(i); });
    for (size_t i = 0; i < tensors_.size(); ++i) {
      c10::IValue& argument = arguments_[tensors_[i]];
      const std::string& name = operation.schema.arguments()[tensors_[i]].name();
      if (all || is_taken(name)) saved_.emplace_back(i, SavedArgument(argument.toTensor(), plain[i]));
      argument = c10::IValue();
    }
  }

  void save_results(const std::vector<Tensor>& results) {
    if (!operation_.backward) return;
    for (size_t i = 0; i < results.size(); ++i) {
      const bool taken = is_taken(operation_.schema.returns()[i].name());
      saved_results_.emplace_back(taken ? results[i] : Tensor(), /*is_output=*/i < operation_.outputs);
    }
  }

  std::string name() const override { return "Nllx_" + operation_.name; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list gradients(tensors_.size());
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& grad) { return grad.defined(); })) return gradients;
    std::vector<size_t> wanted;  // which of tensors_
    bool by_kernel = operation_.backward.has_value();
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (!task_should_compute_output(i)) continue;
      wanted.push_back(i);
      by_kernel &= operation_.has_kernel(tensors_[i]);
    }
    if (wanted.empty()) return gradients;
    Stack arguments = arguments_;
    for (const auto& [i, saved] : saved_) arguments[tensors_[i]] = saved.unpack();
    if (by_kernel) {
      run_kernel(grads, arguments, wanted, gradients);
    } else {
      run_definition(grads, std::move(arguments), wanted, gradients);
    }
    return gradients;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [i, saved] : saved_) saved.release();
    for (auto& saved : saved_results_) saved.reset_data();
  }

 private:
  bool is_taken(const std::string& name) const {
    if (!operation_.backward) return true;
    const auto& arguments = operation_.backward->schema().arguments();
    return place_of(arguments, name) < arguments.size();
  }

  static c10::IValue or_none(const Tensor& t) { return t.defined() ? c10::IValue(t) : c10::IValue(); }

  void run_kernel(const variable_list& grads, const Stack& arguments, const std::vector<size_t>& wanted,
                  variable_list& gradients) {
    const c10::FunctionSchema& schema = operation_.backward->schema();
    Stack stack;
    for (size_t place = 0; place < schema.arguments().size(); ++place) {
      const std::string& name = schema.arguments()[place].name();
      const size_t argument = place_of(operation_.schema.arguments(), name);
      if (place < operation_.outputs) {
        stack.push_back(or_none(grads[place]));
      } else if (argument < arguments.size()) {
        stack.push_back(arguments[argument]);
      } else if (name == "output_mask") {
        c10::List<bool> mask;
        for (const size_t input : operation_.inputs) {
          mask.push_back(std::any_of(wanted.begin(), wanted.end(), [&](size_t i) { return tensors_[i] == input; }));
        }
        stack.emplace_back(std::move(mask));
      } else {
        stack.push_back(or_none(saved_results_[operation_.result_at(place)].unpack(getptr())));
      }
    }
    operation_.backward->callBoxed(&stack);
    for (size_t i = 0; i < operation_.inputs.size(); ++i) {
      const auto of = std::find(tensors_.begin(), tensors_.end(), operation_.inputs[i]);
      if (of != tensors_.end() && stack[i].isTensor()) gradients[of - tensors_.begin()] = stack[i].toTensor();
    }
  }

  void run_definition(const variable_list& grads, Stack arguments, const std::vector<size_t>& wanted,
                      variable_list& gradients) {
    c10::List<std::optional<Tensor>> given;
    for (const Tensor& grad : grads) given.push_back(grad.defined() ? std::optional<Tensor>(grad) : std::nullopt);
    std::vector<int64_t> places;
    for (const size_t i : wanted) places.push_back(static_cast<int64_t>(tensors_[i]));
    arguments.insert(arguments.begin(), c10::IValue(std::move(given)));
    arguments.emplace_back(std::move(places));
    operation_.vjp.callBoxed(&arguments);
    const std::vector<Tensor> results = arguments[0].toTensorVector();
    for (size_t i = 0; i < wanted.size(); ++i) gradients[wanted[i]] = results[i];
  }

  const Operation& operation_;
  Stack arguments_;              // without the tensors
  std::vector<size_t> tensors_;  // where they were
  std::vector<std::pair<size_t, SavedArgument>> saved_;
  std::vector<torch::autograd::SavedVariable> saved_results_;  // undefined where the backward does not take them
};

const Operation& operation(const std::string& name) {
  // Made at the first call, when nllx/_operators has registered the rest; never destroyed, as nodes may outlive the end
  // of the process.
  static auto& operations = *new std::unordered_map<std::string, Operation>;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = operations.find(name);
  return found != operations.end() ? found->second : operations.emplace(name, Operation(name)).first->second;
}

}  // namespace

void differentiate_level(const std::string& name, const pybind11::tuple& values, const pybind11::tuple& plain_values,
                         const pybind11::tuple& outputs) {
  const Operation& of = operation(name);
  Stack arguments =
      torch::jit::createStackForSchema(of.schema, pybind11::args(values), pybind11::kwargs(), std::nullopt);
  std::vector<size_t> places;
  torch::autograd::variable_list tensors;
  bool differentiable = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!arguments[i].isTensor() || !arguments[i].toTensor().defined()) continue;
    places.push_back(i);
    differentiable |= tensors.emplace_back(arguments[i].toTensor()).requires_grad();
  }
  if (!differentiable || !at::GradMode::is_enabled()) return;
  std::vector<Tensor> plain, results;
  for (const size_t i : places) plain.push_back(plain_values[i].cast<Tensor>());
  for (const auto& output : outputs) results.push_back(output.is_none() ? Tensor() : output.cast<Tensor>());
  const auto node = make_node<NodePointer, LevelNode>(of, std::move(arguments), std::move(places), plain);
  node->set_next_edges(torch::autograd::collect_next_edges(tensors));
  for (size_t i = 0; i < of.outputs; ++i) torch::autograd::set_history(results[i], node);
  static_cast<LevelNode*>(node.get())->save_results(results);
}

}  // namespace nllx
