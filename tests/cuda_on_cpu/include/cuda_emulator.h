// Runs CUDA kernels on the CPU, to test what they compute. A thread is a fiber; one block runs at a time, or the blocks
// of one cluster, and fibers switch only where a thread waits: at barriers and warp collectives. Which one goes on is
// set by `order`.
//
// Shared memory is filled with 0xff before each block, which is NaN for floating types: a read before the write shows.
// Threads that wait for each other for ever, and collectives used against their rules, end the launch with a message.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// __shared__ is left undefined: a variable declared by it, and not by SHARED_ARRAY, would not be filled.

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_emulator {

// The thread that runs, and its block.
extern uint3 thread_index, block_index;
extern dim3 block_dim, grid_dim;
extern unsigned lane;
extern unsigned cluster_rank, cluster_blocks;  // of its block, and of all of its cluster
constexpr unsigned kMostClusterBlocks = 8;     // that every GPU with clusters allows

// 0: ascending clusters, warps and lanes, the first warp that can go on as far as it gets. 1: the same descending.
// Others: random, with this seed.
extern uint64_t order;
// If not 0, grids are cut to so many clusters, so that kernels whose blocks walk over their work have to.
extern unsigned most_blocks;

void launch(const char* kernel, unsigned cluster, dim3 grid, dim3 block, size_t dynamic_shared,
            void (*body)(const void*), const void* arguments);
// An array of `bytes` for each block of a cluster, `stride` bytes apart.
void add_shared(void* p, size_t bytes, size_t stride);
uint4* dynamic_shared_memory();
// What the block `rank` of the cluster has where this one has `p`.
void* shared_of_rank(void* p, unsigned rank);
void cluster_arrive();
void cluster_wait();
// What the next launch has of dynamic shared memory. It fails if it has other, and if the kernel may never have so
// much.
void allow_shared(const char* kernel, int bytes, int most);
// A place in a kernel's source. A thread notes there what it accesses of shared memory; what the lanes of a warp have
// noted in one place as their first, second, ... access between two barriers is one access of the warp.
struct Site {
  const char* file;
  int line;
};
void note_shared(const void* p, size_t bytes, Site site);
// Copies of 16 or 8 bytes are made as late as they may be, as early in order 1, and at either time in random ones.
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(int groups);

// Atomics over the bus, since the last emulator_host_memory.
extern int system_atomics;
void check_atomic(const void* p);

enum class Vote { kNone, kCount, kOr, kAnd };
int block_barrier(const char* name, Vote vote, int predicate);

enum class Collective { kSync, kShuffle, kBallot };
// The result of a collective of the lanes of `mask` for this lane. `source`: of a shuffle.
uint64_t warp_collective(const char* name, Collective kind, unsigned mask, uint64_t value, unsigned source);

template <typename T>
T shuffle(const char* name, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles registers of 32 and 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_collective(name, Collective::kShuffle, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The first lane of this lane's group of `width`.
inline unsigned group(int width) { return lane & ~static_cast<unsigned>(width - 1); }

// One for each block of a cluster.
template <typename T, size_t n>
struct SharedArray {
  struct alignas(16) OfBlock {
    T values[n];
    alignas(16) char guard[64];  // nothing is to be read or written behind an array
  };
  OfBlock blocks[kMostClusterBlocks];
  SharedArray() { add_shared(blocks, sizeof(T) * n, sizeof(OfBlock)); }
};

template <typename Body>
void call(const void* body) {
  (*static_cast<const Body*>(body))();
}

template <typename Kernel, typename... Args>
void launch_kernel(const char* name, Kernel kernel, int cluster, dim3 grid, dim3 block, size_t dynamic_shared,
                   Args... args) {
  const auto body = [&] { kernel(args...); };
  launch(name, static_cast<unsigned>(cluster), grid, block, dynamic_shared, &call<decltype(body)>, &body);
}

}  // namespace cuda_emulator

#define CUDA_LAUNCH_CLUSTERS(kernel, cluster, grid, block, smem, stream, ...) \
  cuda_emulator::launch_kernel(#kernel, [](auto... a) { kernel(a...); }, cluster, grid, block, smem, ##__VA_ARGS__)
#define CUDA_LAUNCH(kernel, grid, block, smem, stream, ...) \
  CUDA_LAUNCH_CLUSTERS(kernel, 1, grid, block, smem, stream, ##__VA_ARGS__)
#define SHARED_ARRAY(T, name, n)                          \
  static cuda_emulator::SharedArray<T, n> name##_storage; \
  T(&name)[n] = name##_storage.blocks[cuda_emulator::cluster_rank].values

#define DYNAMIC_SHARED(name) uint4* const name = cuda_emulator::dynamic_shared_memory()
// A device of two blocks to a multiprocessor.
#define RESIDENT_BLOCKS(kernel, blocks, threads, smem, multiprocessors) \
  std::min<int64_t>(blocks, 2 * int64_t{multiprocessors})
#define ALLOW_SHARED(kernel, bytes, most) cuda_emulator::allow_shared(#kernel, bytes, most)

#define threadIdx (cuda_emulator::thread_index)
#define blockIdx (cuda_emulator::block_index)
#define blockDim (cuda_emulator::block_dim)
#define gridDim (cuda_emulator::grid_dim)
constexpr int warpSize = 32;

inline void __syncthreads() { cuda_emulator::block_barrier("__syncthreads", cuda_emulator::Vote::kNone, 0); }
inline int __syncthreads_count(int p) {
  return cuda_emulator::block_barrier("__syncthreads_count", cuda_emulator::Vote::kCount, p);
}
inline int __syncthreads_or(int p) {
  return cuda_emulator::block_barrier("__syncthreads_or", cuda_emulator::Vote::kOr, p);
}
inline int __syncthreads_and(int p) {
  return cuda_emulator::block_barrier("__syncthreads_and", cuda_emulator::Vote::kAnd, p);
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_emulator::warp_collective("__syncwarp", cuda_emulator::Collective::kSync, mask, 0, 0);
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  using namespace cuda_emulator;
  return static_cast<unsigned>(warp_collective("__ballot_sync", Collective::kBallot, mask, p != 0, 0));
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, p) == mask; }

template <typename T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  using namespace cuda_emulator;
  return shuffle("__shfl_sync", mask, v, group(width) | (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
  using namespace cuda_emulator;
  const unsigned source = lane ^ bits;
  return shuffle("__shfl_xor_sync", mask, v, source < group(width) + width ? source : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  using namespace cuda_emulator;
  return shuffle("__shfl_down_sync", mask, v, lane + delta < group(width) + width ? lane + delta : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  using namespace cuda_emulator;
  return shuffle("__shfl_up_sync", mask, v, lane >= group(width) + delta ? lane - delta : lane);
}

// One fiber runs at a time, so that atomics are plain and fences nothing. What is atomic for the device alone fails on
// memory that the host writes too.
template <typename T>
T atomicAdd(T* p, T v) {
  cuda_emulator::check_atomic(p);
  const T old = *p;
  *p = old + v;
  return old;
}
template <typename T>
T atomicMax(T* p, T v) {
  cuda_emulator::check_atomic(p);
  const T old = *p;
  if (v > old) *p = v;
  return old;
}
template <typename T>
T atomicCAS_system(T* p, T compare, T v) {
  ++cuda_emulator::system_atomics;
  const T old = *p;
  if (old == compare) *p = v;
  return old;
}
template <typename T>
T atomicCAS(T* p, T compare, T v) {
  cuda_emulator::check_atomic(p);
  const T old = *p;
  if (old == compare) *p = v;
  return old;
}
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}

inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T v) {
  *p = v;
}

namespace nllx {
inline int most_cluster_blocks(const void*, int, int, int, const char*&) { return cuda_emulator::kMostClusterBlocks; }
inline int cluster_rank() { return static_cast<int>(cuda_emulator::cluster_rank); }
inline int cluster_blocks() { return static_cast<int>(cuda_emulator::cluster_blocks); }
inline void cluster_arrive() { cuda_emulator::cluster_arrive(); }
inline void cluster_wait() { cuda_emulator::cluster_wait(); }
template <typename T>
T* shared_of_rank(T* p, int rank) {
  return static_cast<T*>(cuda_emulator::shared_of_rank(p, static_cast<unsigned>(rank)));
}
template <typename T>
T read_shared(const T* p, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_emulator::note_shared(p, sizeof(T), {file, line});
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}
template <typename T>
void write_shared(T* p, const T& value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_emulator::note_shared(p, sizeof(T), {file, line});
  std::memcpy(p, &value, sizeof(T));
}
inline void copy_async(void* to, const void* from, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_emulator::note_shared(to, 16, {file, line});
  cuda_emulator::copy_async(to, from, 16);
}
inline void copy_async_8(void* to, const void* from) { cuda_emulator::copy_async(to, from, 8); }
inline void commit_copies() { cuda_emulator::commit_copies(); }
inline void wait_for_copies(int groups) { cuda_emulator::wait_for_copies(groups); }
inline bool copies_are_async(int ahead) { return ahead > 0; }  // as on the device that the plan was made for
inline void prefetch(const void* p) { static_cast<void>(*static_cast<const volatile char*>(p)); }
inline float exp2_approximate(float x) { return std::exp2(x); }
inline void store_bytes(void* p, const uint4& v) { *static_cast<uint4*>(p) = v; }
inline void store_bytes(void* p, const uint2& v) { *static_cast<uint2*>(p) = v; }
}  // namespace nllx
