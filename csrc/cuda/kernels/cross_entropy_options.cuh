// Cross entropy of rows with options (RowOptions): a family of its own, so that the kernels without them stay as they
// are. A row by threads that divide a warp or are the block, a row of a plane by one thread; the losses of the rows and
// their weights in the mean are added by others.
#pragma once

#include "row_gradient.cuh"
#include "row_options.cuh"

namespace nllx {

template <typename acc>
__device__ __forceinline__ IndexTarget<acc> target_of_row(const Targets& t, int64_t classes, int64_t row, bool reports,
                                                          BadTarget* bad) {
  if (!t.index) return {0, true, false, acc(1)};
  const IndexTarget<acc> y = index_target<acc>(t, classes, row);
  if (y.bad && reports) report_bad_target(bad, row, y.index, classes, t.ignore_index);
  return y;
}

template <typename acc>
__device__ __forceinline__ acc sample_weight_of(const KernelOptions<acc>& o, int64_t row) {
  return o.sample_weight ? o.sample_weight[row] : acc(1);
}

// What the state of a row says, for the row's thread to write.
template <typename T>
__device__ __forceinline__ void store_row(const CrossEntropyForward& p, const KernelOptions<typename AccOf<T>::type>& o,
                                          void* row_weight, int64_t row, const IndexTarget<typename AccOf<T>::type>& y,
                                          const RowState<typename AccOf<T>::type>& s, bool terms,
                                          typename AccOf<T>::type target_logit) {
  using acc = typename AccOf<T>::type;
  RowStats<acc> stats{0, 0};
  acc loss = 0, weight = 0;
  if (y.counts) {
    stats = s.stats();
    const bool index = p.targets.index != nullptr;
    const acc factor = sample_weight_of(o, row);
    const acc logsumexp = stats.max + stats.log_sum;
    loss = row_loss_of(s, stats, terms, index, terms ? scale_of<acc>(p.targets) * y.weight : y.weight, target_logit);
    if (o.z_loss != acc(0)) loss += o.z_loss * logsumexp * logsumexp;
    loss *= factor;
    weight = factor * y.weight;
  }
  if (y.bad) loss = static_cast<acc>(__builtin_nanf(""));
  store_row_loss<T>(p.row_loss, p.row_loss_is_acc, row, loss);
  if (row_weight) static_cast<acc*>(row_weight)[row] = weight;
  static_cast<RowStats<acc>*>(p.row_stats)[row] = stats;
}

template <typename T>
__global__ void __launch_bounds__(kStatisticsThreads, resident<T>(2, 2, 1))
    cross_entropy_options_rows_kernel(CrossEntropyForward p, KernelOptions<typename AccOf<T>::type> options,
                                      void* row_weight, int threads_per_row, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  constexpr int kSize = Vector<T>::kSize, kAtOnce = kVectorsAtOnce / 2;
  SHARED_ARRAY(RowState<acc>, states, 32);
  const int t = threadIdx.x % threads_per_row, rows_at_once = kStatisticsThreads / threads_per_row;
  const int64_t rows = p.extent.rows(), classes = p.extent.classes;
  const bool terms = has_terms(p.targets);
  // Every thread stays in the loop until the block's rows are done: the shuffles need whole warps.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows_at_once; first < rows;
       first += static_cast<int64_t>(gridDim.x) * rows_at_once) {
    const int64_t row = first + threadIdx.x / threads_per_row;
    RowState<acc> s = RowState<acc>::empty();
    IndexTarget<acc> y{0, false, false, acc(0)};
    acc target_logit = 0;
    if (row < rows) y = target_of_row<acc>(p.targets, classes, row, t == 0, bad);
    if (y.counts) {
      int64_t outer, inner;
      split_row(p.extent, row, outer, inner);
      const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner * p.logits_strides.inner;
      const ClassTerms<T> a(p.targets, classes, outer, inner);
      const LogitMap<acc> map(options, row);
      target_logit = map(to_acc(x[y.index]));
      ClassReader<T, kAtOnce> reader(x, classes, t, threads_per_row);
      reader.each(
          [&](int64_t c, T value) {
            const acc z = map(to_acc(value));
            s.raise_max(z);
            s.template add_below_max<true>(z, terms ? a(c) : acc(0));
          },
          [&](int64_t c, int step, int64_t tail, const Vector<T>* vectors) {
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
              const int64_t at = c + j * step;
              if (at >= tail) continue;
              acc z[kSize], m = map(vectors[j][0]);
#pragma unroll
              for (int i = 0; i < kSize; ++i) m = larger(m, z[i] = map(vectors[j][i]));
              s.raise_max(m);
              if (terms) {
                acc coefficients[kSize];
                a.load(at, coefficients);
#pragma unroll
                for (int i = 0; i < kSize; ++i) s.template add_below_max<true>(z[i], coefficients[i]);
              } else {
#pragma unroll
                for (int i = 0; i < kSize; ++i) s.template add_below_max<false>(z[i], acc(0));
              }
            }
          });
    }
    if (threads_per_row > 32) {
      merge_in_block(s, states);
    } else {
      merge_in_warp(s, threads_per_row);
    }
    if (row < rows && t == 0) store_row<T>(p, options, row_weight, row, y, s, terms, target_logit);
  }
}

template <typename T>
__global__ void __launch_bounds__(kStatisticsThreads, resident<T>(2, 2, 1))
    cross_entropy_options_planes_kernel(CrossEntropyForward p, KernelOptions<typename AccOf<T>::type> options,
                                        void* row_weight, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  constexpr int kAtOnce = kPlaneClassesAtOnce, kBlock = 64;
  const PlaneTile where(p.extent, kStatisticsThreads, 1);
  const int64_t classes = p.extent.classes, stride = p.logits_strides.classes;
  const bool terms = has_terms(p.targets);
  for (int64_t tile = blockIdx.x; tile < where.tiles; tile += gridDim.x) {
    int64_t outer, inner;
    where.locate(tile, 1, outer, inner);
    if (inner >= p.extent.inner) continue;
    const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner;
    const int64_t row = outer * p.extent.inner + inner;
    const IndexTarget<acc> y = target_of_row<acc>(p.targets, classes, row, true, bad);
    RowState<acc> s = RowState<acc>::empty();
    acc target_logit = 0;
    if (y.counts) {
      const ClassTerms<T> a(p.targets, classes, outer, inner);
      const LogitMap<acc> map(options, row);
      target_logit = map(to_acc(x[y.index * stride]));
      for (int64_t first = 0; first < classes; first += kBlock) {  // in blocks: fewer additions to a large sum
        const int64_t end = classes - first < kBlock ? classes : first + kBlock;
        RowState<acc> block = RowState<acc>::empty();
        for (int64_t start = first; start < end; start += kAtOnce) {
          acc z[kAtOnce], m;
          minus_infinity(m);
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            z[j] = start + j < end ? map(to_acc(x[(start + j) * stride])) : to_acc(minus_infinity_of<T>());
            m = larger(m, z[j]);
          }
          block.raise_max(m);
          if (terms) {
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j)
              block.template add_below_max<true>(z[j], start + j < end ? a(start + j) : acc(0));
          } else {
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) block.template add_below_max<false>(z[j], acc(0));
          }
        }
        s.merge(block);
      }
    }
    store_row<T>(p, options, row_weight, row, y, s, terms, target_logit);
  }
}

// The gradient of a row's z, with the options in it.
template <typename T>
struct OptionsGradient : RowGradient<T> {
  using acc = typename AccOf<T>::type;
  using RowGradient<T>::RowGradient;
  __device__ __forceinline__ acc at_target() const { return -this->k * this->target_term; }
  __device__ __forceinline__ acc beside_target(acc z, int64_t c) const { return this->of_other(z, c); }
};
// `mass`: Σ a_c of a row of probabilities.
template <typename T>
__device__ __forceinline__ OptionsGradient<T> options_gradient(const CrossEntropyBackward& p,
                                                               const KernelOptions<typename AccOf<T>::type>& o,
                                                               int64_t row, int64_t outer, int64_t inner,
                                                               const IndexTarget<typename AccOf<T>::type>& y,
                                                               typename AccOf<T>::type mass, bool terms) {
  using acc = typename AccOf<T>::type;
  const RowStats<acc> stats = static_cast<const RowStats<acc>*>(p.row_stats)[row];
  acc k = incoming_gradient<acc>(p.grad_output, p.grad_output_stride, p.total_weight, row);
  k *= sample_weight_of(o, row);
  OptionsGradient<T> gradient(p.targets, p.extent.classes, outer, inner, y, mass, k, stats, terms);
  if (o.z_loss != acc(0)) gradient.ka += 2 * k * o.z_loss * (stats.max + stats.log_sum) * exp_acc(-stats.log_sum);
  return gradient;
}

template <typename T>
__global__ void __launch_bounds__(kStatisticsThreads, resident<T>(2, 2, 1))
    cross_entropy_options_backward_rows_kernel(CrossEntropyBackward p, KernelOptions<typename AccOf<T>::type> options,
                                               int threads_per_row, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  constexpr int kAtOnce = kVectorsAtOnce / 2;
  SHARED_ARRAY(acc, scratch, kStatisticsThreads / 32);
  const int t = threadIdx.x % threads_per_row, rows_at_once = kStatisticsThreads / threads_per_row;
  const int64_t rows = p.extent.rows(), classes = p.extent.classes;
  const bool terms = has_terms(p.targets);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows_at_once; first < rows;
       first += static_cast<int64_t>(gridDim.x) * rows_at_once) {
    const int64_t row = first + threadIdx.x / threads_per_row;
    int64_t outer = 0, inner = 0;
    if (row < rows) split_row(p.extent, row, outer, inner);
    acc mass = 0;
    if (p.targets.probabilities) {
      const ClassTerms<T> a(p.targets, classes, outer, inner);
      for (int64_t c = t; row < rows && c < classes; c += threads_per_row) mass += a(c);
      mass = sum_of_row(mass, threads_per_row, scratch);
    }
    acc by_scale = 0;
    if (row < rows) {
      const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner * p.logits_strides.inner;
      T* grad = static_cast<T*>(p.grad_logits) + outer * p.grad_strides.outer + inner * p.grad_strides.inner;
      const IndexTarget<acc> y = target_of_row<acc>(p.targets, classes, row, t == 0, bad);
      const LogitMap<acc> map(options, row);
      by_scale = write_row_gradient<T, kAtOnce>(x, grad, classes, t, threads_per_row, map,
                                                options_gradient<T>(p, options, row, outer, inner, y, mass, terms));
    }
    if (!p.grad_logit_scale) continue;
    by_scale = sum_of_row(by_scale, threads_per_row, scratch);
    if (row < rows && t == 0) static_cast<acc*>(p.grad_logit_scale)[row] = by_scale;
  }
}

template <typename T>
__global__ void __launch_bounds__(kStatisticsThreads, resident<T>(2, 2, 1))
    cross_entropy_options_backward_planes_kernel(CrossEntropyBackward p, KernelOptions<typename AccOf<T>::type> options,
                                                 BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  constexpr int64_t kBlock = 64;
  const PlaneTile where(p.extent, kStatisticsThreads, 1);
  const int64_t classes = p.extent.classes;
  const bool terms = has_terms(p.targets);
  for (int64_t tile = blockIdx.x; tile < where.tiles; tile += gridDim.x) {
    int64_t outer, inner;
    where.locate(tile, 1, outer, inner);
    if (inner >= p.extent.inner) continue;
    const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner;
    T* grad = static_cast<T*>(p.grad_logits) + outer * p.grad_strides.outer + inner;
    const int64_t row = outer * p.extent.inner + inner;
    acc mass = 0;
    if (p.targets.probabilities) {
      const ClassTerms<T> a(p.targets, classes, outer, inner);
      for (int64_t first_class = 0; first_class < classes; first_class += kBlock) {
        const int64_t end = classes - first_class < kBlock ? classes : first_class + kBlock;
        acc block = 0;
        for (int64_t c = first_class; c < end; ++c) block += a(c);
        mass += block;
      }
    }
    const IndexTarget<acc> y = target_of_row<acc>(p.targets, classes, row, true, bad);
    const LogitMap<acc> map(options, row);
    const acc by_scale = write_column_gradient(x, p.logits_strides.classes, grad, p.grad_strides.classes, classes, map,
                                               options_gradient<T>(p, options, row, outer, inner, y, mass, terms));
    if (p.grad_logit_scale) static_cast<acc*>(p.grad_logit_scale)[row] = by_scale;
  }
}

}  // namespace nllx
