// Cross entropy where the classes of a row are adjacent in memory: vectors run over the classes.
//
// Forward: a row is read from memory once. Its first block (the whole row if it fits one) is looked through twice while
// it is in the first-level cache, for its maximum and for the sum of exponentials; every further block once, with the
// maximum so far as the reference and its own maximum found on the way. Only where that is more than 1 above the
// reference, which would cost digits, the block is summed again with its own. What comes next is prefetched meanwhile,
// so that arithmetic and the loads from memory overlap. Backward: read once, written once.

template <typename acc>
struct RowSums {
  acc max = kLowest<acc>;
  double sum = 0;   // Σ exp(x - max)
  double dot = 0;   // Σ a (x - max)
  double mass = 0;  // Σ a
  // kMoment: the first classes among which the maximum is.
  int64_t highest = 0, highest_classes = 0;

  template <Terms kTerms>
  void refer_to(acc new_max) {
    const double shift = static_cast<double>(finite_max(max)) - static_cast<double>(finite_max(new_max));
    if constexpr (kTerms == Terms::kMoment) {
      // Of what vanishes a product with the lowest number of its type would be infinite.
      const double moved = shift < kVanishing<double> ? kVanishing<double> : shift;
      if (!is_minus_infinity(max)) dot = (dot + sum * moved) * exp(shift);
    }
    if (!is_minus_infinity(max)) sum *= exp(shift);  // else it is zero, or NaN
    if (mass != 0) dot += mass * shift;              // without any, there is nothing to move, be it by infinity
    max = new_max;
  }
  RowStats<acc> stats() const { return {finite_max(max), static_cast<acc>(log(sum))}; }
};

template <Terms kTerms, typename acc>
NLLX_INLINE RowSums<acc> merged(RowSums<acc> a, RowSums<acc> b) {
  const bool second = b.max > a.max;
  if (a.max > b.max) {
    b.template refer_to<kTerms>(a.max);
  } else if (b.max > a.max) {
    a.template refer_to<kTerms>(b.max);
  }
  const RowSums<acc>& higher = second ? b : a;
  return {a.max, a.sum + b.sum, a.dot + b.dot, a.mass + b.mass, higher.highest, higher.highest_classes};
}

// Terms that a lane adds in acc before the sum of the lanes is added to a double: equal numbers are rounded in one
// direction when they are added.
constexpr int64_t kTermsPerLane = 64;

// The coefficients of kLanes classes from c on, of which the first n exist.
template <Terms kTerms, typename acc, typename P>
NLLX_INLINE Vec<acc> row_coefficients(const ClassTerms<acc, P>& t, int64_t c, int n) {
  Vec<acc> a = broadcast(t.uniform);
  if constexpr (kTerms == Terms::kProbabilities) a += t.scale * load_some(t.probabilities + c, n, acc(0));
  if (kTerms == Terms::kWeighted || (kTerms != Terms::kUniform && t.weight)) a *= load_some(t.weight + c, n, acc(0));
  return n == kLanes<acc> ? a : select(first_lanes<acc>(n), a, Vec<acc>{});
}

template <typename T, typename acc, bool kMapped>
NLLX_INLINE acc block_max(const T* x, int64_t n, const LogitMap<acc>& map) {
  constexpr int L = kLanes<acc>;
  if constexpr (kMapped) {  // the largest logit has the largest z, where no factor is negative
    if (map.in[0] >= acc(0) && map.out[0] >= acc(0))
      return mapped(broadcast(block_max<T, acc, false>(x, n, map)), map)[0];
  }
  Vec<acc> m[4];
#pragma GCC unroll 4
  for (int u = 0; u < 4; ++u) m[u] = broadcast(kLowest<acc>);
  int64_t c = 0;
  const auto at = [&](int) -> const LogitMap<acc>& { return map; };
  for (; c + 4 * L <= n; c += 4 * L) {
    Vec<acc> v[4];
    load_logits<kMapped, 4>(v, x + c, L, L, kLowest<acc>, at);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) m[u] = max_not_nan(m[u], v[u]);
  }
  for (; c + L <= n; c += L) m[0] = max_not_nan(m[0], load_logits<kMapped>(x + c, L, kLowest<acc>, map));
  if (c < n) {
    const int rest = static_cast<int>(n - c);
    m[1] = max_not_nan(m[1], load_logits<kMapped>(x + c, rest, kLowest<acc>, map));
  }
  return largest_lane<acc>(max_not_nan(max_not_nan(m[0], m[1]), max_not_nan(m[2], m[3])));
}

// The sums of n classes from `start` on with the reference; their maximum too with kMax. Prefetches what lies `ahead`
// elements further.
template <Terms kTerms, bool kMax, typename T, typename acc, typename P, bool kMapped>
NLLX_INLINE RowSums<acc> block_sums(const T* row, int64_t start, int64_t n, int64_t ahead, acc reference,
                                    const ClassTerms<acc, P, kMapped>& terms) {
  constexpr int L = kLanes<acc>, U = kTerms == Terms::kNone ? 4 : 2;
  const T* x = row + start;
  const Vec<acc> shift = broadcast(reference);
  Vec<acc> sum[U], dot[U], mass[U], max[U];
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) {
    sum[u] = dot[u] = mass[u] = Vec<acc>{};
    max[u] = shift;
  }
  const auto add = [&](auto count, int64_t first, int k) __attribute__((always_inline)) {
    constexpr int K = decltype(count)::value;
    Vec<acc> v[K], e[K];
    const auto at = [&](int) __attribute__((always_inline)) -> decltype(auto) { return map_of(terms); };
    load_logits<kMapped, K>(v, x + first, L, k, kLowest<acc>, at);
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) {
      if constexpr (kMax) max[u] = max_not_nan(max[u], v[u]);
      e[u] = v[u] = v[u] - shift;
      prefetch(x + first + u * L + ahead);
    }
    exp_vecs<K>(e);
#pragma GCC unroll 4
    for (int u = 0; u < K; ++u) {
      sum[u] += e[u];
      if constexpr (kTerms == Terms::kUniform) {
        dot[u] += k == L ? v[u] : select(first_lanes<acc>(k), v[u], Vec<acc>{});
      } else if constexpr (kTerms == Terms::kMoment) {
        dot[u] += e[u] * not_vanished<acc>(v[u]);
      } else if constexpr (kTerms != Terms::kNone) {
        const Vec<acc> a = row_coefficients<kTerms>(terms, start + first + u * L, k);
        dot[u] += weighted_vec<acc>(a, v[u]);
        mass[u] += a;
      }
    }
  };
  int64_t c = 0;
  for (; c + U * L <= n; c += U * L) add(Count<U>{}, c, L);
  for (; c < n; c += L) add(Count<1>{}, c, n - c < L ? static_cast<int>(n - c) : L);

  RowSums<acc> result;
#pragma GCC unroll 4
  for (int u = 1; u < U; ++u) {
    sum[0] += sum[u];
    dot[0] += dot[u];
    mass[0] += mass[u];
    max[0] = max_not_nan(max[0], max[u]);
  }
  result.sum = sum_of_lanes<acc>(sum[0]);
  if constexpr (kMax) result.max = largest_lane<acc>(max[0]);
  if constexpr (kTerms == Terms::kUniform) {
    result.dot = static_cast<double>(terms.uniform) * sum_of_lanes<acc>(dot[0]);
    result.mass = static_cast<double>(terms.uniform) * static_cast<double>(n);
  } else if constexpr (kTerms == Terms::kMoment) {
    result.dot = sum_of_lanes<acc>(dot[0]);
  } else if constexpr (kTerms != Terms::kNone) {
    result.dot = sum_of_lanes<acc>(dot[0]);
    result.mass = sum_of_lanes<acc>(mass[0]);
  }
  return result;
}

// The sums of the classes from begin to end; `next`: from `begin` to where what is summed next begins.
template <Terms kTerms, typename T, typename acc, typename P, bool kMapped>
NLLX_INLINE RowSums<acc> segment_sums(const T* row, int64_t begin, int64_t end, int64_t next,
                                      const ClassTerms<acc, P, kMapped>& terms) {
  constexpr int64_t kBlock = kTermsPerLane * kLanes<acc> * (kTerms == Terms::kNone ? 4 : 2), kFirstBlock = kBlock / 4;
  RowSums<acc> s;
  acc reference = kLowest<acc>, max = kLowest<acc>;
  int64_t n = end - begin <= kBlock ? end - begin : kFirstBlock;
  for (int64_t start = begin; start < end; start += n, n = end - start < kBlock ? end - start : kBlock) {
    const int64_t ahead = start + n < end ? n : begin + next - start;
    RowSums<acc> block;
    acc block_maximum;
    bool summed = false;
    if (is_minus_infinity(reference)) {  // the first block, or nothing but -inf so far
      block_maximum = block_max<T, acc, kMapped>(row + start, n, map_of(terms));
    } else {
      block = block_sums<kTerms, true, T, acc, P>(row, start, n, ahead, reference, terms);
      block_maximum = block.max;
      summed = !(block_maximum > reference + acc(1));
    }
    if (!summed) {
      s.max = reference;
      s.template refer_to<kTerms>(block_maximum);
      reference = block_maximum;
      block = block_sums<kTerms, false, T, acc, P>(row, start, n, ahead, finite_max(reference), terms);
    }
    if (kTerms == Terms::kMoment && block_maximum > max) {
      s.highest = start;
      s.highest_classes = n;
    }
    max = block_maximum > max ? block_maximum : max;
    s.sum += block.sum;
    s.dot += block.dot;
    s.mass += block.mass;
  }
  s.max = reference;
  if (max > reference) s.template refer_to<kTerms>(max);
  return s;
}

template <Terms kTerms, typename T, typename acc, typename P, bool kMapped>
NLLX_INLINE RowSums<acc> row_sums(const T* row, int64_t classes, int64_t next_row,
                                  const ClassTerms<acc, P, kMapped>& terms) {
  RowSums<acc> s;
  for (int64_t begin = 0; begin < classes; begin += Chunks::kSegment) {
    const int64_t end = classes - begin < Chunks::kSegment ? classes : begin + Chunks::kSegment;
    const int64_t next = (end < classes ? end : next_row) - begin;
    const RowSums<acc> segment = segment_sums<kTerms, T, acc, P>(row, begin, end, next, terms);
    s = begin == 0 ? segment : merged<kTerms>(s, segment);
  }
  return s;
}

// The loss of a row from its parts. `target_logit` is x_y - m.
template <Terms kTerms, typename acc>
NLLX_INLINE acc row_loss_of(acc weight, acc scale, acc target_logit, const RowSums<acc>& s, acc log_sum) {
  acc loss = 0;
  if constexpr (kTerms != Terms::kProbabilities) loss = -weighted(scale * weight, target_logit - log_sum);
  if constexpr (kTerms != Terms::kNone) loss += static_cast<acc>(s.mass) * log_sum - static_cast<acc>(s.dot);
  return loss;
}

template <typename T, Terms kTerms, typename P, bool kMapped>
NLLX_INLINE void finish_forward_row(const CrossEntropyForward& p, int64_t row, const T* x,
                                    const IndexTarget<typename AccOf<T>::type>& y,
                                    const ClassTerms<typename AccOf<T>::type, P, kMapped>& terms,
                                    const RowSums<typename AccOf<T>::type>& s, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  const RowStats<acc> stats = s.stats();
  const acc target_logit =
      kTerms == Terms::kProbabilities ? acc(0) : logit_at<kMapped>(x + y.index, map_of(terms)) - stats.max;
  acc loss = row_loss_of<kTerms>(y.weight, terms.scale, target_logit, s, stats.log_sum);
  double weight = static_cast<double>(y.weight);
  if (p.options) {
    const acc factor = sample_weight_of<acc>(*p.options, row);
    loss = factor * (loss + z_loss_of(*p.options, stats.max + stats.log_sum));
    weight = static_cast<double>(factor * y.weight);
  }
  result.loss += static_cast<double>(loss);
  result.weight += weight;
  store_row_loss<T>(p.row_loss, p.row_loss_is_acc, row, loss);
  static_cast<RowStats<acc>*>(p.row_stats)[row] = stats;
}

// What the target says of a row; true if the row counts, else its loss and statistics are zero.
template <typename T, Terms kTerms>
NLLX_INLINE bool begin_forward_row(const CrossEntropyForward& p, int64_t row, IndexTarget<typename AccOf<T>::type>& y,
                                   ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  y = {0, false, false, acc(1)};
  if constexpr (kTerms != Terms::kProbabilities) y = index_target<acc>(p.targets, p.extent.classes, row);
  if (y.bad) note_bad_target(result, row);
  if (!y.ignored && !y.bad) return true;
  store_row_loss<T>(p.row_loss, p.row_loss_is_acc, row, acc(0));
  static_cast<RowStats<acc>*>(p.row_stats)[row] = {0, 0};
  return false;
}

template <typename T, Terms kTerms, typename P, bool kMapped>
void cross_entropy_forward_rows(const CrossEntropyForward& p, const Chunks& chunks, int64_t chunk,
                                ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  const int64_t next_row = row_step(p.extent, p.logits_strides);
  for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
    IndexTarget<acc> y;
    if (!begin_forward_row<T, kTerms>(p, row, y, result)) continue;
    const Row r = row_of(p.extent, row);
    const T* x = static_cast<const T*>(p.logits) + r.offset(p.logits_strides);
    const auto terms = row_terms<acc, P, kMapped>(p.targets, p.extent, r.outer, r.inner, p.options, row);
    const RowSums<acc> s = row_sums<kTerms, T, acc, P>(x, p.extent.classes, next_row, terms);
    finish_forward_row<T, kTerms, P, kMapped>(p, row, x, y, terms, s, result);
  }
}

// Few long rows: a unit is a segment of a row, and its sums are merged by the kernel below.
template <typename T, Terms kTerms, typename P, bool kMapped>
void sum_row_segment(const CrossEntropyForward& p, const Chunks& chunks, int64_t unit, RowPart& part) {
  using acc = typename AccOf<T>::type;
  const int64_t row = unit / chunks.segments, begin = (unit - row * chunks.segments) * Chunks::kSegment;
  const int64_t end = p.extent.classes - begin < Chunks::kSegment ? p.extent.classes : begin + Chunks::kSegment;
  const Row r = row_of(p.extent, row);
  const T* x = static_cast<const T*>(p.logits) + r.offset(p.logits_strides);
  const auto terms = row_terms<acc, P, kMapped>(p.targets, p.extent, r.outer, r.inner, p.options, row);
  const RowSums<acc> s = segment_sums<kTerms, T, acc, P>(x, begin, end, end - begin, terms);
  part = {static_cast<double>(s.max), s.sum, s.dot, s.mass};
}

template <typename T, Terms kTerms, typename P, bool kMapped>
void merge_row_segments(const CrossEntropyForward& p, int64_t row, const RowPart* parts, int64_t count,
                        ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  IndexTarget<acc> y;
  if (!begin_forward_row<T, kTerms>(p, row, y, result)) return;
  const Row r = row_of(p.extent, row);
  const T* x = static_cast<const T*>(p.logits) + r.offset(p.logits_strides);
  const auto terms = row_terms<acc, P, kMapped>(p.targets, p.extent, r.outer, r.inner, p.options, row);
  RowSums<acc> s;
  for (int64_t i = 0; i < count; ++i) {
    const RowSums<acc> part{static_cast<acc>(parts[i].max), parts[i].sum, parts[i].dot, parts[i].mass};
    s = i == 0 ? part : merged<kTerms>(s, part);
  }
  finish_forward_row<T, kTerms, P, kMapped>(p, row, x, y, terms, s, result);
}

// ---- backward ----

// Σ a_c of probabilities.
template <typename acc, typename P>
NLLX_INLINE acc probability_mass(const ClassTerms<acc, P>& terms, int64_t classes) {
  constexpr int L = kLanes<acc>;
  double sum = 0;
  for (int64_t start = 0; start < classes; start += kTermsPerLane * L) {
    const int64_t end = classes - start < kTermsPerLane * L ? classes : start + kTermsPerLane * L;
    Vec<acc> block{};
    for (int64_t c = start; c < end; c += L) {
      block += row_coefficients<Terms::kProbabilities>(terms, c, end - c < L ? static_cast<int>(end - c) : L);
    }
    sum += sum_of_lanes<acc>(block);
  }
  return static_cast<acc>(sum);
}

// In double, of what f(from, to, sum) adds to `sum` for blocks of the classes from begin to end.
template <typename acc, typename F>
NLLX_INLINE double sum_of_blocks(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t kBlock = kTermsPerLane * kLanes<acc>;
  double total = 0;
  for (int64_t c = begin; c < end; c += kBlock) {
    Vec<acc> sum{};
    f(c, end - c < kBlock ? end : c + kBlock, sum);
    total += sum_of_lanes<acc>(sum);
  }
  return total;
}

// The gradient of a row: factor exp(z_c - m) - k a_c, but for what the target adds, and times dz / dx where the logits
// are mapped. As `value` of write_row.
template <Terms kTerms, typename T, typename acc, typename P, bool kMapped>
struct RowGradient {
  const T* x;
  Vec<acc> max, factor, k, uniform;
  const ClassTerms<acc, P, kMapped>& terms;
  // kMapped: whether dz / dx is not in the factors; and what Σ dloss / dz dz / dx x / in is added to.
  bool differentiates = kMapped;
  Vec<acc>* by_scale = nullptr;

  RowGradient(const T* row, acc row_max, acc row_factor, acc incoming, const ClassTerms<acc, P, kMapped>& t)
      : x(row),
        max(broadcast(row_max)),
        factor(broadcast(row_factor)),
        k(broadcast(incoming)),
        uniform(broadcast(incoming * t.uniform)),
        terms(t) {}

  template <int K>
  NLLX_MEMBER_INLINE void operator()(Count<K> count, int64_t first, int n, Vec<acc>* g) const {
    constexpr int L = kLanes<acc>;
    [[maybe_unused]] MappedLogits<K, kMapped, acc> logits;
    const auto vector = [&](int u) __attribute__((always_inline)) {
      return load_some(x + first + u * L, lanes_of<acc>(count, u, n), acc(0));
    };
    logits.load(
        g, vector, [&](int) __attribute__((always_inline)) -> decltype(auto) { return map_of(terms); },
        [&](int) __attribute__((always_inline)) { return max; });
    exp_vecs<K>(g);
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) {
      [[maybe_unused]] const int64_t c = first + u * L;
      [[maybe_unused]] const int lanes = lanes_of<acc>(count, u, n);
      if constexpr (kTerms == Terms::kNone) {
        g[u] *= factor;
      } else if constexpr (kTerms == Terms::kUniform) {
        g[u] = fused_minus(g[u], factor, uniform);
      } else if constexpr (kTerms == Terms::kAnySmoothing) {
        Vec<acc> a = uniform;
        if (terms.weight) a *= load_some(terms.weight + c, lanes, acc(0));
        g[u] = fused_minus(g[u], factor, a);
      } else if constexpr (kTerms == Terms::kWeighted) {
        g[u] = fused_minus(g[u], factor, uniform * load_some(terms.weight + c, lanes, acc(0)));
      } else {
        g[u] = fused_minus(g[u], factor, k * row_coefficients<kTerms>(terms, c, lanes));
      }
    }
    if constexpr (kMapped) {
      if (!differentiates) return;
#pragma GCC unroll 8
      for (int u = 0; u < K; ++u) logits.differentiate(u, lanes_of<acc>(count, u, n), map_of(terms), g[u], by_scale);
    }
  }
};

template <typename T, Terms kTerms, typename P, bool kMapped>
NLLX_INLINE void backward_row(const CrossEntropyBackward& p, bool stream, int64_t unit, int64_t row, int64_t begin,
                              int64_t end, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  const int64_t classes = p.extent.classes;
  const Row r = row_of(p.extent, row);
  const T* x = static_cast<const T*>(p.logits) + r.offset(p.logits_strides);
  T* grad = static_cast<T*>(p.grad_logits) + r.offset(p.grad_strides);
  IndexTarget<acc> y{0, false, false, acc(0)};
  if constexpr (kTerms != Terms::kProbabilities) y = index_target<acc>(p.targets, classes, row);
  if (y.bad) note_bad_target(result, row);
  const bool wants_scale_gradient = kMapped && p.wants_scale_gradient();
  if (y.ignored || y.bad) {
    if (wants_scale_gradient) add_scale_gradient(p, unit, 0, result);
    memset(grad + begin, 0, sizeof(T) * static_cast<size_t>(end - begin));
    return;
  }
  const auto terms = row_terms<acc, P, kMapped>(p.targets, p.extent, r.outer, r.inner, p.options, row);
  acc k = incoming_gradient<acc>(p.grad_output, p.grad_output_stride, p.total_weight, row);
  const acc target_term = kTerms == Terms::kProbabilities ? acc(0) : terms.scale * y.weight;
  acc mass = kTerms == Terms::kProbabilities ? probability_mass<acc, P>(terms, classes)
                                             : target_term + smoothing_mass<kTerms, acc, P>(p.targets, terms, classes);
  const RowStats<acc> stats = static_cast<const RowStats<acc>*>(p.row_stats)[row];
  if (p.options) {
    k *= sample_weight_of<acc>(*p.options, row);
    mass += z_loss_slope_of(*p.options, stats.max + stats.log_sum);
  }
  bool differentiates = false;
  if constexpr (kMapped) {
    differentiates = !folds_slope(*p.options, wants_scale_gradient);
    if (!differentiates) k *= terms.map.in[0];
  }
  // k A exp(z - lse): the part that is the same for the whole row is one factor.
  const acc factor = static_cast<acc>(static_cast<double>(k * mass) * exp(-static_cast<double>(stats.log_sum)));
  const bool has_target = kTerms != Terms::kProbabilities && y.index >= begin && y.index < end;
  // The value at the target is made from the logit before the row is written: the gradient may lie over the logits.
  acc at_target = 0;
  double target_by_scale = 0;
  if (has_target) {
    MappedLogits<1, kMapped, acc> logit;
    const acc term = k * (target_term + smoothing_term<kTerms, acc, P>(terms, y.index));
    Vec<acc> v;
    logit.load(
        &v, [&](int) { return broadcast(to_acc(x[y.index])); }, [&](int) -> decltype(auto) { return map_of(terms); },
        [&](int) { return broadcast(stats.max); });
    Vec<acc> g = factor * exp_vec(v) - term;
    if (differentiates) {
      Vec<acc> of_target = broadcast(k * target_term), sum{};
      logit.differentiate(0, kLanes<acc>, map_of(terms), of_target, &sum);
      target_by_scale = static_cast<double>(sum[0]);
      logit.differentiate(0, kLanes<acc>, map_of(terms), g, nullptr);
    }
    at_target = g[0];
  }
  RowGradient<kTerms, T, acc, P, kMapped> value(x, stats.max, factor, k, terms);
  value.differentiates = differentiates;
  if constexpr (kMapped) {
    if (wants_scale_gradient) {
      const double sum = sum_of_blocks<acc>(begin, end, [&](int64_t from, int64_t to, Vec<acc>& of_block) {
        value.by_scale = &of_block;
        // Not streamed: which class is which lane would depend on where the gradient lies, and so the bits of the sum.
        write_row(false, grad, from, to, value, has_target ? y.index : -1, from_acc<T>(at_target));
      });
      const double per_scale = static_cast<double>(row_map<acc>(*p.options, row).per_scale);
      add_scale_gradient(p, unit, per_scale * (sum - target_by_scale), result);
      return;
    }
  }
  write_row(stream, grad, begin, end, value, has_target ? y.index : -1, from_acc<T>(at_target));
}

template <typename T, Terms kTerms, typename P, bool kMapped>
void cross_entropy_backward_rows(const CrossEntropyBackward& p, const Chunks& chunks, int64_t chunk,
                                 ChunkResult& result) {
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    if (chunks.segments == 1) {
      backward_row<T, kTerms, P, kMapped>(p, chunks.stream, unit, unit, 0, p.extent.classes, result);
    } else {
      const int64_t row = unit / chunks.segments, begin = (unit - row * chunks.segments) * Chunks::kSegment;
      const int64_t end = p.extent.classes - begin < Chunks::kSegment ? p.extent.classes : begin + Chunks::kSegment;
      backward_row<T, kTerms, P, kMapped>(p, chunks.stream, unit, row, begin, end, result);
    }
  }
  if (chunks.stream) end_stream();
}
