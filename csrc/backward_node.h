// The node of the autograd graph behind each loss. torch::autograd::Function would do for any function, with maps from
// names to options and sets of tensors, which take longer than the kernels of a small problem; this holds what one
// backward needs in plain members, as the nodes of torch's own losses do.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <string>
#include <type_traits>
#include <typeinfo>
#include <vector>

#include "saved_tensor.h"

namespace nllx {

// A type `Op` has
//   kName, kSaved, kArguments and kSavesOutput: the name, the number of tensors saved, how many of them, the first, are
//   arguments that it reads, and whether they are outputs of the forward
//   its options as members, and visit(f), which calls f with each of them
//   Tensor backward(const Tensor& grad_output, const std::array<Tensor, kSaved>& saved) const: the gradient of the one
//   input that has one
template <typename Op>
class BackwardNode final : public torch::autograd::Node {
 public:
  using Saved = std::array<at::Tensor, Op::kSaved>;
  using variable_list = torch::autograd::variable_list;

  explicit BackwardNode(Op op) : op_(std::move(op)) {}

  void save(const Saved& tensors) {
    for (size_t i = 0; i < Op::kSaved; ++i) {
      saved_[i] = SavedTensor(tensors[i], Op::kSavesOutput, /*is_argument=*/i < Op::kArguments);
    }
  }

  std::string name() const override { return Op::kName; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    Saved tensors;
    for (size_t i = 0; i < Op::kSaved; ++i) tensors[i] = saved_[i].unpack(saved_for());
    const NodeUnderWay checked;
    return differentiate(op_, grads, tensors);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& saved : saved_) saved.release();
  }

  // Compiled autograd: what the compiled graph depends on, and the backward as a function of what is saved.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const auto& saved : saved_) {
      saved.check();
      args.collect(saved.variable(), Op::kSavesOutput);
    }
    op_.visit([&](const auto& option) { args.collect(option); });
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (auto& saved : saved_) swap.before(saved.variable());
    op_.visit([&](auto& option) { swap.before(option); });
    variable_list tensors;
    for (auto& saved : saved_) tensors.push_back(saved.variable().unpack(saved_for()));
    torch::dynamo::autograd::PackedArgs packed;
    packed.pack(tensors);
    op_.visit([&](const auto& option) { packed.pack(option); });
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
    op_.visit([&](auto& option) { swap.after(option); });
    return result;
  }

 private:
  NodePointer saved_for() {
    if constexpr (Op::kSavesOutput) return getptr();
    return nullptr;
  }

  static variable_list differentiate(const Op& op, const variable_list& grads, const Saved& saved) {
    return {grads[0].defined() ? op.backward(grads[0], saved) : at::Tensor()};
  }

  static variable_list apply_functional(const variable_list& grads, const std::vector<c10::IValue>& values) {
    torch::dynamo::autograd::PackedArgs packed(values);
    const auto tensors = packed.unpack<variable_list>();
    Saved saved;
    std::copy(tensors.begin(), tensors.end(), saved.begin());
    Op op;
    op.visit([&](auto& option) { option = packed.unpack<std::remove_reference_t<decltype(option)>>(); });
    return differentiate(op, grads, saved);
  }

  std::array<SavedTensor, Op::kSaved> saved_;
  Op op_;
};

// The types of the nodes, and their names, for the classes that Python has of them.
struct NodeType {
  const std::type_info* type;
  const char* name;
};
std::vector<NodeType> node_types();

template <typename Pointer, typename Node, typename... Args>
Pointer make_node(Args&&... args) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    // torch's deleter frees a long graph without recursion.
    return Pointer(new Node(std::forward<Args>(args)...), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Node>(std::forward<Args>(args)...);
  }
}

// Makes `output` the result of an operation on `input` whose backward is `op`, with the tensors that it needs.
template <typename Op>
void set_backward(const at::Tensor& input, const at::Tensor& output, Op op,
                  const typename BackwardNode<Op>::Saved& saved) {
  const auto node = make_node<NodePointer, BackwardNode<Op>>(std::move(op));
  node->set_next_edges(torch::autograd::collect_next_edges(input));
  torch::autograd::set_history(output, node);
  static_cast<BackwardNode<Op>*>(node.get())->save(saved);
}

}  // namespace nllx
