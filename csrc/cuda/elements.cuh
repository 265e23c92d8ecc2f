// Element types and 16-byte access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../online_softmax.h"
#include "cuda_launch.h"
#include "kernels.h"

namespace nllx {

__device__ __forceinline__ float to_acc(float v) { return v; }
__device__ __forceinline__ double to_acc(double v) { return v; }
__device__ __forceinline__ float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_acc(__half v) { return __half2float(v); }

template <typename T>
struct FromAcc {
  static __device__ __forceinline__ T convert(T v) { return v; }
};
template <>
struct FromAcc<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 convert(float v) { return __float2bfloat16(v); }
};
template <>
struct FromAcc<__half> {
  static __device__ __forceinline__ __half convert(float v) { return __float2half(v); }
};
template <typename T, typename acc>
__device__ __forceinline__ T from_acc(acc v) {
  return FromAcc<T>::convert(v);
}

// 16 bytes of elements. Declared so that one load or store instruction moves them.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  T values[kSize];
};

// Elements from `p` on up to the first that is 16-byte aligned.
template <typename T>
__device__ __forceinline__ int64_t elements_to_alignment(const T* p, int64_t n) {
  const int64_t head = static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(T));
  return head < n ? head : n;
}

// Calls one(c) or many(c, vector) for the classes of a row that thread `t` of `threads` takes: single ones up to the
// first aligned address and after the last whole vector, vectors between, so that a row of any alignment is read in 16
// bytes.
template <typename T, typename One, typename Many>
__device__ __forceinline__ void for_classes(const T* row, int64_t classes, int t, int threads, One one, Many many) {
  constexpr int kSize = Vector<T>::kSize;
  const int64_t head = elements_to_alignment(row, classes);
  const int64_t body = (classes - head) / kSize, tail = head + body * kSize;
  for (int64_t c = t; c < head; c += threads) one(c);
  for (int64_t v = t; v < body; v += threads) {
    const int64_t c = head + v * kSize;
    many(c, *reinterpret_cast<const Vector<T>*>(row + c));
  }
  for (int64_t c = tail + t; c < classes; c += threads) one(c);
}

}  // namespace nllx
