// The things that differ between nvcc and the build that runs the kernels on the CPU (tests/cuda_on_cpu).
#pragma once

#ifdef __CUDACC__
#define CUDA_LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
#define SHARED_ARRAY(T, name, n) __shared__ T name[n]
// The dynamic shared memory of the launch, 16-byte aligned.
#define DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
// Shared memory beyond 48 KiB has to be asked for.
#define ALLOW_SHARED(kernel, bytes) \
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))

namespace nllx {
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
