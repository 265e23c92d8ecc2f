// nll_loss, and the check of class indices alone.
#pragma once

#include "loss_sum.cuh"

namespace nllx {

// Unit of work: a row by a thread, which reads one log-probability; a chunk is rows_per_chunk of them.
template <typename T>
__global__ void __launch_bounds__(256, 1)
    nll_loss_forward_kernel(NllLossForward p, LossReduction r, int64_t rows_per_chunk, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  SHARED_ARRAY(double, scratch, 32);
  const int64_t rows = p.extent.rows(), chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;
  unsigned done = 0;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x, ++done) {
    const int64_t begin = chunk * rows_per_chunk, end = begin + rows_per_chunk < rows ? begin + rows_per_chunk : rows;
    LossTerms sum;
#pragma unroll 4
    for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) {
      const IndexTarget<acc> y = index_target<acc>(p.targets, p.extent.classes, row);
      acc loss = 0;
      if (y.counts) {
        int64_t outer, inner;
        split_row(p.extent, row, outer, inner);
        const T* x = static_cast<const T*>(p.log_probs) + outer * p.strides.outer + inner * p.strides.inner;
        loss = -weighted(y.weight, to_acc(x[y.index * p.strides.classes]));
      } else if (y.bad) {
        report_bad_target(bad, row, y.index, p.extent.classes, p.targets.ignore_index);
        minus_infinity(loss);
        loss -= loss;  // NaN
      }
      if (p.row_loss) store_row_loss<T>(p.row_loss, p.row_loss_is_acc, row, loss);
      sum.add(loss, y.weight);
    }
    add_chunk<T>(r, p.targets, chunk, chunks, sum, scratch);
  }
  finish_loss<T>(r, p.targets, chunks, done, scratch);
}

// Writes each number of the gradient once: -k w_y at the target, zero elsewhere. Reads no log-probability. Unit of
// work: a row by `threads_per_row` threads, 16 bytes at a time, or, of a plane, a row by a thread.
template <typename T>
__global__ void __launch_bounds__(256, 1)
    nll_loss_backward_kernel(NllLossBackward p, int threads_per_row, BadTarget* bad) {
  using acc = typename AccOf<T>::type;
  constexpr int kSize = Vector<T>::kSize;
  const bool planes = p.layout == Layout::kPlanes;
  const int rows_at_once = blockDim.x / threads_per_row, t = threadIdx.x % threads_per_row,
            r = threadIdx.x / threads_per_row;
  const int64_t tiles = planes ? (p.extent.inner + rows_at_once - 1) / rows_at_once : 1;
  const int64_t units = planes ? p.extent.outer * tiles : (p.extent.rows() + rows_at_once - 1) / rows_at_once;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    int64_t outer, inner;
    if (planes) {
      outer = unit / tiles;
      inner = (unit - outer * tiles) * rows_at_once + r;
      if (inner >= p.extent.inner) continue;
    } else {
      if (unit * rows_at_once + r >= p.extent.rows()) continue;
      split_row(p.extent, unit * rows_at_once + r, outer, inner);
    }
    const int64_t row = outer * p.extent.inner + inner, classes = p.extent.classes;
    const IndexTarget<acc> y = index_target<acc>(p.targets, classes, row);
    if (y.bad && t == 0) report_bad_target(bad, row, y.index, classes, p.targets.ignore_index);
    acc value = 0;
    if (y.counts) value = -y.weight * incoming_gradient<acc>(p.grad_output, p.grad_output_stride, p.total_weight, row);
    const int64_t target = y.counts ? y.index : -1;
    T* grad = static_cast<T*>(p.grad_log_probs) + outer * p.grad_strides.outer + inner * p.grad_strides.inner;
    if (planes) {
#pragma unroll 4
      for (int64_t c = 0; c < classes; ++c)
        grad[c * p.grad_strides.classes] = from_acc<T>(c == target ? value : acc(0));
      continue;
    }
    const int past = elements_past_boundary(grad);
    for (int64_t c = static_cast<int64_t>(t) * kSize - past; c < classes;
         c += static_cast<int64_t>(threads_per_row) * kSize) {
      const int64_t ahead = target - c;
      const Vector<T> v = Vector<T>::of([&](int i) { return i == ahead ? value : acc(0); });
      store_vector(grad, c, classes, v, true);
    }
  }
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
