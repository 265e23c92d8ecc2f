#include "cuda_emulator.h"

#undef _FORTIFY_SOURCE  // its check of longjmp refuses to switch stacks
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime_api.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) static_cast<void>(0)
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" void __ubsan_get_current_report_data(const char** kind, const char** message, const char** file,
                                                unsigned* line, unsigned* column, char** address);

namespace cuda_emulator {

uint3 thread_index, block_index;
dim3 block_dim, grid_dim;
unsigned lane;
uint64_t order = 0;
unsigned most_blocks = 0;

namespace {

constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr size_t kMostDynamicShared = 227 << 10;  // of a block, on the newest architectures
constexpr size_t kStackBytes = 1 << 20;           // the sanitizers format their reports on it

struct Fiber {
  enum class State { kReady, kWaiting, kDone };
  State state = State::kDone;
  bool has_context = false;  // it stands in `run_fiber` or in a kernel, and not before the first switch to it
  jmp_buf context;
  unsigned thread = 0;
  uint3 index{};
  const char* where = "";  // what it waits in
  uint64_t result = 0;     // of a warp collective
};

// The lanes of one mask that have arrived at a collective. Subsets of a warp may meet apart, so there is one for each
// mask that is in use; a wrong mask ends as a deadlock.
struct Meeting {
  unsigned mask, arrived;
  const char* name;
  uint64_t values[kWarp];
  unsigned sources[kWarp];
};

Fiber fibers[kMostThreads];
Fiber* current;
jmp_buf scheduler;

// The block that runs.
void (*body)(const void*);
const void* arguments;
unsigned threads;
unsigned at_barrier;
int votes, vote_result;
std::vector<Meeting> meetings[kMostThreads / kWarp];

std::string error;         // of the block, or what the sanitizer reported; ends the launch
std::string last_message;  // of the last launch that failed
cudaError_t last_error = cudaSuccess;
std::string launch_log;  // a line for each launch: kernel, blocks, threads
std::mt19937_64 random_bits;

alignas(16) char dynamic_memory[kMostDynamicShared + 64];  // what lies behind it is NaN too
size_t dynamic_bytes;                                      // of the launch

// In a function, since static constructors of other files add to it.
std::vector<std::pair<void*, size_t>>& shared_arrays() {
  static std::vector<std::pair<void*, size_t>> arrays;
  return arrays;
}

// Back to the scheduler, until it resumes this fiber.
__attribute__((noinline)) void leave() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

void wait() {
  current->state = Fiber::State::kWaiting;
  leave();
}

[[noreturn]] void fail(const std::string& message) {
  error = message;
  for (;;) leave();
}

// A fiber lives on over blocks and launches: making a context costs more than running a short kernel.
void run_fiber() {
  for (;;) {
    body(arguments);
    current->state = Fiber::State::kDone;
    leave();
  }
}

char* stack_of(unsigned thread) {
  static char* const stacks = static_cast<char*>(mmap(nullptr, kStackBytes * kMostThreads, PROT_READ | PROT_WRITE,
                                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return stacks + thread * kStackBytes;
}

__attribute__((noinline)) void resume(Fiber& fiber) {
  current = &fiber;
  thread_index = fiber.index;
  lane = fiber.thread % kWarp;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.has_context) _longjmp(fiber.context, 1);
  fiber.has_context = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = stack_of(fiber.thread);
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, run_fiber, 0);
  setcontext(&start);
}

// An access outside of the memory of the process ends the launch and not the process.
void handle_fault(int) {
  if (error.empty()) {
    error = "segmentation fault in thread " + std::to_string(current->thread) + " of block " +
            std::to_string(block_index.x);
  }
  _longjmp(scheduler, 1);
}

#ifdef __SANITIZE_ADDRESS__
// Ends the launch, and not the process. The report's first line says what, its second where.
void note_report(const char* report) {
  if (!error.empty()) return;
  const std::string text = report;
  const auto begin = text.find("AddressSanitizer: "), end = text.find('\n', begin);
  const auto where = text.find("#0 ", end), where_end = text.find('\n', where);
  error = begin == std::string::npos ? text : text.substr(begin, end - begin);
  if (where != std::string::npos) error += " in " + text.substr(where, where_end - where);
}
#endif

class FaultHandler {
 public:
  FaultHandler() {
#ifdef __SANITIZE_ADDRESS__
    __asan_set_error_report_callback(note_report);
#endif
    struct sigaction action{};
    action.sa_handler = handle_fault;
    action.sa_flags = SA_NODEFER;  // it does not return
    sigaction(SIGSEGV, &action, &old_);
  }
  ~FaultHandler() { sigaction(SIGSEGV, &old_, nullptr); }

 private:
  struct sigaction old_;
};

template <typename T>
void arrange(std::vector<T>& items) {
  if (order == 1) std::reverse(items.begin(), items.end());
  if (order > 1) std::shuffle(items.begin(), items.end(), random_bits);
}

std::vector<unsigned> count_to(unsigned n) {
  std::vector<unsigned> items(n);
  std::iota(items.begin(), items.end(), 0u);
  return items;
}

void describe_deadlock() {
  std::map<std::string, std::vector<unsigned>> waiting;
  for (unsigned i = 0; i < threads; ++i) {
    waiting[fibers[i].state == Fiber::State::kDone ? "have returned" : std::string("wait in ") + fibers[i].where]
        .push_back(i);
  }
  error = "deadlock in block " + std::to_string(block_index.x) + ":";
  for (const auto& [what, which] : waiting) {
    error += " " + std::to_string(which.size()) + " threads " + what + " (thread " + std::to_string(which.front()) +
             " first);";
  }
  error.pop_back();
}

// Runs the threads of a block until all have returned; false with `error` set if they do not.
bool run_block() {
  for (const auto& [p, bytes] : shared_arrays()) std::memset(p, 0xff, bytes);
  ASAN_UNPOISON_MEMORY_REGION(dynamic_memory, sizeof(dynamic_memory));
  std::memset(dynamic_memory, 0xff, dynamic_bytes + 64);
  ASAN_POISON_MEMORY_REGION(dynamic_memory + dynamic_bytes, sizeof(dynamic_memory) - dynamic_bytes);
  at_barrier = 0;
  for (auto& of_warp : meetings) of_warp.clear();
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].state = Fiber::State::kReady;
    fibers[i].thread = i;
    fibers[i].index = {i % block_dim.x, i / block_dim.x % block_dim.y, i / (block_dim.x * block_dim.y)};
  }
  static std::vector<unsigned> warps, lanes;
  warps = count_to((threads + kWarp - 1) / kWarp);
  lanes = count_to(kWarp);
  if (order == 1) arrange(warps), arrange(lanes);
  for (bool ran = true; ran && error.empty();) {
    ran = false;
    if (order > 1) arrange(warps);
    for (const unsigned warp : warps) {
      // A warp goes on as far as it can, where it shows that it did not wait for the others; at random, only half of
      // it.
      for (bool again = true; again && error.empty();) {
        again = false;
        if (order > 1) arrange(lanes);
        for (const unsigned l : lanes) {
          const unsigned i = warp * kWarp + l;
          if (i >= threads || fibers[i].state != Fiber::State::kReady) continue;
          resume(fibers[i]);
          ran = again = true;
        }
        if (order > 1 && random_bits() % 2) break;
      }
    }
  }
  const auto done = [](const Fiber& fiber) { return fiber.state == Fiber::State::kDone; };
  if (error.empty() && !std::all_of(fibers, fibers + threads, done)) describe_deadlock();
  if (error.empty()) return true;
  for (unsigned i = 0; i < threads; ++i) fibers[i].has_context = false;  // they stand inside a kernel
  return false;
}

}  // namespace

void add_shared(void* p, size_t bytes) {
  std::memset(p, 0xff, bytes);
  shared_arrays().push_back({p, bytes});
}

uint4* dynamic_shared_memory() { return reinterpret_cast<uint4*>(dynamic_memory); }

int block_barrier(const char* name, Vote vote, int predicate) {
  if (at_barrier == 0) votes = 0;
  votes += predicate != 0;
  if (++at_barrier < threads) {
    current->where = name;
    wait();
    return vote_result;
  }
  at_barrier = 0;
  const int all = static_cast<int>(threads);
  vote_result = vote == Vote::kCount ? votes : vote == Vote::kOr ? votes > 0 : vote == Vote::kAnd ? votes == all : 0;
  for (unsigned i = 0; i < threads; ++i) fibers[i].state = Fiber::State::kReady;
  return vote_result;
}

uint64_t warp_collective(const char* name, Collective kind, unsigned mask, uint64_t value, unsigned source) {
  const unsigned warp = current->thread / kWarp, me = lane;
  const auto in_mask = [&](unsigned l) { return l < kWarp && (mask >> l & 1) != 0; };
  if (!in_mask(me)) fail(std::string(name) + ": the lane that calls it is not in its mask");
  if (kind == Collective::kShuffle && !in_mask(source)) {
    fail(std::string(name) + ": the source, lane " + std::to_string(source) + ", is not in the mask");
  }
  auto& of_warp = meetings[warp];
  auto meeting = std::find_if(of_warp.begin(), of_warp.end(), [&](const Meeting& m) { return m.mask == mask; });
  if (meeting == of_warp.end()) meeting = of_warp.insert(of_warp.end(), Meeting{mask, 0, name, {}, {}});
  if (meeting->arrived == 0) meeting->name = name;
  if (std::strcmp(meeting->name, name) != 0)
    fail(std::string(name) + ": other lanes of its mask are in " + meeting->name);
  meeting->values[me] = value;
  meeting->sources[me] = source;
  meeting->arrived |= 1u << me;
  if (meeting->arrived != mask) {
    current->where = name;
    wait();
    return current->result;
  }
  meeting->arrived = 0;
  uint64_t ballot = 0;
  for (unsigned l = 0; l < kWarp; ++l) {
    if (in_mask(l) && meeting->values[l] != 0) ballot |= uint64_t{1} << l;
  }
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!in_mask(l)) continue;
    Fiber& fiber = fibers[warp * kWarp + l];
    fiber.result = kind == Collective::kShuffle ? meeting->values[meeting->sources[l]] : ballot;
    fiber.state = Fiber::State::kReady;
  }
  return current->result;
}

void launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared, void (*kernel_body)(const void*),
            const void* kernel_arguments) {
  launch_log +=
      std::string(kernel) + "\t" + std::to_string(grid.x) + "\t" + std::to_string(block.x * block.y * block.z) + "\n";
  const auto within = [](const dim3& d, unsigned x, unsigned y, unsigned z) {
    return d.x >= 1 && d.x <= x && d.y >= 1 && d.y <= y && d.z >= 1 && d.z <= z;
  };
  threads = block.x * block.y * block.z;
  if (!within(grid, 0x7fffffffu, 65535, 65535) || !within(block, 1024, 1024, 64) || threads > kMostThreads ||
      dynamic_shared > kMostDynamicShared) {
    last_error = cudaErrorInvalidConfiguration;
    last_message = std::string(kernel) + ": no such grid or block, or too much dynamic shared memory";
    return;
  }
  if (most_blocks && grid.x > most_blocks) grid.x = most_blocks;
  block_dim = block;
  grid_dim = grid;
  dynamic_bytes = dynamic_shared;
  const FaultHandler handler;
  body = kernel_body;
  arguments = kernel_arguments;
  random_bits.seed(order);
  std::vector<unsigned> blocks = count_to(grid.x * grid.y * grid.z);
  arrange(blocks);
  for (const unsigned b : blocks) {
    block_index = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
    if (run_block()) continue;
    last_error = cudaErrorLaunchFailure;
    last_message = std::string(kernel) + ": " + error;
    error.clear();
    return;
  }
}

}  // namespace cuda_emulator

cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_emulator::last_error;
  cuda_emulator::last_error = cudaSuccess;
  return error;
}

// Called by the sanitizer's runtime, inside the operation that is undefined.
EXPORT void __ubsan_on_report() {
  const char *kind, *message, *file;
  unsigned line, column;
  char* address;
  __ubsan_get_current_report_data(&kind, &message, &file, &line, &column, &address);
  cuda_emulator::error =
      std::string("undefined behaviour (") + kind + "): " + message + " at " + file + ":" + std::to_string(line);
}

// The C interface: what the next launch is to be like, and what became of the last one. Strings end with the next one.
EXPORT void emulator_configure(uint64_t order, unsigned most_blocks) {
  cuda_emulator::order = order;
  cuda_emulator::most_blocks = most_blocks;
  cuda_emulator::launch_log.clear();
  cuda_emulator::last_message.clear();
}
EXPORT const char* emulator_launches() { return cuda_emulator::launch_log.c_str(); }
// Why a launch failed, or what was undefined in host code; otherwise empty.
EXPORT const char* emulator_error() {
  if (!cuda_emulator::error.empty()) cuda_emulator::last_message = std::exchange(cuda_emulator::error, {});
  return cuda_emulator::last_message.c_str();
}
