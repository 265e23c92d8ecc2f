// The mathematics of the loss, once for every kernel, host and device.
//
// A row of logits x has maximum m, sum s = Σ exp(x_c - m) and log-sum-exp lse = m + log s. Two parts of a row merge as
//   m = max(m1, m2),  s = s1 exp(m1 - m) + s2 exp(m2 - m)
// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
//
// Index and probability targets are one formula. A class c has the coefficient
//   a_c = w_c ((1 - ε) p_c + ε / C)           and the row has   A = Σ a_c
//   loss      = -Σ a_c (x_c - lse) = A log s - Σ a_c (x_c - m)
//   gradient  = k (A exp(x_c - lse) - a_c)    with k the incoming gradient, divided by the divisor of a mean
// where an index target y is p_c = [c = y], except that its first term takes the weight w_y alone, as torch does (w_c =
// w_y there, so it is the same number).
#pragma once

#include <cstdint>

#include "problem.h"

#if defined(__CUDACC__)
#define NLLX_HOST_DEVICE __host__ __device__ __forceinline__
#else
#include <math.h>
#define NLLX_HOST_DEVICE static inline __attribute__((always_inline))
#endif

namespace nllx {

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
// What the backward needs of a row beside its logits. The log-sum-exp is kept as its two parts, since their sum would
// lose the smaller one: in float32 a row with lse = 1000 would know x - lse to 6e-5 only, and a row of the lowest
// finite number, a common mask, would have a softmax of 1 instead of 1 / C.
template <typename acc>
struct RowStats {
  acc max, log_sum;
};

NLLX_HOST_DEVICE bool is_minus_infinity(float x) { return x == -__builtin_inff(); }
NLLX_HOST_DEVICE bool is_minus_infinity(double x) { return x == -__builtin_inf(); }

// A row of -inf only has no finite maximum; subtracting zero instead keeps -inf - m from becoming NaN, so that a tile
// of masked classes beside finite ones counts as zero, and a row of nothing else ends as log(0) = -inf.
template <typename acc>
NLLX_HOST_DEVICE acc finite_max(acc max) {
  return is_minus_infinity(max) ? acc(0) : max;
}

// a * value where 0 * (-inf) is 0: a class that does not count may be masked. NaN stays NaN.
template <typename acc>
NLLX_HOST_DEVICE acc weighted(acc a, acc value) {
  return a == acc(0) && is_minus_infinity(value) ? acc(0) : a * value;
}

// Whether an index names a class, as 64-bit numbers: 2^32 + 1 is not class 1.
NLLX_HOST_DEVICE bool is_class(int64_t index, int64_t classes) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(classes);
}

// The divisor of the mean for index targets.
NLLX_HOST_DEVICE double index_divisor(const Targets& targets, double weight) {
  return weight == 0. ? targets.zero_divisor : weight;
}

// An index as a 64-bit number. Of uint64 what that cannot hold is the largest one, which names no class either: its
// bits might be those of a negative ignore_index.
template <typename Index>
NLLX_HOST_DEVICE int64_t as_index(Index y) {
  if (sizeof(Index) == 8 && Index(-1) > Index(0) && static_cast<int64_t>(y) < 0) return INT64_MAX;
  return static_cast<int64_t>(y);
}

NLLX_HOST_DEVICE int64_t load_index(const void* index, IndexType type, int64_t row) {
  switch (type) {
    case IndexType::kInt64:
      return static_cast<const int64_t*>(index)[row];
    case IndexType::kInt32:
      return static_cast<const int32_t*>(index)[row];
    case IndexType::kInt16:
      return static_cast<const int16_t*>(index)[row];
    case IndexType::kInt8:
      return static_cast<const int8_t*>(index)[row];
    case IndexType::kUInt16:
      return static_cast<const uint16_t*>(index)[row];
    case IndexType::kUInt32:
      return static_cast<const uint32_t*>(index)[row];
    case IndexType::kUInt64:
      return as_index(static_cast<const uint64_t*>(index)[row]);
    default:
      return static_cast<const uint8_t*>(index)[row];
  }
}

}  // namespace nllx
