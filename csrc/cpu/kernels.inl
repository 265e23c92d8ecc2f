// Every CPU kernel, compiled once per capability unit. Reads of a row go in blocks that stay in the first-level cache:
// one pass for the maximum, one for the sum of exponentials, so memory is read once.
#include "../online_softmax.h"
#include "kernels.h"
#include "vec.h"

namespace nllx {
namespace NLLX_CAPABILITY {
namespace {

constexpr int64_t kBlockBytes = 16 * 1024;  // half of a small first-level cache
constexpr int64_t kTile = Chunks::kTile;

// How the classes other than an index target's enter the loss.
enum class Terms {
  kNone,          // not at all
  kUniform,       // a_c = w_c ε / C: label smoothing of an index target
  kProbabilities  // a_c = w_c ((1 - ε) p_c + ε / C)
};

// The coefficients a_c of the classes; `P` is the element type of the probabilities.
template <typename acc, typename P>
struct ClassTerms {
  const P* probabilities;  // of this row (or of the first row of this tile)
  int64_t stride;          // between classes
  const acc* weight;       // null: all ones
  acc scale, uniform;      // 1 - ε, ε / C
};

template <typename acc, typename P>
ClassTerms<acc, P> class_terms(const Targets& t, const Extent& extent, int64_t outer, int64_t inner) {
  const Strides& s = t.probability_strides;
  const P* p = static_cast<const P*>(t.probabilities);
  return {p ? p + outer * s.outer + inner * s.inner : nullptr, s.classes, static_cast<const acc*>(t.weight),
          static_cast<acc>(1. - t.label_smoothing),
          static_cast<acc>(t.label_smoothing / static_cast<double>(extent.classes))};
}

// The coefficients of kLanes classes from c on (rows), of which the first n exist.
template <Terms kTerms, typename acc, typename P>
NLLX_INLINE Vec<acc> row_coefficients(const ClassTerms<acc, P>& t, int64_t c, int n) {
  const bool whole = n == kLanes<acc>;
  Vec<acc> a = broadcast(t.uniform);
  if constexpr (kTerms == Terms::kProbabilities) {
    a += t.scale * (whole ? load(t.probabilities + c) : load_first(t.probabilities + c, n, acc(0)));
  }
  if (t.weight) a *= whole ? load(t.weight + c) : load_first(t.weight + c, n, acc(0));
  return whole ? a : select(first_lanes<acc>(n), a, Vec<acc>{});
}
template <typename acc>
NLLX_INLINE Vec<acc> weighted_vec(Vec<acc> a, Vec<acc> v) {
  return select((a == acc(0)) & (v == -static_cast<acc>(__builtin_inf())), Vec<acc>{}, a * v);
}

template <typename acc>
struct RowSums {
  acc max = -static_cast<acc>(__builtin_inf());
  double sum = 0;   // Σ exp(x - max)
  double dot = 0;   // Σ a (x - max)
  double mass = 0;  // Σ a
  RowStats<acc> stats() const { return {finite_max(max), static_cast<acc>(log(sum))}; }
};

template <typename T, typename acc>
NLLX_INLINE acc block_max(const T* x, int64_t n) {
  constexpr int L = kLanes<acc>;
  const acc lowest = -static_cast<acc>(__builtin_inf());
  Vec<acc> m0 = broadcast(lowest), m1 = m0, m2 = m0, m3 = m0;
  int64_t c = 0;
  for (; c + 4 * L <= n; c += 4 * L) {
    m0 = max_not_nan(m0, load(x + c));
    m1 = max_not_nan(m1, load(x + c + L));
    m2 = max_not_nan(m2, load(x + c + 2 * L));
    m3 = max_not_nan(m3, load(x + c + 3 * L));
  }
  for (; c + L <= n; c += L) m0 = max_not_nan(m0, load(x + c));
  if (c < n) m1 = max_not_nan(m1, load_first(x + c, static_cast<int>(n - c), lowest));
  return largest_lane<acc>(max_not_nan(max_not_nan(m0, m1), max_not_nan(m2, m3)));
}

template <Terms kTerms, typename T, typename acc, typename P>
NLLX_INLINE RowSums<acc> row_sums(const T* row, int64_t classes, const ClassTerms<acc, P>& terms) {
  constexpr int L = kLanes<acc>;
  // Equal coefficients are rounded in one direction when they are added, so few are before the double takes their sum.
  constexpr int64_t kBlock = kTerms == Terms::kNone ? kBlockBytes / static_cast<int64_t>(sizeof(T)) : 64 * kLanes<acc>;
  const acc lowest = -static_cast<acc>(__builtin_inf());
  RowSums<acc> s;
  for (int64_t start = 0; start < classes; start += kBlock) {
    const T* x = row + start;
    const int64_t n = classes - start < kBlock ? classes - start : kBlock;
    const acc m = block_max<T, acc>(x, n);
    if (m > s.max) {
      if (!is_minus_infinity(s.max)) {
        s.sum *= exp(static_cast<double>(s.max) - static_cast<double>(m));
        s.dot += s.mass * (static_cast<double>(s.max) - static_cast<double>(m));
      }
      s.max = m;
    }
    const Vec<acc> shift = broadcast(finite_max(s.max));
    Vec<acc> sum0{}, sum1{}, sum2{}, sum3{}, dot{}, mass{};
    int64_t c = 0;
    if constexpr (kTerms == Terms::kNone) {
      for (; c + 4 * L <= n; c += 4 * L) {
        sum0 += exp_vec(load(x + c) - shift);
        sum1 += exp_vec(load(x + c + L) - shift);
        sum2 += exp_vec(load(x + c + 2 * L) - shift);
        sum3 += exp_vec(load(x + c + 3 * L) - shift);
      }
    }
    for (; c < n; c += L) {
      const int k = n - c < L ? static_cast<int>(n - c) : L;
      const Vec<acc> v = (k == L ? load(x + c) : load_first(x + c, k, lowest)) - shift;
      sum0 += exp_vec(v);
      if constexpr (kTerms != Terms::kNone) {
        const Vec<acc> a = row_coefficients<kTerms>(terms, start + c, k);
        dot += weighted_vec<acc>(a, v);
        mass += a;
      }
    }
    s.sum += sum_of_lanes<acc>((sum0 + sum1) + (sum2 + sum3));
    if constexpr (kTerms != Terms::kNone) {
      s.dot += sum_of_lanes<acc>(dot);
      s.mass += sum_of_lanes<acc>(mass);
    }
  }
  return s;
}

// What an index target says of its row.
template <typename acc>
struct IndexTarget {
  int64_t index;
  bool ignored, bad;
  acc weight;  // of the target's class
};
template <typename acc>
NLLX_INLINE IndexTarget<acc> index_target(const Targets& t, int64_t classes, int64_t row) {
  IndexTarget<acc> r;
  r.index = load_index(t.index, t.index_type, row);
  r.ignored = r.index == t.ignore_index;
  r.bad = !r.ignored && !is_class(r.index, classes);
  r.weight = r.ignored || r.bad ? acc(0) : t.weight ? static_cast<const acc*>(t.weight)[r.index] : acc(1);
  return r;
}
NLLX_INLINE void note_bad_target(ChunkResult& result, int64_t row) {
  if (result.bad_target < 0 || row < result.bad_target) result.bad_target = row;
}

template <typename T, typename acc>
NLLX_INLINE void store_row_loss(void* row_loss, bool is_acc, int64_t row, acc loss) {
  if (!row_loss) return;
  if (is_acc) {
    static_cast<acc*>(row_loss)[row] = loss;
  } else {
    static_cast<T*>(row_loss)[row] = from_acc<T>(loss);
  }
}

// The loss of a row from its parts. `log_sum` is log Σ exp(x - m), `target_logit` is x_y - m.
template <Terms kTerms, typename acc>
NLLX_INLINE acc row_loss_of(const IndexTarget<acc>& y, acc scale, acc target_logit, acc log_sum, acc dot, acc mass) {
  acc loss = 0;
  if constexpr (kTerms != Terms::kProbabilities) loss = -weighted(scale * y.weight, target_logit - log_sum);
  if constexpr (kTerms != Terms::kNone) loss += mass * log_sum - dot;
  return loss;
}

// ---- cross entropy, forward ----

template <typename T, Terms kTerms, typename P>
void cross_entropy_forward_rows(const CrossEntropyForward& p, const Chunks& chunks, int64_t chunk,
                                ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  const int64_t classes = p.extent.classes;
  for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
    const int64_t outer = p.extent.inner == 1 ? row : row / p.extent.inner, inner = row - outer * p.extent.inner;
    const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner * p.logits_strides.inner;
    IndexTarget<acc> y{0, false, false, acc(1)};
    if constexpr (kTerms != Terms::kProbabilities) y = index_target<acc>(p.targets, classes, row);
    if (y.bad) note_bad_target(result, row);
    acc loss = 0;
    RowStats<acc> stats{0, 0};
    if (!y.ignored && !y.bad) {
      const ClassTerms<acc, P> terms = class_terms<acc, P>(p.targets, p.extent, outer, inner);
      const RowSums<acc> s = row_sums<kTerms, T, acc, P>(x, classes, terms);
      stats = s.stats();
      const acc target_logit = kTerms == Terms::kProbabilities ? acc(0) : to_acc(x[y.index]) - stats.max;
      loss = row_loss_of<kTerms>(y, terms.scale, target_logit, stats.log_sum, static_cast<acc>(s.dot),
                                 static_cast<acc>(s.mass));
      result.loss += static_cast<double>(loss);
      result.weight += static_cast<double>(y.weight);
    }
    store_row_loss<T>(p.row_loss, p.row_loss_is_acc, row, loss);
    static_cast<RowStats<acc>*>(p.row_stats)[row] = stats;
  }
}

// A tile of up to kTile neighbouring rows of one plane.
struct Tile {
  int64_t outer, inner, row;
  int width;
};
NLLX_INLINE Tile tile_of(const Extent& extent, int64_t unit) {
  const int64_t tiles = Chunks::tiles_per_plane(extent);
  const int64_t outer = unit / tiles, inner = (unit - outer * tiles) * kTile;
  return {outer, inner, outer * extent.inner + inner,
          static_cast<int>(extent.inner - inner < kTile ? extent.inner - inner : kTile)};
}
// The classes of a tile that are read twice while they are in the second-level cache.
template <typename T>
NLLX_INLINE int64_t classes_per_block() {
  return 128 * 1024 / (kTile * static_cast<int64_t>(sizeof(T)));
}
template <typename T, typename acc>
NLLX_INLINE Vec<acc> load_some(const T* p, int k, acc fill) {
  return k == kLanes<acc> ? load(p) : load_first(p, k, fill);
}
template <typename T>
NLLX_INLINE void store_some(T* p, Vec<typename AccOf<T>::type> v, int k) {
  if (k == kLanes<typename AccOf<T>::type>) {
    store(p, v);
  } else {
    store_first(p, v, k);
  }
}
// Calls body(i, k) for the vectors of a tile: lanes i to i + k - 1 exist.
#define NLLX_FOR_VECTORS(i, k, width)     \
  for ([[maybe_unused]] int i = 0, k = 0; \
       i < (width) && (k = (width) - i < kLanes<acc> ? (width) - i : kLanes<acc>, true); i += kLanes<acc>)

template <Terms kTerms, typename acc, typename P>
NLLX_INLINE Vec<acc> tile_coefficients(const ClassTerms<acc, P>& t, int64_t c, int i, int k) {
  Vec<acc> a = broadcast(t.uniform);
  if constexpr (kTerms == Terms::kProbabilities)
    a += t.scale * load_some(t.probabilities + c * t.stride + i, k, acc(0));
  if (t.weight) a *= t.weight[c];
  return a;
}

template <typename acc>
struct TileSums {
  alignas(64) acc max[kTile], sum[kTile], dot[kTile], mass[kTile];
};

template <Terms kTerms, typename T, typename acc, typename P>
NLLX_INLINE void tile_sums(const T* x, int64_t class_stride, int64_t classes, int width,
                           const ClassTerms<acc, P>& terms, TileSums<acc>& s) {
  const acc lowest = -static_cast<acc>(__builtin_inf());
  const int64_t block = classes_per_block<T>();
  // The sums of a block are added to the others' once: thousands of additions in acc, one class after another, would
  // lose digits. The mass of uniform coefficients is one number for all rows.
  alignas(64) acc before[kTile], sum[kTile], dot[kTile], mass[kTile];
  double uniform_mass = 0;
  NLLX_FOR_VECTORS(i, k, width) {
    store(s.max + i, broadcast(lowest));
    store(s.sum + i, Vec<acc>{});
    store(s.dot + i, Vec<acc>{});
    store(s.mass + i, Vec<acc>{});
  }
  for (int64_t start = 0; start < classes; start += block) {
    const int64_t end = classes - start < block ? classes : start + block;
    memcpy(before, s.max, sizeof before);
    for (int64_t c = start; c < end; ++c) {
      const T* plane = x + c * class_stride;
      NLLX_FOR_VECTORS(i, k, width) { store(s.max + i, max_not_nan(load(s.max + i), load_some(plane + i, k, lowest))); }
    }
    NLLX_FOR_VECTORS(i, k, width) {
      const Vec<acc> old_max = load(before + i), new_max = load(s.max + i);
      const Mask<acc> first = old_max == lowest;
      const Vec<acc> shift =
          select(first, Vec<acc>{}, old_max - new_max);  // nothing has been summed before the first finite one
      store(s.sum + i, load(s.sum + i) * exp_vec(shift));
      if constexpr (kTerms == Terms::kUniform) {
        store(s.dot + i, load(s.dot + i) + static_cast<acc>(uniform_mass) * shift);
      }
      if constexpr (kTerms == Terms::kProbabilities) store(s.dot + i, load(s.dot + i) + load(s.mass + i) * shift);
      store(sum + i, Vec<acc>{});
      store(dot + i, Vec<acc>{});
      store(mass + i, Vec<acc>{});
    }
    for (int64_t c = start; c < end; ++c) {
      const T* plane = x + c * class_stride;
      NLLX_FOR_VECTORS(i, k, width) {
        const Vec<acc> m = load(s.max + i);
        const Vec<acc> v = load_some(plane + i, k, lowest) - select(m == lowest, Vec<acc>{}, m);
        store(sum + i, load(sum + i) + exp_vec(v));
        if constexpr (kTerms != Terms::kNone) {
          const Vec<acc> a = tile_coefficients<kTerms>(terms, c, i, k);
          store(dot + i, load(dot + i) + weighted_vec<acc>(a, v));
          if constexpr (kTerms == Terms::kProbabilities) store(mass + i, load(mass + i) + a);
        }
      }
      if constexpr (kTerms == Terms::kUniform) {
        uniform_mass += static_cast<double>(terms.uniform) * (terms.weight ? static_cast<double>(terms.weight[c]) : 1.);
      }
    }
    NLLX_FOR_VECTORS(i, k, width) {
      store(s.sum + i, load(s.sum + i) + load(sum + i));
      if constexpr (kTerms != Terms::kNone) store(s.dot + i, load(s.dot + i) + load(dot + i));
      if constexpr (kTerms == Terms::kProbabilities) store(s.mass + i, load(s.mass + i) + load(mass + i));
    }
  }
  if constexpr (kTerms == Terms::kUniform) {
    NLLX_FOR_VECTORS(i, k, width) { store(s.mass + i, broadcast(static_cast<acc>(uniform_mass))); }
  }
}

// `width` neighbouring rows from `row` on, whose logits of class c are x[c * stride + i]; T is the type of the
// problem's logits, X that of these.
template <typename T, Terms kTerms, typename X, typename P>
NLLX_INLINE void cross_entropy_forward_tile(const CrossEntropyForward& p, int64_t row, int width, const X* x,
                                            int64_t stride, const ClassTerms<typename AccOf<T>::type, P>& terms,
                                            TileSums<typename AccOf<T>::type>& s, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  tile_sums<kTerms, X, acc, P>(x, stride, p.extent.classes, width, terms, s);
  NLLX_FOR_VECTORS(i, k, width) { store(s.sum + i, log_vec(load(s.sum + i))); }
  for (int i = 0; i < width; ++i) {
    IndexTarget<acc> y{0, false, false, acc(1)};
    if constexpr (kTerms != Terms::kProbabilities) y = index_target<acc>(p.targets, p.extent.classes, row + i);
    if (y.bad) note_bad_target(result, row + i);
    acc loss = 0;
    RowStats<acc> stats{0, 0};
    if (!y.ignored && !y.bad) {
      stats = {finite_max(s.max[i]), s.sum[i]};
      const acc target_logit = kTerms == Terms::kProbabilities ? acc(0) : to_acc(x[y.index * stride + i]) - stats.max;
      loss = row_loss_of<kTerms>(y, terms.scale, target_logit, stats.log_sum, s.dot[i], s.mass[i]);
      result.loss += static_cast<double>(loss);
      result.weight += static_cast<double>(y.weight);
    }
    store_row_loss<T>(p.row_loss, p.row_loss_is_acc, row + i, loss);
    static_cast<RowStats<acc>*>(p.row_stats)[row + i] = stats;
  }
}

template <typename T, Terms kTerms, typename P>
void cross_entropy_forward_planes(const CrossEntropyForward& p, const Chunks& chunks, int64_t chunk,
                                  ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  TileSums<acc> s;
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const Tile tile = tile_of(p.extent, unit);
    const T* x = static_cast<const T*>(p.logits) + tile.outer * p.logits_strides.outer + tile.inner;
    const ClassTerms<acc, P> terms = class_terms<acc, P>(p.targets, p.extent, tile.outer, tile.inner);
    cross_entropy_forward_tile<T, kTerms>(p, tile.row, tile.width, x, p.logits_strides.classes, terms, s, result);
  }
}

// Rows of few classes fill a vector badly. They are turned into a tile of a plane, in the first-level cache, whose
// vectors run over the rows.
constexpr int64_t kFewClasses = 16;

template <typename T, typename acc>
NLLX_INLINE void rows_to_tile(const T* rows, int64_t row_stride, int64_t classes, int width, acc* tile) {
  for (int64_t c = 0; c < classes; ++c) {
    for (int i = 0; i < width; ++i) tile[c * kTile + i] = to_acc(rows[i * row_stride + c]);
  }
}
template <typename T, typename acc>
NLLX_INLINE void tile_to_rows(const acc* tile, T* rows, int64_t row_stride, int64_t classes, int width) {
  for (int i = 0; i < width; ++i) {
    for (int64_t c = 0; c < classes; ++c) rows[i * row_stride + c] = from_acc<T>(tile[c * kTile + i]);
  }
}

template <typename Problem>
NLLX_INLINE bool has_few_classes(const Problem& p) {
  return p.layout == Layout::kRows && p.extent.inner == 1 && p.extent.classes <= kFewClasses;
}

template <typename T, Terms kTerms, typename P>
void cross_entropy_forward_few_classes(const CrossEntropyForward& p, const Chunks& chunks, int64_t chunk,
                                       ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  alignas(64) acc tile[kFewClasses * kTile];
  TileSums<acc> s;
  const ClassTerms<acc, P> terms = class_terms<acc, P>(p.targets, p.extent, 0, 0);
  for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); row += kTile) {
    const int width = static_cast<int>(chunks.end(chunk) - row < kTile ? chunks.end(chunk) - row : kTile);
    const T* x = static_cast<const T*>(p.logits) + row * p.logits_strides.outer;
    rows_to_tile(x, p.logits_strides.outer, p.extent.classes, width, tile);
    cross_entropy_forward_tile<T, kTerms>(p, row, width, static_cast<const acc*>(tile), kTile, terms, s, result);
  }
}

// ---- cross entropy, backward ----

template <typename acc>
NLLX_INLINE acc incoming_gradient(const void* grad_output, int64_t stride, const void* total_weight, int64_t row) {
  const acc g = static_cast<const acc*>(grad_output)[row * stride];
  return total_weight ? g / *static_cast<const acc*>(total_weight) : g;
}

template <typename acc>
NLLX_INLINE Vec<acc> softmax_vec(Vec<acc> x, Vec<acc> max, Vec<acc> log_sum) {
  return exp_vec((x - max) - log_sum);
}

template <typename T, Terms kTerms, typename P>
void cross_entropy_backward_rows(const CrossEntropyBackward& p, const Chunks& chunks, int64_t chunk,
                                 ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  constexpr int L = kLanes<acc>;
  const int64_t classes = p.extent.classes;
  for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
    const int64_t outer = p.extent.inner == 1 ? row : row / p.extent.inner, inner = row - outer * p.extent.inner;
    const T* x = static_cast<const T*>(p.logits) + outer * p.logits_strides.outer + inner * p.logits_strides.inner;
    T* grad = static_cast<T*>(p.grad_logits) + outer * p.grad_strides.outer + inner * p.grad_strides.inner;
    IndexTarget<acc> y{0, false, false, acc(0)};
    if constexpr (kTerms != Terms::kProbabilities) y = index_target<acc>(p.targets, classes, row);
    if (y.bad) note_bad_target(result, row);
    if (y.ignored || y.bad) {
      memset(grad, 0, sizeof(T) * static_cast<size_t>(classes));
      continue;
    }
    const ClassTerms<acc, P> terms = class_terms<acc, P>(p.targets, p.extent, outer, inner);
    const acc k = incoming_gradient<acc>(p.grad_output, p.grad_output_stride, p.total_weight, row);
    const acc target_term = kTerms == Terms::kProbabilities ? acc(0) : terms.scale * y.weight;
    acc mass = target_term;  // A
    if constexpr (kTerms == Terms::kUniform) {
      mass +=
          terms.uniform * (terms.weight ? *static_cast<const acc*>(p.targets.weight_sum) : static_cast<acc>(classes));
    }
    if constexpr (kTerms == Terms::kProbabilities) {
      double sum = 0;  // in blocks, so that few numbers are added in acc before the double takes them
      for (int64_t start = 0; start < classes; start += 64 * L) {
        const int64_t end = classes - start < 64 * L ? classes : start + 64 * L;
        Vec<acc> block{};
        for (int64_t c = start; c < end; c += L) {
          block += row_coefficients<kTerms>(terms, c, end - c < L ? static_cast<int>(end - c) : L);
        }
        sum += sum_of_lanes<acc>(block);
      }
      mass = static_cast<acc>(sum);
    }
    const RowStats<acc> stats = static_cast<const RowStats<acc>*>(p.row_stats)[row];
    const Vec<acc> max = broadcast(stats.max), log_sum = broadcast(stats.log_sum), ka = broadcast(k * mass);
    // The value at the target is made from the logit before the row is written: the gradient may lie over the logits.
    acc at_target = 0;
    if constexpr (kTerms != Terms::kProbabilities) {
      at_target = k * mass * softmax_vec<acc>(broadcast(to_acc(x[y.index])), max, log_sum)[0];
      acc a = target_term;
      if constexpr (kTerms == Terms::kUniform)
        a += terms.weight ? terms.uniform * terms.weight[y.index] : terms.uniform;
      at_target -= k * a;
    }
    for (int64_t c = 0; c < classes; c += L) {
      const int n = classes - c < L ? static_cast<int>(classes - c) : L;
      Vec<acc> g = ka * softmax_vec<acc>(load_some(x + c, n, acc(0)), max, log_sum);
      if constexpr (kTerms != Terms::kNone) g -= k * row_coefficients<kTerms>(terms, c, n);
      store_some(grad + c, g, n);
    }
    if constexpr (kTerms != Terms::kProbabilities) grad[y.index] = from_acc<T>(at_target);
  }
}

template <typename acc>
struct TileGradient {
  // at_target: with elements of type acc, what comes off the gradient at the target; else the gradient there.
  alignas(64) acc max[kTile], log_sum[kTile], k[kTile], ka[kTile], mass[kTile], at_target[kTile];
  alignas(64) typename VecOf<acc>::integer valid[kTile];
  int64_t target[kTile];  // checked; read once, since another thread of the program may write the target meanwhile
};

// As cross_entropy_forward_tile; `grad` may be `x`.
template <typename T, Terms kTerms, typename X, typename P>
NLLX_INLINE void cross_entropy_backward_tile(const CrossEntropyBackward& p, int64_t row, int width, const X* x,
                                             int64_t stride, X* grad, int64_t grad_stride,
                                             const ClassTerms<typename AccOf<T>::type, P>& terms,
                                             TileGradient<typename AccOf<T>::type>& s, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  constexpr bool kExact = sizeof(X) == sizeof(acc);  // the gradient can be completed after it is stored
  const int64_t classes = p.extent.classes;
  if constexpr (kTerms == Terms::kProbabilities) {
    alignas(64) acc block[kTile];
    NLLX_FOR_VECTORS(i, k, width) { store(s.mass + i, Vec<acc>{}); }
    for (int64_t start = 0; start < classes; start += 64) {  // as in tile_sums
      NLLX_FOR_VECTORS(i, k, width) { store(block + i, Vec<acc>{}); }
      for (int64_t c = start; c < classes && c < start + 64; ++c) {
        NLLX_FOR_VECTORS(i, k, width) { store(block + i, load(block + i) + tile_coefficients<kTerms>(terms, c, i, k)); }
      }
      NLLX_FOR_VECTORS(i, k, width) { store(s.mass + i, load(s.mass + i) + load(block + i)); }
    }
  }
  for (int i = 0; i < width; ++i) {
    IndexTarget<acc> y{0, false, false, acc(0)};
    if constexpr (kTerms != Terms::kProbabilities) y = index_target<acc>(p.targets, classes, row + i);
    if (y.bad) note_bad_target(result, row + i);
    const bool valid = !y.ignored && !y.bad;
    s.valid[i] = valid ? -1 : 0;
    s.target[i] = y.index;
    if (!valid) continue;
    const acc k = incoming_gradient<acc>(p.grad_output, p.grad_output_stride, p.total_weight, row + i);
    const RowStats<acc> stats = static_cast<const RowStats<acc>*>(p.row_stats)[row + i];
    s.max[i] = stats.max;
    s.log_sum[i] = stats.log_sum;
    s.k[i] = k;
    if constexpr (kTerms != Terms::kProbabilities) {
      const acc target_term = terms.scale * y.weight;
      acc mass = target_term, a = target_term;
      if constexpr (kTerms == Terms::kUniform) {
        mass +=
            terms.uniform * (terms.weight ? *static_cast<const acc*>(p.targets.weight_sum) : static_cast<acc>(classes));
        a += terms.weight ? terms.uniform * terms.weight[y.index] : terms.uniform;
      }
      s.mass[i] = mass;
      if constexpr (kExact) {
        s.at_target[i] = k * target_term;
      } else {
        const Vec<acc> x_y = broadcast(to_acc(x[y.index * stride + i]));
        s.at_target[i] = k * mass * softmax_vec<acc>(x_y, broadcast(stats.max), broadcast(stats.log_sum))[0] - k * a;
      }
    }
    s.ka[i] = k * s.mass[i];
  }
  for (int64_t c = 0; c < classes; ++c) {
    const X* plane = x + c * stride;
    X* grad_plane = grad + c * grad_stride;
    NLLX_FOR_VECTORS(i, k, width) {
      Vec<acc> g =
          load(s.ka + i) * softmax_vec<acc>(load_some(plane + i, k, acc(0)), load(s.max + i), load(s.log_sum + i));
      if constexpr (kTerms != Terms::kNone) g -= load(s.k + i) * tile_coefficients<kTerms>(terms, c, i, k);
      Mask<acc> valid;
      memcpy(&valid, s.valid + i, sizeof valid);
      store_some(grad_plane + i, select(valid, g, Vec<acc>{}), k);
    }
  }
  if constexpr (kTerms != Terms::kProbabilities) {
    for (int i = 0; i < width; ++i) {
      if (!s.valid[i]) continue;
      X& at_target = grad[s.target[i] * grad_stride + i];
      if constexpr (kExact) {
        at_target -= s.at_target[i];
      } else {
        at_target = from_acc<X>(s.at_target[i]);
      }
    }
  }
}

template <typename T, Terms kTerms, typename P>
void cross_entropy_backward_planes(const CrossEntropyBackward& p, const Chunks& chunks, int64_t chunk,
                                   ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  TileGradient<acc> s;
  memset(&s, 0, sizeof s);  // lanes beyond the width of a tile are computed too, and dropped
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const Tile tile = tile_of(p.extent, unit);
    const T* x = static_cast<const T*>(p.logits) + tile.outer * p.logits_strides.outer + tile.inner;
    T* grad = static_cast<T*>(p.grad_logits) + tile.outer * p.grad_strides.outer + tile.inner;
    const ClassTerms<acc, P> terms = class_terms<acc, P>(p.targets, p.extent, tile.outer, tile.inner);
    cross_entropy_backward_tile<T, kTerms>(p, tile.row, tile.width, x, p.logits_strides.classes, grad,
                                           p.grad_strides.classes, terms, s, result);
  }
}

template <typename T, Terms kTerms, typename P>
void cross_entropy_backward_few_classes(const CrossEntropyBackward& p, const Chunks& chunks, int64_t chunk,
                                        ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  alignas(64) acc tile[kFewClasses * kTile];
  TileGradient<acc> s;
  memset(&s, 0, sizeof s);
  const ClassTerms<acc, P> terms = class_terms<acc, P>(p.targets, p.extent, 0, 0);
  for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); row += kTile) {
    const int width = static_cast<int>(chunks.end(chunk) - row < kTile ? chunks.end(chunk) - row : kTile);
    const T* x = static_cast<const T*>(p.logits) + row * p.logits_strides.outer;
    T* grad = static_cast<T*>(p.grad_logits) + row * p.grad_strides.outer;
    rows_to_tile(x, p.logits_strides.outer, p.extent.classes, width, tile);
    cross_entropy_backward_tile<T, kTerms>(p, row, width, static_cast<const acc*>(tile), kTile, tile, kTile, terms, s,
                                           result);
    tile_to_rows(static_cast<const acc*>(tile), grad, p.grad_strides.outer, p.extent.classes, width);
  }
}

// From the problem to the instance: layout, terms and the type of the probabilities.
template <typename T, template <typename, Terms, typename> class Rows,
          template <typename, Terms, typename> class FewClasses, template <typename, Terms, typename> class Planes,
          typename Problem>
NLLX_INLINE void run_cross_entropy(const Problem& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
#define NLLX_RUN(kTerms, P)                                                      \
  (p.layout == Layout::kRows ? Rows<T, kTerms, P>::run(p, chunks, chunk, result) \
                             : Planes<T, kTerms, P>::run(p, chunks, chunk, result))
  if (p.targets.index && has_few_classes(p)) {
    p.targets.label_smoothing > 0 ? FewClasses<T, Terms::kUniform, acc>::run(p, chunks, chunk, result)
                                  : FewClasses<T, Terms::kNone, acc>::run(p, chunks, chunk, result);
  } else if (p.targets.index) {
    if (p.targets.label_smoothing > 0) {
      NLLX_RUN(Terms::kUniform, T);
    } else {
      NLLX_RUN(Terms::kNone, T);
    }
  } else if (p.targets.probabilities_are_acc) {
    NLLX_RUN(Terms::kProbabilities, acc);
  } else {
    NLLX_RUN(Terms::kProbabilities, T);
  }
#undef NLLX_RUN
}
#define NLLX_INSTANCE(Name, function)                                                             \
  template <typename T, Terms kTerms, typename P>                                                 \
  struct Name {                                                                                   \
    template <typename Problem>                                                                   \
    static void run(const Problem& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) { \
      function<T, kTerms, P>(p, chunks, chunk, result);                                           \
    }                                                                                             \
  };
NLLX_INSTANCE(ForwardRows, cross_entropy_forward_rows)
NLLX_INSTANCE(ForwardFewClasses, cross_entropy_forward_few_classes)
NLLX_INSTANCE(ForwardPlanes, cross_entropy_forward_planes)
NLLX_INSTANCE(BackwardRows, cross_entropy_backward_rows)
NLLX_INSTANCE(BackwardFewClasses, cross_entropy_backward_few_classes)
NLLX_INSTANCE(BackwardPlanes, cross_entropy_backward_planes)
#undef NLLX_INSTANCE

template <typename T>
void cross_entropy_forward(const CrossEntropyForward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  run_cross_entropy<T, ForwardRows, ForwardFewClasses, ForwardPlanes>(p, chunks, chunk, result);
}
template <typename T>
void cross_entropy_backward(const CrossEntropyBackward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  run_cross_entropy<T, BackwardRows, BackwardFewClasses, BackwardPlanes>(p, chunks, chunk, result);
}

// ---- nll_loss ----
//
// The forward gathers one number per row; the backward writes zeros and that number's place together.

template <typename T>
void nll_loss_forward(const NllLossForward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
    const IndexTarget<acc> y = index_target<acc>(p.targets, p.extent.classes, row);
    if (y.bad) note_bad_target(result, row);
    acc loss = 0;
    if (!y.ignored && !y.bad) {
      const int64_t outer = p.extent.inner == 1 ? row : row / p.extent.inner, inner = row - outer * p.extent.inner;
      const T* x = static_cast<const T*>(p.log_probs) + outer * p.strides.outer + inner * p.strides.inner;
      loss = -weighted(y.weight, to_acc(x[y.index * p.strides.classes]));
      result.loss += static_cast<double>(loss);
      result.weight += static_cast<double>(y.weight);
    }
    store_row_loss<T>(p.row_loss, p.row_loss_is_acc, row, loss);
  }
}

template <typename T>
void nll_loss_backward(const NllLossBackward& p, const Chunks& chunks, int64_t chunk, ChunkResult& result) {
  using acc = typename AccOf<T>::type;
  const Extent& e = p.extent;
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const bool rows = p.layout == Layout::kRows;
    const Tile tile = rows ? Tile{unit / e.inner, unit % e.inner, unit, 1} : tile_of(e, unit);
    T* grad = static_cast<T*>(p.grad_log_probs) + tile.outer * p.grad_strides.outer + tile.inner * p.grad_strides.inner;
    if (rows) {
      memset(grad, 0, sizeof(T) * static_cast<size_t>(e.classes));
    } else {
      for (int64_t c = 0; c < e.classes; ++c)
        memset(grad + c * p.grad_strides.classes, 0, sizeof(T) * static_cast<size_t>(tile.width));
    }
    for (int i = 0; i < tile.width; ++i) {
      const IndexTarget<acc> y = index_target<acc>(p.targets, e.classes, tile.row + i);
      if (y.bad) note_bad_target(result, tile.row + i);
      if (y.ignored || y.bad) continue;
      const acc k = incoming_gradient<acc>(p.grad_output, p.grad_output_stride, p.total_weight, tile.row + i);
      grad[y.index * p.grad_strides.classes + i] = from_acc<T>(-y.weight * k);
    }
  }
}

// ---- log_softmax ----

template <typename T>
void log_softmax_forward_rows(const LogSoftmaxForward& p, const Chunks& chunks, int64_t chunk) {
  using acc = typename AccOf<T>::type;
  constexpr int L = kLanes<acc>;
  for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
    const int64_t outer = p.extent.inner == 1 ? row : row / p.extent.inner, inner = row - outer * p.extent.inner;
    const T* x = static_cast<const T*>(p.input) + outer * p.input_strides.outer + inner * p.input_strides.inner;
    T* y = static_cast<T*>(p.output) + outer * p.output_strides.outer + inner * p.output_strides.inner;
    const RowStats<acc> s = row_sums<Terms::kNone, T, acc, T>(x, p.extent.classes, ClassTerms<acc, T>{}).stats();
    const Vec<acc> m = broadcast(s.max), log_sum = broadcast(s.log_sum);
    for (int64_t c = 0; c < p.extent.classes; c += L) {
      const int n = p.extent.classes - c < L ? static_cast<int>(p.extent.classes - c) : L;
      store_some(y + c, (load_some(x + c, n, acc(0)) - m) - log_sum, n);
    }
  }
}

template <typename T>
void log_softmax_forward_planes(const LogSoftmaxForward& p, const Chunks& chunks, int64_t chunk) {
  using acc = typename AccOf<T>::type;
  TileSums<acc> s;
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const Tile tile = tile_of(p.extent, unit);
    const T* x = static_cast<const T*>(p.input) + tile.outer * p.input_strides.outer + tile.inner;
    T* y = static_cast<T*>(p.output) + tile.outer * p.output_strides.outer + tile.inner;
    tile_sums<Terms::kNone, T, acc, T>(x, p.input_strides.classes, p.extent.classes, tile.width, ClassTerms<acc, T>{},
                                       s);
    for (int i = 0; i < tile.width; ++i) {
      s.max[i] = finite_max(s.max[i]);
    }
    NLLX_FOR_VECTORS(i, k, tile.width) { store(s.sum + i, log_vec(load(s.sum + i))); }
    for (int64_t c = 0; c < p.extent.classes; ++c) {
      NLLX_FOR_VECTORS(i, k, tile.width) {
        const Vec<acc> v = load_some(x + c * p.input_strides.classes + i, k, acc(0));
        store_some(y + c * p.output_strides.classes + i, (v - load(s.max + i)) - load(s.sum + i), k);
      }
    }
  }
}

// gradient = g - exp(output) Σ g
template <typename T>
void log_softmax_backward_rows(const LogSoftmaxBackward& p, const Chunks& chunks, int64_t chunk) {
  using acc = typename AccOf<T>::type;
  constexpr int L = kLanes<acc>;
  const int64_t classes = p.extent.classes;
  for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
    const int64_t outer = p.extent.inner == 1 ? row : row / p.extent.inner, inner = row - outer * p.extent.inner;
    const T* g = static_cast<const T*>(p.grad_output) + outer * p.grad_output_strides.outer +
                 inner * p.grad_output_strides.inner;
    const T* y = static_cast<const T*>(p.output) + outer * p.output_strides.outer + inner * p.output_strides.inner;
    T* grad = static_cast<T*>(p.grad_input) + outer * p.grad_input_strides.outer + inner * p.grad_input_strides.inner;
    double sum = 0;
    for (int64_t start = 0; start < classes; start += 64 * L) {
      const int64_t end = classes - start < 64 * L ? classes : start + 64 * L;
      Vec<acc> block{};
      for (int64_t c = start; c < end; c += L)
        block += load_some(g + c, end - c < L ? static_cast<int>(end - c) : L, acc(0));
      sum += sum_of_lanes<acc>(block);
    }
    const Vec<acc> total = broadcast(static_cast<acc>(sum));
    for (int64_t c = 0; c < classes; c += L) {
      const int n = classes - c < L ? static_cast<int>(classes - c) : L;
      store_some(grad + c, load_some(g + c, n, acc(0)) - exp_vec(load_some(y + c, n, acc(0))) * total, n);
    }
  }
}

template <typename T>
void log_softmax_backward_planes(const LogSoftmaxBackward& p, const Chunks& chunks, int64_t chunk) {
  using acc = typename AccOf<T>::type;
  alignas(64) acc total[kTile];
  for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
    const Tile tile = tile_of(p.extent, unit);
    const T* g = static_cast<const T*>(p.grad_output) + tile.outer * p.grad_output_strides.outer + tile.inner;
    const T* y = static_cast<const T*>(p.output) + tile.outer * p.output_strides.outer + tile.inner;
    T* grad = static_cast<T*>(p.grad_input) + tile.outer * p.grad_input_strides.outer + tile.inner;
    memset(total, 0, sizeof total);
    for (int64_t c = 0; c < p.extent.classes; ++c) {
      NLLX_FOR_VECTORS(i, k, tile.width) {
        store(total + i, load(total + i) + load_some(g + c * p.grad_output_strides.classes + i, k, acc(0)));
      }
    }
    for (int64_t c = 0; c < p.extent.classes; ++c) {
      NLLX_FOR_VECTORS(i, k, tile.width) {
        const Vec<acc> v = load_some(g + c * p.grad_output_strides.classes + i, k, acc(0));
        const Vec<acc> softmax = exp_vec(load_some(y + c * p.output_strides.classes + i, k, acc(0)));
        store_some(grad + c * p.grad_input_strides.classes + i, v - softmax * load(total + i), k);
      }
    }
  }
}

template <typename T>
void log_softmax_forward(const LogSoftmaxForward& p, const Chunks& chunks, int64_t chunk) {
  p.layout == Layout::kRows ? log_softmax_forward_rows<T>(p, chunks, chunk)
                            : log_softmax_forward_planes<T>(p, chunks, chunk);
}
template <typename T>
void log_softmax_backward(const LogSoftmaxBackward& p, const Chunks& chunks, int64_t chunk) {
  p.layout == Layout::kRows ? log_softmax_backward_rows<T>(p, chunks, chunk)
                            : log_softmax_backward_planes<T>(p, chunks, chunk);
}

}  // namespace

#define NLLX_PER_TYPE(kernel) {kernel<float>, kernel<double>, kernel<bfloat16>, kernel<float16>}
const CpuKernels kernels = {
    NLLX_PER_TYPE(cross_entropy_forward), NLLX_PER_TYPE(cross_entropy_backward), NLLX_PER_TYPE(nll_loss_forward),
    NLLX_PER_TYPE(nll_loss_backward),     NLLX_PER_TYPE(log_softmax_forward),    NLLX_PER_TYPE(log_softmax_backward),
};
#undef NLLX_PER_TYPE

}  // namespace NLLX_CAPABILITY
}  // namespace nllx
