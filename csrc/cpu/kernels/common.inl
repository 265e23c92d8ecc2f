// What the CPU kernels share: targets, the coefficients of the classes, sums of rows. Included by kernels.inl.

constexpr int64_t kTile = Chunks::kTile;
// Room for a tile's rows. Streamed runs start where a line does, so that their last vector may reach beyond the tile.
constexpr int64_t kTileRoom = kTile + 16;

// Calls the body for the vectors of a tile: lanes i to i + k - 1 exist.
#define NLLX_FOR_VECTORS(i, k, width)     \
  for ([[maybe_unused]] int i = 0, k = 0; \
       i < (width) && (k = (width) - i < kLanes<acc> ? (width) - i : kLanes<acc>, true); i += kLanes<acc>)

template <typename acc>
constexpr acc kLowest = -static_cast<acc>(__builtin_inf());

// How the classes other than an index target's enter the loss.
enum class Terms {
  kNone,           // not at all
  kUniform,        // a_c = ε / C: label smoothing of an index target
  kWeighted,       // a_c = w_c ε / C: the same with weights
  kAnySmoothing,   // a_c = w_c ε / C, with weights or without: in place of the two above where the logits are mapped,
                   // for fewer instances
  kProbabilities,  // a_c = w_c ((1 - ε) p_c + ε / C)
  kMoment          // a_c = exp(x_c - max), which refers to the maximum too: Σ a (x - max) is the sum's first moment
};

// x - max where its product with exp(x - max) is asked for: below, that exponential is 0 in every type, and -inf times
// it would be NaN.
template <typename acc>
constexpr acc kVanishing = acc(-1e4);
template <typename acc>
NLLX_INLINE Vec<acc> not_vanished(Vec<acc> v) {
  return select(v < kVanishing<acc>, broadcast(kVanishing<acc>), v);
}

// ---- what the logits are compared by ----

// tanh of K vectors, and with kSlope its derivative 1 - tanh². Not inlined into every loop, which would make the
// compiled kernels twice as large. The float version is y + y³ p(y²) up to |y| = 1/2, beyond y P(y²) / Q(y²), both
// fitted here: they minimise the largest relative error, which is at most 1.5e-8 but for roundings; from 8.7 on tanh
// rounds to 1. Most logits are well below their softcap, and of K vectors of them the second is not computed; what
// comes out of a lane does not depend on the others.
template <int K, bool kSlope, typename acc>
NLLX_APART void tanh_vecs(Vec<acc>* y, [[maybe_unused]] Vec<acc>* slope) {
  if constexpr (sizeof(acc) == 8) {
    for (int u = 0; u < K; ++u) {
      for (int i = 0; i < kLanes<acc>; ++i) {
        const double t = tanh(y[u][i]), c = cosh(y[u][i]);
        y[u][i] = t;
        if constexpr (kSlope) slope[u][i] = 1 / (c * c);
      }
    }
  } else {
    Vec<acc> s[K], small[K], p[K], q[K], e[K];
    Mask<acc> any_large{};
#define NLLX_EACH _Pragma("GCC unroll 8") for (int u = 0; u < K; ++u)
    NLLX_EACH s[u] = y[u] * y[u];
    NLLX_EACH small[u] = s[u] * 1.7241522997e-2f - 5.30455097815e-2f;
    NLLX_EACH small[u] = small[u] * s[u] + 1.33258791904e-1f;
    NLLX_EACH small[u] = small[u] * s[u] - 3.33331439064e-1f;
    NLLX_EACH small[u] = (small[u] * s[u]) * y[u] + y[u];
    NLLX_EACH any_large |= s[u] > 0.25f;
    if constexpr (kSlope) NLLX_EACH slope[u] = acc(1) - small[u] * small[u];
    if (any_lane(bit_cast<vec_i64>(any_large))) {
      if constexpr (kSlope) {  // 1 - tanh² has no digits left where tanh is nearly 1
        NLLX_EACH e[u] = acc(-2) * select(y[u] < acc(0), -y[u], y[u]);
        exp_vecs<K>(e);
        NLLX_EACH q[u] = reciprocal(acc(1) + e[u]);
        NLLX_EACH slope[u] = select(s[u] > 0.25f, acc(4) * e[u] * (q[u] * q[u]), slope[u]);
      }
      NLLX_EACH y[u] = at_least(y[u], -8.7f);
      NLLX_EACH y[u] = select(y[u] > 8.7f, broadcast(8.7f), y[u]);
      NLLX_EACH s[u] = y[u] * y[u];
      NLLX_EACH p[u] = s[u] * 1.38973120899e-8f + 2.0993878094e-5f;
      NLLX_EACH q[u] = s[u] * 7.99647799756e-7f + 3.32366378722e-4f;
      NLLX_EACH p[u] = p[u] * s[u] + 3.51875899925e-3f;
      NLLX_EACH q[u] = q[u] * s[u] + 2.59649639788e-2f;
      NLLX_EACH p[u] = p[u] * s[u] + 1.34004835525e-1f;
      NLLX_EACH q[u] = q[u] * s[u] + 4.67338039956e-1f;
      NLLX_EACH p[u] = p[u] * s[u] + 9.99999985601e-1f;
      NLLX_EACH q[u] = q[u] * s[u] + 1.f;
      NLLX_EACH small[u] = select(s[u] > 0.25f, (y[u] * p[u]) * reciprocal(q[u]), small[u]);
    }
    NLLX_EACH y[u] = small[u];
#undef NLLX_EACH
  }
}

// From a row's logits x to z = in x, or out tanh(in x) where they are capped. Of a row all lanes are alike; of a tile a
// lane is a row.
template <typename acc>
struct LogitMap {
  Vec<acc> in, out;
  bool capped;
};
// K vectors of x become z; at(u) is the map of vector u.
template <int K, typename acc, typename MapAt>
NLLX_INLINE void map_vecs(Vec<acc>* v, const MapAt& at) {
#pragma GCC unroll 8
  for (int u = 0; u < K; ++u) v[u] = rounded(v[u] * at(u).in);
  if (!at(0).capped) return;
  tanh_vecs<K, false, acc>(v, nullptr);
#pragma GCC unroll 8
  for (int u = 0; u < K; ++u) v[u] = rounded(v[u] * at(u).out);
}
// …and slope dz / dx / in where they are capped, where it is not 1.
template <int K, typename acc, typename MapAt>
NLLX_INLINE void map_vecs(Vec<acc>* v, Vec<acc>* slope, const MapAt& at) {
#pragma GCC unroll 8
  for (int u = 0; u < K; ++u) v[u] = rounded(v[u] * at(u).in);
  if (!at(0).capped) return;
  tanh_vecs<K, true, acc>(v, slope);
#pragma GCC unroll 8
  for (int u = 0; u < K; ++u) {
    v[u] = rounded(v[u] * at(u).out);
    slope[u] *= at(u).out;
  }
}
// Of one row; `per_scale`: the derivative of `in` with respect to its logit_scale.
template <typename acc>
struct RowMap {
  acc in, out, per_scale;
  bool capped;
  NLLX_MEMBER_INLINE LogitMap<acc> vec() const { return {broadcast(in), broadcast(out), capped}; }
};
template <typename acc>
NLLX_INLINE RowMap<acc> row_map(const RowOptions& o, int64_t row) {
  const auto number = [&](const void* of, int64_t stride) {
    return of ? static_cast<double>(static_cast<const acc*>(of)[row * stride]) : 1.;
  };
  const double sharpness = o.sharpness / number(o.temperature, o.temperature_stride);
  const double per_scale = o.softcap != 0 ? o.scale / o.softcap : o.scale * sharpness;
  return {static_cast<acc>(per_scale * number(o.logit_scale, o.logit_scale_stride)),
          static_cast<acc>(o.softcap * sharpness), static_cast<acc>(per_scale), o.softcap != 0};
}
// Of a tile of rows.
template <typename acc, bool kMapped>
struct TileMap {
  alignas(64) acc in[kTileRoom], out[kTileRoom], per_scale[kTileRoom];
  bool capped;

  NLLX_MEMBER_INLINE LogitMap<acc> at(int64_t i) const { return {load(in + i), load(out + i), capped}; }
  NLLX_MEMBER_INLINE LogitMap<acc> of_row(int64_t i) const { return {broadcast(in[i]), broadcast(out[i]), capped}; }
  __attribute__((noinline)) void begin(const RowOptions& o, int64_t row, int width) {
    capped = o.softcap != 0;
    const bool one_for_all = o.logit_scale_stride == 0 && o.temperature_stride == 0;
    RowMap<acc> map = row_map<acc>(o, row);
    for (int i = 0; i < width; ++i) {
      if (!one_for_all) map = row_map<acc>(o, row + i);
      in[i] = map.in;
      out[i] = map.out;
      per_scale[i] = map.per_scale;
    }
    // Vectors reach beyond the last row.
    for (int i = width; i < width + kLanes<acc> && i < kTileRoom; ++i) in[i] = out[i] = per_scale[i] = acc(1);
  }
};
template <typename acc>
struct TileMap<acc, false> {
  NLLX_MEMBER_INLINE LogitMap<acc> at(int64_t) const { return LogitMap<acc>(); }
  NLLX_MEMBER_INLINE LogitMap<acc> of_row(int64_t) const { return LogitMap<acc>(); }
  NLLX_MEMBER_INLINE void begin(const RowOptions&, int64_t, int) const {}
};

// K vectors of logits as they are compared: vector u is at p + u * step, with n lanes, of which the others are `fill`.
template <bool kMapped, int K, typename T, typename acc, typename MapAt>
NLLX_INLINE void load_logits(Vec<acc>* v, const T* p, int64_t step, int n, acc fill, const MapAt& at) {
#pragma GCC unroll 8
  for (int u = 0; u < K; ++u) v[u] = load_some(p + u * step, n, kMapped ? acc(0) : fill);
  if constexpr (kMapped) {
    map_vecs<K, acc>(v, at);
    if (n == kLanes<acc>) return;
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) v[u] = select(first_lanes<acc>(n), v[u], broadcast(fill));
  }
}
template <bool kMapped, typename T, typename acc>
NLLX_INLINE Vec<acc> load_logits(const T* p, int n, acc fill, const LogitMap<acc>& map) {
  Vec<acc> v;
  load_logits<kMapped, 1>(&v, p, 0, n, fill, [&](int) -> const LogitMap<acc>& { return map; });
  return v;
}
template <typename acc>
NLLX_INLINE Vec<acc> mapped(Vec<acc> v, const LogitMap<acc>& map) {
  map_vecs<1, acc>(&v, [&](int) -> const LogitMap<acc>& { return map; });
  return v;
}
template <bool kMapped, typename T>
NLLX_INLINE typename AccOf<T>::type logit_at(const T* p, const LogitMap<typename AccOf<T>::type>& map) {
  if constexpr (!kMapped) return to_acc(*p);
  return mapped(broadcast(to_acc(*p)), map)[0];
}

// K vectors of logits, and from a gradient with respect to z that with respect to them.
template <int K, bool kMapped, typename acc>
struct MappedLogits {
  Vec<acc> x[K], slope[K];

  // z - shift(u) from vector(u); at(u) is its map.
  template <typename Load, typename MapAt, typename ShiftAt>
  NLLX_MEMBER_INLINE void load(Vec<acc>* v, const Load& vector, const MapAt& at, const ShiftAt& shift) {
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) v[u] = x[u] = vector(u);
    map_vecs<K, acc>(v, slope, at);
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) v[u] -= shift(u);
  }
  // Of the first n lanes what logit_scale gets is added to by_scale, if there is one, but for the factor per_scale.
  NLLX_MEMBER_INLINE void differentiate(int u, int n, const LogitMap<acc>& map, Vec<acc>& g, Vec<acc>* by_scale) const {
    if (map.capped) g *= slope[u];
    if (by_scale) {
      // A masked class has a gradient of 0, and the product with its logit none.
      const Vec<acc> product = select(g == acc(0), Vec<acc>{}, g * x[u]);
      *by_scale += n == kLanes<acc> ? product : select(first_lanes<acc>(n), product, Vec<acc>{});
    }
    g *= map.in;
  }
};
template <int K, typename acc>
struct MappedLogits<K, false, acc> {
  template <typename Load, typename MapAt, typename ShiftAt>
  NLLX_MEMBER_INLINE void load(Vec<acc>* v, const Load& vector, const MapAt&, const ShiftAt& shift) {
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) v[u] = vector(u) - shift(u);
  }
  NLLX_MEMBER_INLINE void differentiate(int, int, const LogitMap<acc>&, Vec<acc>&, Vec<acc>*) const {}
};
// Where dz / dx is one number of the row, and nobody asks for the sum that logit_scale gets, it goes into the factors
// of the row, and nothing is left to differentiate.
NLLX_INLINE bool folds_slope(const RowOptions& o, bool wants_scale_gradient) {
  return o.softcap == 0 && !wants_scale_gradient;
}
// What a unit of work (a row, or a segment of one) gives to logit_scale.
template <typename Problem>
NLLX_INLINE void add_scale_gradient(const Problem& p, int64_t unit, double gradient, ChunkResult& result) {
  result.scale_gradient += gradient;
  if (p.grad_logit_scale) static_cast<double*>(p.grad_logit_scale)[unit] = gradient;
}

// ---- what multiplies a row's loss, and is added to it ----

template <typename acc>
NLLX_INLINE acc sample_weight_of(const RowOptions& o, int64_t row) {
  return o.sample_weight ? static_cast<const acc*>(o.sample_weight)[row] : acc(1);
}
// Of a log-sum-exp; without the option nothing, even if that is infinite.
template <typename acc>
NLLX_INLINE acc z_loss_of(const RowOptions& o, acc logsumexp) {
  return o.z_loss == 0 ? acc(0) : static_cast<acc>(o.z_loss) * logsumexp * logsumexp;
}
template <typename acc>
NLLX_INLINE acc z_loss_slope_of(const RowOptions& o, acc logsumexp) {
  return o.z_loss == 0 ? acc(0) : static_cast<acc>(2 * o.z_loss) * logsumexp;
}

// ---- the coefficients of the classes ----

// The coefficients a_c of the classes; `P` is the element type of the probabilities. kMapped: the logits are not
// compared as they are.
template <typename acc, typename P, bool kMapped = false>
struct ClassTerms {
  const P* probabilities;  // of this row (or of the first row of this tile)
  int64_t stride;          // between classes
  const acc* weight;       // null: all ones
  acc scale, uniform;      // 1 - ε, ε / C
};
// …and the map of a row.
template <typename acc, typename P>
struct ClassTerms<acc, P, true> : ClassTerms<acc, P> {
  LogitMap<acc> map;
};

template <typename acc, typename P, bool kMapped = false>
ClassTerms<acc, P, kMapped> class_terms(const Targets& t, const Extent& extent, int64_t outer, int64_t inner) {
  const Strides& s = t.probability_strides;
  const P* p = static_cast<const P*>(t.probabilities);
  ClassTerms<acc, P, kMapped> terms{};
  terms.probabilities = p ? p + outer * s.outer + inner * s.inner : nullptr;
  terms.stride = s.classes;
  terms.weight = static_cast<const acc*>(t.weight);
  terms.scale = static_cast<acc>(1. - t.label_smoothing);
  terms.uniform = static_cast<acc>(t.label_smoothing / static_cast<double>(extent.classes));
  return terms;
}
// …of a row.
template <typename acc, typename P, bool kMapped>
NLLX_INLINE ClassTerms<acc, P, kMapped> row_terms(const Targets& t, const Extent& extent, int64_t outer, int64_t inner,
                                                  const RowOptions* options, int64_t row) {
  auto terms = class_terms<acc, P, kMapped>(t, extent, outer, inner);
  if constexpr (kMapped) terms.map = row_map<acc>(*options, row).vec();
  return terms;
}
template <typename acc, typename P>
NLLX_INLINE LogitMap<acc> map_of(const ClassTerms<acc, P, false>&) {
  return LogitMap<acc>();
}
template <typename acc, typename P>
NLLX_INLINE const LogitMap<acc>& map_of(const ClassTerms<acc, P, true>& terms) {
  return terms.map;
}

// Σ a_c over all classes but for an index target's own term; not for probabilities.
template <Terms kTerms, typename acc, typename P>
NLLX_INLINE acc smoothing_mass(const Targets& t, const ClassTerms<acc, P>& terms, int64_t classes) {
  if constexpr (kTerms == Terms::kUniform) return terms.uniform * static_cast<acc>(classes);
  if constexpr (kTerms == Terms::kWeighted) return terms.uniform * *static_cast<const acc*>(t.weight_sum);
  if constexpr (kTerms == Terms::kAnySmoothing) {
    const acc sum = terms.weight ? *static_cast<const acc*>(t.weight_sum) : static_cast<acc>(classes);
    return terms.uniform * sum;
  }
  return acc(0);
}
// a_c of one class, likewise.
template <Terms kTerms, typename acc, typename P>
NLLX_INLINE acc smoothing_term(const ClassTerms<acc, P>& terms, int64_t c) {
  if constexpr (kTerms == Terms::kUniform) return terms.uniform;
  if constexpr (kTerms == Terms::kWeighted) return terms.uniform * terms.weight[c];
  if constexpr (kTerms == Terms::kAnySmoothing) return terms.weight ? terms.uniform * terms.weight[c] : terms.uniform;
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
  alignas(64) integer index[kTileRoom];  // -1 for a row that does not count; so is a vector of them behind the last
  alignas(64) acc weight[kTileRoom];     // of the target's class, 0 for a row that does not count
  int64_t counted;                       // rows that count
};
// With more classes than this the numbers of TileTargets are those of a window of so many classes, and kernels of
// planes read them anew for every window. A multiple of the classes that are taken together.
template <typename acc>
constexpr int64_t kClassWindow = (sizeof(acc) == 4 ? __INT32_MAX__ : __INT64_MAX__) - 3;

// The number of class c in its window.
template <typename acc>
NLLX_INLINE typename VecOf<acc>::integer class_in_window(int64_t c) {
  if constexpr (sizeof(acc) == 4) c = c < kClassWindow<acc> ? c : c % kClassWindow<acc>;
  return static_cast<typename VecOf<acc>::integer>(c);
}
// Whether class c is the first of a window other than the first one.
template <typename acc>
NLLX_INLINE bool starts_a_window(int64_t c) {
  return c >= kClassWindow<acc> && c % kClassWindow<acc> == 0;
}
// The number of class y in the window from `first` on; for a class outside one that no class has.
template <typename acc>
NLLX_INLINE typename VecOf<acc>::integer number_in_window(int64_t y, int64_t first) {
  const uint64_t number = static_cast<uint64_t>(y) - static_cast<uint64_t>(first), window = kClassWindow<acc>;
  return static_cast<typename VecOf<acc>::integer>(number < window ? number : window);
}

// Reads rows from `begin` on, returns how many of them name no class and are not ignored.
template <typename acc, typename Index>
NLLX_INLINE int64_t read_indices(const Index* from, int begin, int width, int64_t ignore_index, int64_t classes,
                                 int64_t first, TileTargets<acc>& s) {
  int64_t counted = 0, bad = 0;
  for (int i = begin; i < width; ++i) {
    const int64_t y = as_index(from[i]);
    const bool ignored = y == ignore_index, valid = is_class(y, classes);
    s.index[i] = (valid & !ignored) ? number_in_window<acc>(y, first) : -1;
    counted += valid & !ignored;
    bad += !valid & !ignored;
  }
  s.counted += counted;
  return bad;
}

// Whole vectors of int64 indices, the type that torch's losses take; returns how many rows were read.
NLLX_INLINE int read_index_vectors(const int64_t* from, int width, int64_t ignore_index, int64_t classes,
                                   TileTargets<float>& s, bool& bad) {
  constexpr int L = kLanes<float>, H = L / 2;
  vec_i64 not_good{};
  Mask<float> counted{};
  int i = 0;
  for (; i + L <= width; i += L) {
    vec_i64 y[2], counts[2];
    prefetch(from + i + 512);  // other arrays are read between one call and the next
#pragma GCC unroll 4
    for (int h = 0; h < 2; ++h) {
      memcpy(&y[h], from + i + h * H, sizeof y[h]);
      const vec_i64 present = y[h] != ignore_index, valid = (y[h] >= 0) & (y[h] < classes);
      counts[h] = present & valid;
      not_good |= present & ~valid;
    }
    const Mask<float> mask = low_halves(counts[0], counts[1]), index = low_halves(y[0], y[1]) | ~mask;
    memcpy(s.index + i, &index, sizeof index);
    counted -= mask;
  }
  for (int j = 0; j < L; ++j) s.counted += counted[j];
  bad = any_lane(not_good);
  return i;
}

// The numbers of the targets in the window from `first` on.
template <typename acc>
NLLX_APART void read_window(const Targets& t, int64_t classes, int64_t row, int width, int64_t first,
                            TileTargets<acc>& s, ChunkResult& result) {
  s.counted = 0;
  bool bad = false;
  switch (t.index_type) {
    case IndexType::kInt64: {
      const int64_t* from = static_cast<const int64_t*>(t.index) + row;
      int done = 0;
      if constexpr (sizeof(acc) == 4) {
        if (classes <= kClassWindow<acc>) done = read_index_vectors(from, width, t.ignore_index, classes, s, bad);
      }
      bad |= read_indices(from, done, width, t.ignore_index, classes, first, s) > 0;
      break;
    }
#define NLLX_READ(kType, type)                                                                                    \
  case IndexType::kType:                                                                                          \
    bad = read_indices(static_cast<const type*>(t.index) + row, 0, width, t.ignore_index, classes, first, s) > 0; \
    break;
      NLLX_READ(kInt32, int32_t)
      NLLX_READ(kInt16, int16_t)
      NLLX_READ(kInt8, int8_t)
      NLLX_READ(kUInt8, uint8_t)
      NLLX_READ(kUInt16, uint16_t)
      NLLX_READ(kUInt32, uint32_t)
      NLLX_READ(kUInt64, uint64_t)
#undef NLLX_READ
  }
  if (bad) {  // rare, and the call raises: look again, one by one
    for (int i = 0; i < width; ++i) {
      if (index_target<acc>(t, classes, row + i).bad) note_bad_target(result, row + i);
    }
  }
  const Mask<acc> none = ~Mask<acc>{};
  memcpy(s.index + width, &none, sizeof none);
}

template <typename acc>
NLLX_APART void read_targets(const Targets& t, int64_t classes, int64_t row, int width, TileTargets<acc>& s,
                             ChunkResult& result) {
  read_window(t, classes, row, width, 0, s, result);
  const acc* weight = static_cast<const acc*>(t.weight);
  const bool look_up = weight && s.counted > 0;
  if (classes > kClassWindow<acc>) {
    for (int i = 0; i < width; ++i) s.weight[i] = index_target<acc>(t, classes, row + i).weight;
  } else if (look_up) {  // that of class 0 where the row does not count: a branch would be foretold badly
    for (int i = 0; i < width; ++i) s.weight[i] = weight[s.index[i] < 0 ? 0 : s.index[i]];
  }
  NLLX_FOR_VECTORS(i, k, width) {
    Mask<acc> index;
    memcpy(&index, s.index + i, sizeof index);
    store(s.weight + i, select(index >= 0, look_up ? load(s.weight + i) : broadcast(acc(1)), Vec<acc>{}));
  }
}

// The value that a row's target names; class 0's where the row does not count.
template <typename T, typename acc>
NLLX_INLINE void gather_targets(const T* x, int64_t row_stride, int64_t class_stride, int width,
                                const TileTargets<acc>& targets, acc* values) {
  // Nothing but loads, so that many are under way.
  for (int i = 0; i < width; ++i) {
    const int64_t y = targets.index[i] < 0 ? 0 : static_cast<int64_t>(targets.index[i]);
    values[i] = to_acc(x[i * row_stride + y * class_stride]);
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

// In double, in eight sums or more: one would wait for each addition.
template <typename acc>
NLLX_APART double sum_in_double(const acc* values, int n) {
  constexpr int D = kLanes<double>, kSums = D < 8 ? 8 : D;
  Vec<double> sums[kSums / D] = {};
  int i = 0;
  for (; i + kSums <= n; i += kSums) {
#pragma GCC unroll 4
    for (int u = 0; u < kSums / D; ++u) sums[u] += load_doubles(values + i + u * D);
  }
  double lanes[kSums];
  memcpy(lanes, sums, sizeof lanes);
  for (int j = 0; i + j < n; ++j) lanes[j] += static_cast<double>(values[i + j]);
  return sum_of<kSums>(lanes);
}
// The weights of the rows that count.
template <typename acc>
NLLX_INLINE double sum_of_weights(const Targets& t, const TileTargets<acc>& s, int width) {
  return t.weight ? sum_in_double(s.weight, width) : static_cast<double>(s.counted);
}

template <typename acc>
NLLX_INLINE acc incoming_gradient(const void* grad_output, int64_t stride, const void* total_weight, int64_t row) {
  const acc g = static_cast<const acc*>(grad_output)[row * stride];
  return total_weight ? g / *static_cast<const acc*>(total_weight) : g;
}

// ---- what a row or a tile is written with ----

template <int n>
struct Count {
  static constexpr int value = n;
};
// Vectors whose exponentials are computed together.
constexpr int kTogether = 4;

// Lanes of vector u of K, of the last of which n are wanted.
template <typename acc, int K>
NLLX_INLINE int lanes_of(Count<K>, int u, int n) {
  return u + 1 < K ? kLanes<acc> : n;
}

// Calls f(Count<K>, c, n) for the vectors from begin to end, at most kMost together: K vectors from c on, the last of
// which has n lanes.
template <int kMost, typename acc, typename F>
NLLX_INLINE void for_vectors(int64_t begin, int64_t end, const F& f) {
  constexpr int L = kLanes<acc>;
  int64_t c = begin;
  for (; end - c > (kMost - 1) * L; c += kMost * L) {
    f(Count<kMost>{}, c, end - c < kMost * L ? static_cast<int>(end - c) - (kMost - 1) * L : L);
  }
  if constexpr (kMost > 1) {
    if (c < end) for_vectors<kMost - 1, acc>(c, end, f);
  }
}

// Writes the elements from begin to end, past the caches where `streamed`: value(Count<K>, c, n, v) makes the K vectors
// from c on, of the last of which n lanes are wanted. The element `at`, if there is one between them, is `at_value`
// instead: written afterwards, it would bring its line back from memory.
template <typename T, typename F>
NLLX_INLINE void write_row(bool streamed, T* out, int64_t begin, int64_t end, const F& value, int64_t at = -1,
                           T at_value = T{}) {
  using acc = typename AccOf<T>::type;
  constexpr int L = kLanes<acc>, kVectors = kLine<T> / L > kTogether ? kLine<T> / L : kTogether;
  int64_t c = begin;
  if (streamed) {
    int64_t line = begin;
    while (line < end && !starts_a_line(out + line)) ++line;
    for (; c < line; c += L) {
      const int n = line - c < L ? static_cast<int>(line - c) : L;
      Vec<acc> v;
      value(Count<1>{}, c, n, &v);
      store_some(out + c, v, n);
    }
    c = line;
    if (at >= begin && at < c) out[at] = at_value;
  }
  for (; c + kVectors * L <= end; c += kVectors * L) {
    Vec<acc> v[kVectors];
    value(Count<kVectors>{}, c, L, v);
    const bool has_target = static_cast<uint64_t>(at - c) < static_cast<uint64_t>(kVectors * L);
    if (streamed) {
      alignas(64) T lines[kVectors * L];
#pragma GCC unroll 8
      for (int u = 0; u < kVectors; ++u) store(lines + u * L, v[u]);
      if (has_target) lines[at - c] = at_value;
#pragma GCC unroll 4
      for (int i = 0; i < kVectors * L; i += kLine<T>) stream_line(out + c + i, lines + i);
    } else {
#pragma GCC unroll 8
      for (int u = 0; u < kVectors; ++u) store(out + c + u * L, v[u]);
      if (has_target) out[at] = at_value;
    }
  }
  for_vectors<2, acc>(c, end, [&](auto count, int64_t first, int n) __attribute__((always_inline)) {
    constexpr int K = decltype(count)::value;
    Vec<acc> v[K];
    value(count, first, n, v);
#pragma GCC unroll 2
    for (int u = 0; u < K; ++u) store_some(out + first + u * L, v[u], lanes_of<acc>(count, u, n));
  });
  if (at >= c && at < end) out[at] = at_value;
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
