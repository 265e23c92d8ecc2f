// nll_loss, the sum of row losses, and the check of class indices alone.
#pragma once

#include "targets.cuh"

namespace nllx {

// Unit of work: a row by a thread, which reads one log-probability.
template <typename T>
__global__ void __launch_bounds__(256, 1) nll_loss_forward_kernel(NllLossForward p, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < p.extent.rows();
       row += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const IndexTarget<acc> y = index_target<acc>(p.targets, p.extent.classes, row);
    acc loss = 0;
    if (y.counts) {
      const int64_t outer = row / p.extent.inner, inner = row - outer * p.extent.inner;
      const T* x = static_cast<const T*>(p.log_probs) + outer * p.strides.outer + inner * p.strides.inner;
      loss = -weighted(y.weight, to_acc(x[y.index * p.strides.classes]));
    } else if (y.bad) {
      report_bad_target(bad, row, y.index, p.extent.classes, p.targets.ignore_index);
      minus_infinity(loss);
      loss -= loss;  // NaN
    }
    store_row_loss<T>(p.row_loss, p.row_loss_is_acc, row, loss);
  }
}

// Writes each number of the gradient once: -k w_y at the target, zero elsewhere. Reads no log-probability. A thread per
// row of a plane, or `threads_per_row` threads per row.
template <typename T>
__global__ void __launch_bounds__(256, 1)
    nll_loss_backward_kernel(NllLossBackward p, int threads_per_row, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  const bool planes = p.layout == Layout::kPlanes;
  const int rows_per_block = blockDim.x / threads_per_row, t = threadIdx.x % threads_per_row,
            r = threadIdx.x / threads_per_row;
  const int64_t tiles = planes ? (p.extent.inner + rows_per_block - 1) / rows_per_block : 1;
  const int64_t units = planes ? p.extent.outer * tiles : (p.extent.rows() + rows_per_block - 1) / rows_per_block;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t outer = planes ? unit / tiles : (unit * rows_per_block + r) / p.extent.inner;
    const int64_t inner =
        planes ? (unit - outer * tiles) * rows_per_block + r : unit * rows_per_block + r - outer * p.extent.inner;
    if (inner >= p.extent.inner || outer >= p.extent.outer) continue;
    const int64_t row = outer * p.extent.inner + inner;
    const IndexTarget<acc> y = index_target<acc>(p.targets, p.extent.classes, row);
    if (y.bad && t == 0) report_bad_target(bad, row, y.index, p.extent.classes, p.targets.ignore_index);
    acc value = 0;
    if (y.counts) value = -y.weight * incoming_gradient<acc>(p.grad_output, p.grad_output_stride, p.total_weight, row);
    T* grad = static_cast<T*>(p.grad_log_probs) + outer * p.grad_strides.outer + inner * p.grad_strides.inner;
    for (int64_t c = t; c < p.extent.classes; c += threads_per_row) {
      grad[c * p.grad_strides.classes] = from_acc<T>(y.counts && c == y.index ? value : acc(0));
    }
  }
}

template <typename T>
__device__ __forceinline__ void finish_reduction(const LossReduction& r, const Targets& targets, double loss,
                                                 double weight) {
  using acc = typename AccOf<T>::type;
  if (targets.index) weight = index_divisor(targets, weight);
  *static_cast<acc*>(r.total_weight) = static_cast<acc>(weight);
  if (r.reduction == Reduction::kNone) return;
  const double value = r.reduction == Reduction::kMean ? loss / weight : loss;
  if (r.loss_is_acc) {
    *static_cast<acc*>(r.loss) = static_cast<acc>(value);
  } else {
    *static_cast<T*>(r.loss) = from_acc<T>(static_cast<acc>(value));
  }
}

// The losses and weights of kRowsPerPartial rows by a block, in double and in fixed order; if there is one block, it
// finishes. Weights are those of the targets, so that the forward kernels need not write them.
template <typename T>
__global__ void __launch_bounds__(512, 1)
    loss_partials_kernel(LossReduction r, Extent extent, Targets targets, const void* row_loss, bool row_loss_is_acc) {
  using acc = typename AccOf<T>::type;
  SHARED_ARRAY(double, scratch, 32);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kRowsPerPartial;
  const int64_t end = begin + kRowsPerPartial < extent.rows() ? begin + kRowsPerPartial : extent.rows();
  double loss = 0, weight = 0;
  for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) {
    loss += static_cast<double>(row_loss_is_acc ? static_cast<const acc*>(row_loss)[row]
                                                : to_acc(static_cast<const T*>(row_loss)[row]));
    weight += targets.index ? static_cast<double>(index_target<acc>(targets, extent.classes, row).weight) : 1.;
  }
  loss = sum_in_block(loss, scratch);
  weight = sum_in_block(weight, scratch);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    finish_reduction<T>(r, targets, loss, weight);
  } else {
    r.partials[2 * blockIdx.x] = loss;
    r.partials[2 * blockIdx.x + 1] = weight;
  }
}

// The partial sums by one block, in fixed order.
template <typename T>
__global__ void __launch_bounds__(512, 1) loss_total_kernel(LossReduction r, Targets targets, int64_t partials) {
  SHARED_ARRAY(double, scratch, 32);
  double loss = 0, weight = 0;
  for (int64_t i = threadIdx.x; i < partials; i += blockDim.x) {
    loss += r.partials[2 * i];
    weight += r.partials[2 * i + 1];
  }
  loss = sum_in_block(loss, scratch);
  weight = sum_in_block(weight, scratch);
  if (threadIdx.x == 0) finish_reduction<T>(r, targets, loss, weight);
}

// The classes of a target as int64, zero where ignored or out of range.
__global__ void __launch_bounds__(256, 1)
    checked_target_kernel(const void* target, IndexType type, int64_t n, int64_t classes, int64_t ignore_index,
                          int64_t* out, BadTarget* bad) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t y = load_index(target, type, i);
    const bool ignored = y == ignore_index, counts = !ignored && is_class(y, classes);
    if (!ignored && !counts) report_bad_target(bad, i, y, classes, ignore_index);
    out[i] = counts ? y : 0;
  }
}

}  // namespace nllx
