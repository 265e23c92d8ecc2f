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
  store_stats(s.max, s.sum, width, stats);
  result.loss += sum_in_double(loss, width);
  result.weight += kIndex ? sum_of_weights(p.targets, targets, width) : static_cast<double>(width);
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
    store(s.factor + i, k * mass * exp_vec(-load(s.factor + i)));
  }
}
