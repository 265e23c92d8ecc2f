// The things that differ between nvcc and the build that runs the kernels on the CPU (tests/cuda_on_cpu).
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <atomic>

#include "plan.h"

#define CUDA_LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
// Every `cluster` blocks that follow each other are a thread-block cluster.
#define CUDA_LAUNCH_CLUSTERS(kernel, cluster, grid, block, smem, stream, ...) \
  nllx::launch_clusters(kernel, cluster, grid, block, smem, stream, __VA_ARGS__)
#define SHARED_ARRAY(T, name, n) __shared__ T name[n]
// The dynamic shared memory of the launch, 16-byte aligned.
#define DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
// Before every launch with dynamic shared memory: so much, of which launches of the kernel never have more than `most`.
#define ALLOW_SHARED(kernel, bytes, most) nllx::allow_shared<(kernel)>(bytes, most)
// So many blocks, of those that a problem has, that the device holds all of them at once: they walk over the work, and
// what a block begins and ends with is paid once for each.
#define RESIDENT_BLOCKS(kernel, blocks, threads, smem, multiprocessors) \
  nllx::resident_blocks(kernel, blocks, threads, smem, multiprocessors)

namespace nllx {
// Both attributes are the current device's, and may be set while a stream is captured.
template <auto kKernel>
void allow_shared(int bytes, int most) {
  if (bytes <= 0) return;
  // More than 48 KiB, static and dynamic, have to be asked for; of the static there are less than 3. The limit is one
  // for all threads of the process, so that it is set to `most` always and never to what one launch needs; and for each
  // launch, since a context that is not the device's first may have a limit of its own.
  if (bytes > (45 << 10)) cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  // What is read goes to shared memory: as many blocks as fit there are worth more than a first-level cache. Left to
  // the driver, it may be fewer than the plan counts on. Once for a device: a preference that is lost costs time alone.
  static std::atomic<uint64_t> preferred{0};  // a bit for each device
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return;
  const uint64_t bit = uint64_t{1} << device % 64;
  if (preferred.load(std::memory_order_relaxed) & bit) return;
  if (cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared) !=
      cudaSuccess) {
    cudaGetLastError();  // no error of the launch to come
  }
  preferred.fetch_or(bit, std::memory_order_relaxed);
}
template <typename... Parameters>
int64_t resident_blocks(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
                        int multiprocessors) {
  if (blocks <= 16 * int64_t{multiprocessors}) return blocks;  // not worth the question, which takes microseconds
  int of_multiprocessor = 0;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_multiprocessor, kernel, threads,
                                                    static_cast<size_t>(shared_bytes)) != cudaSuccess) {
    cudaGetLastError();  // the grid is as right as another
    return blocks;
  }
  const int64_t resident = int64_t{of_multiprocessor} * multiprocessors;
  return resident > 0 && resident < blocks ? resident : blocks;
}
// `attribute` is the configuration's, and has to live as long.
inline cudaLaunchConfig_t cluster_config(cudaLaunchAttribute& attribute, int cluster, dim3 grid, dim3 block,
                                         size_t shared_bytes) {
  attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;  // GPUs without clusters take no such attribute
  return config;
}

template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block, size_t shared_bytes,
                     cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config = cluster_config(attribute, cluster, grid, block, shared_bytes);
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// The most blocks that a cluster of a kernel's may have on the current device, and why no more. `most`: as for
// allow_shared.
inline int most_cluster_blocks(const void* kernel, int threads, int shared_bytes, int most, const char*& error) {
  int device = 0, clusters = 0;
  cudaFuncAttributes attributes{};
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  error = status != cudaSuccess        ? cudaGetErrorString(status)
          : !clusters                  ? "the device has no thread-block clusters"
          : attributes.ptxVersion < 90 ? "the code that runs here was compiled for architectures without clusters"
                                       : "";
  int blocks = *error ? 1 : kMostClusterBlocks;
  for (; blocks > 1; blocks /= 2) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config =
        cluster_config(attribute, blocks, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                       static_cast<size_t>(shared_bytes));
    int at_once = 0;
    status = cudaOccupancyMaxActiveClusters(&at_once, kernel, &config);
    if (status == cudaSuccess && at_once > 0) break;
    error = status == cudaSuccess ? "no larger cluster fits" : cudaGetErrorString(status);
  }
  cudaGetLastError();  // nothing of this is an error of the launch to come
  return blocks;
}

// Of the cluster that this block is a part of: the block's number in it, and how many there are.
__device__ __forceinline__ int cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
__device__ __forceinline__ int cluster_blocks() {
  unsigned blocks = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
#endif
  return static_cast<int>(blocks);
}
// The cluster's barrier in two steps. What a thread has written before it arrives is visible to all after they waited.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" : : : "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" : : : "memory");
#endif
}
// What another block of the cluster has in shared memory where this one has `p`. That block has to have begun, and may
// not end before the access.
template <typename T>
__device__ __forceinline__ T* shared_of_rank(T* p, [[maybe_unused]] int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  return p;
#endif
}

// Where threads of a warp access shared memory side by side: the emulator counts the banks.
template <typename T>
__device__ __forceinline__ T read_shared(const T* p) {
  return *p;
}
template <typename T>
__device__ __forceinline__ void write_shared(T* p, const T& value) {
  *p = value;
}

// 16 bytes, or 8, from device to shared memory, while the thread goes on; from sm_80 on. What a thread has asked for
// since the last time is a group; it waits until at most `groups` (up to 2) of its groups are on their way. Only this
// thread may then read what has come, unless there is a barrier. Shared memory that it has read may be written again
// where what was read has been used.
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(__cvta_generic_to_global(from))
               : "memory");
}
__device__ __forceinline__ void copy_async_8(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;"
               :
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(__cvta_generic_to_global(from))
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }
__device__ __forceinline__ void wait_for_copies(int groups) {
  if (groups == 0) {
    asm volatile("cp.async.wait_group 0;" : : : "memory");
  } else if (groups == 1) {
    asm volatile("cp.async.wait_group 1;" : : : "memory");
  } else {
    asm volatile("cp.async.wait_group 2;" : : : "memory");
  }
}
// Whether the plan has any on their way.
__device__ __forceinline__ bool copies_are_async(int ahead) { return ahead > 0; }
#else
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
}
__device__ __forceinline__ void copy_async_8(void* to, const void* from) {
  *static_cast<uint2*>(to) = *static_cast<const uint2*>(from);
}
__device__ __forceinline__ void commit_copies() {}
__device__ __forceinline__ void wait_for_copies(int) {}
__device__ __forceinline__ bool copies_are_async(int) { return false; }
#endif

// Brings what will soon be read into the second-level cache.
__device__ __forceinline__ void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(__cvta_generic_to_global(p)));
}

// 2^x as the hardware gives it: 2^-22.5 off at the most, zero for what would be denormal.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 16 and 8 bytes to device memory in one instruction. A plain assignment beside a branch that stores the elements one
// by one is merged with it by the compiler, and then single elements are stored.
__device__ __forceinline__ void store_bytes(void* p, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_bytes(void* p, const uint2& v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y) : "memory");
}
}  // namespace nllx
#endif
