// The two things that differ between nvcc and the build that runs the kernels on the CPU (tests/cuda_on_cpu).
#pragma once

#ifdef __CUDACC__
#define CUDA_LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
#define SHARED_ARRAY(T, name, n) __shared__ T name[n]
#endif
