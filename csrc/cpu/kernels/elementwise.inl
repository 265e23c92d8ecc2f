// What losses of one element at a time share: blocks of elements that lie one behind the other whatever the strides of
// the tensors are, and sums in double.

// Elements that are worked on together. They are copied at most once, in the first-level cache.
constexpr int kElementBlock = 1024;

// Calls f(offset, run) for the `n` elements from number `begin` on, in order: `run` of them lie from `offset` on, at
// equal distances of strides.of[0].
template <typename F>
NLLX_INLINE void for_each_stretch(const Elements& e, const ElementStrides& strides, int64_t begin, int64_t n,
                                  const F& f) {
  int64_t at[Elements::kMostDims], offset = 0;
  for (int d = 0; d < e.dims; ++d) {
    const int64_t next = begin / e.sizes[d];
    at[d] = begin - next * e.sizes[d];
    offset += at[d] * strides.of[d];
    begin = next;
  }
  while (n > 0) {
    const int64_t left = e.sizes[0] - at[0], run = n < left ? n : left;
    f(offset, run);
    n -= run;
    at[0] += run;
    offset += run * strides.of[0];
    for (int d = 0; at[d] == e.sizes[d] && d + 1 < e.dims; ++d) {
      offset += strides.of[d + 1] - e.sizes[d] * strides.of[d];
      at[d] = 0;
      ++at[d + 1];
    }
  }
}

// Elements to neighbouring places, in their type or in acc.
template <typename From, typename To>
NLLX_APART void gather(const Elements& e, const From* from, const ElementStrides& strides, int64_t begin, int n,
                       To* to) {
  constexpr bool kConvert = sizeof(From) != sizeof(To);
  const auto converted = [](From v) __attribute__((always_inline)) {
    if constexpr (kConvert)
      return to_acc(v);
    else
      return v;
  };
  const int64_t stride = strides.of[0];
  for_each_stretch(e, strides, begin, n, [&](int64_t offset, int64_t run) __attribute__((always_inline)) {
    const From* p = from + offset;
    if (stride == 0) {
      const To value = converted(*p);
      for (int64_t i = 0; i < run; ++i) to[i] = value;
    } else if (stride == 1) {
      int64_t i = 0;
      if constexpr (kConvert) {
        for (; i + kLanes<To> <= run; i += kLanes<To>) store(to + i, load(p + i));
      }
      for (; i < run; ++i) to[i] = converted(p[i]);
    } else {
      for (int64_t i = 0; i < run; ++i) to[i] = converted(p[i * stride]);
    }
    to += run;
  });
}
template <typename T>
NLLX_APART void scatter(const Elements& e, const T* from, T* to, const ElementStrides& strides, int64_t begin, int n) {
  const int64_t stride = strides.of[0];
  for_each_stretch(e, strides, begin, n, [&](int64_t offset, int64_t run) __attribute__((always_inline)) {
    for (int64_t i = 0; i < run; ++i) to[offset + i * stride] = from[i];
    from += run;
  });
}

// The elements from number `begin` on, where they lie if they lie one behind the other, or in `buffer`.
template <typename T>
NLLX_INLINE const T* block_of(const Elements& e, const void* data, const ElementStrides& strides, int64_t begin, int n,
                              T* buffer) {
  const T* from = static_cast<const T*>(data);
  if (strides.adjacent) return from + begin;
  gather(e, from, strides, begin, n, buffer);
  return buffer;
}
// Likewise as acc, of elements of T or of acc.
template <typename T, typename acc>
NLLX_INLINE const acc* acc_block_of(const Elements& e, const void* data, bool is_acc, const ElementStrides& strides,
                                    int64_t begin, int n, acc* buffer) {
  if (is_acc || sizeof(T) == sizeof(acc)) return block_of<acc>(e, data, strides, begin, n, buffer);
  gather(e, static_cast<const T*>(data), strides, begin, n, buffer);
  return buffer;
}

// Writes a block of results, value(Count<K>, i, lanes, v) as write_row asks for them.
template <typename T, typename F>
NLLX_INLINE void write_block(const Elements& e, void* data, const ElementStrides& strides, bool streamed, int64_t begin,
                             int n, const F& value) {
  T* to = static_cast<T*>(data);
  if (strides.adjacent) return write_row(streamed, to + begin, 0, n, value);
  T buffer[kElementBlock];
  write_row(false, buffer, 0, n, value);
  scatter(e, static_cast<const T*>(buffer), to, strides, begin, n);
}

template <typename F>
NLLX_INLINE void for_each_block(const Chunks& chunks, int64_t chunk, const F& f) {
  for (int64_t begin = chunks.begin(chunk), end = chunks.end(chunk); begin < end; begin += kElementBlock) {
    f(begin, static_cast<int>(end - begin < kElementBlock ? end - begin : kElementBlock));
  }
}

// ---- sums in double ----

NLLX_INLINE void to_doubles(Vec<float> v, Vec<double>& low, Vec<double>& high) {
#if NLLX_VECTOR_BYTES == 64
  const __m512 all = bit_cast<__m512>(v);
  low = bit_cast<Vec<double>>(_mm512_cvtps_pd(_mm512_castps512_ps256(all)));
  high = bit_cast<Vec<double>>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(all, 1)));
#elif NLLX_VECTOR_BYTES == 32
  const __m256 all = bit_cast<__m256>(v);
  low = bit_cast<Vec<double>>(_mm256_cvtps_pd(_mm256_castps256_ps128(all)));
  high = bit_cast<Vec<double>>(_mm256_cvtps_pd(_mm256_extractf128_ps(all, 1)));
#else
  for (int i = 0; i < kLanes<double>; ++i) {
    low[i] = static_cast<double>(v[i]);
    high[i] = static_cast<double>(v[i + kLanes<double>]);
  }
#endif
}

// Four vectors of sums: one would wait for each addition. Those of a block are added to those of the blocks before, so
// that double rounds few sums that are many times their terms.
struct DoubleSums {
  Vec<double> of[4] = {};
  // The vector numbered `u` of a few that follow each other.
  NLLX_MEMBER_INLINE void add(int u, Vec<float> v) {
    Vec<double> low, high;
    to_doubles(v, low, high);
    of[2 * u % 4] += low;
    of[(2 * u + 1) % 4] += high;
  }
  NLLX_MEMBER_INLINE void add(int u, Vec<double> v) { of[u % 4] += v; }
  NLLX_MEMBER_INLINE void add(const DoubleSums& block) {
    for (int i = 0; i < 4; ++i) of[i] += block.of[i];
  }
  NLLX_MEMBER_INLINE double total() const { return sum_of_lanes<double>((of[0] + of[1]) + (of[2] + of[3])); }
};
