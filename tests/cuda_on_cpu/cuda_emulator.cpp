#include "cuda_emulator.h"

#undef _FORTIFY_SOURCE  // its check of longjmp refuses to switch stacks
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <tuple>
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
unsigned lane, cluster_rank, cluster_blocks = 1;
uint64_t order = 0;
unsigned most_blocks = 0;
int system_atomics = 0;

namespace {

constexpr unsigned kWarp = 32, kMostThreads = 1024, kMostWarps = kMostThreads / kWarp;
constexpr unsigned kMostFibers = 4096;            // threads of a cluster
constexpr size_t kMostDynamicShared = 227 << 10;  // of a block, on the newest architectures
constexpr size_t kStackBytes = 1 << 20;           // the sanitizers format their reports on it

struct Fiber {
  enum class State { kReady, kWaiting, kDone };
  State state = State::kDone;
  bool has_context = false;  // it stands in `run_fiber` or in a kernel, and not before the first switch to it
  jmp_buf context;
  unsigned rank = 0, thread = 0;  // its block in the cluster, and its number in the block
  uint3 index{}, block{};
  const char* where = "";  // what it waits in
  uint64_t result = 0;     // of a warp collective
  bool arrived = false;    // at the cluster's barrier, and has not waited there since
  uint64_t phase = 0;      // that the cluster's barrier then had
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    void make() const { std::memcpy(to, from, bytes); }
  };
  uint64_t barriers = 0;                 // that it has passed
  std::vector<Copy> open;                // since the last commit
  std::deque<std::vector<Copy>> groups;  // on their way, the oldest first
};

// The lanes of one mask that have arrived at a collective. Subsets of a warp may meet apart, so there is one for each
// mask that is in use; a wrong mask ends as a deadlock.
struct Meeting {
  unsigned mask, arrived;
  const char* name;
  uint64_t values[kWarp];
  unsigned sources[kWarp];
};

Fiber fibers[kMostFibers];
Fiber* current;
jmp_buf scheduler;

// The cluster that runs.
void (*body)(const void*);
const void* arguments;
unsigned threads;          // of a block
unsigned cluster_arrived;  // threads at its barrier
uint64_t cluster_phase;    // how often the barrier has opened

struct Block {
  unsigned at_barrier = 0;
  int votes = 0, vote_result = 0;
  std::vector<Meeting> meetings[kMostWarps];
};
Block blocks[kMostClusterBlocks];

std::string error;         // of the block, or what the sanitizer reported; ends the launch
std::string last_message;  // of the last launch that failed
cudaError_t last_error = cudaSuccess;
std::string launch_log;  // a line for each launch: kernel, blocks, threads
std::mt19937_64 random_bits;

constexpr size_t kDynamicStride = kMostDynamicShared + 64;  // what lies behind it is NaN too
alignas(16) char dynamic_memory[kMostClusterBlocks * kDynamicStride];
size_t dynamic_bytes;               // of the launch
const char* host_memory = nullptr;  // that host and device write
size_t host_bytes = 0;
// What ALLOW_SHARED has said of the next launch.
std::string allowed_kernel;
size_t allowed_bytes;

struct Shared {
  char* begin;
  size_t bytes, stride;
};
// In a function, since static constructors of other files add to it.
std::vector<Shared>& shared_arrays() {
  static std::vector<Shared> arrays;
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

char* stack_of(const Fiber& fiber) {
  static char* const stacks = static_cast<char*>(mmap(nullptr, kStackBytes * kMostFibers, PROT_READ | PROT_WRITE,
                                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return stacks + static_cast<size_t>(&fiber - fibers) * kStackBytes;
}

__attribute__((noinline)) void resume(Fiber& fiber) {
  current = &fiber;
  thread_index = fiber.index;
  block_index = fiber.block;
  cluster_rank = fiber.rank;
  lane = fiber.thread % kWarp;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.has_context) _longjmp(fiber.context, 1);
  fiber.has_context = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = stack_of(fiber);
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, run_fiber, 0);
  setcontext(&start);
}

// An access outside of the memory of the process ends the launch and not the process.
void handle_fault(int) {
  if (error.empty()) {
    error = "segmentation fault in thread " + std::to_string(current->thread) + " of block " +
            std::to_string(current->block.x);
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
  std::map<std::string, std::vector<const Fiber*>> waiting;
  for (unsigned i = 0; i < cluster_blocks * threads; ++i) {
    waiting[fibers[i].state == Fiber::State::kDone ? "have returned" : std::string("wait in ") + fibers[i].where]
        .push_back(&fibers[i]);
  }
  error = "deadlock in block " + std::to_string(fibers[0].block.x) + (cluster_blocks > 1 ? " and its cluster:" : ":");
  for (const auto& [what, which] : waiting) {
    error += " " + std::to_string(which.size()) + " threads " + what + " (thread " +
             std::to_string(which.front()->thread) + " of block " + std::to_string(which.front()->block.x) + " first);";
  }
  error.pop_back();
}

// What warps access of shared memory, if it is counted: 32 banks have a word of four bytes each, of which one goes to
// the warp in a cycle. Accesses of 8 bytes take a half of the warp at a time, of 16 bytes a quarter.
struct SharedAccess {
  const char* file;
  int line;
  uint64_t barriers, warp;
  unsigned number;  // of the lane's accesses there
  bool operator<(const SharedAccess& o) const {
    return std::tie(file, line, barriers, warp, number) < std::tie(o.file, o.line, o.barriers, o.warp, o.number);
  }
};
struct LaneAccess {
  unsigned lane;
  uintptr_t first_word, last_word;
};
bool counts_banks = false;
std::map<SharedAccess, std::vector<LaneAccess>> shared_accesses;  // of the block
std::map<SharedAccess, unsigned> numbers;                         // of a lane's accesses to one place so far
std::map<std::string, unsigned> most_cycles;  // of a part of a warp that could do with one, by place

unsigned cycles(const std::vector<LaneAccess>& lanes) {
  std::map<uintptr_t, std::set<uintptr_t>> banks;
  for (const LaneAccess& access : lanes)
    for (uintptr_t word = access.first_word; word <= access.last_word; ++word) banks[word % kWarp].insert(word);
  size_t most = 0;
  for (const auto& [bank, words] : banks) most = std::max(most, words.size());
  return static_cast<unsigned>(most);
}

void count_banks() {
  for (const auto& [access, lanes] : shared_accesses) {
    const auto words = lanes[0].last_word - lanes[0].first_word + 1;
    std::map<uintptr_t, std::vector<LaneAccess>> parts;
    for (const LaneAccess& of_lane : lanes) parts[of_lane.lane / (kWarp / words)].push_back(of_lane);
    unsigned& most = most_cycles[std::string(access.file) + ":" + std::to_string(access.line)];
    for (const auto& [part, of_part] : parts) most = std::max(most, cycles(of_part));
  }
  shared_accesses.clear();
  numbers.clear();
}

// Shared memory as it is before a block begins.
void clear_shared() {
  for (const Shared& array : shared_arrays()) {
    for (unsigned b = 0; b < cluster_blocks; ++b) std::memset(array.begin + b * array.stride, 0xff, array.bytes);
  }
  ASAN_UNPOISON_MEMORY_REGION(dynamic_memory, sizeof(dynamic_memory));
  for (unsigned b = 0; b < cluster_blocks; ++b) {
    char* const of_block = dynamic_memory + b * kDynamicStride;
    std::memset(of_block, 0xff, dynamic_bytes + 64);
    ASAN_POISON_MEMORY_REGION(of_block + dynamic_bytes, kDynamicStride - dynamic_bytes);
  }
}

// The address sanitizer sees what is read there, too, and further on.
void check_dynamic_shared() {
  ASAN_UNPOISON_MEMORY_REGION(dynamic_memory, sizeof(dynamic_memory));
  for (unsigned b = 0; b < cluster_blocks; ++b) {
    const char* const behind = dynamic_memory + b * kDynamicStride + dynamic_bytes;
    if (std::any_of(behind, behind + 64, [](char c) { return c != '\xff'; }))
      error = "dynamic shared memory was written behind its end";
  }
}

// Runs the threads of a cluster, whose first block is `first`, until all have returned; false with `error` set if they
// do not.
bool run_cluster(unsigned first) {
  clear_shared();
  cluster_arrived = 0;
  cluster_phase = 0;
  const unsigned all = cluster_blocks * threads, warps_of_block = (threads + kWarp - 1) / kWarp;
  for (unsigned i = 0; i < all; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = Fiber::State::kReady;
    fiber.arrived = false;
    fiber.barriers = 0;
    fiber.open.clear();
    fiber.groups.clear();
    fiber.rank = i / threads;
    fiber.thread = i % threads;
    fiber.index = {fiber.thread % block_dim.x, fiber.thread / block_dim.x % block_dim.y,
                   fiber.thread / (block_dim.x * block_dim.y)};
    const unsigned b = first + fiber.rank;
    fiber.block = {b % grid_dim.x, b / grid_dim.x % grid_dim.y, b / (grid_dim.x * grid_dim.y)};
  }
  for (unsigned b = 0; b < cluster_blocks; ++b) {
    blocks[b].at_barrier = 0;
    for (auto& of_warp : blocks[b].meetings) of_warp.clear();
  }
  static std::vector<unsigned> warps, lanes;
  warps = count_to(cluster_blocks * warps_of_block);
  lanes = count_to(kWarp);
  if (order == 1) arrange(warps), arrange(lanes);
  for (bool ran = true; ran && error.empty();) {
    ran = false;
    if (order > 1) arrange(warps);
    for (const unsigned warp : warps) {
      // In the fixed orders a warp, and with it a block, runs before all that come after it whenever it can; in random
      // ones any warp comes next, so that others may be left far behind.
      if (ran) break;
      const unsigned rank = warp / warps_of_block, of_block = warp % warps_of_block;
      // A warp goes on as far as it can, where it shows that it did not wait for the others; at random, a part of it.
      for (bool again = true; again && error.empty();) {
        again = false;
        if (order > 1) arrange(lanes);
        for (const unsigned l : lanes) {
          const unsigned i = of_block * kWarp + l;
          if (i >= threads || fibers[rank * threads + i].state != Fiber::State::kReady) continue;
          resume(fibers[rank * threads + i]);
          ran = again = true;
        }
        if (order > 1 && random_bits() % 16 == 0) break;
      }
    }
  }
  const auto done = [](const Fiber& fiber) { return fiber.state == Fiber::State::kDone; };
  if (error.empty() && !std::all_of(fibers, fibers + all, done)) describe_deadlock();
  if (error.empty()) check_dynamic_shared();
  count_banks();
  if (error.empty()) return true;
  for (unsigned i = 0; i < all; ++i) fibers[i].has_context = false;  // they stand inside a kernel
  return false;
}

}  // namespace

void add_shared(void* p, size_t bytes, size_t stride) {
  char* const begin = static_cast<char*>(p);
  std::memset(begin, 0xff, kMostClusterBlocks * stride);
  for (unsigned b = 0; b < kMostClusterBlocks; ++b) {
    // By granules of the address sanitizer; the array itself ends at the end of one or in the last, which it knows.
    ASAN_POISON_MEMORY_REGION(begin + b * stride + bytes, stride - bytes);
  }
  shared_arrays().push_back({begin, bytes, stride});
}

uint4* dynamic_shared_memory() { return reinterpret_cast<uint4*>(dynamic_memory + cluster_rank * kDynamicStride); }

void* shared_of_rank(void* p, unsigned rank) {
  const char* const name = "shared_of_rank";
  if (rank >= cluster_blocks) fail(std::string(name) + ": the cluster has no block " + std::to_string(rank));
  if (rank != current->rank) {
    if (cluster_phase == 0) fail(std::string(name) + ": the other block may not have begun");
    const Fiber* const other = fibers + rank * threads;
    if (std::all_of(other, other + threads, [](const Fiber& f) { return f.state == Fiber::State::kDone; }))
      fail(std::string(name) + ": the other block has ended");
  }
  const auto moved = [&](char* begin, size_t stride) -> char* {
    const ptrdiff_t at = static_cast<char*>(p) - (begin + current->rank * stride);
    return at >= 0 && static_cast<size_t>(at) < stride ? begin + rank * stride + at : nullptr;
  };
  char* found = moved(dynamic_memory, kDynamicStride);
  for (const Shared& array : shared_arrays()) found = found ? found : moved(array.begin, array.stride);
  if (!found) fail(std::string(name) + ": not an address of this block's shared memory");
  return found;
}

void cluster_arrive() {
  if (current->arrived) fail("cluster_arrive: a second time without cluster_wait");
  current->arrived = true;
  current->phase = cluster_phase;
  if (++cluster_arrived < cluster_blocks * threads) return;
  cluster_arrived = 0;
  ++cluster_phase;
  for (unsigned i = 0; i < cluster_blocks * threads; ++i) {
    if (fibers[i].state == Fiber::State::kWaiting && std::strcmp(fibers[i].where, "cluster_wait") == 0)
      fibers[i].state = Fiber::State::kReady;
  }
}

void cluster_wait() {
  if (!current->arrived) fail("cluster_wait: without cluster_arrive");
  if (cluster_phase == current->phase) {
    current->where = "cluster_wait";
    wait();
  }
  current->arrived = false;
}

void allow_shared(const char* kernel, int bytes, int most) {
  if (bytes > most) error = "more dynamic shared memory than is asked for";
  allowed_kernel = kernel;
  allowed_bytes = static_cast<size_t>(bytes);
}

void note_shared(const void* p, size_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("shared memory at an address that is not aligned");
  if (!counts_banks) return;
  const uint64_t warp = current->rank * kMostWarps + current->thread / kWarp;
  SharedAccess access{site.file, site.line, current->barriers, warp, lane};
  access.number = numbers[access]++;
  const auto begin = reinterpret_cast<uintptr_t>(p);
  shared_accesses[access].push_back({lane, begin / 4, (begin + bytes - 1) / 4});
}

void copy_async(void* to, const void* from, size_t bytes) {
  const Fiber::Copy copy{to, from, bytes};
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0)
    fail("copy_async: an address that is not aligned");
  if (order == 1 || (order > 1 && random_bits() % 2)) {
    copy.make();
  } else {
    current->open.push_back(copy);
  }
}

void commit_copies() { current->groups.push_back(std::exchange(current->open, {})); }

void wait_for_copies(int groups) {
  if (groups < 0 || groups > 2) fail("wait_for_copies: no such number of groups");
  while (current->groups.size() > static_cast<size_t>(groups)) {
    for (const Fiber::Copy& copy : current->groups.front()) copy.make();
    current->groups.pop_front();
  }
}

void check_atomic(const void* p) {
  const char* const at = static_cast<const char*>(p);
  if (at >= host_memory && at < host_memory + host_bytes)
    fail("an atomic of the device on memory that the host writes");
}

int block_barrier(const char* name, Vote vote, int predicate) {
  Block& block = blocks[current->rank];
  ++current->barriers;
  if (block.at_barrier == 0) block.votes = 0;
  block.votes += predicate != 0;
  if (++block.at_barrier < threads) {
    current->where = name;
    wait();
    return block.vote_result;
  }
  block.at_barrier = 0;
  const int all = static_cast<int>(threads), votes = block.votes;
  block.vote_result = vote == Vote::kCount ? votes
                      : vote == Vote::kOr  ? votes > 0
                      : vote == Vote::kAnd ? votes == all
                                           : 0;
  for (unsigned i = 0; i < threads; ++i) fibers[current->rank * threads + i].state = Fiber::State::kReady;
  return block.vote_result;
}

uint64_t warp_collective(const char* name, Collective kind, unsigned mask, uint64_t value, unsigned source) {
  const unsigned warp = current->thread / kWarp, me = lane;
  const auto in_mask = [&](unsigned l) { return l < kWarp && (mask >> l & 1) != 0; };
  if (!in_mask(me)) fail(std::string(name) + ": the lane that calls it is not in its mask");
  if (kind == Collective::kShuffle && !in_mask(source)) {
    fail(std::string(name) + ": the source, lane " + std::to_string(source) + ", is not in the mask");
  }
  auto& of_warp = blocks[current->rank].meetings[warp];
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
    Fiber& fiber = fibers[current->rank * threads + warp * kWarp + l];
    fiber.result = kind == Collective::kShuffle ? meeting->values[meeting->sources[l]] : ballot;
    fiber.state = Fiber::State::kReady;
  }
  return current->result;
}

void launch(const char* kernel, unsigned cluster, dim3 grid, dim3 block, size_t dynamic_shared,
            void (*kernel_body)(const void*), const void* kernel_arguments) {
  launch_log += std::string(kernel) + "\t" + std::to_string(grid.x) + "\t" +
                std::to_string(block.x * block.y * block.z) + "\t" + std::to_string(cluster) + "\n";
  const auto within = [](const dim3& d, unsigned x, unsigned y, unsigned z) {
    return d.x >= 1 && d.x <= x && d.y >= 1 && d.y <= y && d.z >= 1 && d.z <= z;
  };
  threads = block.x * block.y * block.z;
  if (!within(grid, 0x7fffffffu, 65535, 65535) || !within(block, 1024, 1024, 64) || threads > kMostThreads ||
      dynamic_shared > kMostDynamicShared || cluster < 1 || cluster > kMostClusterBlocks || grid.x % cluster != 0 ||
      (cluster > 1 && cluster * threads > kMostFibers)) {
    last_error = cudaErrorInvalidConfiguration;
    last_message = std::string(kernel) + ": no such grid, block or cluster, or too much dynamic shared memory";
    return;
  }
  if (dynamic_shared > 0 && (std::exchange(allowed_kernel, "") != kernel || allowed_bytes != dynamic_shared)) {
    last_error = cudaErrorLaunchFailure;
    last_message = std::string(kernel) + ": dynamic shared memory without ALLOW_SHARED";
    return;
  }
  // Whole clusters.
  if (most_blocks && grid.x > most_blocks * cluster) grid.x = most_blocks * cluster;
  cluster_blocks = cluster;
  block_dim = block;
  grid_dim = grid;
  dynamic_bytes = dynamic_shared;
  const FaultHandler handler;
  body = kernel_body;
  arguments = kernel_arguments;
  random_bits.seed(order);
  std::vector<unsigned> clusters = count_to(grid.x * grid.y * grid.z / cluster);
  arrange(clusters);
  for (const unsigned c : clusters) {
    if (run_cluster(c * cluster)) continue;
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

namespace cuda_emulator {
std::string allocation_log;  // what host code has asked of the runtime's memory, in order
bool allocations_fail = false;
cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
}  // namespace cuda_emulator

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  cuda_emulator::allocation_log +=
      "malloc " + std::to_string(bytes) + " in mode " + std::to_string(cuda_emulator::capture_mode) + "\n";
  if (cuda_emulator::allocations_fail) return cudaErrorMemoryAllocation;
  *memory = std::malloc(bytes);
  std::memset(*memory, 0xAB, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  cuda_emulator::allocation_log += "memset on " + std::to_string(reinterpret_cast<uintptr_t>(stream)) + "\n";
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, cuda_emulator::capture_mode);
  return cudaSuccess;
}

// What was asked of memory since the last call; whether the next allocations fail.
EXPORT const char* emulator_allocations(bool fail) {
  static std::string log;
  log = std::exchange(cuda_emulator::allocation_log, {});
  cuda_emulator::allocations_fail = fail;
  return log.c_str();
}
// Memory that the host writes too, and the atomics of the system since the last call.
EXPORT int emulator_host_memory(const void* memory, size_t bytes) {
  cuda_emulator::host_memory = static_cast<const char*>(memory);
  cuda_emulator::host_bytes = bytes;
  return std::exchange(cuda_emulator::system_atomics, 0);
}
EXPORT int emulator_capture_mode() { return cuda_emulator::capture_mode; }

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
// Whether accesses of shared memory are counted from now on; the most cycles that a part of a warp took for one since
// the last call, a line for each place in the source. A part needs one.
EXPORT const char* emulator_banks(bool count) {
  static std::string log;
  log.clear();
  for (const auto& [place, cycles] : cuda_emulator::most_cycles) log += place + "\t" + std::to_string(cycles) + "\n";
  cuda_emulator::most_cycles.clear();
  cuda_emulator::counts_banks = count;
  return log.c_str();
}
EXPORT const char* emulator_launches() { return cuda_emulator::launch_log.c_str(); }
// Why a launch failed, or what was undefined in host code; otherwise empty.
EXPORT const char* emulator_error() {
  if (!cuda_emulator::error.empty()) cuda_emulator::last_message = std::exchange(cuda_emulator::error, {});
  return cuda_emulator::last_message.c_str();
}
