// mse_loss: w (x - t)^2, and its gradient.
#pragma once

#include "elementwise.cuh"
#include "loss_sum.cuh"

namespace nllx {

// Unit of work: a chunk of elements, a multiple of those that a block takes together, by a block.
template <typename T, bool kVectors>
__global__ void __launch_bounds__(256, resident<T>(3, 4, 4))
    mse_loss_forward_kernel(ElementwiseForward p, LossReduction r, int64_t elements_per_chunk) {
  using acc = typename AccOf<T>::type;
  using Step = ElementwiseStep<T, kVectors>;
  SHARED_ARRAY(double, scratch, 32);
  const Elements& e = p.elements;
  const int64_t chunks = (e.count + elements_per_chunk - 1) / elements_per_chunk;
  unsigned done = 0;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x, ++done) {
    const int64_t begin = chunk * elements_per_chunk;
    const int64_t end = e.count - begin < elements_per_chunk ? e.count : begin + elements_per_chunk;
    LossTerms sum;
    for (int64_t first = begin + threadIdx.x * Step::kSize; first < end; first += Step::kElements) {
      acc x[Step::kTogether][Step::kSize], t[Step::kTogether][Step::kSize], w[Step::kTogether][Step::kSize];
#pragma unroll
      for (int u = 0; u < Step::kTogether; ++u) {
        const int64_t i = first + u * Step::kApart;
        load_elements<T, kVectors>(e, p.input, p.input_strides, i, x[u]);
        load_elements<T, kVectors>(e, p.target, p.target_strides, i, t[u]);
        if (p.weight) load_elements<T, kVectors>(e, p.weight, p.weight_is_acc, p.weight_strides, i, w[u]);
      }
#pragma unroll
      for (int u = 0; u < Step::kTogether; ++u) {
#pragma unroll
        for (int j = 0; j < Step::kSize; ++j) {
          const acc d = x[u][j] - t[u][j];
          x[u][j] = p.weight ? w[u][j] * (d * d) : d * d;
        }
        sum.add(sum_of(x[u]), p.weight ? sum_of(w[u]) : acc(0));
      }
      if (!p.loss) continue;
#pragma unroll
      for (int u = 0; u < Step::kTogether; ++u) {
        const int64_t i = first + u * Step::kApart;
        if (p.loss_is_acc) {
          store_elements<acc, kVectors>(e, p.loss, p.loss_strides, i, x[u]);
        } else {
          store_elements<T, kVectors>(e, p.loss, p.loss_strides, i, x[u]);
        }
      }
    }
    if (!p.weight && threadIdx.x == 0) sum.weight = static_cast<double>(end - begin);
    add_chunk<T>(r, Targets(), chunk, chunks, sum, scratch);
  }
  finish_loss<T>(r, Targets(), chunks, done, scratch);
}

// Each gradient is written once: 2 k w (x - t), and its negative for the target. Unit of work: the elements that a
// block takes together.
template <typename T, bool kVectors>
__global__ void __launch_bounds__(256, resident<T>(3, 4, 4)) mse_loss_backward_kernel(ElementwiseBackward p) {
  using acc = typename AccOf<T>::type;
  using Step = ElementwiseStep<T, kVectors>;
  const Elements& e = p.elements;
  acc scale = 2;
  if (p.one_grad_output) {
    acc g =
        p.grad_output_is_acc ? *static_cast<const acc*>(p.grad_output) : to_acc(*static_cast<const T*>(p.grad_output));
    if (p.total_weight) g /= *static_cast<const acc*>(p.total_weight);
    scale *= g;
  }
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * Step::kElements + threadIdx.x * Step::kSize; first < e.count;
       first += static_cast<int64_t>(gridDim.x) * Step::kElements) {
    acc x[Step::kTogether][Step::kSize], t[Step::kTogether][Step::kSize];
#pragma unroll
    for (int u = 0; u < Step::kTogether; ++u) {
      const int64_t i = first + u * Step::kApart;
      load_elements<T, kVectors>(e, p.input, p.input_strides, i, x[u]);
      load_elements<T, kVectors>(e, p.target, p.target_strides, i, t[u]);
    }
#pragma unroll
    for (int u = 0; u < Step::kTogether; ++u) {
      const int64_t i = first + u * Step::kApart;
      acc w[Step::kSize], g[Step::kSize];
      if (p.weight) load_elements<T, kVectors>(e, p.weight, p.weight_is_acc, p.weight_strides, i, w);
      if (!p.one_grad_output)
        load_elements<T, kVectors>(e, p.grad_output, p.grad_output_is_acc, p.grad_output_strides, i, g);
#pragma unroll
      for (int j = 0; j < Step::kSize; ++j) {
        acc factor = p.one_grad_output ? scale : scale * g[j];
        // Before the difference, as torch has it: a small one by a small weight could underflow.
        if (p.weight) factor *= w[j];
        x[u][j] = (x[u][j] - t[u][j]) * factor;
        t[u][j] = -x[u][j];
      }
      if (p.grad_input) store_elements<T, kVectors>(e, p.grad_input, p.grad_input_strides, i, x[u]);
      if (p.grad_target) store_elements<T, kVectors>(e, p.grad_target, p.grad_target_strides, i, t[u]);
    }
  }
}

}  // namespace nllx
