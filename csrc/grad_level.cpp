#include "grad_level.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <array>
#include <mutex>
#include <utility>
#include <vector>

#include "backward_node.h"
#include "ops.h"

namespace nllx {

namespace {

using at::Tensor;
using torch::jit::Stack;

OptionalTensor optional_tensor(const c10::IValue& value) {
  return value.isTensor() ? OptionalTensor(value.toTensor()) : std::nullopt;
}

// The gradient of the first argument by a kernel, from the arguments and the results that are saved.
using Gradient = Tensor(const Tensor& grad_output, const Stack& arguments, const std::vector<Tensor>& results);

Tensor cross_entropy_gradient(const Tensor& grad_output, const Stack& a, const std::vector<Tensor>& results) {
  return cross_entropy_backward(grad_output, a[0].toTensor(), a[1].toTensor(), optional_tensor(a[2]), results[0],
                                results[1], a[3].toInt(), a[4].toSymInt(), a[5].toDouble());
}
Tensor nll_loss_gradient(const Tensor& grad_output, const Stack& a, const std::vector<Tensor>& results) {
  return nll_loss_backward(grad_output, a[0].toTensor(), a[1].toTensor(), optional_tensor(a[2]), results[0],
                           a[3].toInt(), a[4].toSymInt());
}
Tensor log_softmax_gradient(const Tensor& grad_output, const Stack& a, const std::vector<Tensor>& results) {
  return log_softmax_backward(grad_output, results[0], a[1].toInt());
}

c10::OperatorHandle find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("nllx::" + name).c_str(), "");
}

// What a backward needs: the arguments and the results but the first, or that alone.
enum class Saved { kArguments, kResult };

struct Operation {
  Operation(const std::string& name, Gradient* gradient, Saved saved)
      : name(name), schema(find(name).schema()), gradient(gradient), saved(saved), vjp(find("_" + name + "_vjp")) {}

  std::string name;
  const c10::FunctionSchema& schema;
  Gradient* gradient;  // null where no kernel has the derivative
  Saved saved;
  c10::OperatorHandle vjp;  // every other derivative, by the definition
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
    for (size_t i = 0; i < tensors_.size(); ++i) {
      c10::IValue& argument = arguments_[tensors_[i]];
      if (operation_.saved == Saved::kArguments) saved_.emplace_back(argument.toTensor(), plain[i]);
      argument = c10::IValue();
    }
  }

  void save_results(const std::vector<Tensor>& results) {
    if (operation_.saved == Saved::kResult) {
      saved_results_.emplace_back(results[0], /*is_output=*/true);
    } else {
      for (size_t i = 1; i < results.size(); ++i) saved_results_.emplace_back(results[i], /*is_output=*/false);
    }
  }

  std::string name() const override { return "Nllx_" + operation_.name; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list gradients(tensors_.size());
    if (!grads[0].defined()) return gradients;
    std::vector<size_t> wanted;  // which of tensors_
    std::vector<int64_t> places;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (!task_should_compute_output(i)) continue;
      wanted.push_back(i);
      places.push_back(static_cast<int64_t>(tensors_[i]));
    }
    if (wanted.empty()) return gradients;
    Stack arguments = arguments_;
    for (size_t i = 0; i < saved_.size(); ++i) arguments[tensors_[i]] = saved_[i].unpack();
    if (operation_.gradient && places == std::vector<int64_t>{0}) {
      std::vector<Tensor> results;
      for (auto& saved : saved_results_) results.push_back(saved.unpack(getptr()));
      gradients[0] = operation_.gradient(grads[0], arguments, results);
    } else {
      arguments.insert(arguments.begin(), grads[0]);
      arguments.emplace_back(std::move(places));
      operation_.vjp.callBoxed(&arguments);
      const std::vector<Tensor> results = arguments[0].toTensorVector();
      for (size_t i = 0; i < wanted.size(); ++i) gradients[wanted[i]] = results[i];
    }
    return gradients;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& saved : saved_) saved.release();
    for (auto& saved : saved_results_) saved.reset_data();
  }

 private:
  const Operation& operation_;
  Stack arguments_;              // without the tensors
  std::vector<size_t> tensors_;  // where they were
  std::vector<SavedArgument> saved_;
  std::vector<torch::autograd::SavedVariable> saved_results_;
};

const Operation& operation(const std::string& name) {
  // Made at the first call, when nllx/_transforms.py has registered the rest.
  static const std::array<Operation, kOperations.size()> operations{{
      {kOperations[0], &cross_entropy_gradient, Saved::kArguments},
      {kOperations[1], nullptr, Saved::kArguments},
      {kOperations[2], &nll_loss_gradient, Saved::kArguments},
      {kOperations[3], nullptr, Saved::kArguments},
      {kOperations[4], &log_softmax_gradient, Saved::kResult},
      {kOperations[5], nullptr, Saved::kArguments},
  }};
  for (const Operation& candidate : operations) {
    if (candidate.name == name) return candidate;
  }
  TORCH_CHECK_INDEX(false, "nllx has no operator with derivatives that is called ", name);
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
    if (!arguments[i].isTensor()) continue;
    places.push_back(i);
    differentiable |= tensors.emplace_back(arguments[i].toTensor()).requires_grad();
  }
  if (!differentiable || !at::GradMode::is_enabled()) return;
  if (of.gradient && arguments.size() > 2) {  // the forward of a loss: of input, target, weight
    check_weight_gradient(of.name.c_str(), arguments[1].toTensor(), optional_tensor(arguments[2]));
  }
  std::vector<Tensor> plain, results;
  for (const size_t i : places) plain.push_back(plain_values[i].cast<Tensor>());
  for (const auto& output : outputs) results.push_back(output.cast<Tensor>());
  const auto node = make_node<NodePointer, LevelNode>(of, std::move(arguments), std::move(places), plain);
  node->set_next_edges(torch::autograd::collect_next_edges(tensors));
  torch::autograd::set_history(results[0], node);
  static_cast<LevelNode*>(node.get())->save_results(results);
}

}  // namespace nllx
