#include "large_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "../message.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace nllx {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLargeBytes = 2 * kHugePage;

#if defined(__linux__)

struct Block {
  void* data;
  size_t bytes;  // a multiple of kHugePage
};

// Maps whole, aligned huge pages; null where the system has no memory.
void* map(size_t bytes) {
  const size_t mapped = bytes + kHugePage;
  void* begin = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (begin == MAP_FAILED) return nullptr;
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t aligned = (address + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > address) munmap(begin, aligned - address);
  if (address + mapped > aligned + bytes) {
    munmap(reinterpret_cast<void*>(aligned + bytes), address + mapped - (aligned + bytes));
  }
  void* data = reinterpret_cast<void*>(aligned);
  madvise(data, bytes, MADV_HUGEPAGE);  // refused where the system has none: the pages are then small
  return data;
}

class LargeMemory final : public c10::Allocator {
 public:
  // Never destroyed: tensors may outlive every other static object.
  static LargeMemory& instance() {
    static LargeMemory* memory = new LargeMemory;
    return *memory;
  }

  c10::DataPtr allocate(size_t requested) override {
    const size_t bytes = (requested + kHugePage - 1) / kHugePage * kHugePage;
    Block block = take(bytes);
    if (!block.data) block = {map(bytes), bytes};
    if (!block.data) {
      release();
      block.data = map(bytes);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, block.data, "nllx: not enough memory: you tried to allocate ", number(requested),
                     " bytes.");
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      live_ += block.bytes;
      most_live_ = live_ > most_live_ ? live_ : most_live_;
    }
    c10::profiledCPUMemoryReporter().New(block.data, block.bytes);
    return {block.data, new Block(block), &LargeMemory::free, at::Device(at::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // the context is not the data
  void copy_data(void* dest, const void* src, std::size_t count) const override { std::memcpy(dest, src, count); }

  void release() {
    std::vector<Block> blocks;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      blocks.swap(kept_);
      kept_bytes_ = 0;
    }
    for (const Block& block : blocks) munmap(block.data, block.bytes);
  }

 private:
  LargeMemory() {
    const char* keep = std::getenv("NLLX_CPU_KEEP_MEMORY");
    keep_ = !(keep && std::strcmp(keep, "0") == 0);
#if defined(__linux__)
    // A process that forks while another of its threads allocates gives the child the mutex unlocked.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
#endif
  }

  // The smallest kept block that holds `bytes` and is not more than twice as large. Where there is none, blocks are
  // given back until the new one fits into what lived at once before.
  Block take(size_t bytes) {
    std::vector<Block> dropped;
    Block found{nullptr, 0};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      size_t best = kept_.size();
      for (size_t i = 0; i < kept_.size(); ++i) {
        if (kept_[i].bytes < bytes || kept_[i].bytes > 2 * bytes) continue;
        if (best == kept_.size() || kept_[i].bytes < kept_[best].bytes) best = i;
      }
      if (best < kept_.size()) {
        found = kept_[best];
        kept_bytes_ -= found.bytes;
        kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(best));
      } else {
        while (!kept_.empty() && live_ + kept_bytes_ + bytes > most_live_) {
          dropped.push_back(kept_.front());  // the oldest
          kept_bytes_ -= kept_.front().bytes;
          kept_.erase(kept_.begin());
        }
      }
    }
    for (const Block& block : dropped) munmap(block.data, block.bytes);
    return found;
  }

  static void free(void* context) {
    Block* block = static_cast<Block*>(context);
    instance().give_back(*block);
    delete block;
  }
  void give_back(Block block) {
    c10::profiledCPUMemoryReporter().Delete(block.data);
    // The pages stay mapped, and keep their contents' place, until the system needs them for something else.
    const bool keep = keep_ && madvise(block.data, block.bytes, MADV_FREE) == 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      live_ -= block.bytes;
      if (keep) {
        kept_.push_back(block);
        kept_bytes_ += block.bytes;
      }
    }
    if (!keep) munmap(block.data, block.bytes);
  }

  std::mutex mutex_;
  bool keep_ = true;
  std::vector<Block> kept_;
  size_t kept_bytes_ = 0, live_ = 0, most_live_ = 0;
};

#endif

}  // namespace

at::Tensor empty_like_large(const at::Tensor& like, std::optional<at::MemoryFormat> format) {
#if defined(__linux__)
  if (like.nbytes() >= kLargeBytes) {
    // Strides as at::empty_like gives them, found without memory.
    const at::Tensor shape = at::empty_like(like, like.options().device(at::kMeta), format);
    return at::detail::empty_strided_generic(shape.sizes(), shape.strides(), &LargeMemory::instance(),
                                             c10::DispatchKeySet(c10::DispatchKey::CPU), like.scalar_type());
  }
#endif
  // What at::empty_like does, without the dispatcher: a small problem's memory would take as long as its arithmetic.
  if (format == at::MemoryFormat::Contiguous)
    return at::Tensor(at::detail::empty_cpu(like.sizes(), like.scalar_type()));
  if (!format && like.is_non_overlapping_and_dense()) {
    return at::Tensor(at::detail::empty_strided_cpu(like.sizes(), like.strides(), like.scalar_type()));
  }
  return at::empty_like(like, at::TensorOptions(), format);
}

}  // namespace nllx
