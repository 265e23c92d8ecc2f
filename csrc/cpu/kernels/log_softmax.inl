// log_softmax, on the sums of rows.inl, planes.inl and short_rows.inl.

template <typename T>
void log_softmax_forward_rows(const LogSoftmaxForward& p, const Chunks& chunks, int64_t chunk) {
  using acc = typename AccOf<T>::type;
  const int64_t next_row = row_step(p.extent, p.input_strides);
  for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
    const Row r = row_of(p.extent, row);
    const T* x = static_cast<const T*>(p.input) + r.offset(p.input_strides);
    T* y = static_cast<T*>(p.output) + r.offset(p.output_strides);
    const RowStats<acc> s =
        row_sums<Terms::kNone, T, acc, T>(x, p.extent.classes, next_row, ClassTerms<acc, T>{}).stats();
    const Vec<acc> m = broadcast(s.max), log_sum = broadcast(s.log_sum);
    const auto value = [&](auto count, int64_t c, int n, Vec<acc>* v) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int u = 0; u < decltype(count)::value; ++u) {
        v[u] = (load_some(x + c + u * kLanes<acc>, lanes_of<acc>(count, u, n), acc(0)) - m) - log_sum;
      }
    };
    write_row(chunks.stream, y, 0, p.extent.classes, value);
  }
  if (chunks.stream) end_stream();
}

template <typename T>
void log_softmax_forward_planes(const LogSoftmaxForward& p, const Chunks& chunks, int64_t chunk) {
  using acc = typename AccOf<T>::type;
  constexpr int L = kLanes<acc>;
  TileSums<acc> s;
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const Tile tile = tile_of(p.extent, unit);
    const T* x = static_cast<const T*>(p.input) + tile.outer * p.input_strides.outer + tile.inner;
    T* y = static_cast<T*>(p.output) + tile.outer * p.output_strides.outer + tile.inner;
    sum_planes<Terms::kNone, false, T, acc, T>(x, x, p.input_strides.classes, p.extent.classes, tile.width,
                                               ClassTerms<acc, T>{}, TileMap<acc, false>(), s, nullptr, nullptr,
                                               [](int64_t) {});
    NLLX_FOR_VECTORS(i, k, tile.width) store(s.sum + i, log_vec(load(s.sum + i)));
    for (int64_t c = 0; c < p.extent.classes; ++c) {
      const T* from = x + c * p.input_strides.classes;
      const T* next = c + 1 < p.extent.classes ? from + p.input_strides.classes : x + kTile;
      T* to = y + c * p.output_strides.classes;
      const auto value = [&](auto count, int64_t first, int k, Vec<acc>* v) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int u = 0; u < decltype(count)::value; ++u) {
          const int64_t i = first + u * L;
          prefetch(next + i);
          v[u] = (load_some(from + i, lanes_of<acc>(count, u, k), acc(0)) - load(s.max + i)) - load(s.sum + i);
        }
      };
      write_row(chunks.stream, to, 0, tile.width, value);
    }
  }
  if (chunks.stream) end_stream();
}

template <typename T>
void log_softmax_forward_short_rows(const LogSoftmaxForward& p, const Chunks& chunks, int64_t chunk) {
  using acc = typename AccOf<T>::type;
  constexpr int L = kLanes<acc>;
  alignas(64) acc tile[kFew * kGroup];
  TileSums<acc> s;
  const int classes = static_cast<int>(p.extent.classes);
  const int64_t x_step = row_step(p.extent, p.input_strides), y_step = row_step(p.extent, p.output_strides);
  const ClassTerms<acc, T> none{};
  for_each_run(p.extent, chunks.begin(chunk), chunks.end(chunk), kGroup, [&](int64_t, const Row& r, int width) {
    const T* x = static_cast<const T*>(p.input) + r.offset(p.input_strides);
    T* y = static_cast<T*>(p.output) + r.offset(p.output_strides);
    const bool few = has_few_classes(classes);
    if (few) rows_to_tile(x, x_step, classes, width, tile);
    for (int i = 0; i < width; i += L) {
      if (few) {
        sum_few<Terms::kNone>(tile, classes, i, none, s);
      } else {
        sum_short_rows<Terms::kNone, T, acc, T>(x + i * x_step, x_step, classes, i, width - i < L ? width - i : L, none,
                                                0, s);
      }
      const Vec<acc> max = load(s.max + i), log_sum = log_vec(load(s.sum + i));
      store(s.sum + i, log_sum);
      for (int c = 0; few && c < classes; ++c) {
        acc* v = tile + c * kGroup + i;
        store(v, (load(v) - max) - log_sum);
      }
    }
    if (few) return tile_to_rows(chunks.stream, static_cast<const acc*>(tile), y, y_step, classes, width);
    for (int i = 0; i < width; ++i) {
      const Vec<acc> max = broadcast(s.max[i]), log_sum = broadcast(s.sum[i]);
      const T* from = x + i * x_step;
      const auto value = [&](auto count, int64_t c, int n, Vec<acc>* v) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int u = 0; u < decltype(count)::value; ++u) {
          v[u] = (load_some(from + c + u * L, lanes_of<acc>(count, u, n), acc(0)) - max) - log_sum;
        }
      };
      write_row(chunks.stream, y + i * y_step, 0, classes, value);
    }
  });
  if (chunks.stream) end_stream();
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
      Vec<acc> block[4] = {};
      int64_t c = start;
      for (; c + 4 * L <= end; c += 4 * L) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) block[u] += load(g + c + u * L);
      }
      for (; c < end; c += L) block[0] += load_some(g + c, end - c < L ? static_cast<int>(end - c) : L, acc(0));
      sum += sum_of_lanes<acc>((block[0] + block[1]) + (block[2] + block[3]));
    }
    const Vec<acc> total = broadcast(static_cast<acc>(sum));
    const auto value = [&](auto count, int64_t c, int n, Vec<acc>* v) __attribute__((always_inline)) {
      constexpr int K = decltype(count)::value;
#pragma GCC unroll 8
      for (int u = 0; u < K; ++u) v[u] = load_some(y + c + u * L, lanes_of<acc>(count, u, n), acc(0));
      exp_vecs<K>(v);
#pragma GCC unroll 8
      for (int u = 0; u < K; ++u) {
        v[u] = load_some(g + c + u * L, lanes_of<acc>(count, u, n), acc(0)) - v[u] * total;
      }
    };
    write_row(chunks.stream, grad, 0, classes, value);
  }
  if (chunks.stream) end_stream();
}

template <typename T>
void log_softmax_backward_planes(const LogSoftmaxBackward& p, const Chunks& chunks, int64_t chunk) {
  using acc = typename AccOf<T>::type;
  constexpr int L = kLanes<acc>;
  alignas(64) acc total[kTileRoom], rest[kTile], block[kTile];
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const Tile tile = tile_of(p.extent, unit);
    const T* g = static_cast<const T*>(p.grad_output) + tile.outer * p.grad_output_strides.outer + tile.inner;
    const T* y = static_cast<const T*>(p.output) + tile.outer * p.output_strides.outer + tile.inner;
    T* grad = static_cast<T*>(p.grad_input) + tile.outer * p.grad_input_strides.outer + tile.inner;
    NLLX_FOR_VECTORS(i, k, tile.width) {
      store(total + i, Vec<acc>{});
      store(rest + i, Vec<acc>{});
    }
    for (int64_t start = 0; start < p.extent.classes; start += kClassBlock) {
      const int64_t end = p.extent.classes - start < kClassBlock ? p.extent.classes : start + kClassBlock;
      NLLX_FOR_VECTORS(i, k, tile.width) store(block + i, Vec<acc>{});
      for (int64_t c = start; c < end; ++c) {
        const T* gc = g + c * p.grad_output_strides.classes;
        NLLX_FOR_VECTORS(i, k, tile.width) {
          prefetch(gc + p.grad_output_strides.classes + i);
          store(block + i, load(block + i) + load_some(gc + i, k, acc(0)));
        }
      }
      NLLX_FOR_VECTORS(i, k, tile.width) {
        Vec<acc> sum = load(total + i), rounded_off = load(rest + i);
        add_with_rest(sum, rounded_off, load(block + i));
        store(total + i, sum);
        store(rest + i, rounded_off);
      }
    }
    NLLX_FOR_VECTORS(i, k, tile.width) store(total + i, with_rest(load(total + i), load(rest + i)));
    for (int64_t c = 0; c < p.extent.classes; ++c) {
      const T* gc = g + c * p.grad_output_strides.classes;
      const T* yc = y + c * p.output_strides.classes;
      T* to = grad + c * p.grad_input_strides.classes;
      const auto value = [&](auto count, int64_t first, int k, Vec<acc>* v) __attribute__((always_inline)) {
        constexpr int K = decltype(count)::value;
#pragma GCC unroll 8
        for (int u = 0; u < K; ++u) {
          const int64_t i = first + u * L;
          prefetch(gc + p.grad_output_strides.classes + i);
          prefetch(yc + p.output_strides.classes + i);
          v[u] = load_some(yc + i, lanes_of<acc>(count, u, k), acc(0));
        }
        exp_vecs<K>(v);
#pragma GCC unroll 8
        for (int u = 0; u < K; ++u) {
          const int64_t i = first + u * L;
          v[u] = load_some(gc + i, lanes_of<acc>(count, u, k), acc(0)) - v[u] * load(total + i);
        }
      };
      write_row(chunks.stream, to, 0, tile.width, value);
    }
  }
  if (chunks.stream) end_stream();
}

template <typename T>
void log_softmax_backward_few_classes(const LogSoftmaxBackward& p, const Chunks& chunks, int64_t chunk) {
  using acc = typename AccOf<T>::type;
  constexpr int L = kLanes<acc>;
  alignas(64) acc g[kFew * kGroup];
  alignas(64) acc y[kFew * kGroup];
  const int classes = static_cast<int>(p.extent.classes);
  const int64_t g_step = row_step(p.extent, p.grad_output_strides), y_step = row_step(p.extent, p.output_strides);
  const int64_t grad_step = row_step(p.extent, p.grad_input_strides);
  for_each_run(p.extent, chunks.begin(chunk), chunks.end(chunk), kGroup, [&](int64_t, const Row& r, int width) {
    rows_to_tile(static_cast<const T*>(p.grad_output) + r.offset(p.grad_output_strides), g_step, classes, width, g);
    rows_to_tile(static_cast<const T*>(p.output) + r.offset(p.output_strides), y_step, classes, width, y);
    for (int i = 0; i < width; i += L) {
      Vec<acc> total{};
      for (int c = 0; c < classes; ++c) total += load(g + c * kGroup + i);
      for (int c = 0; c < classes; ++c) {
        acc* v = g + c * kGroup + i;
        store(v, load(v) - exp_vec(load(y + c * kGroup + i)) * total);
      }
    }
    tile_to_rows(chunks.stream, static_cast<const acc*>(g),
                 static_cast<T*>(p.grad_input) + r.offset(p.grad_input_strides), grad_step, classes, width);
  });
  if (chunks.stream) end_stream();
}

template <typename T>
void log_softmax_forward(const LogSoftmaxForward& p, const Chunks& chunks, int64_t chunk) {
  if (p.layout == Layout::kPlanes) return log_softmax_forward_planes<T>(p, chunks, chunk);
  has_short_rows<typename AccOf<T>::type>(p.layout, p.extent) ? log_softmax_forward_short_rows<T>(p, chunks, chunk)
                                                              : log_softmax_forward_rows<T>(p, chunks, chunk);
}
template <typename T>
void log_softmax_backward(const LogSoftmaxBackward& p, const Chunks& chunks, int64_t chunk) {
  if (p.layout == Layout::kPlanes) return log_softmax_backward_planes<T>(p, chunks, chunk);
  has_few_classes(p.extent.classes) ? log_softmax_backward_few_classes<T>(p, chunks, chunk)
                                    : log_softmax_backward_rows<T>(p, chunks, chunk);
}
