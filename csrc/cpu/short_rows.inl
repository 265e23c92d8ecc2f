// Cross entropy of rows whose classes are adjacent in memory and so few that what is done once for a row would cost
// more than what is done for each class. Rows are taken in groups of up to kGroup: the vectors run over the classes of
// one row where a row has more than a vector of them, else (few_*) over the rows of the group, transposed in the
// first-level cache; losses and factors of a group are made by vectors of rows (tiles.inl) either way.

template <typename acc>
constexpr int kGroup = 4 * kLanes<acc>;
// A row of more classes is one of rows.inl.
template <typename acc>
constexpr int64_t kShortRow = 16 * kLanes<acc>;

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
    const auto add = [&](int c, int k) __attribute__((always_inline)) {
      const Vec<acc> d = load_some(row + c, k, kLowest<acc>) - shift;
      sum += exp_vec(d);
      if constexpr (kTerms == Terms::kUniform) {
        dot += k == L ? d : select(first_lanes<acc>(k), d, Vec<acc>{});
      } else if constexpr (kTerms != Terms::kNone) {
        const Vec<acc> a = row_coefficients<kTerms>(terms, c, k);
        dot += weighted_vec<acc>(a, d);
        mass += a;
      }
    };
    for (int c = 0; c < whole; c += L) {
      prefetch(row + L * row_stride + c);
      add(c, L);
    }
    if (rest) {
      prefetch(row + L * row_stride + whole);
      add(whole, rest);
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

// A row of at most a vector of classes.
template <typename acc>
NLLX_INLINE bool is_few(int64_t classes) {
  return classes <= kLanes<acc>;
}

// `width` rows that are `row_stride` apart, as the columns of a tile whose classes are kGroup apart, up to a whole
// vector of rows.
template <typename T, typename acc>
NLLX_INLINE void rows_to_tile(const T* rows, int64_t row_stride, int classes, int width, acc* tile) {
  constexpr int L = kLanes<acc>;
  for (int i = 0; i < width; i += L) {
    const int n = width - i < L ? width - i : L;
    const T* x = rows + i * row_stride;
    if (classes == 2 && row_stride == 2 && n == L) {
      Vec<acc> a = load(x), b = load(x + L);
      deinterleave(a, b, typename LanesTo<L>::type{});
      store(tile + i, a);
      store(tile + kGroup<acc> + i, b);
      continue;
    }
    Vec<acc> v[L];
    if (n == L && classes == L) {
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) v[j] = load(x + j * row_stride);
    } else {
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) v[j] = load_first(x + (j < n ? j : 0) * row_stride, classes, acc(0));
    }
    transpose<acc>(v);
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) store(tile + j * kGroup<acc> + i, v[j]);
  }
}
template <typename T, typename acc>
NLLX_INLINE void tile_to_rows(const acc* tile, T* rows, int64_t row_stride, int classes, int width) {
  constexpr int L = kLanes<acc>;
  for (int i = 0; i < width; i += L) {
    const int n = width - i < L ? width - i : L;
    T* x = rows + i * row_stride;
    if (classes == 2 && row_stride == 2 && n == L) {
      Vec<acc> a = load(tile + i), b = load(tile + kGroup<acc> + i);
      interleave(a, b, typename LanesTo<L>::type{});
      store(x, a);
      store(x + L, b);
      continue;
    }
    Vec<acc> v[L];
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) v[j] = load(tile + j * kGroup<acc> + i);
    transpose<acc>(v);
    if (n == L) {
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) store_some(x + j * row_stride, v[j], classes);
    } else {
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) {
        if (j < n) store_some(x + j * row_stride, v[j], classes);
      }
    }
  }
}

// The sums of the vector of rows from i on.
template <Terms kTerms, typename acc, typename P>
NLLX_INLINE void sum_few(const acc* tile, int classes, int i, const ClassTerms<acc, P>& terms, TileSums<acc>& s) {
  Vec<acc> max = broadcast(kLowest<acc>), sum{}, dot{};
  for (int c = 0; c < classes; ++c) max = max_not_nan(max, load(tile + c * kGroup<acc> + i));
  max = select(max == kLowest<acc>, Vec<acc>{}, max);
  acc mass = 0;
  for (int c = 0; c < classes; ++c) {
    const Vec<acc> d = load(tile + c * kGroup<acc> + i) - max;
    sum += exp_vec(d);
    if constexpr (kTerms == Terms::kUniform) dot += terms.uniform * d;
    if constexpr (kTerms == Terms::kWeighted) {
      dot += weighted_vec<acc>(broadcast(smoothing_term<kTerms>(terms, c)), d);
    }
    mass += smoothing_term<kTerms>(terms, c);
  }
  store(s.max + i, max);
  store(s.sum + i, sum);
  store(s.dot + i, dot);
  store(s.mass + i, broadcast(mass));
}

// The gradient of the vector of rows from i on, over their logits.
template <Terms kTerms, typename acc, typename P>
NLLX_INLINE void gradient_of_few(acc* tile, int classes, int i, const ClassTerms<acc, P>& terms,
                                 const TileTargets<acc>& targets, const TileGradient<acc>& s) {
  const Vec<acc> max = load(s.max + i), factor = load(s.factor + i), at_target = load(s.at_target + i);
  Mask<acc> index;
  memcpy(&index, targets.index + i, sizeof index);
  for (int c = 0; c < classes; ++c) {
    Vec<acc> g = factor * exp_vec(load(tile + c * kGroup<acc> + i) - max);
    g = select(index == static_cast<typename VecOf<acc>::integer>(c), g - at_target, g);
    if constexpr (kTerms != Terms::kNone) g -= load(s.k + i) * smoothing_term<kTerms>(terms, c);
    store(tile + c * kGroup<acc> + i, select(index >= 0, g, Vec<acc>{}));
  }
}

// ---- the kernels ----

template <typename T, Terms kTerms, typename P>
void cross_entropy_forward_short_rows(const CrossEntropyForward& p, const Chunks& chunks, int64_t chunk,
                                      ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  constexpr int L = kLanes<acc>;
  alignas(64) acc tile[L * kGroup<acc>];
  alignas(64) acc target_logits[kGroup<acc>];
  TileSums<acc> s;
  TileTargets<acc> targets;
  const int64_t row_stride = row_step(p.extent, p.logits_strides);
  const int64_t probability_stride = row_step(p.extent, p.targets.probability_strides);
  const int classes = static_cast<int>(p.extent.classes);
  const bool few = kTerms != Terms::kProbabilities && is_few<acc>(classes);
  for_each_run(p.extent, chunks.begin(chunk), chunks.end(chunk), kGroup<acc>,
               [&](int64_t row, const Row& r, int width) {
                 const T* x = static_cast<const T*>(p.logits) + r.offset(p.logits_strides);
                 const ClassTerms<acc, P> terms = class_terms<acc, P>(p.targets, p.extent, r.outer, r.inner);
                 if constexpr (kTerms != Terms::kProbabilities) {
                   read_targets(p.targets, classes, row, width, targets, result);
                 }
                 if (few) {
                   rows_to_tile(x, row_stride, classes, width, tile);
                   for (int i = 0; i < width; i += L) sum_few<kTerms>(tile, classes, i, terms, s);
                 } else {
                   for (int i = 0; i < width; i += L) {
                     ClassTerms<acc, P> from = terms;
                     if constexpr (kTerms == Terms::kProbabilities) from.probabilities += i * probability_stride;
                     sum_short_rows<kTerms, T, acc, P>(x + i * row_stride, row_stride, classes, i,
                                                       width - i < L ? width - i : L, from, probability_stride, s);
                   }
                 }
                 if constexpr (kTerms != Terms::kProbabilities) {
                   for (int i = 0; i < width && classes > 0; ++i) {
                     const int64_t y = targets.index[i] < 0 ? 0 : static_cast<int64_t>(targets.index[i]);
                     target_logits[i] = to_acc(x[i * row_stride + y]);
                   }
                 }
                 finish_forward_tile<T, kTerms>(p, row, width, terms.scale, targets, target_logits, s, result);
               });
}

// Bytes that are a multiple of 64, from and to addresses that are too.
NLLX_INLINE void stream_bytes(const void* from, void* to, int64_t bytes) {
  const float* f = static_cast<const float*>(from);
  float* t = static_cast<float*>(to);
  for (int64_t i = 0; i < bytes / 4; i += kLanes<float>) stream(t + i, load(f + i));
}

template <typename T, Terms kTerms, typename P>
void cross_entropy_backward_short_rows(const CrossEntropyBackward& p, const Chunks& chunks, int64_t chunk,
                                       ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  constexpr int L = kLanes<acc>;
  // Rows whose gradient is a multiple of 64 bytes; it is made in the cache and streamed from there.
  constexpr int kStaged = 64 / static_cast<int>(sizeof(T));
  alignas(64) acc tile[L * kGroup<acc>];
  alignas(64) T staged[kStaged * kShortRow<acc>];
  alignas(64) acc at_target[kGroup<acc>];
  TileGradient<acc> s;
  TileTargets<acc> targets;
  memset(&s, 0, sizeof s);
  const int64_t row_stride = row_step(p.extent, p.logits_strides), grad_stride = row_step(p.extent, p.grad_strides);
  const int64_t probability_stride = row_step(p.extent, p.targets.probability_strides);
  const int classes = static_cast<int>(p.extent.classes);
  const bool few = kTerms != Terms::kProbabilities && is_few<acc>(classes);
  const bool stream = chunks.stream && grad_stride == classes;
  for_each_run(
      p.extent, chunks.begin(chunk), chunks.end(chunk), kGroup<acc>, [&](int64_t row, const Row& r, int width) {
        const T* x = static_cast<const T*>(p.logits) + r.offset(p.logits_strides);
        T* grad = static_cast<T*>(p.grad_logits) + r.offset(p.grad_strides);
        ClassTerms<acc, P> terms = class_terms<acc, P>(p.targets, p.extent, r.outer, r.inner);
        const P* probabilities = terms.probabilities;
        if constexpr (kTerms == Terms::kProbabilities) {
          for (int i = 0; i < width; ++i) {
            terms.probabilities = probabilities + i * probability_stride;
            s.at_target[i] = probability_mass(terms, classes);
          }
        } else {
          read_targets(p.targets, classes, row, width, targets, result);
        }
        begin_backward_tile<kTerms>(p, row, width, terms, targets, s);
        if (few) {
          rows_to_tile(x, row_stride, classes, width, tile);
          for (int i = 0; i < width; i += L) gradient_of_few<kTerms>(tile, classes, i, terms, targets, s);
        } else if constexpr (kTerms != Terms::kProbabilities) {
          // Made before a row is written: the gradient may lie over the logits.
          for (int i = 0; i < width; ++i) {
            const int64_t y = targets.index[i] < 0 ? 0 : static_cast<int64_t>(targets.index[i]);
            at_target[i] = to_acc(x[i * row_stride + y]);
          }
          NLLX_FOR_VECTORS(i, n, width) {
            Vec<acc> g = load(s.factor + i) * exp_vec(load(at_target + i) - load(s.max + i)) - load(s.at_target + i);
            if constexpr (kTerms == Terms::kUniform) g -= load(s.k + i) * terms.uniform;
            if constexpr (kTerms == Terms::kWeighted) g -= load(s.k + i) * (terms.uniform * load(targets.weight + i));
            store(at_target + i, g);
          }
        }
        for (int first = 0; first < width; first += kStaged) {
          const int rows = width - first < kStaged ? width - first : kStaged;
          T* to = grad + first * grad_stride;
          const bool streamed = stream && rows == kStaged && reinterpret_cast<uintptr_t>(to) % 64 == 0;
          T* out = streamed ? staged : to;
          if (few) {
            tile_to_rows(static_cast<const acc*>(tile + first), out, grad_stride, classes, rows);
          } else {
            for (int j = 0; j < rows; ++j) {
              const int i = first + j;
              T* g = out + j * grad_stride;
              if constexpr (kTerms == Terms::kProbabilities) {
                terms.probabilities = probabilities + i * probability_stride;
              } else if (targets.index[i] < 0) {
                memset(g, 0, sizeof(T) * static_cast<size_t>(classes));
                continue;
              }
              prefetch(x + (i + L) * row_stride);
              gradient_of_segment<kTerms, false, T, acc, P>(x + i * row_stride, g, 0, classes, s.max[i], s.factor[i],
                                                            s.k[i], terms);
              if constexpr (kTerms != Terms::kProbabilities) g[targets.index[i]] = from_acc<T>(at_target[i]);
            }
          }
          if (streamed) stream_bytes(staged, to, static_cast<int64_t>(sizeof(T)) * kStaged * classes);
        }
      });
  if (stream) end_stream();
}
