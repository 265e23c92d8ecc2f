#include "saved_tensor.h"

#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#endif

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

c10::weak_intrusive_ptr<c10::StorageImpl> no_storage() {
  return c10::weak_intrusive_ptr<c10::StorageImpl>(c10::intrusive_ptr<c10::StorageImpl>());
}
c10::weak_intrusive_ptr<c10::StorageImpl> weak_storage_of(const Tensor& t) {
  return t.has_storage() ? t.storage().getWeakStorageImpl() : no_storage();
}

// Under another storage too, as arrays of NumPy and DLPack come back.
bool lies_in(const Tensor& t, const c10::StorageImpl& storage) {
  if (!t.has_storage()) return false;
  if (t.storage().unsafeGetStorageImpl() == &storage) return true;
  const auto *begin = static_cast<const char*>(storage.data()), *own = static_cast<const char*>(t.storage().data());
  if (!begin || !own || t.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return false;
  const char* first = own + t.storage_offset() * static_cast<int64_t>(t.element_size());
  return first >= begin && first < begin + storage.nbytes();
}

// Where a tensor was, and at which version, when a backward was to need it.
class Version {
 public:
  Version() = default;
  explicit Version(const Tensor& t) {
    if (!t.defined() || t.is_inference() || !t.has_storage()) return;
    storage_ = weak_storage_of(t);
    counter_ = torch::autograd::impl::version_counter(t);
    version_ = counter_.current_version();
  }

  bool is_alive() const { return !storage_.expired(); }
  bool is_of_same_memory(const Version& other) const {
    return is_alive() && storage_._unsafe_get_target() == other.storage_._unsafe_get_target();
  }
  bool holds(const Tensor& t) const {
    const auto storage = storage_.lock();
    return storage && t.defined() && lies_in(t, *storage);
  }
  void check() const {
    if (counter_.enabled()) check_version(counter_.current_version(), version_);
  }
  // What lies elsewhere is a copy, and right whatever has become of the original.
  void check(const Tensor& t) const {
    if (holds(t)) check();
  }

 private:
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_ = no_storage();
  c10::VariableVersion counter_;
  int64_t version_ = 0;
};

// What hooks were given. Goes along with a tensor, and with others over its memory (detach), but not with copies.
struct Given final : c10::BackendMeta {
  explicit Given(Version version) : version(std::move(version)) {}
  const Version version;
};

// Hooks of the user, and whether what they give back is still what they got: the memory of the original, or of what a
// checkpoint has computed again and its own forward has saved, which the node that asks for it has never seen.
class CheckedHooks final : public SavedVariableHooks {
 public:
  explicit CheckedHooks(std::unique_ptr<SavedVariableHooks> hooks) : hooks_(std::move(hooks)) {}

  void call_pack_hook(const Tensor& tensor) override {
    saved_ = Version(tensor);
    tensor.unsafeGetTensorImpl()->set_backend_meta(c10::make_intrusive<Given>(saved_));
    hooks_->call_pack_hook(tensor);
  }

  Tensor call_unpack_hook() override {
    Tensor tensor = hooks_->call_unpack_hook();
    if (saved_.holds(tensor)) {
      saved_.check();
    } else if (const auto* recomputed = dynamic_cast<const Given*>(tensor.unsafeGetTensorImpl()->get_backend_meta())) {
      recomputed->version.check(tensor);
    }
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

Memory::Memory(const Tensor& t) : storage_(weak_storage_of(t)), data_(t.has_storage() ? t.storage().data() : nullptr) {}

void Memory::check(const Tensor& t) const {
  TORCH_CHECK(
      storage_of(t) == storage_._unsafe_get_target() && (!data_ || t.storage().data() == data_),
      "one of the variables needed for gradient computation has been given other memory since the forward (by an "
      "assignment to its .data, say), or its memory has been freed");
}

SavedTensor::SavedTensor(const Tensor& tensor, bool is_output, bool is_argument) {
  if (!tensor.defined()) return;
  if (!has_default_hooks()) {
    variable_ = SavedVariable(tensor, is_output);
    if (is_argument) memory_.emplace(tensor);
    return;
  }
  variable_ = without_hooks(tensor, is_output);
  variable_.register_hooks(
      std::make_unique<CheckedHooks>(torch::autograd::Engine::get_default_engine().get_default_saved_variable_hooks()));
}

Tensor SavedTensor::unpack(NodePointer saved_for) const {
  Tensor tensor = variable_.unpack(std::move(saved_for));
  if (memory_) memory_->check(tensor);
  return tensor;
}

void SavedTensor::check() const {
  if (!memory_) return;
  if (const auto data = variable_.get_raw_data(); data.has_value() && data->defined()) memory_->check(*data);
}

void SavedTensor::release() {
  variable_.reset_data();
  memory_.reset();
}

namespace {

// What forward operators have noted, as long as some of the memory lives that it is about.
struct Note {
  c10::weak_intrusive_ptr<c10::StorageImpl> result;
  const void* result_data;
  std::vector<Version> versions;

  bool is_on(const Tensor& t) const { return !result.expired() && t.storage().data() == result_data; }
  bool is_alive() const {
    return std::any_of(versions.begin(), versions.end(), [](const Version& v) { return v.is_alive(); });
  }
  bool shares_memory_with(const Note& other) const {
    if (versions.size() != other.versions.size()) return false;
    for (size_t i = 0; i < versions.size(); ++i) {
      if (versions[i].is_of_same_memory(other.versions[i])) return true;
    }
    return false;
  }
};
std::atomic<bool> any_note = false;  // in most processes there never is one
thread_local int nodes_under_way = 0;

class Notes {
 public:
  static Notes& instance() {
    static auto* notes = new Notes;  // never destroyed: threads may outlive the end of the process
    return *notes;
  }

  // `hooks`: whether there are; without them only what has a note already gets another, which then is the last one.
  void add(Note note, bool hooks) {
    const std::lock_guard<std::mutex> lock(mutex_);
    bool known = false, is_first = true;
    const auto is_over = [&](const Note& old) {
      if (!old.is_alive()) return true;
      if (!old.shares_memory_with(note)) return false;
      known = true;
      // A result that is gone, or of which hooks have a copy. Of those the first on the same logits stays: whether its
      // backward is still to come is not known, and that would be wrong.
      if (!old.result.expired()) return false;
      const bool stays = is_first && old.versions.size() != 2 && old.versions[0].is_of_same_memory(note.versions[0]);
      if (stays) is_first = false;
      return !stays;
    };
    std::vector<Note> kept;
    for (Note& old : notes_) {
      if (!is_over(old)) kept.push_back(std::move(old));
    }
    notes_ = std::move(kept);
    if (hooks || known) notes_.push_back(std::move(note));
    any_note = !notes_.empty();
  }

  // A copy: memory that is looked at may be freed by that, and whoever frees it is not to be waited for.
  std::vector<Note> all() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return notes_;
  }

 private:
  Notes() {
#if defined(__linux__)
    // A process that forks while another of its threads is in here gives the child the mutex unlocked.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
#endif
  }

  std::mutex mutex_;
  std::vector<Note> notes_;
};

}  // namespace

bool versions_are_remembered() { return any_note.load(std::memory_order_relaxed) && nodes_under_way == 0; }

void remember_versions(const Tensor& result, at::ArrayRef<Tensor> tensors) {
  if (!result.has_storage()) return;
  Notes::instance().add({weak_storage_of(result), result.storage().data(), {tensors.begin(), tensors.end()}},
                        has_default_hooks());
}

void check_versions(const Tensor& result, at::ArrayRef<Tensor> tensors) {
  if (!result.has_storage()) return;
  const std::vector<Note> all = Notes::instance().all();
  for (auto note = all.rbegin(); note != all.rend(); ++note) {
    if (note->versions.size() != tensors.size() || !note->is_on(result)) continue;
    for (size_t i = 0; i < tensors.size(); ++i) note->versions[i].check(tensors[i]);
    return;
  }
  // Hooks have given a copy of the result, and any forward on this memory may be the one: of the logits all must agree,
  // and of other arguments the last one has to do, since their memory is used again and again.
  for (size_t i = 0; i < tensors.size(); ++i) {
    for (auto note = all.rbegin(); note != all.rend(); ++note) {
      if (note->versions.size() != tensors.size() || !note->versions[i].holds(tensors[i])) continue;
      note->versions[i].check();
      if (i > 0 || tensors.size() == 2) break;
    }
  }
}

NodeUnderWay::NodeUnderWay() { ++nodes_under_way; }
NodeUnderWay::~NodeUnderWay() { --nodes_under_way; }

}  // namespace nllx
