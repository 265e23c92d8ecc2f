// Kernels that show what the emulator does and what it reports.
#include "cuda_runtime.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

__global__ void indices_kernel(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1000 * block + thread;
}

// Four results for each thread of a warp.
__global__ void shuffles_kernel(int width, int n, double* out) {
  const double v = threadIdx.x;
  out[threadIdx.x] = __shfl_sync(0xffffffffu, v, n, width);
  out[32 + threadIdx.x] = __shfl_xor_sync(0xffffffffu, v, n, width);
  out[64 + threadIdx.x] = __shfl_down_sync(0xffffffffu, v, n, width);
  out[96 + threadIdx.x] = __shfl_up_sync(0xffffffffu, v, n, width);
}

__global__ void votes_kernel(int limit, unsigned* out) {
  const int p = static_cast<int>(threadIdx.x) < limit;
  unsigned* mine = out + threadIdx.x * 6;
  mine[0] = __syncthreads_count(p);
  mine[1] = __syncthreads_or(p);
  mine[2] = __syncthreads_and(p);
  mine[3] = __ballot_sync(0xffffffffu, p);
  mine[4] = __any_sync(0xffffffffu, p);
  mine[5] = __all_sync(0xffffffffu, p);
}

// Halves of a warp that meet apart.
__global__ void halves_kernel(int* out) {
  const unsigned mask = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
  int v = threadIdx.x;
  if (threadIdx.x < 16) {
    for (int n = 8; n > 0; n /= 2) v += __shfl_xor_sync(mask, v, n);
  } else {
    for (int n = 8; n > 0; n /= 2) {
      const int other = __shfl_xor_sync(mask, v, n);
      v = other > v ? other : v;
    }
  }
  out[threadIdx.x] = v;
}

__global__ void atomics_kernel(int* out) {
  atomicAdd(&out[0], static_cast<int>(threadIdx.x));
  atomicMax(&out[1], static_cast<int>(threadIdx.x));
  atomicCAS(&out[2], 0, static_cast<int>(threadIdx.x) + 1);
}

// Each thread passes its number on to the next one through shared memory.
__global__ void neighbours_kernel(bool barrier_before, bool barrier_after, float* out) {
  SHARED_ARRAY(float, shared, 64);
  for (int i = 0; i < 2; ++i) {
    shared[threadIdx.x] = static_cast<float>(100 * i + threadIdx.x);
    if (barrier_before) __syncthreads();
    out[64 * i + threadIdx.x] = shared[(threadIdx.x + 1) % 64];
    if (barrier_after) __syncthreads();
  }
}

__global__ void deadlock_kernel() {
  if (threadIdx.x >= 40) return;
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncwarp(0xffu);
    __syncwarp();
  }
}

__global__ void not_in_mask_kernel() { __syncwarp(0xfffffffeu); }
__global__ void source_not_in_mask_kernel() {
  if (threadIdx.x < 16) __shfl_xor_sync(0x0000ffffu, 1.f, 16);
}
__global__ void mixed_collectives_kernel() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __ballot_sync(0xffffffffu, 1);
  }
}

// Each block of a cluster tells the next one its number, and what it has in dynamic shared memory.
__global__ void clusters_kernel(bool begin, bool end, bool dynamic, int* out) {
  SHARED_ARRAY(int, told, 64);
  DYNAMIC_SHARED(memory);
  int* const mine = dynamic ? reinterpret_cast<int*>(memory) : told;
  const int rank = nllx::cluster_rank(), next = (rank + 1) % nllx::cluster_blocks();
  if (begin) {
    nllx::cluster_arrive();
    nllx::cluster_wait();
  }
  nllx::shared_of_rank(mine, next)[threadIdx.x] = static_cast<int>(100 * blockIdx.x + threadIdx.x);
  if (end) {
    nllx::cluster_arrive();
    nllx::cluster_wait();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = mine[threadIdx.x];
}

// Half of the blocks wait for the others, which do not come.
__global__ void cluster_deadlock_kernel() {
  if (nllx::cluster_rank() % 2 == 0) {
    nllx::cluster_arrive();
    nllx::cluster_wait();
  }
}
__global__ void wait_without_arrival_kernel() { nllx::cluster_wait(); }
__global__ void two_arrivals_kernel() {
  nllx::cluster_arrive();
  nllx::cluster_arrive();
}
__global__ void no_such_rank_kernel() {
  SHARED_ARRAY(int, value, 1);
  nllx::cluster_arrive();
  nllx::cluster_wait();
  *nllx::shared_of_rank(&value[0], 4) = 1;
}

// Threads that read and write numbers `stride` apart.
template <typename T>
__global__ void banks_kernel(int stride) {
  DYNAMIC_SHARED(memory);
  T* const mine = reinterpret_cast<T*>(memory) + static_cast<int>(threadIdx.x) * stride;
  nllx::write_shared(mine, T(0));
  nllx::read_shared(mine);
}

struct alignas(16) Quad {
  float values[4];
};
__global__ void misaligned_kernel(const float* in, float* out) {
  *reinterpret_cast<Quad*>(out + 4 * threadIdx.x) = *reinterpret_cast<const Quad*>(in + 4 * threadIdx.x);
}

__global__ void wild_kernel(float* out) { out[threadIdx.x == 7 ? int64_t{1} << 45 : 0] = 1; }

}  // namespace

// A float past the end of shared memory, through a pointer, whose bounds the compiler does not know.
__global__ void beyond_shared_kernel(float* out) {
  SHARED_ARRAY(float, shared, 64);
  const float* volatile from = shared;
  out[threadIdx.x] = from[threadIdx.x + 33];
}
__global__ void beyond_dynamic_shared_kernel(float* out) {
  DYNAMIC_SHARED(memory);
  out[threadIdx.x] = reinterpret_cast<const float*>(memory)[threadIdx.x + 33];
}

EXPORT int indices(unsigned* out) {
  CUDA_LAUNCH(indices_kernel, dim3(2, 3, 2), dim3(4, 3, 5), 0, nullptr, out);
  return cudaGetLastError();
}
EXPORT int shuffles(int width, int n, double* out) {
  CUDA_LAUNCH(shuffles_kernel, dim3(1), dim3(32), 0, nullptr, width, n, out);
  return cudaGetLastError();
}
EXPORT int votes(int limit, unsigned* out) {
  CUDA_LAUNCH(votes_kernel, dim3(1), dim3(64), 0, nullptr, limit, out);
  return cudaGetLastError();
}
EXPORT int halves(int* out) {
  CUDA_LAUNCH(halves_kernel, dim3(1), dim3(32), 0, nullptr, out);
  return cudaGetLastError();
}
EXPORT int atomics(int* out) {
  CUDA_LAUNCH(atomics_kernel, dim3(1), dim3(100), 0, nullptr, out);
  return cudaGetLastError();
}
EXPORT int neighbours(bool barrier_before, bool barrier_after, float* out) {
  CUDA_LAUNCH(neighbours_kernel, dim3(1), dim3(64), 0, nullptr, barrier_before, barrier_after, out);
  return cudaGetLastError();
}
EXPORT int banks(int bytes, int stride) {
  const auto shared = static_cast<size_t>(64 * stride * bytes);
  if (bytes == 8) {
    ALLOW_SHARED((banks_kernel<double>), static_cast<int>(shared), static_cast<int>(shared));
    CUDA_LAUNCH((banks_kernel<double>), dim3(1), dim3(64), shared, nullptr, stride);
  } else if (bytes == 4) {
    ALLOW_SHARED((banks_kernel<float>), static_cast<int>(shared), static_cast<int>(shared));
    CUDA_LAUNCH((banks_kernel<float>), dim3(1), dim3(64), shared, nullptr, stride);
  } else {
    ALLOW_SHARED((banks_kernel<uint16_t>), static_cast<int>(shared), static_cast<int>(shared));
    CUDA_LAUNCH((banks_kernel<uint16_t>), dim3(1), dim3(64), shared, nullptr, stride);
  }
  return cudaGetLastError();
}
EXPORT int clusters(int blocks, bool begin, bool end, bool dynamic, int* out) {
  ALLOW_SHARED(clusters_kernel, 256, 256);
  CUDA_LAUNCH_CLUSTERS(clusters_kernel, blocks, dim3(2 * static_cast<unsigned>(blocks)), dim3(64), 256, nullptr, begin,
                       end, dynamic, out);
  return cudaGetLastError();
}
EXPORT int cluster_deadlock() {
  CUDA_LAUNCH_CLUSTERS(cluster_deadlock_kernel, 4, dim3(4), dim3(48), 0, nullptr);
  return cudaGetLastError();
}
EXPORT int wait_without_arrival() {
  CUDA_LAUNCH_CLUSTERS(wait_without_arrival_kernel, 4, dim3(4), dim3(48), 0, nullptr);
  return cudaGetLastError();
}
EXPORT int two_arrivals() {
  CUDA_LAUNCH_CLUSTERS(two_arrivals_kernel, 4, dim3(4), dim3(48), 0, nullptr);
  return cudaGetLastError();
}
EXPORT int no_such_rank() {
  CUDA_LAUNCH_CLUSTERS(no_such_rank_kernel, 4, dim3(4), dim3(48), 0, nullptr);
  return cudaGetLastError();
}
EXPORT int parts_of_clusters() {
  CUDA_LAUNCH_CLUSTERS(cluster_deadlock_kernel, 4, dim3(6), dim3(48), 0, nullptr);
  return cudaGetLastError();
}
EXPORT int misaligned(const float* in, float* out) {
  CUDA_LAUNCH(misaligned_kernel, dim3(1), dim3(32), 0, nullptr, in, out);
  return cudaGetLastError();
}
EXPORT int wild(float* out) {
  CUDA_LAUNCH(wild_kernel, dim3(1), dim3(32), 0, nullptr, out);
  return cudaGetLastError();
}
EXPORT int beyond_shared(float* out) {
  CUDA_LAUNCH(beyond_shared_kernel, dim3(1), dim3(32), 0, nullptr, out);
  return cudaGetLastError();
}
EXPORT int beyond_dynamic_shared(float* out) {
  ALLOW_SHARED(beyond_dynamic_shared_kernel, 256, 256);
  CUDA_LAUNCH(beyond_dynamic_shared_kernel, dim3(1), dim3(32), 64 * sizeof(float), nullptr, out);
  return cudaGetLastError();
}
// What is allowed is that of another kernel.
EXPORT int shared_of_another_kernel(float* out) {
  ALLOW_SHARED(beyond_shared_kernel, 256, 256);
  CUDA_LAUNCH(beyond_dynamic_shared_kernel, dim3(1), dim3(32), 256, nullptr, out);
  return cudaGetLastError();
}
EXPORT int more_shared_than_ever() {
  ALLOW_SHARED(deadlock_kernel, 256, 128);
  CUDA_LAUNCH(deadlock_kernel, dim3(1), dim3(64), 256, nullptr);
  return cudaGetLastError();
}
EXPORT int deadlock() {
  CUDA_LAUNCH(deadlock_kernel, dim3(1), dim3(64), 0, nullptr);
  return cudaGetLastError();
}
EXPORT int not_in_mask() {
  CUDA_LAUNCH(not_in_mask_kernel, dim3(1), dim3(32), 0, nullptr);
  return cudaGetLastError();
}
EXPORT int source_not_in_mask() {
  CUDA_LAUNCH(source_not_in_mask_kernel, dim3(1), dim3(32), 0, nullptr);
  return cudaGetLastError();
}
EXPORT int mixed_collectives() {
  CUDA_LAUNCH(mixed_collectives_kernel, dim3(1), dim3(32), 0, nullptr);
  return cudaGetLastError();
}
EXPORT int too_many_threads(float* out) {
  CUDA_LAUNCH(wild_kernel, dim3(1), dim3(1025), 0, nullptr, out);
  return cudaGetLastError();
}
