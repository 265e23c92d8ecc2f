// Loss and statistics of each row, in one read of the logits.
#pragma once

#include "targets.cuh"

namespace nllx {

// Writes what one thread knows of a whole row.
template <typename T>
__device__ __forceinline__ void finish_row(const CrossEntropyForward& p, int64_t row,
                                           const RowState<typename AccOf<T>::type>& s,
                                           const IndexTarget<typename AccOf<T>::type>& y, const T* x, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  const bool index = p.targets.index != nullptr;
  RowStats<acc> stats{0, 0};
  acc loss = 0;
  if (!index || y.counts) {
    stats = s.stats();
    const acc scale = static_cast<acc>(1. - p.targets.label_smoothing);
    const acc target_logit = index ? to_acc(x[y.index * p.logits_strides.classes]) : acc(0);
    loss = row_loss_of(s, stats, has_terms(p.targets), index, scale * y.weight, target_logit);
  } else if (y.bad) {
    report_bad_target(bad, row, y.index, p.extent.classes, p.targets.ignore_index);
    minus_infinity(loss);
    loss -= loss;  // NaN
  }
  store_row_loss<T>(p.row_loss, p.row_loss_is_acc, row, loss);
  static_cast<RowStats<acc>*>(p.row_stats)[row] = stats;
}

template <typename T>
__device__ __forceinline__ IndexTarget<typename AccOf<T>::type> row_target(const CrossEntropyForward& p, int64_t row) {
  using acc = typename AccOf<T>::type;
  return p.targets.index ? index_target<acc>(p.targets, p.extent.classes, row)
                         : IndexTarget<acc>{0, true, false, acc(1)};
}

// Unit of work: a row by `threads_per_row` threads of a warp, kValues logits each, strided so that neighbouring threads
// read neighbouring logits. Reads each logit once and keeps it in a register, so the maximum is known before the sum.
// Preconditions: classes ≤ threads_per_row * kValues, class stride 1. Plan: CudaFamily::kRegisterRows.
template <typename T, int kValues>
__global__ void __launch_bounds__(128, 1)
    cross_entropy_forward_register_rows_kernel(CrossEntropyForward p, int threads_per_row, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  const int lane = threadIdx.x % threads_per_row;
  const int64_t rows_per_block = blockDim.x / threads_per_row, rows = p.extent.rows(), classes = p.extent.classes;
  const bool terms = has_terms(p.targets);
  // Every thread stays in the loop until the block's rows are done: the shuffles need whole warps.
  for (int64_t first = blockIdx.x * rows_per_block; first < rows; first += gridDim.x * rows_per_block) {
    const int64_t row = first + threadIdx.x / threads_per_row;
    const bool exists = row < rows;
    const int64_t outer = exists ? row / p.extent.inner : 0, inner = exists ? row - outer * p.extent.inner : 0;
    const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner * p.logits_strides.inner;
    const IndexTarget<acc> y = exists ? row_target<T>(p, row) : IndexTarget<acc>{0, false, false, acc(0)};
    RowState<acc> s = RowState<acc>::empty();
    if (y.counts) {
      acc values[kValues];
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        const int64_t c = lane + j * threads_per_row;
        if (c < classes) {
          values[j] = to_acc(x[c]);
          s.raise_max(values[j]);
        }
      }
      if (terms) {
        const ClassTerms<T> a(p.targets, classes, outer, inner);
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
          const int64_t c = lane + j * threads_per_row;
          if (c < classes) s.template add_below_max<true>(values[j], a(c));
        }
      } else {
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
          if (lane + j * threads_per_row < classes) s.template add_below_max<false>(values[j], acc(0));
        }
      }
    }
    merge_in_warp(s, threads_per_row);
    if (exists && lane == 0) finish_row<T>(p, row, s, y, x, bad);
  }
}

template <typename T, bool kTerms>
__device__ __forceinline__ RowState<typename AccOf<T>::type> state_of_row(const T* x, int64_t classes,
                                                                          const ClassTerms<T>& a, int t, int threads) {
  using acc = typename AccOf<T>::type;
  RowState<acc> s = RowState<acc>::empty();
  for_classes(
      x, classes, t, threads, [&](int64_t c) { s.template add<kTerms>(to_acc(x[c]), kTerms ? a(c) : acc(0)); },
      [&](int64_t c, const Vector<T>& v) {
        acc m = to_acc(v.values[0]);
#pragma unroll
        for (int i = 1; i < Vector<T>::kSize; ++i) {
          const acc value = to_acc(v.values[i]);
          m = value > m || m != m ? value : m;
        }
        s.raise_max(m);
#pragma unroll
        for (int i = 0; i < Vector<T>::kSize; ++i)
          s.template add_below_max<kTerms>(to_acc(v.values[i]), kTerms ? a(c + i) : acc(0));
      });
  return s;
}

// Unit of work: a row by a block. Reads each logit once, 16 bytes at a time. Precondition: class stride 1.
// Plan: CudaFamily::kBlockRows.
template <typename T>
__global__ void __launch_bounds__(512, 1)
    cross_entropy_forward_block_rows_kernel(CrossEntropyForward p, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  SHARED_ARRAY(RowState<acc>, scratch, 32);
  const int64_t rows = p.extent.rows(), classes = p.extent.classes;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t outer = row / p.extent.inner, inner = row - outer * p.extent.inner;
    const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner * p.logits_strides.inner;
    const IndexTarget<acc> y = row_target<T>(p, row);
    RowState<acc> s = RowState<acc>::empty();
    if (y.counts) {  // the same for all threads of the block
      const ClassTerms<T> a(p.targets, classes, outer, inner);
      s = has_terms(p.targets) ? state_of_row<T, true>(x, classes, a, threadIdx.x, blockDim.x)
                               : state_of_row<T, false>(x, classes, a, threadIdx.x, blockDim.x);
      merge_in_block(s, scratch);
    }
    if (threadIdx.x == 0) finish_row<T>(p, row, s, y, x, bad);
  }
}

template <typename T, bool kTerms>
__device__ __forceinline__ RowState<typename AccOf<T>::type> state_of_column(const T* x, int64_t stride,
                                                                             int64_t classes, const ClassTerms<T>& a) {
  using acc = typename AccOf<T>::type;
  constexpr int kAtOnce = 8;      // loads in flight
  constexpr int64_t kBlock = 64;  // classes that are added in acc one after another; blocks are merged
  RowState<acc> s = RowState<acc>::empty();
  for (int64_t start = 0; start < classes; start += kBlock) {
    const int64_t end = classes - start < kBlock ? classes : start + kBlock;
    RowState<acc> block = RowState<acc>::empty();
    int64_t c = start;
    for (; c + kAtOnce <= end; c += kAtOnce) {
      acc values[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) values[j] = to_acc(x[(c + j) * stride]);
      acc m = values[0];
#pragma unroll
      for (int j = 1; j < kAtOnce; ++j) m = values[j] > m || m != m ? values[j] : m;
      block.raise_max(m);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) block.template add_below_max<kTerms>(values[j], kTerms ? a(c + j) : acc(0));
    }
    for (; c < end; ++c) block.template add<kTerms>(to_acc(x[c * stride]), kTerms ? a(c) : acc(0));
    s.merge(block);
  }
  return s;
}

// Unit of work: a tile of blockDim neighbouring rows of one plane, a thread each. Reads each logit once, neighbouring
// threads at neighbouring addresses. Precondition: inner stride 1. Plan: CudaFamily::kPlanes.
template <typename T>
__global__ void __launch_bounds__(256, 1) cross_entropy_forward_planes_kernel(CrossEntropyForward p, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  const int64_t tiles = (p.extent.inner + blockDim.x - 1) / blockDim.x;
  for (int64_t tile = blockIdx.x; tile < p.extent.outer * tiles; tile += gridDim.x) {
    const int64_t outer = tile / tiles, inner = (tile - outer * tiles) * blockDim.x + threadIdx.x;
    if (inner >= p.extent.inner) continue;
    const int64_t row = outer * p.extent.inner + inner;
    const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner;
    const IndexTarget<acc> y = row_target<T>(p, row);
    RowState<acc> s = RowState<acc>::empty();
    if (y.counts) {
      const ClassTerms<T> a(p.targets, p.extent.classes, outer, inner);
      s = has_terms(p.targets) ? state_of_column<T, true>(x, p.logits_strides.classes, p.extent.classes, a)
                               : state_of_column<T, false>(x, p.logits_strides.classes, p.extent.classes, a);
      // Equal coefficients, added one after another, would be rounded in one direction; their sum is known.
      if (p.targets.index && has_terms(p.targets)) s.mass = a.uniform_mass(p.targets, p.extent.classes);
    }
    finish_row<T>(p, row, s, y, x, bad);
  }
}

}  // namespace nllx
