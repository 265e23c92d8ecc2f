#include "bad_target.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "../message.h"

namespace nllx {

namespace {

constexpr int kMostDevices = 64;
std::array<std::atomic<BadTarget*>, kMostDevices> records{};  // zero until the device is first used
std::mutex mutex;

bool synchronous() {
  static const bool value = [] {
    const char* v = std::getenv("NLLX_SYNC_ERRORS");
    return v && std::strcmp(v, "1") == 0;
  }();
  return value;
}

}  // namespace

BadTarget* bad_target_record() {
  const int device = c10::cuda::current_device();
  TORCH_CHECK(device < kMostDevices, "nllx: more than ", number(kMostDevices), " GPUs");
  BadTarget* record = records[device].load(std::memory_order_acquire);
  if (record) return record;
  const std::lock_guard<std::mutex> lock(mutex);
  record = records[device].load(std::memory_order_acquire);
  if (record) return record;
  // The first call may be inside a stream capture, which this allocation is no part of.
  c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  void* memory = nullptr;
  C10_CUDA_CHECK(cudaHostAlloc(&memory, sizeof(BadTarget), cudaHostAllocMapped | cudaHostAllocPortable));
  std::memset(memory, 0, sizeof(BadTarget));
  record = static_cast<BadTarget*>(memory);
  records[device].store(record, std::memory_order_release);
  return record;
}

void raise_pending_bad_target() {
  for (auto& slot : records) {
    BadTarget* record = slot.load(std::memory_order_acquire);
    if (!record || !*const_cast<volatile int*>(&record->ready)) continue;
    const std::lock_guard<std::mutex> lock(mutex);  // one thread takes it, before a kernel may write the next
    if (!*const_cast<volatile int*>(&record->ready)) continue;
    std::atomic_thread_fence(std::memory_order_acquire);
    const BadTarget bad = *record;
    record->ready = 0;
    std::atomic_thread_fence(std::memory_order_release);
    *const_cast<volatile int*>(&record->claimed) = 0;  // from here on the next one is recorded
    TORCH_CHECK_INDEX(false, "nllx: Target ", number(bad.value), " is out of bounds. target.flatten()[",
                      number(bad.row), "] of an earlier call is ", number(bad.value), ", expected a class from 0 to ",
                      number(bad.classes - 1), " or ignore_index (", number(bad.ignore_index),
                      "); its row got a NaN loss and a zero gradient. NLLX_SYNC_ERRORS=1 raises in the call itself");
  }
}

void raise_bad_target_if_synchronous(cudaStream_t stream) {
  if (!synchronous()) return;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &capturing));
  if (capturing != cudaStreamCaptureStatusNone) return;  // nothing runs yet
  C10_CUDA_CHECK(cudaStreamSynchronize(stream));
  raise_pending_bad_target();
}

}  // namespace nllx
