// mse_loss: w (x - t)^2, and its gradient.

template <bool kWeighted, typename T, typename acc = typename AccOf<T>::type>
NLLX_INLINE Vec<acc> weighted_square(const T* x, const T* t, Vec<acc> w, int n) {
  const Vec<acc> d = load_some(x, n, acc(0)) - load_some(t, n, acc(0));
  return kWeighted ? w * (d * d) : d * d;
}

// Adds the losses of a block to a sum, and its weights to another.
template <bool kWeighted, typename T, typename acc>
NLLX_APART void sum_squares(const T* x, const T* t, const acc* w, int n, DoubleSums& losses, DoubleSums& weights) {
  constexpr int L = kLanes<acc>;
  DoubleSums loss, weight;
  const auto add = [&](int u, int i, int k) __attribute__((always_inline)) {
    Vec<acc> wi{};
    if constexpr (kWeighted) {
      wi = load_some(w + i, k, acc(0));
      weight.add(u, wi);
    }
    loss.add(u, weighted_square<kWeighted>(x + i, t + i, wi, k));
  };
  int i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) add(u, i + u * L, L);
  }
  for (; i < n; i += L) add(0, i, n - i < L ? n - i : L);
  losses.add(loss);
  weights.add(weight);
}

template <bool kWeighted, typename T>
void mse_loss_forward(const ElementwiseForward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  constexpr int L = kLanes<acc>;
  alignas(64) T x_buffer[kElementBlock], t_buffer[kElementBlock];
  alignas(64) acc w_buffer[kElementBlock];
  DoubleSums losses, weights;
  for_each_block(chunks, chunk, [&](int64_t begin, int n) __attribute__((always_inline)) {
    const T* x = block_of(p.elements, p.input, p.input_strides, begin, n, x_buffer);
    const T* t = block_of(p.elements, p.target, p.target_strides, begin, n, t_buffer);
    const acc* w = nullptr;
    if constexpr (kWeighted) {
      w = acc_block_of<T>(p.elements, p.weight, p.weight_is_acc, p.weight_strides, begin, n, w_buffer);
    }
    if (!p.loss) return sum_squares<kWeighted>(x, t, w, n, losses, weights);
    DoubleSums block;
    const auto value = [&](auto count, int64_t i, int k, Vec<acc>* v) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int u = 0; u < decltype(count)::value; ++u) {
        const int lanes = lanes_of<acc>(count, u, k);
        Vec<acc> wi{};
        if constexpr (kWeighted) {
          wi = load_some(w + i + u * L, lanes, acc(0));
          block.add(u, wi);
        }
        v[u] = weighted_square<kWeighted>(x + i + u * L, t + i + u * L, wi, lanes);
      }
    };
    p.loss_is_acc ? write_block<acc>(p.elements, p.loss, p.loss_strides, chunks.stream, begin, n, value)
                  : write_block<T>(p.elements, p.loss, p.loss_strides, chunks.stream, begin, n, value);
    weights.add(block);
  });
  if (chunks.stream) end_stream();
  result.loss = losses.total();
  result.weight = kWeighted ? weights.total() : static_cast<double>(chunks.end(chunk) - chunks.begin(chunk));
}
template <typename T>
void mse_loss_forward(const ElementwiseForward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  p.weight ? mse_loss_forward<true, T>(p, chunks, chunk, result) : mse_loss_forward<false, T>(p, chunks, chunk, result);
}

// g: an incoming gradient for each element, or null. Both gradients are `scale` g w (x - t), but for the sign of
// `scale`.
template <bool kWeighted, bool kOneGradOutput, typename T, typename acc>
NLLX_APART void write_gradient(const Elements& e, void* grad, const ElementStrides& strides, bool streamed,
                               int64_t begin, int n, const T* x, const T* t, const acc* w, const acc* g, acc scale) {
  constexpr int L = kLanes<acc>;
  write_block<T>(e, grad, strides, streamed, begin, n,
                 [&](auto count, int64_t first, int k, Vec<acc>* v) __attribute__((always_inline)) {
#pragma GCC unroll 8
                   for (int u = 0; u < decltype(count)::value; ++u) {
                     const int64_t i = first + u * L;
                     const int lanes = lanes_of<acc>(count, u, k);
                     Vec<acc> factor = broadcast(scale);
                     if constexpr (!kOneGradOutput) factor *= load_some(g + i, lanes, acc(0));
                     // Before the difference, as torch has it: a small one by a small weight could underflow.
                     if constexpr (kWeighted) factor *= load_some(w + i, lanes, acc(0));
                     v[u] = (load_some(x + i, lanes, acc(0)) - load_some(t + i, lanes, acc(0))) * factor;
                   }
                 });
}

template <bool kWeighted, bool kOneGradOutput, typename T>
void mse_loss_backward(const ElementwiseBackward& p, const Chunks& chunks, int64_t chunk) {
  using acc = typename AccOf<T>::type;
  alignas(64) T x_buffer[kElementBlock], t_buffer[kElementBlock];
  alignas(64) acc w_buffer[kElementBlock], g_buffer[kElementBlock];
  acc scale = 2;
  if constexpr (kOneGradOutput) {
    acc g =
        p.grad_output_is_acc ? *static_cast<const acc*>(p.grad_output) : to_acc(*static_cast<const T*>(p.grad_output));
    if (p.total_weight) g /= *static_cast<const acc*>(p.total_weight);
    scale *= g;
  }
  for_each_block(chunks, chunk, [&](int64_t begin, int n) __attribute__((always_inline)) {
    const T* x = block_of(p.elements, p.input, p.input_strides, begin, n, x_buffer);
    const T* t = block_of(p.elements, p.target, p.target_strides, begin, n, t_buffer);
    const acc *w = nullptr, *g = nullptr;
    if constexpr (kWeighted) {
      w = acc_block_of<T>(p.elements, p.weight, p.weight_is_acc, p.weight_strides, begin, n, w_buffer);
    }
    if constexpr (!kOneGradOutput) {
      g = acc_block_of<T>(p.elements, p.grad_output, p.grad_output_is_acc, p.grad_output_strides, begin, n, g_buffer);
    }
    if (p.grad_input) {
      write_gradient<kWeighted, kOneGradOutput>(p.elements, p.grad_input, p.grad_input_strides, chunks.stream, begin, n,
                                                x, t, w, g, scale);
    }
    if (p.grad_target) {
      write_gradient<kWeighted, kOneGradOutput>(p.elements, p.grad_target, p.grad_target_strides, chunks.stream, begin,
                                                n, x, t, w, g, -scale);
    }
  });
  if (chunks.stream) end_stream();
}
template <typename T>
void mse_loss_backward(const ElementwiseBackward& p, const Chunks& chunks, int64_t chunk) {
  if (p.one_grad_output) {
    p.weight ? mse_loss_backward<true, true, T>(p, chunks, chunk) : mse_loss_backward<false, true, T>(p, chunks, chunk);
  } else {
    p.weight ? mse_loss_backward<true, false, T>(p, chunks, chunk)
             : mse_loss_backward<false, false, T>(p, chunks, chunk);
  }
}
