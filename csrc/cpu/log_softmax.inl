// log_softmax, on the sums of rows.inl and tiles.inl.

template <typename T>
void log_softmax_forward_rows(const LogSoftmaxForward& p, const Chunks& chunks, int64_t chunk) {
  using acc = typename AccOf<T>::type;
  const int64_t ahead = row_step(p.extent, p.input_strides);
  for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
    const Row r = row_of(p.extent, row);
    const T* x = static_cast<const T*>(p.input) + r.offset(p.input_strides);
    T* y = static_cast<T*>(p.output) + r.offset(p.output_strides);
    const RowStats<acc> s = row_sums<Terms::kNone, T, acc, T>(x, p.extent.classes, ahead, ClassTerms<acc, T>{}).stats();
    const Vec<acc> m = broadcast(s.max), log_sum = broadcast(s.log_sum);
    const auto value = [&](int64_t c, int n)
                           __attribute__((always_inline)) { return (load_some(x + c, n, acc(0)) - m) - log_sum; };
    if (chunks.stream) {
      write_row<true>(y, 0, p.extent.classes, value);
    } else {
      write_row<false>(y, 0, p.extent.classes, value);
    }
  }
  if (chunks.stream) end_stream();
}

// `width` rows of a tile whose classes are x_stride and y_stride apart; y may be x.
template <bool kPrefetch, typename X, typename Y, typename acc>
NLLX_INLINE void log_softmax_forward_tile(const X* x, int64_t x_stride, Y* y, int64_t y_stride, int64_t classes,
                                          int width, bool streamed, TileSums<acc>& s) {
  constexpr int L = kLanes<acc>;
  for_each_group<acc>(width, [&](auto count, int i, int k) __attribute__((always_inline)) {
    constexpr int V = decltype(count)::value;
    group_sums<Terms::kNone, V, kPrefetch, X, acc, X>(x, x_stride, classes, i, k, ClassTerms<acc, X>{}, s);
    Vec<acc> max[V], log_sum[V];
    for (int v = 0; v < V; ++v) {
      max[v] = load(s.max + i + v * L);
      log_sum[v] = log_vec(load(s.sum + i + v * L));
    }
    for (int64_t c = 0; c < classes; ++c) {
      for (int v = 0; v < V; ++v) {
        const int n = V == 1 ? k : L;
        const Vec<acc> value = (load_some(x + c * x_stride + i + v * L, n, acc(0)) - max[v]) - log_sum[v];
        if (V > 1 && streamed) {
          stream(y + c * y_stride + i + v * L, value);
        } else {
          store_some(y + c * y_stride + i + v * L, value, n);
        }
      }
    }
  });
}

template <typename T>
void log_softmax_forward_planes(const LogSoftmaxForward& p, const Chunks& chunks, int64_t chunk) {
  using acc = typename AccOf<T>::type;
  TileSums<acc> s;
  const bool streamed = chunks.stream && planes_are_aligned<T>(p.output, p.output_strides);
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const Tile tile = tile_of(p.extent, unit);
    const T* x = static_cast<const T*>(p.input) + tile.outer * p.input_strides.outer + tile.inner;
    T* y = static_cast<T*>(p.output) + tile.outer * p.output_strides.outer + tile.inner;
    log_softmax_forward_tile<true>(x, p.input_strides.classes, y, p.output_strides.classes, p.extent.classes,
                                   tile.width, streamed, s);
  }
  if (streamed) end_stream();
}

template <typename T>
void log_softmax_forward_few_classes(const LogSoftmaxForward& p, const Chunks& chunks, int64_t chunk) {
  using acc = typename AccOf<T>::type;
  alignas(64) acc tile[kFewClasses * kGroup<acc>];
  TileSums<acc> s;
  const int classes = static_cast<int>(p.extent.classes);
  const int64_t x_step = row_step(p.extent, p.input_strides), y_step = row_step(p.extent, p.output_strides);
  for_each_run(p.extent, chunks.begin(chunk), chunks.end(chunk), kGroup<acc>, [&](int64_t, const Row& r, int width) {
    rows_to_tile(static_cast<const T*>(p.input) + r.offset(p.input_strides), x_step, classes, width, tile);
    log_softmax_forward_tile<false>(static_cast<const acc*>(tile), kGroup<acc>, tile, kGroup<acc>, classes, width,
                                    false, s);
    tile_to_rows(static_cast<const acc*>(tile), static_cast<T*>(p.output) + r.offset(p.output_strides), y_step, classes,
                 width);
  });
}

// ---- backward: gradient = g - exp(output) Σ g ----

template <typename T>
void log_softmax_backward_rows(const LogSoftmaxBackward& p, const Chunks& chunks, int64_t chunk) {
  using acc = typename AccOf<T>::type;
  constexpr int L = kLanes<acc>;
  const int64_t classes = p.extent.classes;
  for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
    const Row r = row_of(p.extent, row);
    const T* g = static_cast<const T*>(p.grad_output) + r.offset(p.grad_output_strides);
    const T* y = static_cast<const T*>(p.output) + r.offset(p.output_strides);
    T* grad = static_cast<T*>(p.grad_input) + r.offset(p.grad_input_strides);
    double sum = 0;
    for (int64_t start = 0; start < classes; start += kTermsPerLane * L) {
      const int64_t end = classes - start < kTermsPerLane * L ? classes : start + kTermsPerLane * L;
      Vec<acc> block[2] = {};
      int64_t c = start;
      for (; c + 2 * L <= end; c += 2 * L) {
        for (int u = 0; u < 2; ++u) block[u] += load(g + c + u * L);
      }
      for (; c < end; c += L) block[0] += load_some(g + c, end - c < L ? static_cast<int>(end - c) : L, acc(0));
      sum += sum_of_lanes<acc>(block[0] + block[1]);
    }
    const Vec<acc> total = broadcast(static_cast<acc>(sum));
    const auto value = [&](int64_t c, int n) __attribute__((always_inline)) {
      return load_some(g + c, n, acc(0)) - exp_vec(load_some(y + c, n, acc(0))) * total;
    };
    if (chunks.stream) {
      write_row<true>(grad, 0, classes, value);
    } else {
      write_row<false>(grad, 0, classes, value);
    }
  }
  if (chunks.stream) end_stream();
}

template <bool kPrefetch, typename X, typename Y, typename acc>
NLLX_INLINE void log_softmax_backward_tile(const X* g, int64_t g_stride, const X* y, int64_t y_stride, Y* grad,
                                           int64_t grad_stride, int64_t classes, int width, bool streamed) {
  constexpr int L = kLanes<acc>;
  for_each_group<acc>(width, [&](auto count, int i, int k) __attribute__((always_inline)) {
    constexpr int V = decltype(count)::value;
    const int n = V == 1 ? k : L;
    Vec<acc> total[V] = {};
    for (int64_t start = 0; start < classes; start += kClassBlock) {
      const int64_t end = classes - start < kClassBlock ? classes : start + kClassBlock;
      Vec<acc> block[V] = {};
      for (int64_t c = start; c < end; ++c) {
        for (int v = 0; v < V; ++v) {
          if constexpr (V > 1 && kPrefetch) prefetch(y + c * y_stride + i + v * L);
          block[v] += load_some(g + c * g_stride + i + v * L, n, acc(0));
        }
      }
      for (int v = 0; v < V; ++v) total[v] += block[v];
    }
    for (int64_t c = 0; c < classes; ++c) {
      for (int v = 0; v < V; ++v) {
        if constexpr (V > 1 && kPrefetch) prefetch(g + c * g_stride + i + (V + v) * L);
        const Vec<acc> softmax = exp_vec(load_some(y + c * y_stride + i + v * L, n, acc(0)));
        const Vec<acc> value = load_some(g + c * g_stride + i + v * L, n, acc(0)) - softmax * total[v];
        if (V > 1 && streamed) {
          stream(grad + c * grad_stride + i + v * L, value);
        } else {
          store_some(grad + c * grad_stride + i + v * L, value, n);
        }
      }
    }
  });
}

template <typename T>
void log_softmax_backward_planes(const LogSoftmaxBackward& p, const Chunks& chunks, int64_t chunk) {
  const bool streamed = chunks.stream && planes_are_aligned<T>(p.grad_input, p.grad_input_strides);
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const Tile tile = tile_of(p.extent, unit);
    const T* g = static_cast<const T*>(p.grad_output) + tile.outer * p.grad_output_strides.outer + tile.inner;
    const T* y = static_cast<const T*>(p.output) + tile.outer * p.output_strides.outer + tile.inner;
    T* grad = static_cast<T*>(p.grad_input) + tile.outer * p.grad_input_strides.outer + tile.inner;
    log_softmax_backward_tile<true, T, T, typename AccOf<T>::type>(
        g, p.grad_output_strides.classes, y, p.output_strides.classes, grad, p.grad_input_strides.classes,
        p.extent.classes, tile.width, streamed);
  }
  if (streamed) end_stream();
}

template <typename T>
void log_softmax_backward_few_classes(const LogSoftmaxBackward& p, const Chunks& chunks, int64_t chunk) {
  using acc = typename AccOf<T>::type;
  alignas(64) acc g[kFewClasses * kGroup<acc>];
  alignas(64) acc y[kFewClasses * kGroup<acc>];
  const int classes = static_cast<int>(p.extent.classes);
  const int64_t g_step = row_step(p.extent, p.grad_output_strides), y_step = row_step(p.extent, p.output_strides);
  const int64_t grad_step = row_step(p.extent, p.grad_input_strides);
  for_each_run(p.extent, chunks.begin(chunk), chunks.end(chunk), kGroup<acc>, [&](int64_t, const Row& r, int width) {
    rows_to_tile(static_cast<const T*>(p.grad_output) + r.offset(p.grad_output_strides), g_step, classes, width, g);
    rows_to_tile(static_cast<const T*>(p.output) + r.offset(p.output_strides), y_step, classes, width, y);
    log_softmax_backward_tile<false, acc, acc, acc>(g, kGroup<acc>, y, kGroup<acc>, g, kGroup<acc>, classes, width,
                                                    false);
    tile_to_rows(static_cast<const acc*>(g), static_cast<T*>(p.grad_input) + r.offset(p.grad_input_strides), grad_step,
                 classes, width);
  });
}

template <typename T>
void log_softmax_forward(const LogSoftmaxForward& p, const Chunks& chunks, int64_t chunk) {
  if (p.layout == Layout::kPlanes) return log_softmax_forward_planes<T>(p, chunks, chunk);
  has_few_classes(p) ? log_softmax_forward_few_classes<T>(p, chunks, chunk)
                     : log_softmax_forward_rows<T>(p, chunks, chunk);
}
template <typename T>
void log_softmax_backward(const LogSoftmaxBackward& p, const Chunks& chunks, int64_t chunk) {
  if (p.layout == Layout::kPlanes) return log_softmax_backward_planes<T>(p, chunks, chunk);
  has_few_classes(p) ? log_softmax_backward_few_classes<T>(p, chunks, chunk)
                     : log_softmax_backward_rows<T>(p, chunks, chunk);
}
