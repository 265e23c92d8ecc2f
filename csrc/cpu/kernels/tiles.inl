// Losses of tiles: up to kTile neighbouring rows whose sums are known, and what their gradients are made of. Vectors
// run over the rows. How the sums come about is in planes.inl and short_rows.inl.

template <typename acc>
struct TileSums {
  alignas(64) acc max[kTileRoom], sum[kTileRoom], dot[kTileRoom], mass[kTileRoom];
};

template <typename acc>
NLLX_INLINE void store_stats(const acc* max, const acc* log_sum, int width, RowStats<acc>* stats) {
  constexpr int L = kLanes<acc>;
  int i = 0;
  for (; i + L <= width; i += L) {
    Vec<acc> a = load(max + i), b = load(log_sum + i);
    interleave(a, b, typename LanesTo<L>::type{});
    acc* to = reinterpret_cast<acc*>(stats + i);
    store(to, a);
    store(to + L, b);
  }
  for (; i < width; ++i) stats[i] = {max[i], log_sum[i]};
}
template <typename acc>
NLLX_INLINE void load_stats(const RowStats<acc>* stats, int width, acc* max, acc* log_sum) {
  constexpr int L = kLanes<acc>;
  int i = 0;
  for (; i + L <= width; i += L) {
    // Vector by vector: a copy of both by memcpy is made of shorter moves, whose stores a load of a vector waits for.
    const acc* from = reinterpret_cast<const acc*>(stats + i);
    Vec<acc> a = load(from), b = load(from + L);
    deinterleave(a, b, typename LanesTo<L>::type{});
    store(max + i, a);
    store(log_sum + i, b);
  }
  for (; i < width; ++i) {
    max[i] = stats[i].max;
    log_sum[i] = stats[i].log_sum;
  }
}

// What the options of its rows make of the losses of a tile; returns the sum of the weights that a mean divides by.
// index: -1 for a row that does not count; null where all do. weight: of the targets' classes.
template <typename acc>
NLLX_APART double apply_options(const RowOptions& o, int64_t row, int width, const acc* max, const acc* log_sum,
                                const typename VecOf<acc>::integer* index, const acc* weight, acc* loss) {
  alignas(64) acc weights[kTile];
  weights[0] = 0;  // GCC does not see that width > 0
  const acc* sample_weight = o.sample_weight ? static_cast<const acc*>(o.sample_weight) + row : nullptr;
  NLLX_FOR_VECTORS(i, k, width) {
    const Vec<acc> factor = sample_weight ? load_some(sample_weight + i, k, acc(0)) : broadcast(acc(1));
    const Vec<acc> logsumexp = load(max + i) + load(log_sum + i);
    Vec<acc> l = load(loss + i), w = factor;
    if (o.z_loss != 0) l += static_cast<acc>(o.z_loss) * logsumexp * logsumexp;
    l *= factor;
    if (index) {
      Mask<acc> counts;
      memcpy(&counts, index + i, sizeof counts);
      counts = counts >= 0;
      l = select(counts, l, Vec<acc>{});
      w = select(counts, factor * load(weight + i), Vec<acc>{});
    }
    store(loss + i, l);
    store(weights + i, w);
  }
  return sum_in_double(weights, width);
}

// Losses and statistics of a tile whose sums are known. target_logits: x_y of each row, read only where it counts.
template <typename T, Terms kTerms, typename acc>
NLLX_APART void finish_forward_tile(const CrossEntropyForward& p, int64_t row, int width, acc scale,
                                    const TileTargets<acc>& targets, const acc* target_logits, TileSums<acc>& s,
                                    ChunkResult& result) {
  alignas(64) acc loss[kTile];
  loss[0] = 0;  // GCC does not see that width > 0
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
  if (p.options) {
    result.weight += apply_options<acc>(*p.options, row, width, s.max, s.sum, kIndex ? targets.index : nullptr,
                                        kIndex ? targets.weight : nullptr, loss);
  } else {
    result.weight += kIndex ? sum_of_weights(p.targets, targets, width) : static_cast<double>(width);
  }
  store_stats(s.max, s.sum, width, stats);
  result.loss += sum_in_double(loss, width);
  if (p.row_loss) {
    for (int i = 0; i < width; ++i) store_row_loss<T>(p.row_loss, p.row_loss_is_acc, row + i, loss[i]);
  }
}

// ---- backward ----

// What the gradient of each row of a tile is made of: factor exp(x_c - m) - k a_c, less `at_target` at the target.
template <typename acc>
struct TileGradient {
  alignas(64) acc max[kTileRoom], factor[kTileRoom], k[kTileRoom], at_target[kTileRoom];
};

// Of the rows of a tile what logit_scale gets: the sum of a block of classes, and those of all blocks in double.
template <typename acc, bool kMapped>
struct TileScaleGradient {
  alignas(64) acc block[kTileRoom];
  double total[kTile];

  void begin(int width) {
    memset(block, 0, sizeof block);
    for (int i = 0; i < width; ++i) total[i] = 0;
  }
  void end_block(int width) {
    for (int i = 0; i < width; ++i) total[i] += static_cast<double>(block[i]);
    memset(block, 0, sizeof block);
  }
  // index: -1 for a row that does not count; null where all do.
  template <typename Problem>
  void end(const Problem& p, int64_t row, int width, const TileMap<acc, true>& map,
           const typename VecOf<acc>::integer* index, ChunkResult& result) {
    end_block(width);
    for (int i = 0; i < width; ++i) {
      const bool counts = !index || index[i] >= 0;
      add_scale_gradient(p, row + i, counts ? total[i] * static_cast<double>(map.per_scale[i]) : 0., result);
    }
  }
};
template <typename acc>
struct TileScaleGradient<acc, false> {
  acc* block = nullptr;
  void begin(int) {}
  void end_block(int) {}
  template <typename Problem>
  void end(const Problem&, int64_t, int, const TileMap<acc, false>&, const typename VecOf<acc>::integer*,
           ChunkResult&) {}
};

// What the options of its rows make of the incoming gradients of a tile, and what the z-loss adds to the rows' mass.
template <typename acc>
NLLX_APART void begin_options(const RowOptions& o, int64_t row, int width, const acc* max, const acc* log_sum, acc* k,
                              acc* mass) {
  const acc* sample_weight = o.sample_weight ? static_cast<const acc*>(o.sample_weight) + row : nullptr;
  NLLX_FOR_VECTORS(i, n, width) {
    if (sample_weight) store(k + i, load(k + i) * load_some(sample_weight + i, n, acc(0)));
    Vec<acc> added{};
    if (o.z_loss != 0) added = static_cast<acc>(2 * o.z_loss) * (load(max + i) + load(log_sum + i));
    store(mass + i, added);
  }
}

// With the mass of probabilities in s.at_target.
template <Terms kTerms, typename acc, typename P>
NLLX_APART void begin_backward_tile(const CrossEntropyBackward& p, int64_t row, int width,
                                    const ClassTerms<acc, P>& terms, const TileTargets<acc>& targets,
                                    TileGradient<acc>& s) {
  const RowStats<acc>* stats = static_cast<const RowStats<acc>*>(p.row_stats) + row;
  const acc smoothing = smoothing_mass<kTerms>(p.targets, terms, p.extent.classes);
  load_stats(stats, width, s.max, s.factor);
  if (p.grad_output_stride == 0) {
    const Vec<acc> k = broadcast(incoming_gradient<acc>(p.grad_output, 0, p.total_weight, row));
    NLLX_FOR_VECTORS(i, n, width) store(s.k + i, k);
  } else {
    for (int i = 0; i < width; ++i) s.k[i] = incoming_gradient<acc>(p.grad_output, 1, p.total_weight, row + i);
  }
  alignas(64) acc added[kTile];  // to the mass
  added[0] = 0;
  if (p.options) begin_options<acc>(*p.options, row, width, s.max, s.factor, s.k, added);
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
    if (p.options) mass += load(added + i);
    store(s.factor + i, k * mass * exp_vec(-load(s.factor + i)));
  }
}

// dz / dx, where it is one number of the row, into its factors.
template <typename acc>
NLLX_APART void fold_slope(const TileMap<acc, true>& map, int width, TileGradient<acc>& s) {
  NLLX_FOR_VECTORS(i, n, width) {
    const Vec<acc> in = load(map.in + i);
    store(s.factor + i, in * load(s.factor + i));
    store(s.k + i, in * load(s.k + i));
    store(s.at_target + i, in * load(s.at_target + i));
  }
}
