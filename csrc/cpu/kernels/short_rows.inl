// Cross entropy of rows whose classes are adjacent in memory and so few that what is done once for a row would cost
// more than what is done for each class. Rows are taken in groups of up to kGroup: the vectors run over the classes of
// one row, or with at most kFew classes over the rows of the group, transposed in the first-level cache; losses and
// factors of a group are made by vectors of rows (tiles.inl) either way.

constexpr int kGroup = 64;
constexpr int kFew = 32;
static_assert(Chunks::kRowGroup % kGroup == 0, "a group does not end in the middle of a chunk");
// A row of more classes is one of rows.inl.
template <typename acc>
constexpr int64_t kShortRow = 1024 / static_cast<int64_t>(sizeof(acc));

template <typename acc>
NLLX_INLINE bool has_short_rows(Layout layout, const Extent& extent) {
  return layout == Layout::kRows && extent.classes <= kShortRow<acc>;
}

// ---- vectors over the classes ----

template <int kStep, typename acc, typename F>
NLLX_INLINE void reduce_steps(Vec<acc>* v, const F& f) {
  if constexpr (kStep > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kStep; ++i) {
      Vec<acc> a = v[i], b = v[i + kStep];
      exchange<kStep>(a, b, typename LanesTo<kLanes<acc>>::type{});
      v[i] = f(a, b);
    }
    reduce_steps<kStep / 2, acc>(v, f);
  }
}
// Lane j: the lanes of partial[j] put together by f, in an order that is the same for each j.
template <typename acc, typename F>
NLLX_INLINE Vec<acc> reduce_lanes(const acc* partial, const F& f) {
  constexpr int L = kLanes<acc>;
  Vec<acc> v[L];
#pragma GCC unroll 16
  for (int j = 0; j < L; ++j) v[j] = load(partial + j * L);
  reduce_steps<L / 2, acc>(v, f);
  return v[0];
}

// The sums of up to a vector of rows, the first of which is row i of the tile. Prefetches the rows that come next.
template <Terms kTerms, typename T, typename acc, typename P>
NLLX_INLINE void sum_short_rows(const T* x, int64_t row_stride, int classes, int i, int rows, ClassTerms<acc, P> terms,
                                int64_t probability_stride, TileSums<acc>& s) {
  constexpr int L = kLanes<acc>;
  alignas(64) acc partial[L * L], dots[L * L], masses[L * L];
  const auto larger = [](Vec<acc> a, Vec<acc> b) __attribute__((always_inline)) { return max_not_nan(a, b); };
  const auto plus = [](Vec<acc> a, Vec<acc> b) __attribute__((always_inline)) { return a + b; };
  const int whole = classes / L * L, rest = classes - whole;
  for (int j = 0; j < L; ++j) {
    const T* row = x + (j < rows ? j : 0) * row_stride;
    Vec<acc> m = rest ? load_first(row + whole, rest, kLowest<acc>) : broadcast(kLowest<acc>);
    for (int c = 0; c < whole; c += L) m = max_not_nan(m, load(row + c));
    store(partial + j * L, m);
  }
  Vec<acc> max = reduce_lanes<acc>(partial, larger);
  max = select(max == kLowest<acc>, Vec<acc>{}, max);
  store(s.max + i, max);
  const P* probabilities = terms.probabilities;
  for (int j = 0; j < L; ++j) {
    const T* row = x + (j < rows ? j : 0) * row_stride;
    if constexpr (kTerms == Terms::kProbabilities) {
      terms.probabilities = probabilities + (j < rows ? j : 0) * probability_stride;
    }
    const Vec<acc> shift = broadcast(s.max[i + j]);
    Vec<acc> sum{}, dot{}, mass{};
    for (int c = 0; c < classes; c += L) {
      const int k = c < whole ? L : rest;
      prefetch(row + L * row_stride + c);
      const Vec<acc> d = load_some(row + c, k, kLowest<acc>) - shift;
      sum += exp_vec(d);
      if constexpr (kTerms == Terms::kUniform) {
        dot += k == L ? d : select(first_lanes<acc>(k), d, Vec<acc>{});
      } else if constexpr (kTerms != Terms::kNone) {
        const Vec<acc> a = row_coefficients<kTerms>(terms, c, k);
        dot += weighted_vec<acc>(a, d);
        mass += a;
      }
    }
    store(partial + j * L, sum);
    if constexpr (kTerms != Terms::kNone) store(dots + j * L, dot);
    if constexpr (kTerms != Terms::kNone && kTerms != Terms::kUniform) store(masses + j * L, mass);
  }
  store(s.sum + i, reduce_lanes<acc>(partial, plus));
  if constexpr (kTerms == Terms::kUniform) {
    store(s.dot + i, terms.uniform * reduce_lanes<acc>(dots, plus));
    store(s.mass + i, broadcast(terms.uniform * static_cast<acc>(classes)));
  } else if constexpr (kTerms != Terms::kNone) {
    store(s.dot + i, reduce_lanes<acc>(dots, plus));
    store(s.mass + i, reduce_lanes<acc>(masses, plus));
  }
}

// ---- vectors over the rows ----

NLLX_INLINE bool has_few_classes(int64_t classes) { return classes <= kFew; }

// Calls f(c) for the blocks of classes, from c to c + kBlock - 1; the last one begins where it ends with the classes.
template <typename acc, typename F>
NLLX_INLINE void for_blocks(int classes, const F& f) {
  constexpr int B = kBlock<acc>;
  for (int c = 0; c < classes; c += B) f(c + B <= classes || classes < B ? c : classes - B);
}

// `width` rows that are `row_stride` apart, as the columns of a tile whose classes are kGroup apart, up to a whole
// vector of rows.
template <typename T, typename acc>
NLLX_APART void rows_to_tile(const T* rows, int64_t row_stride, int classes, int width, acc* tile) {
  constexpr int L = kLanes<acc>, B = kBlock<acc>;
  const T* end = rows + (width - 1) * row_stride + classes;
  const int64_t lines = row_stride < kLine<T> ? kLine<T> : row_stride;  // of a row, or lines of several
  const int64_t ahead = kGroup * row_stride < 32 * kLine<T> ? 32 * kLine<T> : kGroup * row_stride;
  for (int i = 0; i < width; i += L) {
    const int n = width - i < L ? width - i : L;
    const T* x = rows + i * row_stride;
    int64_t stride = row_stride;
    for (int64_t j = 0; j < L * row_stride; j += lines) prefetch(x + ahead + j);
    if (classes == 2 && row_stride == 2 && n == L) {
      Vec<acc> a = load(x), b = load(x + L);
      deinterleave(a, b, typename LanesTo<L>::type{});
      store(tile + i, a);
      store(tile + kGroup + i, b);
      continue;
    }
    T copy[L * kFew];
    if (n < L || (classes < B && x + (L - 1) * row_stride + B > end)) {  // blocks would reach beyond the rows
      memset(copy, 0, sizeof copy);
      for (int j = 0; j < n; ++j) memcpy(copy + j * kFew, x + j * row_stride, sizeof(T) * static_cast<size_t>(classes));
      x = copy;
      stride = kFew;
    }
    for_blocks<acc>(classes, [&](int c) __attribute__((always_inline)) {
      Vec<acc> v[B];
#pragma GCC unroll 4
      for (int j = 0; j < B; ++j) v[j] = load_blocks(x + j * stride + c, B * stride);
      transpose_blocks<acc>(v);
#pragma GCC unroll 4
      for (int j = 0; j < B; ++j) store(tile + (c + j) * kGroup + i, v[j]);
    });
  }
}
// Writes the first `width` columns of a tile to rows, past the caches where `streamed`.
template <typename T, typename acc>
NLLX_APART void tile_to_rows(bool streamed, const acc* tile, T* rows, int64_t row_stride, int classes, int width) {
  constexpr int L = kLanes<acc>, B = kBlock<acc>;
  alignas(64) T staged[kGroup * kFew];
  streamed = streamed && row_stride == classes && width == kGroup && starts_a_line(rows);
  T* to = streamed ? staged : rows;
  const bool pairs = classes == 2 && row_stride == 2;
  int i = 0;
  for (; i + L <= width && (classes >= B || pairs); i += L) {
    T* out = to + i * row_stride;
    if (pairs) {
      Vec<acc> a = load(tile + i), b = load(tile + kGroup + i);
      interleave(a, b, typename LanesTo<L>::type{});
      store(out, a);
      store(out + L, b);
      continue;
    }
    for_blocks<acc>(classes, [&](int c) __attribute__((always_inline)) {
      Vec<acc> v[B];
#pragma GCC unroll 4
      for (int j = 0; j < B; ++j) v[j] = load(tile + (c + j) * kGroup + i);
      transpose_blocks<acc>(v);
#pragma GCC unroll 4
      for (int j = 0; j < B; ++j) store_blocks(out + j * row_stride + c, B * row_stride, v[j]);
    });
  }
  for (; i < width; ++i) {
    for (int c = 0; c < classes; ++c) to[i * row_stride + c] = from_acc<T>(tile[c * kGroup + i]);
  }
  for (int line = 0; streamed && line < kGroup * classes / kLine<T>; ++line) {
    stream_line(rows + line * kLine<T>, staged + line * kLine<T>);
  }
}

// The sums of the vector of rows from i on, and the logits of their targets.
template <Terms kTerms, typename acc, typename P, bool kMapped = false>
NLLX_INLINE void sum_few(acc* tile, int classes, int i, const ClassTerms<acc, P>& terms, TileSums<acc>& s,
                         const TileTargets<acc>* targets = nullptr, acc* target_logits = nullptr,
                         const TileMap<acc, kMapped>& map = TileMap<acc, kMapped>()) {
  Vec<acc> max = broadcast(kLowest<acc>), sum{}, dot{}, target{};
  Mask<acc> index{};
  if (targets) memcpy(&index, targets->index + i, sizeof index);
  for (int c = 0; c < classes; ++c) {
    Vec<acc> v = load(tile + c * kGroup + i);
    if constexpr (kMapped) store(tile + c * kGroup + i, v = mapped(v, map.at(i)));
    max = max_not_nan(max, v);
    if (targets) target = select(index == static_cast<typename VecOf<acc>::integer>(c), v, target);
  }
  max = select(max == kLowest<acc>, Vec<acc>{}, max);
  acc mass = 0;
  for (int c = 0; c < classes; ++c) {
    const Vec<acc> d = load(tile + c * kGroup + i) - max;
    sum += exp_vec(d);
    if constexpr (kTerms == Terms::kUniform) dot += terms.uniform * d;
    if constexpr (kTerms == Terms::kWeighted || kTerms == Terms::kAnySmoothing) {
      dot += weighted_vec<acc>(broadcast(smoothing_term<kTerms>(terms, c)), d);
    }
    mass += smoothing_term<kTerms>(terms, c);
  }
  store(s.max + i, max);
  store(s.sum + i, sum);
  store(s.dot + i, dot);
  store(s.mass + i, broadcast(mass));
  if (targets) store(target_logits + i, target);
}

// The gradient of the vector of rows from i on, over their logits.
template <Terms kTerms, typename acc, typename P, bool kMapped>
NLLX_INLINE void gradient_of_few(acc* tile, int classes, int i, const ClassTerms<acc, P>& terms,
                                 const TileMap<acc, kMapped>& map, const TileTargets<acc>& targets,
                                 const TileGradient<acc>& s, bool differentiates, acc* by_scale) {
  const Vec<acc> max = load(s.max + i), factor = load(s.factor + i), at_target = load(s.at_target + i);
  Mask<acc> index;
  memcpy(&index, targets.index + i, sizeof index);
  const Mask<acc> counts = index >= 0;
  Vec<acc> scale_sum{};
  for (int c = 0; c < classes; ++c) {
    acc* x = tile + c * kGroup + i;
    const Vec<acc> target_term = select(index == static_cast<typename VecOf<acc>::integer>(c), at_target, Vec<acc>{});
    MappedLogits<1, kMapped, acc> logits;
    Vec<acc> v;
    logits.load(&v, [&](int) { return load(x); }, [&](int) { return map.at(i); }, [&](int) { return max; });
    Vec<acc> g = factor * exp_vec(v) - target_term;
    if constexpr (kTerms != Terms::kNone) g -= load(s.k + i) * smoothing_term<kTerms>(terms, c);
    if (kMapped && differentiates) {
      logits.differentiate(0, kLanes<acc>, map.at(i), g, by_scale ? &scale_sum : nullptr);
    }
    store(x, select(counts, g, Vec<acc>{}));
  }
  if (by_scale) store(by_scale + i, scale_sum);
}

// ---- the kernels ----

// The gradients at the targets of up to a vector of rows, of which the first is row i of the tile.
template <Terms kTerms, typename T, typename acc, typename P>
NLLX_INLINE void gradients_at_targets(const T* x, int64_t row_stride, int i, int rows, const ClassTerms<acc, P>& terms,
                                      const TileTargets<acc>& targets, const TileGradient<acc>& s, acc* result) {
  for (int j = 0; j < rows; ++j) {
    const int64_t y = targets.index[i + j] < 0 ? 0 : static_cast<int64_t>(targets.index[i + j]);
    result[j] = to_acc(x[j * row_stride + y]);
  }
  Vec<acc> g = load(s.factor + i) * exp_vec(load(result) - load(s.max + i)) - load(s.at_target + i);
  if constexpr (kTerms == Terms::kUniform) g -= load(s.k + i) * terms.uniform;
  if constexpr (kTerms == Terms::kWeighted) g -= load(s.k + i) * (terms.uniform * load(targets.weight + i));
  store(result, g);
}

template <typename T, Terms kTerms, typename P, bool kMapped>
void cross_entropy_forward_short_rows(const CrossEntropyForward& p, const Chunks& chunks, int64_t chunk,
                                      ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  constexpr int L = kLanes<acc>;
  alignas(64) acc tile[kFew * kGroup];
  alignas(64) acc target_logits[kGroup];
  TileSums<acc> s;
  TileTargets<acc> targets;
  TileMap<acc, kMapped> map;
  const int64_t row_stride = row_step(p.extent, p.logits_strides);
  const int64_t probability_stride = row_step(p.extent, p.targets.probability_strides);
  const int classes = static_cast<int>(p.extent.classes);
  const bool few = kMapped || (kTerms != Terms::kProbabilities && has_few_classes(classes));
  for_each_run(p.extent, chunks.begin(chunk), chunks.end(chunk), kGroup, [&](int64_t row, const Row& r, int width) {
    const T* x = static_cast<const T*>(p.logits) + r.offset(p.logits_strides);
    const ClassTerms<acc, P> terms = class_terms<acc, P>(p.targets, p.extent, r.outer, r.inner);
    if constexpr (kTerms != Terms::kProbabilities) {
      read_targets(p.targets, classes, row, width, targets, result);
    }
    if constexpr (kMapped) map.begin(*p.options, row, width);
    if (few) {
      rows_to_tile(x, row_stride, classes, width, tile);
      for (int i = 0; i < width; i += L) {
        sum_few<kTerms, acc, P>(tile, classes, i, terms, s, &targets, target_logits, map);
      }
    } else if constexpr (!kMapped) {
      for (int i = 0; i < width; i += L) {
        ClassTerms<acc, P> from = terms;
        if constexpr (kTerms == Terms::kProbabilities) from.probabilities += i * probability_stride;
        sum_short_rows<kTerms, T, acc, P>(x + i * row_stride, row_stride, classes, i, width - i < L ? width - i : L,
                                          from, probability_stride, s);
      }
    }
    if (kTerms != Terms::kProbabilities && !few) {
      gather_targets(x, row_stride, 1, width, targets, target_logits);
    }
    finish_forward_tile<T, kTerms>(p, row, width, terms.scale, targets, target_logits, s, result);
  });
}

template <typename T, Terms kTerms, typename P, bool kMapped>
void cross_entropy_backward_short_rows(const CrossEntropyBackward& p, const Chunks& chunks, int64_t chunk,
                                       ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  constexpr int L = kLanes<acc>;
  // Rows whose gradient is a number of whole lines; it is made in the cache and streamed from there.
  constexpr int kStaged = kLine<T>;
  alignas(64) acc tile[kFew * kGroup];
  alignas(64) T staged[kStaged * kShortRow<acc> + L];
  alignas(64) acc at_target[L] = {};
  TileGradient<acc> s;
  TileTargets<acc> targets;
  TileMap<acc, kMapped> map;
  TileScaleGradient<acc, kMapped> by_scale;
  memset(&s, 0, sizeof s);
  const int64_t row_stride = row_step(p.extent, p.logits_strides), grad_stride = row_step(p.extent, p.grad_strides);
  const int64_t probability_stride = row_step(p.extent, p.targets.probability_strides);
  const int classes = static_cast<int>(p.extent.classes);
  const bool few = kMapped || (kTerms != Terms::kProbabilities && has_few_classes(classes));
  const bool stream = chunks.stream && grad_stride == classes;
  for_each_run(p.extent, chunks.begin(chunk), chunks.end(chunk), kGroup, [&](int64_t row, const Row& r, int width) {
    const T* x = static_cast<const T*>(p.logits) + r.offset(p.logits_strides);
    T* grad = static_cast<T*>(p.grad_logits) + r.offset(p.grad_strides);
    ClassTerms<acc, P> terms = class_terms<acc, P>(p.targets, p.extent, r.outer, r.inner);
    const P* probabilities = terms.probabilities;
    if constexpr (kTerms == Terms::kProbabilities) {
      for (int i = 0; i < width; ++i) {
        terms.probabilities = probabilities + i * probability_stride;
        s.at_target[i] = probability_mass<acc, P>(terms, classes);
      }
    } else {
      read_targets(p.targets, classes, row, width, targets, result);
    }
    begin_backward_tile<kTerms, acc, P>(p, row, width, terms, targets, s);
    bool differentiates = false;
    if constexpr (kMapped) {
      map.begin(*p.options, row, width);
      differentiates = !folds_slope(*p.options, p.wants_scale_gradient());
      if (!differentiates) fold_slope(map, width, s);
    }
    if (few) {
      if (p.wants_scale_gradient()) by_scale.begin(width);
      rows_to_tile(x, row_stride, classes, width, tile);
      for (int i = 0; i < width; i += L) {
        gradient_of_few<kTerms, acc, P>(tile, classes, i, terms, map, targets, s, differentiates,
                                        kMapped && p.wants_scale_gradient() ? by_scale.block : nullptr);
      }
      if (p.wants_scale_gradient()) by_scale.end(p, row, width, map, targets.index, result);
      return tile_to_rows(stream, static_cast<const acc*>(tile), grad, grad_stride, classes, width);
    }
    if constexpr (kMapped) return;
    for (int first = 0; first < width; first += kStaged) {
      const int rows = width - first < kStaged ? width - first : kStaged;
      T* to = grad + first * grad_stride;
      const bool streamed = stream && rows == kStaged && starts_a_line(to);
      for (int j = 0; j < rows; ++j) {
        const int i = first + j;
        const T* row_x = x + i * row_stride;
        if (kTerms != Terms::kProbabilities && j % L == 0) {
          // Before a row is written: the gradient may lie over the logits.
          gradients_at_targets<kTerms>(row_x, row_stride, i, rows - j < L ? rows - j : L, terms, targets, s, at_target);
        }
        T* g = streamed ? staged + j * classes : to + j * grad_stride;
        for (int64_t c = 0; c < classes; c += kLine<T>) prefetch(row_x + 2 * L * row_stride + c);
        if constexpr (kTerms == Terms::kProbabilities) {
          terms.probabilities = probabilities + i * probability_stride;
        } else if (targets.index[i] < 0) {
          memset(g, 0, sizeof(T) * static_cast<size_t>(classes));
          continue;
        }
        const RowGradient<kTerms, T, acc, P, false> value(row_x, s.max[i], s.factor[i], s.k[i], terms);
        for_vectors<kTogether, acc>(0, classes, [&](auto count, int64_t c, int n) __attribute__((always_inline)) {
          constexpr int K = decltype(count)::value;
          Vec<acc> v[K];
          value(count, c, n, v);
#pragma GCC unroll 4
          for (int u = 0; u < K; ++u) {
            // Beyond its row a vector is overwritten by the next one's, or lies behind the last.
            const int lanes = streamed ? L : lanes_of<acc>(count, u, n);
            store_some(g + c + u * L, v[u], lanes);
          }
        });
        if constexpr (kTerms != Terms::kProbabilities) g[targets.index[i]] = from_acc<T>(at_target[i % L]);
      }
      for (int line = 0; streamed && line < classes; ++line) {
        stream_line(to + line * kLine<T>, staged + line * kLine<T>);
      }
    }
  });
  if (stream) end_stream();
}
