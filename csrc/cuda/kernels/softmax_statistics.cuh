// Statistics of the softmax in one read of the logits, and their gradient in one read and one write.
#pragma once

#include "row_options.cuh"

namespace nllx {

__device__ __forceinline__ int64_t shuffled(int64_t v, int offset) { return __shfl_xor_sync(0xffffffffu, v, offset); }

// The part of a row that a thread has seen, with the first moment of the exponentials.
template <typename acc>
struct MomentState {
  acc max, sum, moment;           // m, Σ exp(x - m), Σ exp(x - m) (x - m)
  int64_t highest, not_a_number;  // the first class of the maximum, and the first NaN; INT64_MAX: none

  static __device__ __forceinline__ MomentState empty() {
    MomentState s{0, 0, 0, INT64_MAX, INT64_MAX};
    minus_infinity(s.max);
    return s;
  }

  // Below, exp(x - m) is 0 in every type, and -inf times it would be NaN.
  static __device__ __forceinline__ acc not_vanished(acc shifted) { return shifted < acc(-1e4) ? acc(-1e4) : shifted; }

  __device__ __forceinline__ void raise_max(acc m) {
    if (!(m > max)) return;
    if (!is_minus_infinity(max)) {
      const acc shift = max - m, factor = exp_acc(shift);
      moment = (moment + sum * not_vanished(shift)) * factor;
      sum *= factor;
    }
    max = m;
  }

  // x ≤ max, or NaN.
  __device__ __forceinline__ void add_below_max(acc x) {
    const acc shifted = x - finite_max(max), e = exp_of_many(shifted);
    sum += e;
    moment += e * not_vanished(shifted);
  }

  // Threads take the classes in any order.
  static __device__ __forceinline__ int64_t first(int64_t a, int64_t b) { return a < b ? a : b; }

  // kCount logits, value(i) of class_of(i); -inf behind the last class.
  template <int kCount, typename Value, typename ClassOf>
  __device__ __forceinline__ void add(Value value, ClassOf class_of) {
    acc m = value(0);
#pragma unroll
    for (int i = 1; i < kCount; ++i) m = larger(m, value(i));
    if (m >= max) {
      if (m > max) highest = INT64_MAX;
      raise_max(m);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (value(i) == m) highest = first(highest, class_of(i));
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) add_below_max(value(i));
    if (sum != sum) {  // rare: NaN, or infinity
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (value(i) != value(i)) not_a_number = first(not_a_number, class_of(i));
      }
    }
  }

  __device__ __forceinline__ void merge(MomentState other) {
    if (other.max > max) highest = other.highest;
    if (other.max == max) highest = first(highest, other.highest);
    not_a_number = first(not_a_number, other.not_a_number);
    raise_max(other.max);
    other.raise_max(max);
    sum += other.sum;
    moment += other.moment;
  }

  __device__ __forceinline__ MomentState of_lane(int offset) const {
    return {__shfl_xor_sync(0xffffffffu, max, offset), __shfl_xor_sync(0xffffffffu, sum, offset),
            __shfl_xor_sync(0xffffffffu, moment, offset), shuffled(highest, offset), shuffled(not_a_number, offset)};
  }
};

// What the state of a row says, for the row's thread to write. target_logit: x_y, read only with a target.
template <typename acc>
__device__ __forceinline__ void store_statistics(const SoftmaxStatisticsForward& p, int64_t row, bool counts,
                                                 const MomentState<acc>& s, acc target_logit) {
  const acc max = counts ? finite_max(s.max) : acc(0), log_sum = counts ? log_acc(s.sum) : acc(0),
            mean = counts ? s.moment / s.sum : acc(0);
  if (p.log_prob) static_cast<acc*>(p.log_prob)[row] = counts ? (target_logit - max) - log_sum : acc(0);
  // The logarithm of infinity is infinite.
  const bool infinite = s.sum != s.sum && s.not_a_number == INT64_MAX;
  if (p.logsumexp) static_cast<acc*>(p.logsumexp)[row] = counts && infinite ? max : max + log_sum;
  if (p.entropy) static_cast<acc*>(p.entropy)[row] = log_sum - mean;
  if (p.prediction) {
    const int64_t highest = s.highest == INT64_MAX ? 0 : s.highest;  // nothing but -inf
    p.prediction[row] = !counts ? -1 : s.not_a_number != INT64_MAX ? s.not_a_number : highest;
  }
  acc* const stats = static_cast<acc*>(p.row_stats) + 3 * row;
  stats[0] = max;
  stats[1] = log_sum;
  stats[2] = mean;
}

template <typename acc, typename Problem>
__device__ __forceinline__ IndexTarget<acc> statistics_target(const Problem& p, int64_t row, bool reports,
                                                              BadTarget* bad) {
  if (!p.targets.index) return {-1, true, false, acc(1)};
  const IndexTarget<acc> y = index_target<acc>(p.targets, p.extent.classes, row);
  if (y.bad && reports) report_bad_target(bad, row, y.index, p.extent.classes, p.targets.ignore_index);
  return y;
}

// Of a class index out of range the statistics are NaN, and the prediction -1.
template <typename acc>
__device__ __forceinline__ void spoil_statistics(const SoftmaxStatisticsForward& p, int64_t row) {
  const acc nan = static_cast<acc>(__builtin_nanf(""));
  if (p.log_prob) static_cast<acc*>(p.log_prob)[row] = nan;
  if (p.logsumexp) static_cast<acc*>(p.logsumexp)[row] = nan;
  if (p.entropy) static_cast<acc*>(p.entropy)[row] = nan;
}

// Unit of work: a row by `threads_per_row` threads, which divide a warp or are the block. Reads each logit once, 16
// bytes at a time at any alignment. Precondition: class stride 1.
template <typename T>
__global__ void __launch_bounds__(kStatisticsThreads, resident<T>(2, 2, 1))
    softmax_statistics_rows_kernel(SoftmaxStatisticsForward p, KernelOptions<typename AccOf<T>::type> options,
                                   int threads_per_row, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  constexpr int kSize = Vector<T>::kSize, kAtOnce = kVectorsAtOnce / 2;
  SHARED_ARRAY(MomentState<acc>, states, kStatisticsThreads / 32);
  const int t = threadIdx.x % threads_per_row, rows_at_once = kStatisticsThreads / threads_per_row;
  const int64_t rows = p.extent.rows();
  // Every thread stays in the loop until the block's rows are done: the shuffles need whole warps.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows_at_once; first < rows;
       first += static_cast<int64_t>(gridDim.x) * rows_at_once) {
    const int64_t row = first + threadIdx.x / threads_per_row;
    MomentState<acc> s = MomentState<acc>::empty();
    IndexTarget<acc> y{-1, false, false, acc(0)};
    acc target_logit = 0;
    if (row < rows) y = statistics_target<acc>(p, row, t == 0, bad);
    if (y.counts) {
      int64_t outer, inner;
      split_row(p.extent, row, outer, inner);
      const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner * p.logits_strides.inner;
      const LogitMap<acc> map(options, row);
      if (y.index >= 0) target_logit = map(to_acc(x[y.index]));
      ClassReader<T, kAtOnce> reader(x, p.extent.classes, t, threads_per_row);
      reader.each(
          [&](int64_t c, T value) {
            const acc z = map(to_acc(value));
            s.template add<1>([&](int) { return z; }, [&](int) { return c; });
          },
          [&](int64_t c, int step, int64_t tail, const Vector<T>* vectors) {
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
              const int64_t at = c + j * step;
              if (at >= tail) continue;
              acc z[kSize];
#pragma unroll
              for (int i = 0; i < kSize; ++i) z[i] = map(vectors[j][i]);
              s.template add<kSize>([&](int i) { return z[i]; }, [&](int i) { return at + i; });
            }
          });
    }
    const int width = threads_per_row < 32 ? threads_per_row : 32;
    for (int offset = 1; offset < width; offset *= 2) s.merge(s.of_lane(offset));
    if (threads_per_row > 32) {
      __syncthreads();  // the states of the row before may still be read
      if (threadIdx.x % 32 == 0) states[threadIdx.x / 32] = s;
      __syncthreads();  // the states of all warps are there
      s = states[0];
      for (int w = 1; w < kStatisticsThreads / 32; ++w) s.merge(states[w]);
    }
    if (row >= rows || t != 0) continue;
    store_statistics(p, row, y.counts, s, target_logit);
    if (y.bad) spoil_statistics<acc>(p, row);
  }
}

// Unit of work: kStatisticsThreads neighbouring rows of one plane, a thread each.
template <typename T>
__global__ void __launch_bounds__(kStatisticsThreads, resident<T>(2, 2, 1))
    softmax_statistics_planes_kernel(SoftmaxStatisticsForward p, KernelOptions<typename AccOf<T>::type> options,
                                     BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  constexpr int kAtOnce = kPlaneClassesAtOnce, kBlock = 64;
  const PlaneTile where(p.extent, kStatisticsThreads, 1);
  const int64_t classes = p.extent.classes, stride = p.logits_strides.classes;
  for (int64_t tile = blockIdx.x; tile < where.tiles; tile += gridDim.x) {
    int64_t outer, inner;
    where.locate(tile, 1, outer, inner);
    if (inner >= p.extent.inner) continue;
    const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner;
    const int64_t row = outer * p.extent.inner + inner;
    const IndexTarget<acc> y = statistics_target<acc>(p, row, true, bad);
    MomentState<acc> s = MomentState<acc>::empty();
    acc target_logit = 0;
    if (y.counts) {
      const LogitMap<acc> map(options, row);
      if (y.index >= 0) target_logit = map(to_acc(x[y.index * stride]));
      for (int64_t first = 0; first < classes; first += kBlock) {  // in blocks: fewer additions to a large sum
        const int64_t end = classes - first < kBlock ? classes : first + kBlock;
        MomentState<acc> block = MomentState<acc>::empty();
        for (int64_t start = first; start < end; start += kAtOnce) {
          acc values[kAtOnce];
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j)
            values[j] = start + j < end ? map(to_acc(x[(start + j) * stride])) : to_acc(minus_infinity_of<T>());
          block.template add<kAtOnce>([&](int i) { return values[i]; }, [&](int i) { return start + i; });
        }
        s.merge(block);
      }
    }
    store_statistics(p, row, y.counts, s, target_logit);
    if (y.bad) spoil_statistics<acc>(p, row);
  }
}

// The gradient of a row's z: p (α + β (z - m)) + γ [c = y].
template <typename T>
struct StatisticsGradient {
  using acc = typename AccOf<T>::type;
  acc max, alpha, beta, gamma;  // alpha and beta with 1 / s
  int64_t target;               // -1: none
  bool counts;

  __device__ __forceinline__ StatisticsGradient(const SoftmaxStatisticsBackward& p, int64_t row, bool reports,
                                                BadTarget* bad) {
    const IndexTarget<acc> y = statistics_target<acc>(p, row, reports, bad);
    const acc* const stats = static_cast<const acc*>(p.row_stats) + 3 * row;
    const auto incoming = [&](const void* g) { return g ? static_cast<const acc*>(g)[row] : acc(0); };
    const acc log_prob = incoming(p.grad_log_prob), entropy = incoming(p.grad_entropy);
    const acc scale = exp_acc(-stats[1]);
    counts = y.counts;
    target = y.index;
    max = stats[0];
    alpha = incoming(p.grad_logsumexp) - log_prob;
    // Nothing of the mean where no gradient comes: it is NaN where the entropy is.
    if (entropy != acc(0)) alpha += entropy * stats[2];
    alpha *= scale;
    beta = -scale * entropy;
    gamma = log_prob;
  }

  __device__ __forceinline__ acc at_target() const { return gamma; }
  __device__ __forceinline__ acc beside_target(acc z, int64_t) const {
    const acc shifted = z - max;
    const acc g = exp_of_many(shifted) * (alpha + beta * MomentState<acc>::not_vanished(shifted));
    return counts ? g : acc(0);
  }
  __device__ __forceinline__ acc operator()(acc z, int64_t c) const {
    return beside_target(z, c) + (counts && c == target ? gamma : acc(0));
  }
};

// Units of work as above.
template <typename T>
__global__ void __launch_bounds__(kStatisticsThreads, resident<T>(3, 3, 2))
    softmax_statistics_backward_rows_kernel(SoftmaxStatisticsBackward p, KernelOptions<typename AccOf<T>::type> options,
                                            int threads_per_row, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  constexpr int kAtOnce = sizeof(T) == 8 ? kVectorsAtOnce / 2 : kVectorsAtOnce;
  SHARED_ARRAY(acc, scratch, kStatisticsThreads / 32);
  const int t = threadIdx.x % threads_per_row, rows_at_once = kStatisticsThreads / threads_per_row;
  const int64_t rows = p.extent.rows();
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows_at_once; first < rows;
       first += static_cast<int64_t>(gridDim.x) * rows_at_once) {
    const int64_t row = first + threadIdx.x / threads_per_row;
    acc by_scale = 0;
    if (row < rows) {
      int64_t outer, inner;
      split_row(p.extent, row, outer, inner);
      const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner * p.logits_strides.inner;
      T* grad = static_cast<T*>(p.grad_logits) + outer * p.grad_strides.outer + inner * p.grad_strides.inner;
      const StatisticsGradient<T> gradient(p, row, t == 0, bad);
      const LogitMap<acc> map(options, row);
      by_scale = write_row_gradient<T, kAtOnce>(x, grad, p.extent.classes, t, threads_per_row, map, gradient);
    }
    if (!p.grad_logit_scale) continue;
    by_scale = sum_of_row(by_scale, threads_per_row, scratch);
    if (row < rows && t == 0) static_cast<acc*>(p.grad_logit_scale)[row] = by_scale;
  }
}

template <typename T>
__global__ void __launch_bounds__(kStatisticsThreads, resident<T>(3, 3, 2))
    softmax_statistics_backward_planes_kernel(SoftmaxStatisticsBackward p,
                                              KernelOptions<typename AccOf<T>::type> options, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  const PlaneTile where(p.extent, kStatisticsThreads, 1);
  for (int64_t tile = blockIdx.x; tile < where.tiles; tile += gridDim.x) {
    int64_t outer, inner;
    where.locate(tile, 1, outer, inner);
    if (inner >= p.extent.inner) continue;
    const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner;
    T* grad = static_cast<T*>(p.grad_logits) + outer * p.grad_strides.outer + inner;
    const int64_t row = outer * p.extent.inner + inner;
    const StatisticsGradient<T> gradient(p, row, true, bad);
    const LogitMap<acc> map(options, row);
    const acc by_scale = write_column_gradient(x, p.logits_strides.classes, grad, p.grad_strides.classes,
                                               p.extent.classes, map, gradient);
    if (p.grad_logit_scale) static_cast<acc*>(p.grad_logit_scale)[row] = by_scale;
  }
}

}  // namespace nllx
