// Cross entropy where neighbouring rows are adjacent in memory (planes): vectors run over the rows of a tile, a few
// classes at a time, so that every class is one run through memory.
//
// Forward: the sum of exponentials refers to the maximum so far, and shrinks where that grows, which costs one more
// exponential for kTogether classes. The state of a tile (maximum and sum of each row) stays in the first-level cache.
// Holding all classes of a tile there instead, to take the maximum first, fails for planes whose size is a power of
// two: all classes fall into the same sets of the caches.

// Classes whose exponentials are added in acc before they are added to the other blocks' sum.
constexpr int64_t kClassBlock = 64;
template <typename acc>
constexpr acc kSmallest = acc(0);
template <>
constexpr float kSmallest<float> = -__FLT_MAX__;
template <>
constexpr double kSmallest<double> = -__DBL_MAX__;

// The coefficients of class c of the vector of rows from i on, of which the first k exist.
template <Terms kTerms, typename acc, typename P>
NLLX_INLINE Vec<acc> tile_coefficients(const ClassTerms<acc, P>& t, int64_t c, int i, int k) {
  if constexpr (kTerms == Terms::kWeighted || kTerms == Terms::kAnySmoothing) {
    return broadcast(smoothing_term<kTerms>(t, c));
  }
  Vec<acc> a = broadcast(t.uniform);
  if constexpr (kTerms == Terms::kProbabilities) {
    a += t.scale * load_some(t.probabilities + c * t.stride + i, k, acc(0));
    if (t.weight) a *= t.weight[c];
  }
  return a;
}

// The sums of what earlier blocks of classes gave: what the additions to `sum` round off is kept, since blocks may be
// thousands.
template <typename acc>
struct BlockTotals {
  alignas(64) acc max[kTile], sum[kTile], rest[kTile];
  alignas(64) acc dot[kTile], dot_rest[kTile], mass[kTile], mass_rest[kTile];
};
// Adds x to a sum whose rounding errors are kept in `rest`.
template <typename V>
NLLX_INLINE void add_with_rest(V& sum, V& rest, V x) {
  const V total = sum + x, added = total - sum;
  rest += (sum - (total - added)) + (x - added);
  sum = total;
}
// The sum with its rest; infinity and NaN leave NaN in what is rounded off.
template <typename V>
NLLX_INLINE V with_rest(V sum, V rest) {
  return select(rest == rest, sum + rest, sum);
}

// Adds K classes from c on, whose logits are x, to the sums of a tile, and keeps those of rows whose target they are
// (looking them up later would read most of the tile from memory once more). `next` is prefetched.
template <Terms kTerms, bool kTarget, int K, typename T, typename acc, typename P, bool kMapped>
NLLX_INLINE void add_classes(const T* x, const T* next, int64_t stride, int64_t c, int width,
                             const ClassTerms<acc, P>& terms, const TileMap<acc, kMapped>& map, acc mass_before,
                             TileSums<acc>& s, const TileTargets<acc>* targets, acc* target_logits) {
  constexpr bool kScalarTerms =
      kTerms == Terms::kUniform || kTerms == Terms::kWeighted || kTerms == Terms::kAnySmoothing;
  const typename VecOf<acc>::integer number = class_in_window<acc>(c);
  const auto add = [&](int i, int k) __attribute__((always_inline)) {
    Vec<acc> v[K];
    const Vec<acc> before = load(s.max + i);
    Vec<acc> max = before;
    Mask<acc> highest{};  // kMoment: the class of the maximum, the first of equal ones
    if constexpr (kTerms == Terms::kMoment) memcpy(&highest, s.mass + i, sizeof highest);
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) prefetch(next + u * stride + i);
    load_logits<kMapped, K>(v, x + i, stride, k, acc(0), [&](int) __attribute__((always_inline)) { return map.at(i); });
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) {
      if constexpr (kTerms == Terms::kMoment) highest = select(v[u] > max, Mask<acc>{} + (number + u), highest);
      max = max_not_nan(max, v[u]);
    }
    store(s.max + i, max);
    if constexpr (kTerms == Terms::kMoment) memcpy(s.mass + i, &highest, sizeof highest);
    const Vec<acc> moved = before - max;
    Vec<acc> d[K], e[K + 1] = {moved};
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) d[u] = e[u + 1] = v[u] - max;
    exp_terms<K + 1, acc>(e);
    Vec<acc> sum = load(s.sum + i) * e[0];
    Vec<acc> dot{}, mass{};
    if constexpr (kTerms != Terms::kNone) dot = load(s.dot + i);
    if constexpr (kTerms == Terms::kMoment) dot = dot * e[0] + sum * not_vanished<acc>(moved);
    // Without any mass there is nothing to move, be it from the smallest number by infinity.
    if constexpr (kScalarTerms) {
      if (mass_before != acc(0)) dot += mass_before * moved;
    } else if constexpr (kTerms == Terms::kProbabilities) {
      mass = load(s.mass + i);
      dot += select(mass == acc(0), Vec<acc>{}, mass * moved);
    }
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) {
      sum += e[u + 1];
      if constexpr (kTerms == Terms::kUniform) {
        dot += terms.uniform * d[u];
      } else if constexpr (kTerms == Terms::kMoment) {
        dot += e[u + 1] * not_vanished<acc>(d[u]);
      } else if constexpr (kTerms != Terms::kNone) {
        const Vec<acc> a = tile_coefficients<kTerms>(terms, c + u, i, k);
        dot += weighted_vec<acc>(a, d[u]);
        if constexpr (kTerms == Terms::kProbabilities) mass += a;
      }
    }
    store(s.sum + i, sum);
    if constexpr (kTerms != Terms::kNone) store(s.dot + i, dot);
    if constexpr (kTerms == Terms::kProbabilities) store(s.mass + i, mass);
    if constexpr (kTarget) {
      Mask<acc> index;
      memcpy(&index, targets->index + i, sizeof index);
      Vec<acc> target = load(target_logits + i);
#pragma GCC unroll 4
      for (int u = 0; u < K; ++u) {
        target = select(index == number + u, v[u], target);
      }
      store(target_logits + i, target);
    }
  };
  int i = 0;
  for (; i + kLanes<acc> <= width; i += kLanes<acc>) add(i, kLanes<acc>);
  if (i < width) add(i, width - i);
}

// Moves the sums of a block of classes to the totals. mass_before: of all blocks before, where it is one number.
template <Terms kTerms, typename acc>
NLLX_INLINE void end_block(int width, acc mass_before, TileSums<acc>& s, BlockTotals<acc>& t, bool first) {
  NLLX_FOR_VECTORS(i, k, width) {
    const Vec<acc> max = load(s.max + i);
    Vec<acc> sum{}, rest{}, moved{}, factor{};
    [[maybe_unused]] Vec<acc> earlier{}, earlier_rest{};
    if (!first) {
      moved = load(t.max + i) - max;
      factor = exp_vec(moved);
      earlier = load(t.sum + i);
      earlier_rest = load(t.rest + i);
      sum = earlier * factor;
      rest = earlier_rest * factor;
    }
    add_with_rest(sum, rest, load(s.sum + i));
    store(t.sum + i, sum);
    store(t.rest + i, rest);
    store(t.max + i, max);
    store(s.sum + i, Vec<acc>{});
    if constexpr (kTerms != Terms::kNone) {
      Vec<acc> dot{}, dot_rest{}, mass = broadcast(mass_before), mass_rest{};
      if (!first) {
        dot = load(t.dot + i);
        dot_rest = load(t.dot_rest + i);
        if constexpr (kTerms == Terms::kProbabilities) {
          mass = load(t.mass + i);
          mass_rest = load(t.mass_rest + i);
        }
        if constexpr (kTerms == Terms::kMoment) {
          dot = (dot + earlier * not_vanished<acc>(moved)) * factor;
          dot_rest = (dot_rest + earlier_rest * not_vanished<acc>(moved)) * factor;
        } else {
          add_with_rest(dot, dot_rest, select(mass == acc(0), Vec<acc>{}, mass * moved));
        }
      }
      add_with_rest(dot, dot_rest, load(s.dot + i));
      store(t.dot + i, dot);
      store(t.dot_rest + i, dot_rest);
      store(s.dot + i, Vec<acc>{});
      if constexpr (kTerms == Terms::kProbabilities) {
        if (first) mass = Vec<acc>{};
        add_with_rest(mass, mass_rest, load(s.mass + i));
        store(t.mass + i, mass);
        store(t.mass_rest + i, mass_rest);
        store(s.mass + i, Vec<acc>{});
      }
    }
  }
}

// The sums of a tile. x: the logits of class 0; next: those of the tile that comes next.
template <Terms kTerms, bool kTarget, typename T, typename acc, typename P, bool kMapped, typename F>
NLLX_INLINE void sum_planes(const T* x, const T* next, int64_t stride, int64_t classes, int width,
                            const ClassTerms<acc, P>& terms, const TileMap<acc, kMapped>& map, TileSums<acc>& s,
                            TileTargets<acc>* targets, acc* target_logits, const F& next_window) {
  NLLX_FOR_VECTORS(i, k, width) {
    store(s.max + i, broadcast(kSmallest<acc>));
    store(s.sum + i, Vec<acc>{});
    store(s.dot + i, Vec<acc>{});
    store(s.mass + i, Vec<acc>{});
    if constexpr (kTarget) store(target_logits + i, Vec<acc>{});
  }
  BlockTotals<acc> totals;
  // Of the block so far, of the blocks before it, and what was rounded off there.
  double block_mass = 0, mass = 0, mass_rest = 0;
  const auto earlier_mass = [&] { return mass_rest == mass_rest ? mass + mass_rest : mass; };
  for (int64_t c = 0; c < classes;) {
    const int64_t left = classes - c;
    const int n = left >= kTogether ? kTogether : left >= 2 ? 2 : 1;
    const T* xc = x + c * stride;
    const T* then = left > n ? xc + n * stride : next;
    const acc mass_before = static_cast<acc>(block_mass);
    if (kTarget && starts_a_window<acc>(c)) next_window(c);
    const auto add = [&](auto count) __attribute__((always_inline)) {
      add_classes<kTerms, kTarget, decltype(count)::value, T, acc, P>(xc, then, stride, c, width, terms, map,
                                                                      mass_before, s, targets, target_logits);
    };
    if (n == kTogether) {
      add(Count<kTogether>{});
    } else if (n == 2) {
      add(Count<2>{});
    } else {
      add(Count<1>{});
    }
    if constexpr (kTerms == Terms::kUniform) {
      block_mass = static_cast<double>(terms.uniform) * static_cast<double>(c % kClassBlock + n);
    } else if constexpr (kTerms == Terms::kWeighted || kTerms == Terms::kAnySmoothing) {
      for (int u = 0; u < n; ++u) block_mass += static_cast<double>(smoothing_term<kTerms>(terms, c + u));
    }
    c += n;
    if (classes > kClassBlock && (c % kClassBlock == 0 || c == classes)) {
      end_block<kTerms>(width, static_cast<acc>(earlier_mass()), s, totals, c <= kClassBlock);
      add_with_rest(mass, mass_rest, block_mass);
      block_mass = 0;
    }
  }
  mass = earlier_mass() + block_mass;
  NLLX_FOR_VECTORS(i, k, width) {
    const Vec<acc> max = load(s.max + i);
    Vec<acc> sum = load(s.sum + i);
    if (classes > kClassBlock) {
      sum = with_rest(load(totals.sum + i), load(totals.rest + i));
      if constexpr (kTerms != Terms::kNone) {
        store(s.dot + i, with_rest(load(totals.dot + i), load(totals.dot_rest + i)));
      }
      if constexpr (kTerms == Terms::kProbabilities) {
        store(s.mass + i, with_rest(load(totals.mass + i), load(totals.mass_rest + i)));
      }
    }
    store(s.sum + i, sum);
    // A row of nothing but -inf has no maximum above the smallest number.
    store(s.max + i, select((max == kSmallest<acc>)&(sum == acc(0)), Vec<acc>{}, max));
    if constexpr (kTerms != Terms::kProbabilities && kTerms != Terms::kMoment) {
      store(s.mass + i, broadcast(static_cast<acc>(mass)));
    }
  }
}

template <typename T, Terms kTerms, typename P, bool kMapped>
void cross_entropy_forward_planes(const CrossEntropyForward& p, const Chunks& chunks, int64_t chunk,
                                  ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  TileSums<acc> s;
  TileTargets<acc> targets;
  TileMap<acc, kMapped> map;
  alignas(64) acc target_logits[kTile];
  const int64_t stride = p.logits_strides.classes;
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const Tile tile = tile_of(p.extent, unit);
    const T* x = static_cast<const T*>(p.logits) + tile.outer * p.logits_strides.outer + tile.inner;
    const ClassTerms<acc, P> terms = class_terms<acc, P>(p.targets, p.extent, tile.outer, tile.inner);
    constexpr bool kTarget = kTerms != Terms::kProbabilities;
    if constexpr (kTarget) read_targets(p.targets, p.extent.classes, tile.row, tile.width, targets, result);
    if constexpr (kMapped) map.begin(*p.options, tile.row, tile.width);
    sum_planes<kTerms, kTarget, T, acc, P>(
        x, x + kTile, stride, p.extent.classes, tile.width, terms, map, s, &targets, target_logits,
        [&](int64_t c) { read_window(p.targets, p.extent.classes, tile.row, tile.width, c, targets, result); });
    finish_forward_tile<T, kTerms>(p, tile.row, tile.width, terms.scale, targets, target_logits, s, result);
  }
}

// ---- backward ----

// The gradient of class c of a tile; it may lie over the logits x. `next` is prefetched.
template <Terms kTerms, typename T, typename acc, typename P, bool kMapped>
NLLX_INLINE void gradient_of_class(bool streamed, const T* x, const T* next, int64_t c, int width,
                                   const ClassTerms<acc, P>& terms, const TileMap<acc, kMapped>& map,
                                   const TileTargets<acc>& targets, const TileGradient<acc>& s, T* grad,
                                   bool differentiates, acc* by_scale) {
  constexpr bool kIndex = kTerms != Terms::kProbabilities;
  const typename VecOf<acc>::integer number = class_in_window<acc>(c);
  const auto value = [&](auto count, int64_t first, int k, Vec<acc>* g) __attribute__((always_inline)) {
    constexpr int K = decltype(count)::value, L = kLanes<acc>;
    [[maybe_unused]] MappedLogits<K, kMapped, acc> logits;
    const auto vector = [&](int u) __attribute__((always_inline)) {
      prefetch(next + first + u * L);
      return load_some(x + first + u * L, lanes_of<acc>(count, u, k), acc(0));
    };
    logits.load(
        g, vector, [&](int u) __attribute__((always_inline)) { return map.at(first + u * L); },
        [&](int u) __attribute__((always_inline)) { return load(s.max + first + u * L); });
    exp_vecs<K>(g);
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) {
      const int64_t i = first + u * L;
      const Vec<acc> factor = load(s.factor + i);
      if constexpr (kTerms == Terms::kNone) {
        g[u] *= factor;
      } else {
        const int lanes = lanes_of<acc>(count, u, k);
        const Vec<acc> a = tile_coefficients<kTerms>(terms, c, static_cast<int>(i), lanes);
        g[u] = fused_minus(g[u], factor, load(s.k + i) * a);
      }
      if constexpr (kIndex) {
        Mask<acc> index;
        memcpy(&index, targets.index + i, sizeof index);
        g[u] -= select(index == number, load(s.at_target + i), Vec<acc>{});
        if (kMapped && differentiates) {
          Vec<acc> sum{};
          logits.differentiate(u, lanes_of<acc>(count, u, k), map.at(i), g[u], by_scale ? &sum : nullptr);
          if (by_scale) store(by_scale + i, load(by_scale + i) + sum);
        }
        g[u] = select(index >= 0, g[u], Vec<acc>{});  // also where the logit is NaN
      } else if (kMapped && differentiates) {
        Vec<acc> sum{};
        logits.differentiate(u, lanes_of<acc>(count, u, k), map.at(i), g[u], by_scale ? &sum : nullptr);
        if (by_scale) store(by_scale + i, load(by_scale + i) + sum);
      }
    }
  };
  write_row(streamed, grad, 0, width, value);
}

template <typename T, Terms kTerms, typename P, bool kMapped>
void cross_entropy_backward_planes(const CrossEntropyBackward& p, const Chunks& chunks, int64_t chunk,
                                   ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  TileGradient<acc> s;
  TileTargets<acc> targets;
  TileMap<acc, kMapped> map;
  TileScaleGradient<acc, kMapped> by_scale;
  const bool has_scale_gradient = kMapped && p.wants_scale_gradient();
  // Lanes beyond the width of a tile are computed too, and dropped.
  memset(&s, 0, sizeof s);
  const int64_t classes = p.extent.classes, stride = p.logits_strides.classes, grad_stride = p.grad_strides.classes;
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const Tile tile = tile_of(p.extent, unit);
    const T* x = static_cast<const T*>(p.logits) + tile.outer * p.logits_strides.outer + tile.inner;
    T* grad = static_cast<T*>(p.grad_logits) + tile.outer * p.grad_strides.outer + tile.inner;
    const ClassTerms<acc, P> terms = class_terms<acc, P>(p.targets, p.extent, tile.outer, tile.inner);
    if constexpr (kTerms == Terms::kProbabilities) {
      NLLX_FOR_VECTORS(i, k, tile.width) {
        Vec<acc> mass{}, rest{};
        for (int64_t start = 0; start < classes; start += kClassBlock) {
          const int64_t end = classes - start < kClassBlock ? classes : start + kClassBlock;
          Vec<acc> block{};
          for (int64_t c = start; c < end; ++c) block += tile_coefficients<kTerms>(terms, c, i, k);
          add_with_rest(mass, rest, block);
        }
        store(s.at_target + i, with_rest(mass, rest));
      }
    } else {
      read_targets(p.targets, classes, tile.row, tile.width, targets, result);
    }
    begin_backward_tile<kTerms>(p, tile.row, tile.width, terms, targets, s);
    bool differentiates = false;
    if constexpr (kMapped) {
      map.begin(*p.options, tile.row, tile.width);
      differentiates = !folds_slope(*p.options, has_scale_gradient);
      if (!differentiates) fold_slope(map, tile.width, s);
    }
    if (has_scale_gradient) by_scale.begin(tile.width);
    for (int64_t c = 0; c < classes; ++c) {
      const T* xc = x + c * stride;
      const T* next = c + 1 < classes ? xc + stride : x + kTile;
      if (kTerms != Terms::kProbabilities && starts_a_window<acc>(c)) {
        read_window(p.targets, classes, tile.row, tile.width, c, targets, result);
      }
      gradient_of_class<kTerms, T, acc, P>(chunks.stream, xc, next, c, tile.width, terms, map, targets, s,
                                           grad + c * grad_stride, differentiates,
                                           has_scale_gradient ? by_scale.block : nullptr);
      if (has_scale_gradient && c % kClassBlock == kClassBlock - 1) by_scale.end_block(tile.width);
    }
    if (has_scale_gradient) {
      by_scale.end(p, tile.row, tile.width, map, kTerms == Terms::kProbabilities ? nullptr : targets.index, result);
    }
  }
  if (chunks.stream) end_stream();
}
