// nll_loss: the forward gathers one number per row; the backward writes zeros and that number's place together.

template <typename T>
void nll_loss_forward(const NllLossForward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  TileTargets<acc> targets;
  alignas(64) acc loss[kTile];
  const int64_t step = row_step(p.extent, p.strides), classes = p.extent.classes;
  const auto store_losses = [&](int64_t row, int width) {
    for (int i = 0; p.row_loss && i < width; ++i) {
      store_row_loss<T>(p.row_loss, p.row_loss_is_acc, row + i, loss[i]);
    }
  };
  for_each_run(p.extent, chunks.begin(chunk), chunks.end(chunk), kTile, [&](int64_t row, const Row& r, int width) {
    const T* x = static_cast<const T*>(p.log_probs) + r.offset(p.strides);
    if (classes > kClassWindow<acc>) {
      for (int i = 0; i < width; ++i) {
        const IndexTarget<acc> y = index_target<acc>(p.targets, classes, row + i);
        if (y.bad) note_bad_target(result, row + i);
        const bool counts = !y.ignored && !y.bad;
        loss[i] = counts ? -weighted(y.weight, to_acc(x[i * step + y.index * p.strides.classes])) : acc(0);
        result.loss += static_cast<double>(loss[i]);
        result.weight += static_cast<double>(y.weight);
      }
      return store_losses(row, width);
    }
    read_targets(p.targets, classes, row, width, targets, result);
    if (targets.counted == 0) {
      memset(loss, 0, sizeof loss);
    } else {
      gather_targets(x, step, p.strides.classes, width, targets, loss);
    }
    NLLX_FOR_VECTORS(i, k, width) {
      Mask<acc> index;
      memcpy(&index, targets.index + i, sizeof index);
      const Vec<acc> l = -weighted_vec<acc>(load(targets.weight + i), load(loss + i));
      store(loss + i, select(index >= 0, l, Vec<acc>{}));
    }
    result.loss += sum_in_double(loss, width);
    result.weight += sum_of_weights(p.targets, targets, width);
    store_losses(row, width);
  });
}

// The gradients at the targets.
template <typename acc>
NLLX_INLINE void nll_gradients(const NllLossBackward& p, int64_t row, int width, const TileTargets<acc>& targets,
                               acc* value) {
  if (p.grad_output_stride == 0) {
    const acc k = incoming_gradient<acc>(p.grad_output, 0, p.total_weight, row);
    for (int i = 0; i < width; ++i) value[i] = -targets.weight[i] * k;
  } else {
    for (int i = 0; i < width; ++i) {
      value[i] = -targets.weight[i] * incoming_gradient<acc>(p.grad_output, 1, p.total_weight, row + i);
    }
  }
}

// Zeros, and the value at the target.
template <typename T>
NLLX_INLINE void write_nll_gradient(bool streamed, T* grad, int64_t classes, int64_t index, T value) {
  const auto zero = [](auto count, int64_t, int, Vec<typename AccOf<T>::type>* v) __attribute__((always_inline)) {
    for (int u = 0; u < decltype(count)::value; ++u) v[u] = Vec<typename AccOf<T>::type>{};
  };
  write_row(streamed, grad, 0, classes, zero, index, value);
}

template <typename T>
void nll_loss_backward_rows(const NllLossBackward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  const int64_t step = row_step(p.extent, p.grad_strides), classes = p.extent.classes;
  for_each_run(p.extent, chunks.begin(chunk), chunks.end(chunk), kTile, [&](int64_t row, const Row& r, int width) {
    T* grad = static_cast<T*>(p.grad_log_probs) + r.offset(p.grad_strides);
    for (int i = 0; i < width; ++i) {
      const IndexTarget<acc> y = index_target<acc>(p.targets, classes, row + i);
      if (y.bad) note_bad_target(result, row + i);
      const acc k = incoming_gradient<acc>(p.grad_output, p.grad_output_stride, p.total_weight, row + i);
      write_nll_gradient(chunks.stream, grad + i * step, classes, y.ignored || y.bad ? -1 : y.index,
                         from_acc<T>(-y.weight * k));
    }
  });
  if (chunks.stream) end_stream();
}

// Rows of few classes, in groups that are a number of whole lines; they are made in the cache and streamed from there.
template <typename T>
void nll_loss_backward_short_rows(const NllLossBackward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  constexpr int kRows = kLine<T>;
  TileTargets<acc> targets;
  alignas(64) acc value[kTile];
  alignas(64) T staged[kRows * kShortRow<acc>];
  const int64_t step = row_step(p.extent, p.grad_strides);
  const int classes = static_cast<int>(p.extent.classes);
  for_each_run(p.extent, chunks.begin(chunk), chunks.end(chunk), kTile, [&](int64_t row, const Row& r, int width) {
    T* grad = static_cast<T*>(p.grad_log_probs) + r.offset(p.grad_strides);
    read_targets(p.targets, classes, row, width, targets, result);
    nll_gradients(p, row, width, targets, value);
    for (int begin = 0; begin < width; begin += kRows) {
      const int rows = width - begin < kRows ? width - begin : kRows;
      T* to = grad + begin * step;
      const bool adjacent = step == classes, streamed = chunks.stream && adjacent && rows == kRows && starts_a_line(to);
      T* out = streamed ? staged : to;
      if (adjacent) memset(out, 0, sizeof(T) * static_cast<size_t>(rows * classes));
      for (int i = 0; i < rows; ++i) {
        T* g = out + i * step;
        if (!adjacent) memset(g, 0, sizeof(T) * static_cast<size_t>(classes));
        if (targets.index[begin + i] >= 0) g[targets.index[begin + i]] = from_acc<T>(value[begin + i]);
      }
      for (int line = 0; streamed && line < classes; ++line) {
        stream_line(to + line * kLine<T>, staged + line * kLine<T>);
      }
    }
  });
  if (chunks.stream) end_stream();
}

template <typename T>
void nll_loss_backward_planes(const NllLossBackward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  TileTargets<acc> targets;
  alignas(64) acc value[kTileRoom];
  const int64_t classes = p.extent.classes;
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const Tile tile = tile_of(p.extent, unit);
    T* grad = static_cast<T*>(p.grad_log_probs) + tile.outer * p.grad_strides.outer + tile.inner;
    read_targets(p.targets, classes, tile.row, tile.width, targets, result);
    nll_gradients(p, tile.row, tile.width, targets, value);
    for (int64_t c = 0; c < classes; ++c) {
      if (starts_a_window<acc>(c)) read_window(p.targets, classes, tile.row, tile.width, c, targets, result);
      T* to = grad + c * p.grad_strides.classes;
      const typename VecOf<acc>::integer number = class_in_window<acc>(c);
      const auto gradient = [&](auto count, int64_t first, int, Vec<acc>* g) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int u = 0; u < decltype(count)::value; ++u) {
          const int64_t i = first + u * kLanes<acc>;
          Mask<acc> index;
          memcpy(&index, targets.index + i, sizeof index);
          g[u] = select(index == number, load(value + i), Vec<acc>{});
        }
      };
      write_row(chunks.stream, to, 0, tile.width, gradient);
    }
  }
  if (chunks.stream) end_stream();
}

template <typename T>
void nll_loss_backward(const NllLossBackward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  if (p.layout == Layout::kPlanes) return nll_loss_backward_planes<T>(p, chunks, chunk, result);
  has_short_rows<typename AccOf<T>::type>(p.layout, p.extent)
      ? nll_loss_backward_short_rows<T>(p, chunks, chunk, result)
      : nll_loss_backward_rows<T>(p, chunks, chunk, result);
}
