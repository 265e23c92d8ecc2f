#include "saved_tensor.h"

#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <utility>
#include <vector>

namespace nllx {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::SavedVariableHooks;

void check_version(int64_t found, int64_t expected) {
  TORCH_CHECK(
      found == expected,
      "one of the variables needed for gradient computation has been modified by an inplace operation: it is at "
      "version ",
      found, "; expected version ", expected, " instead");
}

bool has_default_hooks() {
  const auto& hooks = at::SavedTensorDefaultHooks::get_tls_state();
  return !hooks.stack.empty() && !hooks.is_tracing;
}

namespace {

const c10::StorageImpl* storage_of(const Tensor& t) {
  return t.has_storage() ? t.storage().unsafeGetStorageImpl() : nullptr;
}

// Under another storage too, as arrays of NumPy and DLPack come back.
bool lies_in(const Tensor& t, const c10::StorageImpl& storage) {
  if (!t.has_storage()) return false;
  if (t.storage().unsafeGetStorageImpl() == &storage) return true;
  const auto* begin = static_cast<const char*>(storage.data());
  const auto* at = static_cast<const char*>(t.storage().data());
  return begin && at >= begin && at < begin + storage.nbytes();
}

// Where a tensor was, and at which version, when a backward was to need it.
class Version {
 public:
  Version() = default;
  explicit Version(const Tensor& t) {
    if (!t.defined() || t.is_inference() || !t.has_storage()) return;
    storage_ = t.storage().getWeakStorageImpl();
    counter_ = torch::autograd::impl::version_counter(t);
    version_ = counter_.current_version();
  }

  void check() const {
    if (counter_.enabled()) check_version(counter_.current_version(), version_);
  }
  // What lies elsewhere is a copy, and right whatever has become of the original.
  void check(const Tensor& t) const {
    if (const auto storage = storage_.lock(); storage && lies_in(t, *storage)) check();
  }

 private:
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_{c10::intrusive_ptr<c10::StorageImpl>()};
  c10::VariableVersion counter_;
  int64_t version_ = 0;
};

// Goes along with a tensor, and with others over its memory (detach), but not with copies.
struct Versions final : c10::BackendMeta {
  explicit Versions(std::vector<Version> versions) : versions(std::move(versions)) {}
  static const Versions* of(const Tensor& t) {
    return dynamic_cast<const Versions*>(t.unsafeGetTensorImpl()->get_backend_meta());
  }
  const std::vector<Version> versions;
};

void attach(const Tensor& t, std::vector<Version> versions) {
  t.unsafeGetTensorImpl()->set_backend_meta(c10::make_intrusive<Versions>(std::move(versions)));
}

// Hooks of the user, and whether what they give back is still what they got: the memory of the original, or of what a
// checkpoint has computed again and its own forward has saved, which the node that asks for it has never seen.
class CheckedHooks final : public SavedVariableHooks {
 public:
  explicit CheckedHooks(std::unique_ptr<SavedVariableHooks> hooks) : hooks_(std::move(hooks)) {}

  void call_pack_hook(const Tensor& tensor) override {
    saved_ = Version(tensor);
    attach(tensor, {saved_});
    hooks_->call_pack_hook(tensor);
  }

  Tensor call_unpack_hook() override {
    Tensor tensor = hooks_->call_unpack_hook();
    saved_.check(tensor);
    if (const auto* recomputed = Versions::of(tensor)) recomputed->versions[0].check(tensor);
    return tensor;
  }

  // Compiled autograd calls the user's hook itself, and what that returns is not seen here.
  std::optional<std::pair<c10::SafePyObject, c10::SafePyObject>> retrieve_unpack_hook_data() const override {
    saved_.check();
    return hooks_->retrieve_unpack_hook_data();
  }

 private:
  std::unique_ptr<SavedVariableHooks> hooks_;
  Version saved_;
};

struct WithoutDefaultHooks {
  ~WithoutDefaultHooks() { at::SavedTensorDefaultHooks::set_tracing(before); }
  const bool before = at::SavedTensorDefaultHooks::set_tracing(true);
};

SavedVariable without_hooks(const Tensor& tensor, bool is_output) {
  const WithoutDefaultHooks guard;
  return SavedVariable(tensor, is_output);
}

}  // namespace

SavedTensor::SavedTensor(const Tensor& tensor, bool is_output) {
  if (!tensor.defined()) return;
  if (!has_default_hooks()) {
    variable_ = SavedVariable(tensor, is_output);
    storage_ = storage_of(tensor);
    return;
  }
  variable_ = without_hooks(tensor, is_output);
  variable_.register_hooks(
      std::make_unique<CheckedHooks>(torch::autograd::Engine::get_default_engine().get_default_saved_variable_hooks()));
}

void SavedTensor::check_storage(const Tensor& tensor) const {
  TORCH_CHECK(
      !storage_ || storage_ == storage_of(tensor),
      "one of the variables needed for gradient computation has been given other memory since the forward (by an "
      "assignment to its .data, say)");
}

Tensor SavedTensor::unpack(NodePointer saved_for) const {
  Tensor tensor = variable_.unpack(std::move(saved_for));
  if (!variable_.has_hooks() && tensor.defined()) check_storage(tensor);
  return tensor;
}

void SavedTensor::check() const {
  if (const auto data = variable_.get_raw_data(); data.has_value() && data->defined()) check_storage(*data);
}

void remember_versions(const Tensor& result, at::ArrayRef<Tensor> tensors) {
  if (has_default_hooks()) attach(result, std::vector<Version>(tensors.begin(), tensors.end()));
}

void check_versions(const Tensor& result, at::ArrayRef<Tensor> tensors) {
  const Versions* remembered = Versions::of(result);
  if (!remembered || remembered->versions.size() != tensors.size()) return;
  for (size_t i = 0; i < tensors.size(); ++i) remembered->versions[i].check(tensors[i]);
}

}  // namespace nllx
