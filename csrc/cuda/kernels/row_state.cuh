// The part of a row that a thread has seen, and the merging of parts in a warp and in a block.
#pragma once

#include "elements.cuh"

namespace nllx {

__device__ __forceinline__ float exp_acc(float x) { return expf(x); }
__device__ __forceinline__ double exp_acc(double x) { return exp(x); }
__device__ __forceinline__ float log_acc(float x) { return logf(x); }
__device__ __forceinline__ double log_acc(double x) { return log(x); }
__device__ __forceinline__ void minus_infinity(float& x) { x = -__builtin_inff(); }
__device__ __forceinline__ void minus_infinity(double& x) { x = -__builtin_inf(); }

template <typename acc>
struct RowState {
  acc max, sum, dot, mass;  // m, Σ exp(x - m), Σ a (x - m), Σ a

  static __device__ __forceinline__ RowState empty() {
    RowState s{0, 0, 0, 0};
    minus_infinity(s.max);
    return s;
  }

  // Takes `m` as the maximum if it is larger. A NaN is not: it shows in the sum.
  __device__ __forceinline__ void raise_max(acc m) {
    if (!(m > max)) return;
    if (!is_minus_infinity(max)) {
      sum *= exp_acc(max - m);
      dot += mass * (max - m);
    }
    max = m;
  }

  // x ≤ max.
  template <bool kTerms>
  __device__ __forceinline__ void add_below_max(acc x, acc a) {
    const acc shifted = x - finite_max(max);
    sum += exp_of_many(shifted);
    if (kTerms) {
      dot += weighted(a, shifted);
      mass += a;
    }
  }

  __device__ __forceinline__ void merge(RowState other) {
    raise_max(other.max);
    other.raise_max(max);
    sum += other.sum;
    dot += other.dot;
    mass += other.mass;
  }

  __device__ __forceinline__ RowStats<acc> stats() const { return {finite_max(max), log_acc(sum)}; }
};

// exp(x - m) of many x ≤ m, for one m that is not -inf, in units of the row's own: normalized() takes their sum to that
// of exp(x - m), and factor() a sum to the units of a larger m.
template <typename T>
struct Exponentials {
  using acc = typename AccOf<T>::type;
  acc m;
  explicit __device__ __forceinline__ Exponentials(acc m) : m(m) {}
  __device__ __forceinline__ acc operator()(acc x) const { return exp_of_many(x - m); }
  __device__ __forceinline__ acc factor(const Exponentials& next) const { return exp_acc(m - next.m); }
  __device__ __forceinline__ acc normalized(acc sum, acc) const { return sum; }
};

// Of half-precision numbers in one multiplication and addition instead of two operations, since their kernels are bound
// by instructions: 2^(x log2(e) - M) with M = m log2(e) rounded to an integer, so that nothing is lost of it. The sum
// divided by the term of x = m itself is that of exp(x - m), and exactly one where nothing else counts. From |m| = 2^21
// on float has no room for a fraction of M, but a bfloat16 next to m is 2^13 away: every other number counts as zero
// whatever the scale, and x - m, exact, is the exponent.
struct HalfExponentials {
  float scale, offset;
  explicit __device__ __forceinline__ HalfExponentials(float m) {
    const bool fits = fabsf(m) < 2097152.f;
    scale = fits ? 1.44269504f : 1.f;
    offset = fits ? -rintf(m * 1.44269504f) : -m;
  }
  __device__ __forceinline__ float operator()(float x) const { return exp2_approximate(fmaf(x, scale, offset)); }
  __device__ __forceinline__ float factor(const HalfExponentials& next) const {
    return scale != 1.f && next.scale != 1.f ? exp2_approximate(next.offset - offset) : 0.f;
  }
  __device__ __forceinline__ float normalized(float sum, float m) const { return sum / (*this)(m); }
};
template <>
struct Exponentials<__nv_bfloat16> : HalfExponentials {
  using HalfExponentials::HalfExponentials;
};
template <>
struct Exponentials<__half> : HalfExponentials {
  using HalfExponentials::HalfExponentials;
};

// Over each aligned group of `width` lanes. From Hopper on a shuffle that goes unused takes two instructions, a turn of
// the loop nine; before, with a check whether the warp is together, six and eight. Of float64, whose rows take all
// registers, the loop.
template <typename acc, typename Merge>
__device__ __forceinline__ acc merge_lanes(acc v, int width, Merge merge) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  constexpr bool kLoop = true;
#else
  constexpr bool kLoop = sizeof(acc) == 8;
#endif
  if constexpr (kLoop) {
    for (int offset = width / 2; offset > 0; offset /= 2) v = merge(v, __shfl_xor_sync(0xffffffffu, v, offset));
  } else {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const acc other = __shfl_xor_sync(0xffffffffu, v, offset);
      if (offset < width) v = merge(v, other);
    }
  }
  return v;
}

template <typename acc>
__device__ __forceinline__ acc max_in_warp(acc v, int width) {
  return merge_lanes(v, width, [](acc a, acc b) { return larger(a, b); });
}

template <typename acc>
__device__ __forceinline__ acc sum_in_warp(acc v, int width) {
  return merge_lanes(v, width, [](acc a, acc b) { return a + b; });
}

// All lanes of each aligned group of `width` (a power of two) lanes end with the state of the group. Every lane of the
// warp takes part. The maximum comes first: then each lane rescales once, and not at each step.
template <typename acc>
__device__ __forceinline__ void merge_in_warp(RowState<acc>& s, int width) {
  s.raise_max(max_in_warp(s.max, width));
  s.sum = sum_in_warp(s.sum, width);
  s.dot = sum_in_warp(s.dot, width);
  s.mass = sum_in_warp(s.mass, width);
}

// The state of `n` parts, merged in their order.
template <typename acc>
__device__ __forceinline__ RowState<acc> merge_parts(const RowState<acc>* parts, int n) {
  acc m = parts[0].max;
  for (int i = 1; i < n; ++i) m = larger(m, parts[i].max);
  RowState<acc> s{m, 0, 0, 0};
#pragma unroll 4
  for (int i = 0; i < n; ++i) {
    RowState<acc> part = parts[i];
    part.raise_max(m);
    s.sum += part.sum;
    s.dot += part.dot;
    s.mass += part.mass;
  }
  return s;
}

// All threads of the block end with the state of the block, in the same order of merging everywhere. `scratch` is
// shared memory for 32 states.
template <typename acc>
__device__ __forceinline__ void merge_in_block(RowState<acc>& s, RowState<acc>* scratch) {
  merge_in_warp(s, 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
  __syncthreads();  // the scratch may still be read for the row before
  if (lane == 0) scratch[warp] = s;
  __syncthreads();  // the states of all warps are there
  s = merge_parts(scratch, warps);
}

// The blocks of a cluster, each with a part of the same row; a block that is in none is a cluster by itself.
template <typename Part>
class ClusterParts {
 public:
  const int rank, blocks;

  // `slots`: shared memory of the block for 2 * kMostClusterBlocks.
  explicit __device__ __forceinline__ ClusterParts(Part* slots)
      : rank(cluster_rank()), blocks(cluster_blocks()), slots_(slots) {
    if (blocks > 1) cluster_arrive();
  }

  // The parts of all blocks of the cluster in their order, for all threads of all of them; `mine` is known to each
  // thread of the block. Only where blocks > 1, and for every row by all blocks of the cluster.
  __device__ __forceinline__ const Part* exchange(const Part& mine) {
    if (!begun_) {
      cluster_wait();  // the others have begun, and their shared memory may be written
      begun_ = true;
    }
    Part* const slots = slots_ + turn_ * kMostClusterBlocks;
    const int to = static_cast<int>(threadIdx.x);
    if (to < blocks) *shared_of_rank(slots + rank, to) = mine;
    // The slots of the row after the next are written when all threads have arrived here for the next one, and so have
    // read those of this row: one barrier for a row. After the last one nothing of another block is accessed.
    cluster_arrive();
    cluster_wait();  // all parts are there
    turn_ ^= 1;
    return slots;
  }

 private:
  Part* slots_;
  int turn_ = 0;
  bool begun_ = false;
};

template <typename acc>
__device__ __forceinline__ acc sum_in_block(acc v, acc* scratch) {
  v = sum_in_warp(v, 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
  __syncthreads();  // the scratch may still be read for the sum before
  if (lane == 0) scratch[warp] = v;
  __syncthreads();  // the sums of all warps are there
  v = scratch[0];
  for (int w = 1; w < warps; ++w) v += scratch[w];
  return v;
}

}  // namespace nllx
