// What a backward keeps of its forward, guarded against changes. SavedVariable alone compares versions only where no
// hooks for saved tensors are installed; with them (torch.utils.checkpoint, save_on_cpu, users' own) it takes whatever
// they give back, which may be the memory that they were given, with other numbers in it by now.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <optional>

namespace nllx {

// Nodes are counted by std::shared_ptr in torch 2.11 and by c10::intrusive_ptr in 2.13.
using NodePointer = decltype(torch::autograd::Edge::function);

// Raises autograd's error where a tensor has been changed since it was saved.
void check_version(int64_t found, int64_t expected);

// Whether hooks get what is saved now.
bool has_default_hooks();

// Compilers save for themselves, through the same hooks. So a forward operator without a node notes how its arguments
// were, if there are hooks, and the backward that gets its result compares. Where the arguments have been copied, there
// is nothing to raise.
bool versions_are_remembered();
void remember_versions(const at::Tensor& result, at::ArrayRef<at::Tensor> tensors);
void check_versions(const at::Tensor& result, at::ArrayRef<at::Tensor> tensors);

// While a node runs its backward: what it saved has been checked.
struct NodeUnderWay {
  NodeUnderWay();
  ~NodeUnderWay();
};

// Where a tensor lies: assigning to .data gives it other memory and leaves its version, as does a storage that is freed
// and grown again, as far as the allocator has other memory then.
class Memory {
 public:
  explicit Memory(const at::Tensor& t);
  void check(const at::Tensor& t) const;

 private:
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;  // whose address no other storage gets
  const void* data_;
};

class SavedTensor {
 public:
  SavedTensor() = default;
  SavedTensor(const at::Tensor& tensor, bool is_output, bool is_argument);

  // Raises where the tensor, or the memory that the hooks gave back, has been changed since it was saved.
  at::Tensor unpack(NodePointer saved_for = nullptr) const;
  // The same question without the tensor, before a compiler takes what is saved.
  void check() const;
  void release();

  torch::autograd::SavedVariable& variable() { return variable_; }
  const torch::autograd::SavedVariable& variable() const { return variable_; }

 private:
  torch::autograd::SavedVariable variable_;
  std::optional<Memory> memory_;  // of arguments, without hooks
};

}  // namespace nllx
