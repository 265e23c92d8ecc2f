// nll_loss: the forward gathers one number per row; the backward writes zeros and that number's place together.

template <typename T>
void nll_loss_forward(const NllLossForward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  TileTargets<acc> targets;
  alignas(64) acc loss[kTile];
  const int64_t step = row_step(p.extent, p.strides), classes = p.extent.classes;
  for_each_run(p.extent, chunks.begin(chunk), chunks.end(chunk), kTile, [&](int64_t row, const Row& r, int width) {
    const T* x = static_cast<const T*>(p.log_probs) + r.offset(p.strides);
    read_targets(p.targets, classes, row, width, targets, result);
    // Nothing but loads, so that many are under way.
    for (int i = 0; i < width; ++i) {
      const int64_t y = targets.index[i];
      loss[i] = y < 0 ? acc(0) : to_acc(x[i * step + y * p.strides.classes]);
    }
    for (int i = 0; i < width; ++i) loss[i] = -weighted(targets.weight[i], loss[i]);
    for (int i = 0; i < width; ++i) loss[i] = targets.index[i] < 0 ? acc(0) : loss[i];
    result.loss += sum_in_double(loss, width);
    result.weight += sum_in_double(targets.weight, width);
    if (p.row_loss) {
      for (int i = 0; i < width; ++i) store_row_loss<T>(p.row_loss, p.row_loss_is_acc, row + i, loss[i]);
    }
  });
}

template <typename T>
void nll_loss_backward_rows(const NllLossBackward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  TileTargets<acc> targets;
  const int64_t step = row_step(p.extent, p.grad_strides), classes = p.extent.classes;
  const auto zero = [](int64_t, int) __attribute__((always_inline)) { return Vec<acc>{}; };
  for_each_run(p.extent, chunks.begin(chunk), chunks.end(chunk), kTile, [&](int64_t row, const Row& r, int width) {
    T* grad = static_cast<T*>(p.grad_log_probs) + r.offset(p.grad_strides);
    read_targets(p.targets, classes, row, width, targets, result);
    for (int i = 0; i < width; ++i) {
      if (chunks.stream) {
        write_row<true>(grad + i * step, 0, classes, zero);
      } else {
        memset(grad + i * step, 0, sizeof(T) * static_cast<size_t>(classes));
      }
      if (targets.index[i] < 0) continue;
      const acc k = incoming_gradient<acc>(p.grad_output, p.grad_output_stride, p.total_weight, row + i);
      grad[i * step + static_cast<int64_t>(targets.index[i])] = from_acc<T>(-targets.weight[i] * k);
    }
  });
  if (chunks.stream) end_stream();
}

template <typename T>
void nll_loss_backward_planes(const NllLossBackward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  TileTargets<acc> targets;
  alignas(64) acc value[kTile];
  const int64_t classes = p.extent.classes;
  const bool stream_planes = chunks.stream && planes_are_aligned<T>(p.grad_log_probs, p.grad_strides);
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const Tile tile = tile_of(p.extent, unit);
    T* grad = static_cast<T*>(p.grad_log_probs) + tile.outer * p.grad_strides.outer + tile.inner;
    read_targets(p.targets, classes, tile.row, tile.width, targets, result);
    for (int i = 0; i < tile.width; ++i) {
      const acc k = incoming_gradient<acc>(p.grad_output, p.grad_output_stride, p.total_weight, tile.row + i);
      value[i] = -targets.weight[i] * k;
    }
    for (int64_t c = 0; c < classes; ++c) {
      T* to = grad + c * p.grad_strides.classes;
      NLLX_FOR_VECTORS(i, k, tile.width) {
        Mask<acc> index;
        memcpy(&index, targets.index + i, sizeof index);
        const Vec<acc> g = select(index == static_cast<typename VecOf<acc>::integer>(c), load(value + i), Vec<acc>{});
        if (stream_planes && k == kLanes<acc>) {
          stream(to + i, g);
        } else {
          store_some(to + i, g, k);
        }
      }
    }
  }
  if (stream_planes) end_stream();
}

template <typename T>
void nll_loss_backward(const NllLossBackward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  p.layout == Layout::kRows ? nll_loss_backward_rows<T>(p, chunks, chunk, result)
                            : nll_loss_backward_planes<T>(p, chunks, chunk, result);
}
