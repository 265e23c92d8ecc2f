// What the CPU kernels share: targets, the coefficients of the classes, sums of rows. Included by kernels.inl.

constexpr int64_t kTile = Chunks::kTile;

template <typename acc>
constexpr acc kLowest = -static_cast<acc>(__builtin_inf());

// How the classes other than an index target's enter the loss.
enum class Terms {
  kNone,          // not at all
  kUniform,       // a_c = ε / C: label smoothing of an index target
  kWeighted,      // a_c = w_c ε / C: the same with weights
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

// Σ a_c over all classes but for an index target's own term; not for probabilities.
template <Terms kTerms, typename acc, typename P>
NLLX_INLINE acc smoothing_mass(const Targets& t, const ClassTerms<acc, P>& terms, int64_t classes) {
  if constexpr (kTerms == Terms::kUniform) return terms.uniform * static_cast<acc>(classes);
  if constexpr (kTerms == Terms::kWeighted) return terms.uniform * *static_cast<const acc*>(t.weight_sum);
  return acc(0);
}
// a_c of one class, likewise.
template <Terms kTerms, typename acc, typename P>
NLLX_INLINE acc smoothing_term(const ClassTerms<acc, P>& terms, int64_t c) {
  if constexpr (kTerms == Terms::kUniform) return terms.uniform;
  if constexpr (kTerms == Terms::kWeighted) return terms.uniform * terms.weight[c];
  return acc(0);
}

template <typename acc>
NLLX_INLINE Vec<acc> weighted_vec(Vec<acc> a, Vec<acc> v) {
  return select((a == acc(0)) & (v == kLowest<acc>), Vec<acc>{}, a * v);
}

// ---- index targets ----

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

// The index targets of neighbouring rows. They are read once, since another thread of the program may write the target
// meanwhile, and what is checked must be what is used.
template <typename acc>
struct TileTargets {
  using integer = typename VecOf<acc>::integer;
  alignas(64) integer index[kTile];  // -1 for a row that does not count; so are those up to a whole vector
  alignas(64) acc weight[kTile];     // of the target's class, 0 for a row that does not count
  bool all_count;
};

template <typename Index, typename integer>
NLLX_INLINE int64_t read_indices(const Index* from, int width, int64_t ignore_index, int64_t classes, integer* index) {
  int64_t uncounted = 0, bad = 0;
  for (int i = 0; i < width; ++i) {
    const int64_t y = from[i];
    const bool counts = (y != ignore_index) & is_class(y, classes);
    index[i] = counts ? static_cast<integer>(y) : integer(-1);
    uncounted += !counts;
    bad += (y != ignore_index) & !is_class(y, classes);
  }
  return bad ? -1 : uncounted;
}

template <typename acc>
NLLX_INLINE void read_targets(const Targets& t, int64_t classes, int64_t row, int width, TileTargets<acc>& s,
                              ChunkResult& result) {
  int64_t uncounted = 0;
  switch (t.index_type) {
#define NLLX_READ(kType, type)                                                                                  \
  case IndexType::kType:                                                                                        \
    uncounted = read_indices(static_cast<const type*>(t.index) + row, width, t.ignore_index, classes, s.index); \
    break;
    NLLX_READ(kInt64, int64_t)
    NLLX_READ(kInt32, int32_t)
    NLLX_READ(kInt16, int16_t)
    NLLX_READ(kInt8, int8_t)
    NLLX_READ(kUInt8, uint8_t)
#undef NLLX_READ
  }
  if (uncounted < 0) {  // rare, and the call raises: look again, one by one
    for (int i = 0; i < width; ++i) {
      if (index_target<acc>(t, classes, row + i).bad) note_bad_target(result, row + i);
    }
  }
  s.all_count = uncounted == 0;
  const int padded = (width + kLanes<acc> - 1) / kLanes<acc> * kLanes<acc>;
  for (int i = width; i < padded; ++i) s.index[i] = -1;
  const acc* weight = static_cast<const acc*>(t.weight);
  for (int i = 0; i < padded; ++i) {
    s.weight[i] = s.index[i] < 0 ? acc(0) : weight ? weight[s.index[i]] : acc(1);
  }
}

// ---- sums over the rows of a chunk ----

template <typename T, typename acc>
NLLX_INLINE void store_row_loss(void* row_loss, bool is_acc, int64_t row, acc loss) {
  if (!row_loss) return;
  if (is_acc) {
    static_cast<acc*>(row_loss)[row] = loss;
  } else {
    static_cast<T*>(row_loss)[row] = from_acc<T>(loss);
  }
}

// In double, in eight sums: one would wait for each addition.
template <typename acc>
NLLX_INLINE double sum_in_double(const acc* values, int n) {
  double sums[8] = {};
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += static_cast<double>(values[i + j]);
  }
  for (int j = 0; i + j < n; ++j) sums[j] += static_cast<double>(values[i + j]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <typename acc>
NLLX_INLINE acc incoming_gradient(const void* grad_output, int64_t stride, const void* total_weight, int64_t row) {
  const acc g = static_cast<const acc*>(grad_output)[row * stride];
  return total_weight ? g / *static_cast<const acc*>(total_weight) : g;
}

// ---- what a row or a tile is written with ----

// Writes the elements from begin to end: value(c, n) is the vector from c on, of which the first n are wanted. kStream:
// past the caches, from where a whole vector is aligned.
template <bool kStream, typename T, typename F>
NLLX_INLINE void write_row(T* out, int64_t begin, int64_t end, const F& value) {
  constexpr int L = kLanes<typename AccOf<T>::type>;
  int64_t c = begin;
  if constexpr (kStream) {
    constexpr int64_t kBytes = static_cast<int64_t>(sizeof(T)) * L;
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out + c) % static_cast<uintptr_t>(kBytes));
    const int64_t rest = past ? (kBytes - past) / static_cast<int64_t>(sizeof(T)) : 0;
    const int n = static_cast<int>(end - c < rest ? end - c : rest);
    if (n > 0) store_first(out + c, value(c, n), n);
    for (c += n; c + L <= end; c += L) stream(out + c, value(c, L));
  } else {
    for (; c + L <= end; c += L) store(out + c, value(c, L));
  }
  if (c < end) {
    const int n = static_cast<int>(end - c);
    store_first(out + c, value(c, n), n);
  }
}

// Whether whole vectors of an array of planes are aligned wherever a tile starts.
template <typename T>
NLLX_INLINE bool planes_are_aligned(const void* data, const Strides& s) {
  constexpr int L = kLanes<typename AccOf<T>::type>;
  return reinterpret_cast<uintptr_t>(data) % (sizeof(T) * static_cast<uintptr_t>(L)) == 0 && s.classes % L == 0 &&
         s.outer % L == 0;
}

// ---- rows and tiles ----

// Row r of an array of rows.
struct Row {
  int64_t outer, inner;
  int64_t offset(const Strides& s) const { return outer * s.outer + inner * s.inner; }
};
NLLX_INLINE Row row_of(const Extent& extent, int64_t r) {
  if (extent.inner == 1) return {r, 0};
  const int64_t outer = r / extent.inner;
  return {outer, r - outer * extent.inner};
}
// From a row to the next one, if they are of one plane.
NLLX_INLINE int64_t row_step(const Extent& extent, const Strides& s) { return extent.inner == 1 ? s.outer : s.inner; }

// Calls f(row, place, width) for up to `most` rows at a time, equally far apart, from begin to end.
template <typename F>
NLLX_INLINE void for_each_run(const Extent& extent, int64_t begin, int64_t end, int64_t most, const F& f) {
  while (begin < end) {
    const Row r = row_of(extent, begin);
    int64_t width = end - begin < most ? end - begin : most;
    if (extent.inner > 1 && extent.inner - r.inner < width) width = extent.inner - r.inner;
    f(begin, r, static_cast<int>(width));
    begin += width;
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
// Calls the body for the vectors of a tile: lanes i to i + k - 1 exist.
#define NLLX_FOR_VECTORS(i, k, width)     \
  for ([[maybe_unused]] int i = 0, k = 0; \
       i < (width) && (k = (width) - i < kLanes<acc> ? (width) - i : kLanes<acc>, true); i += kLanes<acc>)
