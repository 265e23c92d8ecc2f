// Statistics of the softmax: rows as cross entropy's, with the first moment of the exponentials; planes likewise.
//
// From the maximum m, s = Σ exp(x - m) and u = Σ exp(x - m) (x - m):
//   log_prob = x_y - m - log s     logsumexp = m + log s     entropy = log s - u / s
//   gradient = p (α + β (x - m)) + γ [c = y]   with p = exp(x - m) / s, β = -g_entropy, γ = g_log_prob and
//   α = g_logsumexp - g_log_prob + g_entropy u / s
// of z instead of x, times dz / dx, where the logits are mapped.

template <typename acc>
struct RowMoments {
  acc max, log_sum, mean;  // mean: u / s
};

// The first of n classes whose logit is `value`, the largest; of NaN the first NaN.
template <typename T, typename acc, bool kMapped>
NLLX_INLINE int64_t first_of(const T* x, int64_t stride, int64_t n, acc value, const LogitMap<acc>& map) {
  for (int64_t c = 0; c < n; ++c) {
    const acc v = logit_at<kMapped>(x + c * stride, map);
    if (v >= value || (value != value && v != v)) return c;
  }
  return -1;
}
// …of adjacent classes.
template <typename T, typename acc, bool kMapped>
NLLX_INLINE int64_t first_equal(const T* x, int64_t n, acc value, const LogitMap<acc>& map) {
  constexpr int L = kLanes<acc>;
  const Vec<acc> wanted = broadcast(value);
  int64_t c = 0;
  for (; c + 4 * L <= n; c += 4 * L) {
    Mask<acc> any{};
    Vec<acc> v[4];
    load_logits<kMapped, 4>(v, x + c, L, L, acc(0), [&](int) -> const LogitMap<acc>& { return map; });
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) any |= v[u] >= wanted;
    if (any_lane(bit_cast<vec_i64>(any))) break;
  }
  const int64_t found = first_of<T, acc, kMapped>(x + c, 1, n - c, value, map);
  return found < 0 ? 0 : c + found;
}

// Of a row whose logits are x, `stride` apart. target_logit: z_y - m. highest: the first class of the maximum.
template <typename T, bool kMapped>
NLLX_INLINE void store_statistics(const SoftmaxStatisticsForward& p, int64_t row, const T* x, int64_t stride,
                                  const LogitMap<typename AccOf<T>::type>& map, typename AccOf<T>::type max, double sum,
                                  double moment, typename AccOf<T>::type target_logit, int64_t highest) {
  using acc = typename AccOf<T>::type;
  const double log_sum = log(sum), mean = moment / sum;
  double logsumexp = static_cast<double>(max) + log_sum;
  if (sum != sum) {
    const int64_t first_nan =
        first_of<T, acc, kMapped>(x, stride, p.extent.classes, static_cast<acc>(__builtin_nanf("")), map);
    // As torch.argmax and torch.logsumexp have it: NaN is the largest, and the logarithm of infinity is infinite.
    if (first_nan >= 0) highest = first_nan;
    if (first_nan < 0) logsumexp = static_cast<double>(max);
  }
  if (p.prediction) p.prediction[row] = highest;
  if (p.log_prob) {
    static_cast<acc*>(p.log_prob)[row] = static_cast<acc>(static_cast<double>(target_logit) - log_sum);
  }
  if (p.logsumexp) static_cast<acc*>(p.logsumexp)[row] = static_cast<acc>(logsumexp);
  if (p.entropy) static_cast<acc*>(p.entropy)[row] = static_cast<acc>(log_sum - mean);
  static_cast<RowMoments<acc>*>(p.row_stats)[row] = {max, static_cast<acc>(log_sum), static_cast<acc>(mean)};
}

// Whether the row counts; if not, it is written.
template <typename T>
NLLX_INLINE bool begin_statistics(const SoftmaxStatisticsForward& p, int64_t row,
                                  IndexTarget<typename AccOf<T>::type>& y, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  y = {0, false, false, acc(1)};
  if (p.targets.index) y = index_target<acc>(p.targets, p.extent.classes, row);
  if (y.bad) note_bad_target(result, row);
  if (!y.ignored && !y.bad) return true;
  void* const numbers[] = {p.log_prob, p.logsumexp, p.entropy};
  for (void* out : numbers) {
    if (out) static_cast<acc*>(out)[row] = 0;
  }
  if (p.prediction) p.prediction[row] = -1;
  static_cast<RowMoments<acc>*>(p.row_stats)[row] = {0, 0, 0};
  return false;
}

template <typename T, bool kMapped>
NLLX_INLINE void finish_statistics(const SoftmaxStatisticsForward& p, int64_t row, const T* x,
                                   const LogitMap<typename AccOf<T>::type>& map,
                                   const IndexTarget<typename AccOf<T>::type>& y,
                                   const RowSums<typename AccOf<T>::type>& s) {
  using acc = typename AccOf<T>::type;
  const acc max = finite_max(s.max);
  const int64_t highest = p.prediction
                              ? s.highest + first_equal<T, acc, kMapped>(x + s.highest, s.highest_classes, s.max, map)
                              : int64_t(0);
  const acc target_logit = p.targets.index ? logit_at<kMapped>(x + y.index, map) - max : acc(0);
  store_statistics<T, kMapped>(p, row, x, 1, map, max, s.sum, s.dot, target_logit, highest);
}

template <typename T, bool kMapped>
void softmax_statistics_forward_rows(const SoftmaxStatisticsForward& p, const Chunks& chunks, int64_t chunk,
                                     ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  const int64_t next_row = row_step(p.extent, p.logits_strides);
  for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
    IndexTarget<acc> y;
    if (!begin_statistics<T>(p, row, y, result)) continue;
    const T* x = static_cast<const T*>(p.logits) + row_of(p.extent, row).offset(p.logits_strides);
    const auto terms = row_terms<acc, acc, kMapped>({}, p.extent, 0, 0, p.options, row);
    const RowSums<acc> s = row_sums<Terms::kMoment, T, acc, acc>(x, p.extent.classes, next_row, terms);
    finish_statistics<T, kMapped>(p, row, x, map_of(terms), y, s);
  }
}

// Few long rows, as cross entropy's. RowPart::mass is where the maximum is, which a double holds exactly.
template <typename T, bool kMapped>
void sum_statistics_segment(const SoftmaxStatisticsForward& p, const Chunks& chunks, int64_t unit, RowPart& part) {
  using acc = typename AccOf<T>::type;
  const int64_t row = unit / chunks.segments, begin = (unit - row * chunks.segments) * Chunks::kSegment;
  const int64_t end = p.extent.classes - begin < Chunks::kSegment ? p.extent.classes : begin + Chunks::kSegment;
  const T* x = static_cast<const T*>(p.logits) + row_of(p.extent, row).offset(p.logits_strides);
  const auto terms = row_terms<acc, acc, kMapped>({}, p.extent, 0, 0, p.options, row);
  const RowSums<acc> s = segment_sums<Terms::kMoment, T, acc, acc>(x, begin, end, end - begin, terms);
  const int64_t highest =
      s.highest + first_equal<T, acc, kMapped>(x + s.highest, s.highest_classes, s.max, map_of(terms));
  part = {static_cast<double>(s.max), s.sum, s.dot, static_cast<double>(highest)};
}
template <typename T, bool kMapped>
void merge_statistics_segments(const SoftmaxStatisticsForward& p, int64_t row, const RowPart* parts, int64_t count,
                               ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  IndexTarget<acc> y;
  if (!begin_statistics<T>(p, row, y, result)) return;
  RowSums<acc> s;
  for (int64_t i = 0; i < count; ++i) {
    const RowSums<acc> part{
        static_cast<acc>(parts[i].max), parts[i].sum, parts[i].dot, 0, static_cast<int64_t>(parts[i].mass), 1};
    s = i == 0 ? part : merged<Terms::kMoment>(s, part);
  }
  const T* x = static_cast<const T*>(p.logits) + row_of(p.extent, row).offset(p.logits_strides);
  const auto terms = row_terms<acc, acc, kMapped>({}, p.extent, 0, 0, p.options, row);
  finish_statistics<T, kMapped>(p, row, x, map_of(terms), y, s);
}

// Planes: the tile's sums by sum_planes, whose `mass` holds where the maximum is.
template <typename T, bool kTarget, bool kMapped>
NLLX_INLINE void softmax_statistics_forward_planes(const SoftmaxStatisticsForward& p, const Chunks& chunks,
                                                   int64_t chunk, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  using integer = typename VecOf<acc>::integer;
  TileSums<acc> s;
  TileTargets<acc> targets;
  TileMap<acc, kMapped> map;
  alignas(64) acc target_logits[kTile];
  const int64_t stride = p.logits_strides.classes;
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const Tile tile = tile_of(p.extent, unit);
    const T* x = static_cast<const T*>(p.logits) + tile.outer * p.logits_strides.outer + tile.inner;
    if constexpr (kTarget) read_targets(p.targets, p.extent.classes, tile.row, tile.width, targets, result);
    if constexpr (kMapped) map.begin(*p.options, tile.row, tile.width);
    sum_planes<Terms::kMoment, kTarget, T, acc, acc>(
        x, x + kTile, stride, p.extent.classes, tile.width, {}, map, s, &targets, target_logits,
        [&](int64_t c) { read_window(p.targets, p.extent.classes, tile.row, tile.width, c, targets, result); });
    for (int i = 0; i < tile.width; ++i) {
      const int64_t row = tile.row + i;
      IndexTarget<acc> y;
      if (!begin_statistics<T>(p, row, y, result)) continue;
      int64_t highest = bit_cast<integer>(s.mass[i]);
      // No logit is above the number that the maximum starts from, and there are equal ones; or there are more classes
      // than the numbers of a window.
      if (s.max[i] == kSmallest<acc> || p.extent.classes > kClassWindow<acc>) {
        highest = first_of<T, acc, kMapped>(x + i, stride, p.extent.classes, s.max[i], map.of_row(i));
      }
      store_statistics<T, kMapped>(p, row, x + i, stride, map.of_row(i), s.max[i], static_cast<double>(s.sum[i]),
                                   static_cast<double>(s.dot[i]), kTarget ? target_logits[i] - s.max[i] : acc(0),
                                   highest);
    }
  }
}

template <typename Problem, typename F>
NLLX_INLINE void with_statistics_instance(const Problem& p, const F& f) {
  p.options&& p.options->map_logits() ? f(Instance<Terms::kMoment, void, true>{})
                                      : f(Instance<Terms::kMoment, void, false>{});
}

template <typename T>
void softmax_statistics_forward(const SoftmaxStatisticsForward& p, const Chunks& chunks, int64_t chunk,
                                ChunkResult& result) {
  with_statistics_instance(p, [&](auto instance) {
    constexpr bool kMapped = decltype(instance)::kMapped;
    if (p.layout == Layout::kRows) {
      softmax_statistics_forward_rows<T, kMapped>(p, chunks, chunk, result);
    } else if (p.targets.index) {
      softmax_statistics_forward_planes<T, true, kMapped>(p, chunks, chunk, result);
    } else {
      softmax_statistics_forward_planes<T, false, kMapped>(p, chunks, chunk, result);
    }
  });
}
template <typename T>
void softmax_statistics_forward_segment(const SoftmaxStatisticsForward& p, const Chunks& chunks, int64_t unit,
                                        RowPart& part) {
  with_statistics_instance(
      p, [&](auto instance) { sum_statistics_segment<T, decltype(instance)::kMapped>(p, chunks, unit, part); });
}
template <typename T>
void softmax_statistics_forward_merge(const SoftmaxStatisticsForward& p, int64_t row, const RowPart* parts,
                                      int64_t count, ChunkResult& result) {
  with_statistics_instance(p, [&](auto instance) {
    merge_statistics_segments<T, decltype(instance)::kMapped>(p, row, parts, count, result);
  });
}

// ---- backward ----

// The numbers of a row that its gradient is made of, from the incoming gradients.
template <typename acc>
struct StatisticsGradient {
  acc max, alpha, beta, gamma;  // alpha and beta with 1 / s
};
template <typename acc>
NLLX_INLINE StatisticsGradient<acc> statistics_gradient(const SoftmaxStatisticsBackward& p, int64_t row) {
  const RowMoments<acc> stats = static_cast<const RowMoments<acc>*>(p.row_stats)[row];
  const auto incoming = [&](const void* g) { return g ? static_cast<double>(static_cast<const acc*>(g)[row]) : 0.; };
  const double log_prob = incoming(p.grad_log_prob), entropy = incoming(p.grad_entropy);
  const double scale = exp(-static_cast<double>(stats.log_sum));
  double alpha = incoming(p.grad_logsumexp) - log_prob;
  // Nothing of the mean where no gradient comes: it is NaN where the entropy is.
  if (entropy != 0) alpha += entropy * static_cast<double>(stats.mean);
  return {stats.max, static_cast<acc>(scale * alpha), static_cast<acc>(-scale * entropy), static_cast<acc>(log_prob)};
}

template <typename T, bool kMapped>
void softmax_statistics_backward_rows(const SoftmaxStatisticsBackward& p, const Chunks& chunks, int64_t chunk,
                                      ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  constexpr int L = kLanes<acc>;
  const int64_t classes = p.extent.classes;
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const int64_t row = unit / chunks.segments, begin = (unit - row * chunks.segments) * Chunks::kSegment;
    const int64_t end = chunks.segments == 1 || classes - begin < Chunks::kSegment ? classes : begin + Chunks::kSegment;
    const Row r = row_of(p.extent, row);
    const T* x = static_cast<const T*>(p.logits) + r.offset(p.logits_strides);
    T* grad = static_cast<T*>(p.grad_logits) + r.offset(p.grad_strides);
    IndexTarget<acc> y{-1, false, false, acc(0)};
    if (p.targets.index) y = index_target<acc>(p.targets, classes, row);
    const bool wants_scale_gradient = kMapped && p.wants_scale_gradient();
    if (y.bad) note_bad_target(result, row);
    if (y.ignored || y.bad) {
      if (wants_scale_gradient) add_scale_gradient(p, unit, 0, result);
      memset(grad + begin, 0, sizeof(T) * static_cast<size_t>(end - begin));
      continue;
    }
    const StatisticsGradient<acc> s = statistics_gradient<acc>(p, row);
    const Vec<acc> max = broadcast(s.max), alpha = broadcast(s.alpha), beta = broadcast(s.beta);
    const LogitMap<acc> map = kMapped ? row_map<acc>(*p.options, row).vec() : LogitMap<acc>();
    const auto map_at = [&](int) -> const LogitMap<acc>& { return map; };
    Vec<acc>* block = nullptr;  // of what logit_scale gets
    const auto value = [&](auto count, int64_t first, int n, Vec<acc>* g) __attribute__((always_inline)) {
      constexpr int K = decltype(count)::value;
      MappedLogits<K, kMapped, acc> logits;
      Vec<acc> v[K];
      const auto vector = [&](int u) __attribute__((always_inline)) {
        return load_some(x + first + u * L, lanes_of<acc>(count, u, n), acc(0));
      };
      logits.load(v, vector, map_at, [&](int) __attribute__((always_inline)) { return max; });
#pragma GCC unroll 8
      for (int u = 0; u < K; ++u) g[u] = v[u];
      exp_vecs<K>(g);
#pragma GCC unroll 8
      for (int u = 0; u < K; ++u) {
        g[u] *= alpha + beta * not_vanished<acc>(v[u]);
        logits.differentiate(u, lanes_of<acc>(count, u, n), map, g[u], block);
      }
    };
    const bool has_target = y.index >= begin && y.index < end;
    acc at_target = 0;
    double target_by_scale = 0;
    if (has_target) {
      MappedLogits<1, kMapped, acc> logit;
      Vec<acc> v;
      logit.load(&v, [&](int) { return broadcast(to_acc(x[y.index])); }, map_at, [&](int) { return max; });
      Vec<acc> g = exp_vec(v) * (alpha + beta * not_vanished<acc>(v)) + s.gamma, of_target = broadcast(s.gamma), sum{};
      logit.differentiate(0, L, map, g, nullptr);
      logit.differentiate(0, L, map, of_target, &sum);
      at_target = g[0];
      target_by_scale = static_cast<double>(sum[0]);
    }
    const int64_t at = has_target ? y.index : -1;
    if (!wants_scale_gradient) {
      write_row(chunks.stream, grad, begin, end, value, at, from_acc<T>(at_target));
      continue;
    }
    const double sum = sum_of_blocks<acc>(begin, end, [&](int64_t from, int64_t to, Vec<acc>& of_block) {
      block = &of_block;
      // Not streamed: which class is which lane would depend on where the gradient lies, and so the bits of the sum.
      write_row(false, grad, from, to, value, at, from_acc<T>(at_target));
    });
    const double per_scale = static_cast<double>(row_map<acc>(*p.options, row).per_scale);
    add_scale_gradient(p, unit, per_scale * (sum + target_by_scale), result);
  }
}

template <typename T, bool kMapped>
void softmax_statistics_backward_planes(const SoftmaxStatisticsBackward& p, const Chunks& chunks, int64_t chunk,
                                        ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  constexpr int L = kLanes<acc>;
  alignas(64) acc max[kTileRoom] = {}, alpha[kTileRoom] = {}, beta[kTileRoom] = {}, gamma[kTileRoom] = {};
  TileTargets<acc> targets;
  TileMap<acc, kMapped> map;
  TileScaleGradient<acc, kMapped> by_scale;
  const bool has_scale_gradient = kMapped && p.wants_scale_gradient();
  const int64_t classes = p.extent.classes, stride = p.logits_strides.classes;
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const Tile tile = tile_of(p.extent, unit);
    const T* x = static_cast<const T*>(p.logits) + tile.outer * p.logits_strides.outer + tile.inner;
    T* grad = static_cast<T*>(p.grad_logits) + tile.outer * p.grad_strides.outer + tile.inner;
    if (p.targets.index) {
      read_targets(p.targets, classes, tile.row, tile.width, targets, result);
    } else {  // every row counts, and none has a class
      for (int i = 0; i < kTileRoom; ++i) targets.index[i] = number_in_window<acc>(-1, 0);
    }
    for (int i = 0; i < tile.width; ++i) {
      const StatisticsGradient<acc> s = statistics_gradient<acc>(p, tile.row + i);
      max[i] = s.max;
      alpha[i] = s.alpha;
      beta[i] = s.beta;
      gamma[i] = s.gamma;
    }
    if constexpr (kMapped) map.begin(*p.options, tile.row, tile.width);
    if (has_scale_gradient) by_scale.begin(tile.width);
    acc* const sums = has_scale_gradient ? by_scale.block : nullptr;
    for (int64_t c = 0; c < classes; ++c) {
      const T* xc = x + c * stride;
      const T* next = c + 1 < classes ? xc + stride : x + kTile;
      if (p.targets.index && starts_a_window<acc>(c)) {
        read_window(p.targets, classes, tile.row, tile.width, c, targets, result);
      }
      const typename VecOf<acc>::integer number = class_in_window<acc>(c);
      const auto value = [&](auto count, int64_t first, int n, Vec<acc>* g) __attribute__((always_inline)) {
        constexpr int K = decltype(count)::value;
        MappedLogits<K, kMapped, acc> logits;
        Vec<acc> v[K];
        const auto vector = [&](int u) __attribute__((always_inline)) {
          prefetch(next + first + u * L);
          return load_some(xc + first + u * L, lanes_of<acc>(count, u, n), acc(0));
        };
        logits.load(
            v, vector, [&](int u) __attribute__((always_inline)) { return map.at(first + u * L); },
            [&](int u) __attribute__((always_inline)) { return load(max + first + u * L); });
#pragma GCC unroll 8
        for (int u = 0; u < K; ++u) g[u] = v[u];
        exp_vecs<K>(g);
#pragma GCC unroll 8
        for (int u = 0; u < K; ++u) {
          const int64_t i = first + u * L;
          g[u] *= load(alpha + i) + load(beta + i) * not_vanished<acc>(v[u]);
          Mask<acc> index;
          memcpy(&index, targets.index + i, sizeof index);
          g[u] += select(index == number, load(gamma + i), Vec<acc>{});
          Vec<acc> sum{};
          logits.differentiate(u, lanes_of<acc>(count, u, n), map.at(i), g[u], sums ? &sum : nullptr);
          if (sums) store(sums + i, load(sums + i) + sum);
          g[u] = select(index >= 0, g[u], Vec<acc>{});
        }
      };
      write_row(chunks.stream, grad + c * p.grad_strides.classes, 0, tile.width, value);
      if (has_scale_gradient && c % kClassBlock == kClassBlock - 1) by_scale.end_block(tile.width);
    }
    if (has_scale_gradient) {
      by_scale.end(p, tile.row, tile.width, map, p.targets.index ? targets.index : nullptr, result);
    }
  }
}

template <typename T>
void softmax_statistics_backward(const SoftmaxStatisticsBackward& p, const Chunks& chunks, int64_t chunk,
                                 ChunkResult& result) {
  with_statistics_instance(p, [&](auto instance) {
    constexpr bool kMapped = decltype(instance)::kMapped;
    if (p.layout == Layout::kRows) {
      softmax_statistics_backward_rows<T, kMapped>(p, chunks, chunk, result);
    } else {
      softmax_statistics_backward_planes<T, kMapped>(p, chunks, chunk, result);
    }
  });
  if (chunks.stream) end_stream();
}
