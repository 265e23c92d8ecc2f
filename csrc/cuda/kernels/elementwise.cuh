// What losses of one element at a time share: elements in acc, whatever their strides and type are.
#pragma once

#include "elements.cuh"

namespace nllx {

constexpr int kElementwiseThreads = 256;

// How a thread takes elements. kVectors: every tensor's are adjacent and begin at a 16-byte boundary, and a thread
// takes those of a vector of T; else one by one, which neighbouring threads find in neighbouring places, or near.
// kTogether: so many times, so far apart that the block's threads lie between, with all loads before the arithmetic.
template <typename T, bool kVectors>
struct ElementwiseStep {
  static constexpr int kSize = kVectors ? Vector<T>::kSize : 1, kTogether = kVectors ? 2 : 4;
  static constexpr int kApart = kElementwiseThreads * kSize;
  static constexpr int kElements = kTogether * kApart;  // of a block
};

template <typename Index>
__device__ __forceinline__ int64_t element_offset(const Elements& e, const ElementStrides& strides, Index i) {
  int64_t offset = 0;
#pragma unroll 1
  for (int d = 0; d + 1 < e.dims; ++d) {
    const Index size = static_cast<Index>(e.sizes[d]), next = i / size;
    offset += static_cast<int64_t>(i - next * size) * strides.of[d];
    i = next;
  }
  return offset + static_cast<int64_t>(i) * strides.of[e.dims - 1];
}
// Of element i. Divisions of 32 bits where they do: those of 64 take some fifty instructions.
__device__ __forceinline__ int64_t element_offset(const Elements& e, const ElementStrides& strides, int64_t i) {
  if (strides.adjacent) return i;
  return e.count <= UINT32_MAX ? element_offset<uint32_t>(e, strides, static_cast<uint32_t>(i))
                               : element_offset<uint64_t>(e, strides, static_cast<uint64_t>(i));
}

// The elements from number i on, of type From; 0 beyond the last.
template <typename From, bool kVectors, typename acc, int kSize>
__device__ __forceinline__ void load_elements(const Elements& e, const void* data, const ElementStrides& strides,
                                              int64_t i, acc (&to)[kSize]) {
  const From* from = static_cast<const From*>(data);
  if (kVectors && i + kSize <= e.count) {
    constexpr int kWidth = kSize < Vector<From>::kSize ? kSize : Vector<From>::kSize;
#pragma unroll
    for (int v = 0; v < kSize; v += kWidth) {
      const Vector<From> vector = Vector<From>::load(from + i + v);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) to[v + j] = vector[j];
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kSize; ++j)
    to[j] = i + j < e.count ? to_acc(from[kVectors ? i + j : element_offset(e, strides, i + j)]) : acc(0);
}
// Of type acc or T.
template <typename T, bool kVectors, typename acc, int kSize>
__device__ __forceinline__ void load_elements(const Elements& e, const void* data, bool is_acc,
                                              const ElementStrides& strides, int64_t i, acc (&to)[kSize]) {
  if (is_acc || std::is_same_v<T, acc>) {
    load_elements<acc, kVectors>(e, data, strides, i, to);
  } else {
    load_elements<T, kVectors>(e, data, strides, i, to);
  }
}

// The reverse, rounded to To.
template <typename To, bool kVectors, typename acc, int kSize>
__device__ __forceinline__ void store_elements(const Elements& e, void* data, const ElementStrides& strides, int64_t i,
                                               const acc (&from)[kSize]) {
  To* to = static_cast<To*>(data);
  if (kVectors && i + kSize <= e.count) {
    constexpr int kWidth = kSize < Vector<To>::kSize ? kSize : Vector<To>::kSize;
#pragma unroll
    for (int v = 0; v < kSize; v += kWidth) {
      Vector<To>::of([&](int j) { return from[v + (j < kWidth ? j : 0)]; }).store(to + i + v);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    if (i + j < e.count) to[kVectors ? i + j : element_offset(e, strides, i + j)] = from_acc<To>(from[j]);
  }
}

// As a tree, in acc: one number of many that are added in double, which most GPUs do at a fraction of the speed.
template <typename acc, int kSize>
__device__ __forceinline__ acc sum_of(const acc (&values)[kSize]) {
  acc sums[kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) sums[j] = values[j];
#pragma unroll
  for (int half = kSize / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

}  // namespace nllx
