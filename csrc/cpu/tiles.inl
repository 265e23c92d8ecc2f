// Cross entropy where vectors run over neighbouring rows: planes, and rows of so few classes that they would fill
// vectors badly, which are transposed on the way into the first-level cache.
//
// A tile is up to kTile neighbouring rows; it is taken in groups of up to kGroupVectors vectors of rows, whose sums
// stay in registers while the classes go by. The classes of a group are read in blocks that stay in the first-level
// cache: once for the maximum, once for the sum of exponentials, during which the next group's are prefetched.

constexpr int kGroupVectors = 4;
template <typename acc>
constexpr int kGroup = kGroupVectors * kLanes<acc>;
// Classes whose exponentials a lane adds in acc before they are added to the other blocks' sum.
constexpr int64_t kClassBlock = 64;

// The coefficients of class c of the vector of rows from i on, of which the first k exist.
template <Terms kTerms, typename acc, typename P>
NLLX_INLINE Vec<acc> tile_coefficients(const ClassTerms<acc, P>& t, int64_t c, int i, int k) {
  if constexpr (kTerms == Terms::kWeighted) return broadcast(t.uniform * t.weight[c]);
  Vec<acc> a = broadcast(t.uniform);
  if constexpr (kTerms == Terms::kProbabilities) {
    a += t.scale * load_some(t.probabilities + c * t.stride + i, k, acc(0));
    if (t.weight) a *= t.weight[c];
  }
  return a;
}

template <typename acc>
struct TileSums {
  alignas(64) acc max[kTile], sum[kTile], dot[kTile], mass[kTile];
};

// The sums of V vectors of rows from i on; the last one has k lanes. x: logits of class 0 of the tile's first row.
template <Terms kTerms, int V, bool kPrefetch, typename X, typename acc, typename P>
NLLX_INLINE void group_sums(const X* x, int64_t stride, int64_t classes, int i, int k, const ClassTerms<acc, P>& terms,
                            TileSums<acc>& s) {
  constexpr int L = kLanes<acc>;
  Vec<acc> max[V], sum[V], rest[V], dot[V], mass[V];
  for (int v = 0; v < V; ++v) {
    max[v] = broadcast(kLowest<acc>);
    sum[v] = rest[v] = dot[v] = mass[v] = Vec<acc>{};
  }
  const auto logits = [&](int64_t c, int v) __attribute__((always_inline)) {
    return V == 1 ? load_some(x + c * stride + i, k, kLowest<acc>) : load(x + c * stride + i + v * L);
  };
  double uniform_mass = 0;
  for (int64_t start = 0; start < classes; start += kClassBlock) {
    const int64_t end = classes - start < kClassBlock ? classes : start + kClassBlock;
    Vec<acc> before[V], shift[V], block_sum[V], block_dot[V], block_mass[V];
    for (int v = 0; v < V; ++v) {
      before[v] = max[v];
      block_sum[v] = block_dot[v] = block_mass[v] = Vec<acc>{};
    }
    for (int64_t c = start; c < end; ++c) {
      for (int v = 0; v < V; ++v) max[v] = max_not_nan(max[v], logits(c, v));
    }
    for (int v = 0; v < V; ++v) {
      shift[v] = select(max[v] == kLowest<acc>, Vec<acc>{}, max[v]);
      if (start == 0) continue;
      // Nothing was summed before the first finite one.
      const Vec<acc> moved = select(before[v] == kLowest<acc>, Vec<acc>{}, before[v]) - shift[v];
      const Vec<acc> factor = select(before[v] == kLowest<acc>, broadcast(acc(1)), exp_vec(moved));
      sum[v] *= factor;
      rest[v] *= factor;
      if constexpr (kTerms == Terms::kProbabilities) {
        dot[v] += mass[v] * moved;
      } else if constexpr (kTerms != Terms::kNone) {
        dot[v] += static_cast<acc>(uniform_mass) * moved;
      }
    }
    for (int64_t c = start; c < end; ++c) {
      for (int v = 0; v < V; ++v) {
        if constexpr (V > 1 && kPrefetch) prefetch(x + c * stride + i + (V + v) * L);
        const Vec<acc> d = logits(c, v) - shift[v];
        block_sum[v] += exp_vec(d);
        if constexpr (kTerms == Terms::kUniform) {
          block_dot[v] += d;
        } else if constexpr (kTerms != Terms::kNone) {
          const Vec<acc> a = tile_coefficients<kTerms>(terms, c, i + v * L, k);
          block_dot[v] += weighted_vec<acc>(a, d);
          if constexpr (kTerms == Terms::kProbabilities) block_mass[v] += a;
        }
      }
      if constexpr (kTerms == Terms::kUniform || kTerms == Terms::kWeighted) {
        uniform_mass += static_cast<double>(smoothing_term<kTerms>(terms, c));
      }
    }
    for (int v = 0; v < V; ++v) {
      // What the addition rounds off is kept: blocks may be thousands.
      const Vec<acc> total = sum[v] + block_sum[v], added = total - sum[v];
      rest[v] += (sum[v] - (total - added)) + (block_sum[v] - added);
      sum[v] = total;
      dot[v] += kTerms == Terms::kUniform ? terms.uniform * block_dot[v] : block_dot[v];
      mass[v] += block_mass[v];
    }
  }
  for (int v = 0; v < V; ++v) {
    store(s.max + i + v * L, select(max[v] == kLowest<acc>, Vec<acc>{}, max[v]));
    // Infinity and NaN leave NaN in what is rounded off.
    store(s.sum + i + v * L, select(rest[v] == rest[v], sum[v] + rest[v], sum[v]));
    store(s.dot + i + v * L, dot[v]);
    if constexpr (kTerms == Terms::kProbabilities) {
      store(s.mass + i + v * L, mass[v]);
    } else {
      store(s.mass + i + v * L, broadcast(static_cast<acc>(uniform_mass)));
    }
  }
}

template <int n>
struct Count {
  static constexpr int value = n;
};
// Calls f(Count<V>, i, k) for the groups of a tile: V vectors of rows from i on, the last one of k lanes.
template <typename acc, typename F>
NLLX_INLINE void for_each_group(int width, const F& f) {
  int i = 0;
  for (; i + kGroup<acc> <= width; i += kGroup<acc>) f(Count<kGroupVectors>{}, i, kLanes<acc>);
  for (; i < width; i += kLanes<acc>) f(Count<1>{}, i, width - i < kLanes<acc> ? width - i : kLanes<acc>);
}

// Losses and statistics of a tile whose sums are known. target_logits: x_y of each row, read only where it counts.
template <typename T, Terms kTerms, typename acc>
NLLX_INLINE void finish_forward_tile(const CrossEntropyForward& p, int64_t row, int width, acc scale,
                                     const TileTargets<acc>& targets, const acc* target_logits, TileSums<acc>& s,
                                     ChunkResult& result) {
  alignas(64) acc loss[kTile];
  RowStats<acc>* stats = static_cast<RowStats<acc>*>(p.row_stats) + row;
  constexpr bool kIndex = kTerms != Terms::kProbabilities;
  NLLX_FOR_VECTORS(i, k, width) {
    const Vec<acc> log_sum = log_vec(load(s.sum + i)), max = load(s.max + i);
    Vec<acc> l{};
    if constexpr (kIndex)
      l = -weighted_vec<acc>(scale * load(targets.weight + i), (load(target_logits + i) - max) - log_sum);
    if constexpr (kTerms != Terms::kNone) l += load(s.mass + i) * log_sum - load(s.dot + i);
    if constexpr (kIndex) {
      Mask<acc> counts;
      memcpy(&counts, targets.index + i, sizeof counts);
      counts = counts >= 0;
      l = select(counts, l, Vec<acc>{});
      store(s.max + i, select(counts, max, Vec<acc>{}));
      store(s.sum + i, select(counts, log_sum, Vec<acc>{}));
    } else {
      store(s.sum + i, log_sum);
    }
    store(loss + i, l);
  }
  for (int i = 0; i < width; ++i) stats[i] = {s.max[i], s.sum[i]};
  result.loss += sum_in_double(loss, width);
  result.weight += kIndex ? sum_in_double(targets.weight, width) : static_cast<double>(width);
  if (p.row_loss) {
    for (int i = 0; i < width; ++i) store_row_loss<T>(p.row_loss, p.row_loss_is_acc, row + i, loss[i]);
  }
}

template <typename T, Terms kTerms, typename P>
void cross_entropy_forward_planes(const CrossEntropyForward& p, const Chunks& chunks, int64_t chunk,
                                  ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  TileSums<acc> s;
  TileTargets<acc> targets;
  alignas(64) acc target_logits[kTile];
  const int64_t stride = p.logits_strides.classes;
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const Tile tile = tile_of(p.extent, unit);
    const T* x = static_cast<const T*>(p.logits) + tile.outer * p.logits_strides.outer + tile.inner;
    const ClassTerms<acc, P> terms = class_terms<acc, P>(p.targets, p.extent, tile.outer, tile.inner);
    for_each_group<acc>(tile.width, [&](auto count, int i, int k) __attribute__((always_inline)) {
      constexpr int V = decltype(count)::value;
      group_sums<kTerms, V, true, T, acc, P>(x, stride, p.extent.classes, i, k, terms, s);
    });
    if constexpr (kTerms != Terms::kProbabilities) {
      read_targets(p.targets, p.extent.classes, tile.row, tile.width, targets, result);
      for (int i = 0; i < tile.width && p.extent.classes > 0; ++i) {
        target_logits[i] = to_acc(x[(targets.index[i] < 0 ? 0 : static_cast<int64_t>(targets.index[i])) * stride + i]);
      }
    }
    finish_forward_tile<T, kTerms>(p, tile.row, tile.width, terms.scale, targets, target_logits, s, result);
  }
}

// ---- backward ----

// What the gradient of each row of a tile is made of: factor exp(x_c - m) - k a_c, less `at_target` at the target.
template <typename acc>
struct TileGradient {
  alignas(64) acc max[kTile], factor[kTile], k[kTile], at_target[kTile];
};

// With the mass of probabilities in s.at_target.
template <Terms kTerms, typename acc, typename P>
NLLX_INLINE void begin_backward_tile(const CrossEntropyBackward& p, int64_t row, int width,
                                     const ClassTerms<acc, P>& terms, const TileTargets<acc>& targets,
                                     TileGradient<acc>& s) {
  const RowStats<acc>* stats = static_cast<const RowStats<acc>*>(p.row_stats) + row;
  const acc smoothing = smoothing_mass<kTerms>(p.targets, terms, p.extent.classes);
  for (int i = 0; i < width; ++i) {
    s.max[i] = stats[i].max;
    s.factor[i] = -stats[i].log_sum;
  }
  if (p.grad_output_stride == 0) {
    const Vec<acc> k = broadcast(incoming_gradient<acc>(p.grad_output, 0, p.total_weight, row));
    NLLX_FOR_VECTORS(i, n, width) store(s.k + i, k);
  } else {
    for (int i = 0; i < width; ++i) s.k[i] = incoming_gradient<acc>(p.grad_output, 1, p.total_weight, row + i);
  }
  NLLX_FOR_VECTORS(i, n, width) {
    const Vec<acc> k = load(s.k + i);
    Vec<acc> mass;
    if constexpr (kTerms == Terms::kProbabilities) {
      mass = load(s.at_target + i);
    } else {
      const Vec<acc> target_term = terms.scale * load(targets.weight + i);
      mass = target_term + smoothing;
      store(s.at_target + i, k * target_term);
    }
    store(s.factor + i, k * mass * exp_vec(load(s.factor + i)));
  }
}

// The gradient of V vectors of rows from i on, the last one of k lanes; it may lie over the logits. kAll: all rows
// count.
template <Terms kTerms, int V, bool kAll, bool kStream, bool kPrefetch, typename X, typename T, typename acc,
          typename P>
NLLX_INLINE void group_gradient(const X* x, int64_t stride, int64_t classes, int i, int k,
                                const ClassTerms<acc, P>& terms, const TileTargets<acc>& targets,
                                const TileGradient<acc>& s, T* grad, int64_t grad_stride) {
  constexpr int L = kLanes<acc>;
  constexpr bool kIndex = kTerms != Terms::kProbabilities;
  Vec<acc> max[V], factor[V], at_target[V], incoming[V];
  Mask<acc> index[V];
  for (int v = 0; v < V; ++v) {
    max[v] = load(s.max + i + v * L);
    factor[v] = load(s.factor + i + v * L);
    incoming[v] = load(s.k + i + v * L);
    at_target[v] = load(s.at_target + i + v * L);
    if constexpr (kIndex) memcpy(&index[v], targets.index + i + v * L, sizeof index[v]);
  }
  for (int64_t c = 0; c < classes; ++c) {
    for (int v = 0; v < V; ++v) {
      if constexpr (V > 1 && kPrefetch) prefetch(x + c * stride + i + (V + v) * L);
      const Vec<acc> logit = V == 1 ? load_some(x + c * stride + i, k, acc(0)) : load(x + c * stride + i + v * L);
      Vec<acc> g = factor[v] * exp_vec(logit - max[v]);
      if constexpr (kIndex) {
        g -= select(index[v] == static_cast<typename VecOf<acc>::integer>(c), at_target[v], Vec<acc>{});
      }
      if constexpr (kTerms != Terms::kNone) g -= incoming[v] * tile_coefficients<kTerms>(terms, c, i + v * L, k);
      if constexpr (kIndex && !kAll) g = select(index[v] >= 0, g, Vec<acc>{});
      T* to = grad + c * grad_stride + i + v * L;
      if constexpr (kStream && V > 1) {
        stream(to, g);
      } else if constexpr (V > 1) {
        store(to, g);
      } else {
        store_some(to, g, k);
      }
    }
  }
}

template <Terms kTerms, bool kStream, bool kPrefetch, typename X, typename T, typename acc, typename P>
NLLX_INLINE void tile_gradient(const X* x, int64_t stride, int64_t classes, int width, const ClassTerms<acc, P>& terms,
                               const TileTargets<acc>& targets, const TileGradient<acc>& s, T* grad,
                               int64_t grad_stride) {
  if (kTerms == Terms::kProbabilities || targets.all_count) {
    for_each_group<acc>(width, [&](auto count, int i, int k) __attribute__((always_inline)) {
      constexpr int V = decltype(count)::value;
      group_gradient<kTerms, V, true, kStream, kPrefetch>(x, stride, classes, i, k, terms, targets, s, grad,
                                                          grad_stride);
    });
  } else {
    for_each_group<acc>(width, [&](auto count, int i, int k) __attribute__((always_inline)) {
      constexpr int V = decltype(count)::value;
      group_gradient<kTerms, V, false, kStream, kPrefetch>(x, stride, classes, i, k, terms, targets, s, grad,
                                                           grad_stride);
    });
  }
}

template <typename T, Terms kTerms, typename P>
void cross_entropy_backward_planes(const CrossEntropyBackward& p, const Chunks& chunks, int64_t chunk,
                                   ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  TileGradient<acc> s;
  TileTargets<acc> targets;
  // Lanes beyond the width of a tile are computed too, and dropped.
  memset(&s, 0, sizeof s);
  const int64_t classes = p.extent.classes, stride = p.logits_strides.classes, grad_stride = p.grad_strides.classes;
  const bool stream = chunks.stream && planes_are_aligned<T>(p.grad_logits, p.grad_strides);
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const Tile tile = tile_of(p.extent, unit);
    const T* x = static_cast<const T*>(p.logits) + tile.outer * p.logits_strides.outer + tile.inner;
    T* grad = static_cast<T*>(p.grad_logits) + tile.outer * p.grad_strides.outer + tile.inner;
    const ClassTerms<acc, P> terms = class_terms<acc, P>(p.targets, p.extent, tile.outer, tile.inner);
    if constexpr (kTerms == Terms::kProbabilities) {
      NLLX_FOR_VECTORS(i, k, tile.width) {
        Vec<acc> mass{};
        for (int64_t start = 0; start < classes; start += kClassBlock) {
          const int64_t end = classes - start < kClassBlock ? classes : start + kClassBlock;
          Vec<acc> block{};
          for (int64_t c = start; c < end; ++c) block += tile_coefficients<kTerms>(terms, c, i, k);
          mass += block;
        }
        store(s.at_target + i, mass);
      }
    } else {
      read_targets(p.targets, classes, tile.row, tile.width, targets, result);
    }
    begin_backward_tile<kTerms>(p, tile.row, tile.width, terms, targets, s);
    if (stream) {
      tile_gradient<kTerms, true, true>(x, stride, classes, tile.width, terms, targets, s, grad, grad_stride);
    } else {
      tile_gradient<kTerms, false, true>(x, stride, classes, tile.width, terms, targets, s, grad, grad_stride);
    }
  }
  if (stream) end_stream();
}

// ---- rows of few classes ----

constexpr int64_t kFewClasses = 128;

template <typename Problem>
NLLX_INLINE bool has_few_classes(const Problem& p) {
  return p.layout == Layout::kRows && p.extent.classes <= kFewClasses;
}

// `width` rows that are `row_stride` apart, as the columns of a tile whose classes are kGroup apart.
template <typename T, typename acc>
NLLX_INLINE void rows_to_tile(const T* rows, int64_t row_stride, int classes, int width, acc* tile) {
  constexpr int L = kLanes<acc>;
  for (int i = 0; i < width; i += L) {
    const int n = width - i < L ? width - i : L;
    for (int c = 0; c < classes; c += L) {
      const int m = classes - c < L ? classes - c : L;
      Vec<acc> v[L];
      for (int j = 0; j < L; ++j) {
        v[j] = j < n ? load_some(rows + (i + j) * row_stride + c, m, acc(0)) : Vec<acc>{};
      }
      transpose<acc>(v);
      for (int j = 0; j < m; ++j) store(tile + (c + j) * kGroup<acc> + i, v[j]);
    }
  }
}
template <typename T, typename acc>
NLLX_INLINE void tile_to_rows(const acc* tile, T* rows, int64_t row_stride, int classes, int width) {
  constexpr int L = kLanes<acc>;
  for (int i = 0; i < width; i += L) {
    const int n = width - i < L ? width - i : L;
    for (int c = 0; c < classes; c += L) {
      const int m = classes - c < L ? classes - c : L;
      Vec<acc> v[L];
      for (int j = 0; j < L; ++j) v[j] = j < m ? load(tile + (c + j) * kGroup<acc> + i) : Vec<acc>{};
      transpose<acc>(v);
      for (int j = 0; j < n; ++j) store_some(rows + (i + j) * row_stride + c, v[j], m);
    }
  }
}

template <typename T, Terms kTerms, typename P>
void cross_entropy_forward_few_classes(const CrossEntropyForward& p, const Chunks& chunks, int64_t chunk,
                                       ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  alignas(64) acc tile[kFewClasses * kGroup<acc>];
  alignas(64) acc target_logits[kTile];
  TileSums<acc> s;
  TileTargets<acc> targets;
  const ClassTerms<acc, P> terms = class_terms<acc, P>(p.targets, p.extent, 0, 0);
  const int64_t row_stride = row_step(p.extent, p.logits_strides);
  const int classes = static_cast<int>(p.extent.classes);
  for_each_run(p.extent, chunks.begin(chunk), chunks.end(chunk), kGroup<acc>,
               [&](int64_t row, const Row& r, int width) {
                 const T* x = static_cast<const T*>(p.logits) + r.offset(p.logits_strides);
                 rows_to_tile(x, row_stride, classes, width, tile);
                 for_each_group<acc>(width, [&](auto count, int i, int) __attribute__((always_inline)) {
                   constexpr int V = decltype(count)::value;
                   group_sums<kTerms, V, false, acc, acc, P>(tile, kGroup<acc>, classes, i, kLanes<acc>, terms, s);
                 });
                 read_targets(p.targets, classes, row, width, targets, result);
                 for (int i = 0; i < width; ++i) {
                   target_logits[i] =
                       tile[(targets.index[i] < 0 ? 0 : static_cast<int64_t>(targets.index[i])) * kGroup<acc> + i];
                 }
                 finish_forward_tile<T, kTerms>(p, row, width, terms.scale, targets, target_logits, s, result);
               });
}

template <typename T, Terms kTerms, typename P>
void cross_entropy_backward_few_classes(const CrossEntropyBackward& p, const Chunks& chunks, int64_t chunk,
                                        ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  alignas(64) acc tile[kFewClasses * kGroup<acc>];
  TileGradient<acc> s;
  TileTargets<acc> targets;
  memset(&s, 0, sizeof s);
  const ClassTerms<acc, P> terms = class_terms<acc, P>(p.targets, p.extent, 0, 0);
  const int64_t row_stride = row_step(p.extent, p.logits_strides), grad_stride = row_step(p.extent, p.grad_strides);
  const int classes = static_cast<int>(p.extent.classes);
  for_each_run(p.extent, chunks.begin(chunk), chunks.end(chunk), kGroup<acc>,
               [&](int64_t row, const Row& r, int width) {
                 const T* x = static_cast<const T*>(p.logits) + r.offset(p.logits_strides);
                 T* grad = static_cast<T*>(p.grad_logits) + r.offset(p.grad_strides);
                 rows_to_tile(x, row_stride, classes, width, tile);
                 read_targets(p.targets, classes, row, width, targets, result);
                 begin_backward_tile<kTerms>(p, row, width, terms, targets, s);
                 tile_gradient<kTerms, false, false>(static_cast<const acc*>(tile), kGroup<acc>, classes, width, terms,
                                                     targets, s, tile, kGroup<acc>);
                 tile_to_rows(static_cast<const acc*>(tile), grad, grad_stride, classes, width);
               });
}
