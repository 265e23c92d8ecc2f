// log_softmax and its backward: the row is read twice, the second time mostly from cache, and written once.
#pragma once

#include "cross_entropy_forward.cuh"

namespace nllx {

// Unit of work: a row by `threads_per_row` threads, up to 32 or the whole block. Precondition: class stride 1.
// Plan: cuda_plan_rows.
template <typename T>
__global__ void __launch_bounds__(512, 1) log_softmax_forward_rows_kernel(LogSoftmaxForward p, int threads_per_row) {
  using acc = typename AccOf<T>::type;
  SHARED_ARRAY(RowState<acc>, scratch, 32);
  const int t = threadIdx.x % threads_per_row;
  const int64_t rows_per_block = blockDim.x / threads_per_row, rows = p.extent.rows(), classes = p.extent.classes;
  for (int64_t first = blockIdx.x * rows_per_block; first < rows; first += gridDim.x * rows_per_block) {
    const int64_t row = first + threadIdx.x / threads_per_row;
    const bool exists = row < rows;
    const int64_t outer = exists ? row / p.extent.inner : 0, inner = exists ? row - outer * p.extent.inner : 0;
    const T* x = static_cast<const T*>(p.input) + outer * p.input_strides.outer + inner * p.input_strides.inner;
    RowState<acc> s = RowState<acc>::empty();
    if (exists) s = state_of_row<T, false>(x, classes, ClassTerms<T>(Targets(), classes, 0, 0), t, threads_per_row);
    if (threads_per_row <= 32) {
      merge_in_warp(s, threads_per_row);
    } else {
      merge_in_block(s, scratch);
    }
    if (!exists) continue;
    const RowStats<acc> stats = s.stats();
    T* y = static_cast<T*>(p.output) + outer * p.output_strides.outer + inner * p.output_strides.inner;
    for (int64_t c = t; c < classes; c += threads_per_row)
      y[c] = from_acc<T>((to_acc(x[c]) - stats.max) - stats.log_sum);
  }
}

// Unit of work: a tile of neighbouring rows of one plane, a thread each. Plan: CudaFamily::kPlanes.
template <typename T>
__global__ void __launch_bounds__(256, 1) log_softmax_forward_planes_kernel(LogSoftmaxForward p) {
  using acc = typename AccOf<T>::type;
  const int64_t tiles = (p.extent.inner + blockDim.x - 1) / blockDim.x, classes = p.extent.classes;
  for (int64_t tile = blockIdx.x; tile < p.extent.outer * tiles; tile += gridDim.x) {
    const int64_t outer = tile / tiles, inner = (tile - outer * tiles) * blockDim.x + threadIdx.x;
    if (inner >= p.extent.inner) continue;
    const T* x = static_cast<const T*>(p.input) + outer * p.input_strides.outer + inner;
    T* y = static_cast<T*>(p.output) + outer * p.output_strides.outer + inner;
    const RowStats<acc> stats =
        state_of_column<T, false>(x, p.input_strides.classes, classes, ClassTerms<T>(Targets(), classes, 0, 0)).stats();
    for (int64_t c = 0; c < classes; ++c) {
      y[c * p.output_strides.classes] =
          from_acc<T>((to_acc(x[c * p.input_strides.classes]) - stats.max) - stats.log_sum);
    }
  }
}

// gradient = g - exp(y) Σ g
template <typename T>
__global__ void __launch_bounds__(512, 1) log_softmax_backward_rows_kernel(LogSoftmaxBackward p, int threads_per_row) {
  using acc = typename AccOf<T>::type;
  SHARED_ARRAY(acc, scratch, 32);
  const int t = threadIdx.x % threads_per_row;
  const int64_t rows_per_block = blockDim.x / threads_per_row, rows = p.extent.rows(), classes = p.extent.classes;
  for (int64_t first = blockIdx.x * rows_per_block; first < rows; first += gridDim.x * rows_per_block) {
    const int64_t row = first + threadIdx.x / threads_per_row;
    const bool exists = row < rows;
    const int64_t outer = exists ? row / p.extent.inner : 0, inner = exists ? row - outer * p.extent.inner : 0;
    const T* g = static_cast<const T*>(p.grad_output) + outer * p.grad_output_strides.outer +
                 inner * p.grad_output_strides.inner;
    const T* y = static_cast<const T*>(p.output) + outer * p.output_strides.outer + inner * p.output_strides.inner;
    T* grad = static_cast<T*>(p.grad_input) + outer * p.grad_input_strides.outer + inner * p.grad_input_strides.inner;
    acc sum = 0;
    if (exists) {
      for (int64_t c = t; c < classes; c += threads_per_row) sum += to_acc(g[c]);
    }
    sum = threads_per_row <= 32 ? sum_in_warp(sum, threads_per_row) : sum_in_block(sum, scratch);
    if (!exists) continue;
    for (int64_t c = t; c < classes; c += threads_per_row)
      grad[c] = from_acc<T>(to_acc(g[c]) - exp_acc(to_acc(y[c])) * sum);
  }
}

template <typename T>
__global__ void __launch_bounds__(256, 1) log_softmax_backward_planes_kernel(LogSoftmaxBackward p) {
  using acc = typename AccOf<T>::type;
  const int64_t tiles = (p.extent.inner + blockDim.x - 1) / blockDim.x, classes = p.extent.classes;
  for (int64_t tile = blockIdx.x; tile < p.extent.outer * tiles; tile += gridDim.x) {
    const int64_t outer = tile / tiles, inner = (tile - outer * tiles) * blockDim.x + threadIdx.x;
    if (inner >= p.extent.inner) continue;
    const T* g = static_cast<const T*>(p.grad_output) + outer * p.grad_output_strides.outer + inner;
    const T* y = static_cast<const T*>(p.output) + outer * p.output_strides.outer + inner;
    T* grad = static_cast<T*>(p.grad_input) + outer * p.grad_input_strides.outer + inner;
    acc sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += to_acc(g[c * p.grad_output_strides.classes]);
    for (int64_t c = 0; c < classes; ++c) {
      const acc softmax = exp_acc(to_acc(y[c * p.output_strides.classes]));
      grad[c * p.grad_input_strides.classes] =
          from_acc<T>(to_acc(g[c * p.grad_output_strides.classes]) - softmax * sum);
    }
  }
}

}  // namespace nllx
