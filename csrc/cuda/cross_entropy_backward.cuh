// The gradient of the logits: k (A exp((x - m) - log_sum) - a_c), in one read of the logits and one write.
#pragma once

#include "targets.cuh"

namespace nllx {

// What the gradient of a row needs, the same for all its classes.
template <typename T>
struct RowGradient {
  using acc = typename AccOf<T>::type;
  ClassTerms<T> terms;
  bool has_terms, counts;
  int64_t target;  // -1 for probabilities
  acc target_term, k, ka;
  RowStats<acc> stats;

  __device__ __forceinline__ RowGradient(const CrossEntropyBackward& p, int64_t row, int64_t outer, int64_t inner,
                                         const void* mass, bool reports, BadTarget* bad)
      : terms(p.targets, p.extent.classes, outer, inner),
        has_terms(nllx::has_terms(p.targets)),
        counts(true),
        target(-1),
        target_term(0) {
    acc a;
    if (p.targets.index) {
      const IndexTarget<acc> y = index_target<acc>(p.targets, p.extent.classes, row);
      if (y.bad && reports) report_bad_target(bad, row, y.index, p.extent.classes, p.targets.ignore_index);
      counts = y.counts;
      target = y.index;
      target_term = terms.scale * y.weight;
      a = target_term;
      if (has_terms) a += terms.uniform_mass(p.targets, p.extent.classes);
    } else {
      a = static_cast<const acc*>(mass)[row];
    }
    k = incoming_gradient<acc>(p.grad_output, p.grad_output_stride, p.total_weight, row);
    ka = k * a;
    stats = static_cast<const RowStats<acc>*>(p.row_stats)[row];
  }

  __device__ __forceinline__ acc operator()(acc x, int64_t c) const {
    if (!counts) return acc(0);
    acc g = ka * exp_acc((x - stats.max) - stats.log_sum);
    acc a = has_terms ? terms(c) : acc(0);
    if (c == target) a += target_term;
    return a == acc(0) ? g : g - k * a;  // k may be infinite where the divisor of the mean is zero
  }
};

// Unit of work: a row by `threads_per_row` threads. 16-byte reads, and 16-byte writes where gradient and logits are
// equally aligned. Precondition: class stride 1. Plan: cuda_plan_streaming, CudaFamily::kBlockRows.
template <typename T>
__global__ void __launch_bounds__(256, 1)
    cross_entropy_backward_rows_kernel(CrossEntropyBackward p, int threads_per_row, const void* mass, BadTarget* bad) {
  const int t = threadIdx.x % threads_per_row;
  const int64_t rows_per_block = blockDim.x / threads_per_row, rows = p.extent.rows();
  for (int64_t row = blockIdx.x * rows_per_block + threadIdx.x / threads_per_row; row < rows;
       row += gridDim.x * rows_per_block) {
    const int64_t outer = row / p.extent.inner, inner = row - outer * p.extent.inner;
    const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner * p.logits_strides.inner;
    T* grad = static_cast<T*>(p.grad_logits) + outer * p.grad_strides.outer + inner * p.grad_strides.inner;
    const RowGradient<T> gradient(p, row, outer, inner, mass, t == 0, bad);
    const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == reinterpret_cast<uintptr_t>(grad) % 16;
    for_classes(
        x, p.extent.classes, t, threads_per_row, [&](int64_t c) { grad[c] = from_acc<T>(gradient(to_acc(x[c]), c)); },
        [&](int64_t c, const Vector<T>& v) {
          Vector<T> g;
#pragma unroll
          for (int i = 0; i < Vector<T>::kSize; ++i) g.values[i] = from_acc<T>(gradient(to_acc(v.values[i]), c + i));
          if (aligned) {
            *reinterpret_cast<Vector<T>*>(grad + c) = g;
          } else {
#pragma unroll
            for (int i = 0; i < Vector<T>::kSize; ++i) grad[c + i] = g.values[i];
          }
        });
  }
}

// Unit of work: a tile of blockDim neighbouring rows of one plane, a thread each. Precondition: inner stride 1.
// Plan: CudaFamily::kPlanes.
template <typename T>
__global__ void __launch_bounds__(256, 1)
    cross_entropy_backward_planes_kernel(CrossEntropyBackward p, const void* mass, BadTarget* bad) {
  const int64_t tiles = (p.extent.inner + blockDim.x - 1) / blockDim.x;
  for (int64_t tile = blockIdx.x; tile < p.extent.outer * tiles; tile += gridDim.x) {
    const int64_t outer = tile / tiles, inner = (tile - outer * tiles) * blockDim.x + threadIdx.x;
    if (inner >= p.extent.inner) continue;
    const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner;
    T* grad = static_cast<T*>(p.grad_logits) + outer * p.grad_strides.outer + inner;
    const RowGradient<T> gradient(p, outer * p.extent.inner + inner, outer, inner, mass, true, bad);
#pragma unroll 4
    for (int64_t c = 0; c < p.extent.classes; ++c) {
      grad[c * p.grad_strides.classes] = from_acc<T>(gradient(to_acc(x[c * p.logits_strides.classes]), c));
    }
  }
}

// A of each row, for probability targets, which need not sum to one. Units of work as above; `threads_per_row` up to
// 32, or the whole block.
template <typename T>
__global__ void __launch_bounds__(512, 1)
    probability_mass_rows_kernel(Extent extent, Targets targets, int threads_per_row, void* mass) {
  using acc = typename AccOf<T>::type;
  SHARED_ARRAY(acc, scratch, 32);
  const int t = threadIdx.x % threads_per_row;
  const int64_t rows_per_block = blockDim.x / threads_per_row, rows = extent.rows();
  for (int64_t first = blockIdx.x * rows_per_block; first < rows; first += gridDim.x * rows_per_block) {
    const int64_t row = first + threadIdx.x / threads_per_row;
    acc sum = 0;
    if (row < rows) {
      const int64_t outer = row / extent.inner;
      const ClassTerms<T> terms(targets, extent.classes, outer, row - outer * extent.inner);
      for (int64_t c = t; c < extent.classes; c += threads_per_row) sum += terms(c);
    }
    sum = threads_per_row <= 32 ? sum_in_warp(sum, threads_per_row) : sum_in_block(sum, scratch);
    if (row < rows && t == 0) static_cast<acc*>(mass)[row] = sum;
  }
}
template <typename T>
__global__ void __launch_bounds__(256, 1) probability_mass_planes_kernel(Extent extent, Targets targets, void* mass) {
  using acc = typename AccOf<T>::type;
  const int64_t tiles = (extent.inner + blockDim.x - 1) / blockDim.x;
  for (int64_t tile = blockIdx.x; tile < extent.outer * tiles; tile += gridDim.x) {
    const int64_t outer = tile / tiles, inner = (tile - outer * tiles) * blockDim.x + threadIdx.x;
    if (inner >= extent.inner) continue;
    const ClassTerms<T> terms(targets, extent.classes, outer, inner);
    acc sum = 0;
    for (int64_t start = 0; start < extent.classes; start += 64) {  // in blocks: fewer additions to a large sum
      acc block = 0;
      for (int64_t c = start; c < extent.classes && c < start + 64; ++c) block += terms(c);
      sum += block;
    }
    static_cast<acc*>(mass)[outer * extent.inner + inner] = sum;
  }
}

}  // namespace nllx
