// Vectors of one width per capability unit, on the compiler's vector extension, so that one source gives SSE2 (or
// NEON), AVX2 and AVX-512. Included by the capability units only, inside their namespace: everything here has internal
// linkage, since a function shared between units could be linked as its AVX-512 copy for everyone.
#pragma once

// NLLX_VECTOR_BYTES, and not __AVX2__ or __AVX512F__, selects the intrinsics: a target set in the source does not
// define those macros in every compiler (GCC 12 reads all of a C++ file before it acts on the pragma).
#include <math.h>
#include <stdint.h>
#include <string.h>

#if NLLX_VECTOR_BYTES > 16
#include <immintrin.h>
#elif defined(__x86_64__) || defined(_M_X64)
#include <emmintrin.h>
#endif

#define NLLX_INLINE static inline __attribute__((always_inline))
// For what is done once for a group of rows: one copy of it, not one in every kernel.
#define NLLX_APART static __attribute__((noinline))
#define NLLX_MEMBER_INLINE inline __attribute__((always_inline))

namespace nllx {
namespace NLLX_CAPABILITY {
namespace {

// Half-precision elements as they lie in memory.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename To, typename From>
NLLX_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// ---- scalars: element type -> acc and back, rounded to nearest even ----

NLLX_INLINE float to_acc(float v) { return v; }
NLLX_INLINE double to_acc(double v) { return v; }
NLLX_INLINE float to_acc(bfloat16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
NLLX_INLINE float to_acc(float16 v) {
#if NLLX_VECTOR_BYTES > 16
  return _cvtsh_ss(v.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t exponent = (v.bits >> 10) & 31u, mantissa = v.bits & 0x3ffu;
  if (exponent == 0) {  // zero and subnormal: mantissa * 2^-24 is exact
    return bit_cast<float>(sign | bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f));
  }
  return bit_cast<float>(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | (mantissa << 13));
#endif
}

template <typename T>
struct FromAcc;
template <>
struct FromAcc<float> {
  NLLX_INLINE float convert(float v) { return v; }
};
template <>
struct FromAcc<double> {
  NLLX_INLINE double convert(double v) { return v; }
};
template <>
struct FromAcc<bfloat16> {
  NLLX_INLINE bfloat16 convert(float v) {
    const uint32_t u = bit_cast<uint32_t>(v);
    if (v != v) return {0x7fc0};
    return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
  }
};
template <>
struct FromAcc<float16> {
  NLLX_INLINE float16 convert(float v) {
#if NLLX_VECTOR_BYTES > 16
    return {static_cast<uint16_t>(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT))};
#else
    const uint32_t u = bit_cast<uint32_t>(v), a = u & 0x7fffffffu;
    const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
    uint32_t h;
    if (a > 0x7f800000u) {
      h = 0x7e00u;
    } else if (a >= 0x47800000u) {  // 65536 and above
      h = 0x7c00u;
    } else if (a < 0x38800000u) {  // below 2^-14: the sum with 0.5 rounds to a multiple of 2^-24
      h = bit_cast<uint32_t>(bit_cast<float>(a) + 0.5f) - 0x3f000000u;
    } else {
      h = (a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
    }
    return {static_cast<uint16_t>(sign | h)};
#endif
  }
};
template <typename T, typename acc>
NLLX_INLINE T from_acc(acc v) {
  return FromAcc<T>::convert(v);
}

// ---- vectors ----

template <typename acc>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(NLLX_VECTOR_BYTES)));
  typedef int32_t integer;
  typedef int32_t mask __attribute__((vector_size(NLLX_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(NLLX_VECTOR_BYTES)));
  typedef int64_t integer;
  typedef int64_t mask __attribute__((vector_size(NLLX_VECTOR_BYTES)));
};
template <typename acc>
using Vec = typename VecOf<acc>::type;
template <typename acc>
using Mask = typename VecOf<acc>::mask;
template <typename acc>
constexpr int kLanes = NLLX_VECTOR_BYTES / static_cast<int>(sizeof(acc));

template <typename V>
struct MaskOf;
template <>
struct MaskOf<Vec<float>> {
  typedef Mask<float> type;
};
template <>
struct MaskOf<Vec<double>> {
  typedef Mask<double> type;
};
// The numbers 0 to n - 1 as template arguments; std::integer_sequence would be a template of the standard library.
template <int... kLane>
struct Lanes {};
template <int n, int... kLane>
struct LanesTo : LanesTo<n - 1, n - 1, kLane...> {};
template <int... kLane>
struct LanesTo<0, kLane...> {
  using type = Lanes<kLane...>;
};

typedef uint16_t vec_u16 __attribute__((vector_size(NLLX_VECTOR_BYTES / 2)));
typedef uint32_t vec_u32 __attribute__((vector_size(NLLX_VECTOR_BYTES)));

template <typename acc>
NLLX_INLINE Vec<acc> broadcast(acc v) {
  return v - Vec<acc>{};  // not `Vec{} + v`: that would turn -0 into +0
}

NLLX_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  memcpy(&v, p, sizeof v);
  return v;
}
NLLX_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  memcpy(&v, p, sizeof v);
  return v;
}
NLLX_INLINE Vec<float> load(const bfloat16* p) {
  vec_u16 h;
  memcpy(&h, p, sizeof h);
  return bit_cast<Vec<float>>(__builtin_convertvector(h, vec_u32) << 16);
}
NLLX_INLINE Vec<float> load(const float16* p) {
#if NLLX_VECTOR_BYTES == 64
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif NLLX_VECTOR_BYTES == 32
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_acc(p[i]);
  return v;
#endif
}

NLLX_INLINE void store(float* p, Vec<float> v) { memcpy(p, &v, sizeof v); }
NLLX_INLINE void store(double* p, Vec<double> v) { memcpy(p, &v, sizeof v); }
NLLX_INLINE void store(bfloat16* p, Vec<float> v) {
  const vec_u32 u = bit_cast<vec_u32>(v);
  const vec_u32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vec_u32 bits = v != v ? vec_u32{} + 0x7fc0u : rounded;
#if NLLX_VECTOR_BYTES == 32
  const __m256i w = bit_cast<__m256i>(bits);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
#else
  const vec_u16 h = __builtin_convertvector(bits, vec_u16);
  memcpy(p, &h, sizeof h);
#endif
}
NLLX_INLINE void store(float16* p, Vec<float> v) {
#if NLLX_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif NLLX_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = from_acc<float16>(v[i]);
#endif
}

// The first n lanes from memory, the rest `fill`; nothing beyond p[n - 1] is read.
template <typename T, typename acc>
NLLX_INLINE Vec<acc> load_first(const T* p, int n, acc fill) {
  acc lanes[kLanes<acc>];
  for (int i = 0; i < kLanes<acc>; ++i) lanes[i] = i < n ? to_acc(p[i]) : fill;
  return load(lanes);
}
template <typename T>
NLLX_INLINE void store_first(T* p, Vec<typename AccOf<T>::type> v, int n) {
  T lanes[kLanes<typename AccOf<T>::type>];
  store(lanes, v);
  memcpy(p, lanes, sizeof(T) * static_cast<size_t>(n));
}
#if NLLX_VECTOR_BYTES == 16
// One by one, and what the other lanes hold, which may be anything, decides nothing.
NLLX_INLINE void store_first(float16* p, Vec<float> v, int n) {
  for (int i = 0; i < kLanes<float>; ++i) {
    if (i < n) p[i] = from_acc<float16>(v[i]);
  }
}
#endif

#if NLLX_VECTOR_BYTES == 64
NLLX_INLINE __mmask16 first_lanes16(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
NLLX_INLINE Vec<float> load_first(const float* p, int n, float fill) {
  return bit_cast<Vec<float>>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes16(n), p));
}
NLLX_INLINE Vec<double> load_first(const double* p, int n, double fill) {
  return bit_cast<Vec<double>>(_mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>(first_lanes16(n)), p));
}
NLLX_INLINE void store_first(float* p, Vec<float> v, int n) {
  _mm512_mask_storeu_ps(p, first_lanes16(n), bit_cast<__m512>(v));
}
NLLX_INLINE void store_first(double* p, Vec<double> v, int n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes16(n)), bit_cast<__m512d>(v));
}
template <typename half>
NLLX_INLINE Vec<float> load_first_halves(const half* p, int n, float fill) {
  const __mmask16 first = first_lanes16(n);
  half lanes[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_maskz_loadu_epi16(first, p));
  return bit_cast<Vec<float>>(_mm512_mask_mov_ps(_mm512_set1_ps(fill), first, bit_cast<__m512>(load(lanes))));
}
NLLX_INLINE Vec<float> load_first(const bfloat16* p, int n, float fill) { return load_first_halves(p, n, fill); }
NLLX_INLINE Vec<float> load_first(const float16* p, int n, float fill) { return load_first_halves(p, n, fill); }
template <typename half>
NLLX_INLINE void store_first_halves(half* p, Vec<float> v, int n) {
  half lanes[16];
  store(lanes, v);
  _mm256_mask_storeu_epi16(p, first_lanes16(n), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)));
}
NLLX_INLINE void store_first(bfloat16* p, Vec<float> v, int n) { store_first_halves(p, v, n); }
NLLX_INLINE void store_first(float16* p, Vec<float> v, int n) { store_first_halves(p, v, n); }
#elif NLLX_VECTOR_BYTES == 32
// A window of this, from 8 - n on, is a mask of n lanes.
alignas(64) constexpr int32_t kFirstLanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
NLLX_INLINE __m256i first_lanes8(int n) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFirstLanes + 8 - n));
}
NLLX_INLINE Vec<float> load_first(const float* p, int n, float fill) {
  const __m256i first = first_lanes8(n);
  const __m256 v = _mm256_maskload_ps(p, first);
  return bit_cast<Vec<float>>(_mm256_blendv_ps(_mm256_set1_ps(fill), v, _mm256_castsi256_ps(first)));
}
NLLX_INLINE Vec<double> load_first(const double* p, int n, double fill) {
  const __m256i first = first_lanes8(2 * n);
  const __m256d v = _mm256_maskload_pd(p, first);
  return bit_cast<Vec<double>>(_mm256_blendv_pd(_mm256_set1_pd(fill), v, _mm256_castsi256_pd(first)));
}
// Up to four halves.
NLLX_INLINE uint64_t load_word(const void* p, int halves) {
  uint64_t word = 0;
  if (halves == 4) {
    memcpy(&word, p, 8);
    return word;
  }
  uint32_t pair = 0;
  uint16_t last = 0;
  if (halves & 2) memcpy(&pair, p, 4);
  if (halves & 1) memcpy(&last, static_cast<const uint16_t*>(p) + halves - 1, 2);
  return pair | (static_cast<uint64_t>(last) << (halves & 2 ? 32 : 0));
}
NLLX_INLINE Vec<float> halves_to_floats(__m128i v, const bfloat16*) {
  return bit_cast<Vec<float>>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
NLLX_INLINE Vec<float> halves_to_floats(__m128i v, const float16*) { return bit_cast<Vec<float>>(_mm256_cvtph_ps(v)); }
template <typename half>
NLLX_INLINE Vec<float> load_first_halves(const half* p, int n, float fill) {
  const uint64_t low = load_word(p, n < 4 ? n : 4), high = n > 4 ? load_word(p + 4, n - 4) : 0;
  // Not by way of memory: a load of both words would wait until they are in the cache.
  const __m128i words = _mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low));
  return bit_cast<Vec<float>>(_mm256_blendv_ps(_mm256_set1_ps(fill), bit_cast<__m256>(halves_to_floats(words, p)),
                                               _mm256_castsi256_ps(first_lanes8(n))));
}
NLLX_INLINE Vec<float> load_first(const bfloat16* p, int n, float fill) { return load_first_halves(p, n, fill); }
NLLX_INLINE Vec<float> load_first(const float16* p, int n, float fill) { return load_first_halves(p, n, fill); }
// A masked store takes longer than these (on AMD before Zen 4 by far).
NLLX_INLINE void store_first(float* p, Vec<float> v, int n) {
  __m128 part = _mm256_castps256_ps128(bit_cast<__m256>(v));
  if (n & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps(bit_cast<__m256>(v), 1);
    p += 4;
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
    part = _mm_movehl_ps(part, part);
    p += 2;
  }
  if (n & 1) _mm_store_ss(p, part);
}
NLLX_INLINE void store_first(double* p, Vec<double> v, int n) {
  __m128d part = _mm256_castpd256_pd128(bit_cast<__m256d>(v));
  if (n & 2) {
    _mm_storeu_pd(p, part);
    part = _mm256_extractf128_pd(bit_cast<__m256d>(v), 1);
    p += 2;
  }
  if (n & 1) _mm_store_sd(p, part);
}
template <typename half>
NLLX_INLINE void store_first_halves(half* p, Vec<float> v, int n) {
  half lanes[8];
  store(lanes, v);
  uint64_t words[2];
  memcpy(words, lanes, sizeof words);
  uint64_t word = words[0];
  if (n & 4) {
    memcpy(p, &word, 8);
    word = words[1];
    p += 4;
  }
  if (n & 2) {
    memcpy(p, &word, 4);
    word >>= 32;
    p += 2;
  }
  if (n & 1) memcpy(p, &word, 2);
}
NLLX_INLINE void store_first(bfloat16* p, Vec<float> v, int n) { store_first_halves(p, v, n); }
NLLX_INLINE void store_first(float16* p, Vec<float> v, int n) { store_first_halves(p, v, n); }
#endif

// ---- streaming: past the caches, for results that will not be read soon ----

#if defined(__x86_64__) || defined(_M_X64)
#define NLLX_HAS_STREAMING 1
#endif

// Elements of a line of the caches, which is what memory takes at a time: a line that is streamed in parts, between
// which others are written, may be written to memory several times.
template <typename T>
constexpr int kLine = 64 / static_cast<int>(sizeof(T));

template <typename T>
NLLX_INLINE bool starts_a_line(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

// Copies a line; both start one. In pieces as long as a vector is in memory: a longer load would wait until the stores
// of the vectors are in the cache.
template <typename T>
NLLX_INLINE void stream_line(T* to, const T* from) {
#if NLLX_HAS_STREAMING
  constexpr int kVector = static_cast<int>(sizeof(T)) * kLanes<typename AccOf<T>::type>;
  constexpr int kPiece = kVector > 16 ? kVector : 16;
#pragma GCC unroll 4
  for (int i = 0; i < kLine<T>; i += kPiece / static_cast<int>(sizeof(T))) {
#if NLLX_VECTOR_BYTES == 64
    if constexpr (kPiece == 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_load_si512(from + i));
#endif
#if NLLX_VECTOR_BYTES >= 32
    if constexpr (kPiece == 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i)));
    }
#endif
    if constexpr (kPiece == 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_load_si128(reinterpret_cast<const __m128i*>(from + i)));
    }
  }
#else
  memcpy(to, from, 64);
#endif
}
// Streamed stores are ordered with what follows only by a fence.
NLLX_INLINE void end_stream() {
#if NLLX_HAS_STREAMING
  _mm_sfence();
#endif
}
template <typename T>
NLLX_INLINE void prefetch(const T* p) {  // any address will do
  __builtin_prefetch(p, 0, 3);
}

// The first n lanes; all of them with one instruction.
template <typename T, typename acc>
NLLX_INLINE Vec<acc> load_some(const T* p, int n, acc fill) {
  return n == kLanes<acc> ? load(p) : load_first(p, n, fill);
}
template <typename T>
NLLX_INLINE void store_some(T* p, Vec<typename AccOf<T>::type> v, int n) {
  if (n == kLanes<typename AccOf<T>::type>) {
    store(p, v);
  } else {
    store_first(p, v, n);
  }
}

template <typename acc>
NLLX_INLINE Mask<acc> first_lanes(int n) {
  Mask<acc> iota;
  for (int i = 0; i < kLanes<acc>; ++i) iota[i] = i;
  return iota < n;
}

// a * b - c. Of two products the compiler would fuse the one or the other into the difference, not the same one in
// every copy of a loop.
#if NLLX_VECTOR_BYTES == 64
NLLX_INLINE Vec<float> fused_minus(Vec<float> a, Vec<float> b, Vec<float> c) {
  return bit_cast<Vec<float>>(_mm512_fmsub_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
}
NLLX_INLINE Vec<double> fused_minus(Vec<double> a, Vec<double> b, Vec<double> c) {
  return bit_cast<Vec<double>>(_mm512_fmsub_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b), bit_cast<__m512d>(c)));
}
#elif NLLX_VECTOR_BYTES == 32
NLLX_INLINE Vec<float> fused_minus(Vec<float> a, Vec<float> b, Vec<float> c) {
  return bit_cast<Vec<float>>(_mm256_fmsub_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
}
NLLX_INLINE Vec<double> fused_minus(Vec<double> a, Vec<double> b, Vec<double> c) {
  return bit_cast<Vec<double>>(_mm256_fmsub_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b), bit_cast<__m256d>(c)));
}
#else
template <typename V>
NLLX_INLINE V fused_minus(V a, V b, V c) {
#if defined(__aarch64__)
  __asm__("" : "+w"(c));  // what c is made of is not seen
#endif
  return a * b - c;
}
#endif

// v as it is: a product that is not fused into the sum that it is a term of, but rounded as wherever else it is used.
template <typename V>
NLLX_INLINE V rounded(V v) {
#if defined(__aarch64__)
  __asm__("" : "+w"(v));
#elif NLLX_VECTOR_BYTES == 64
  __asm__("" : "+v"(v));
#elif defined(__x86_64__) || defined(_M_X64)
  __asm__("" : "+x"(v));
#endif
  return v;
}

template <typename V, typename M>
NLLX_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}

// 1 / x for x of ordinary size, to about half a rounding.
template <typename V>
NLLX_INLINE V reciprocal(V x) {
  return 1 / x;
}
#if NLLX_VECTOR_BYTES == 64
NLLX_INLINE Vec<float> reciprocal(
    Vec<float> x) {  // by a step of Newton's; a division takes as long as the rest of a tanh
  const Vec<float> r = bit_cast<Vec<float>>(_mm512_rcp14_ps(bit_cast<__m512>(x)));
  return r + r * (1.f - x * r);
}
#endif

// The larger, where a NaN in `b` loses: the maximum only shifts the exponentials, and the NaN shows in their sum.
template <typename V>
NLLX_INLINE V max_not_nan(V a, V b) {
  return b > a ? b : a;
}
#if NLLX_VECTOR_BYTES == 64
NLLX_INLINE Vec<float> max_not_nan(Vec<float> a, Vec<float> b) {  // vmaxps gives its second operand where one is NaN
  return bit_cast<Vec<float>>(_mm512_max_ps(bit_cast<__m512>(b), bit_cast<__m512>(a)));
}
#endif

// The larger, and NaN where x is NaN.
NLLX_INLINE Vec<float> at_least(Vec<float> x, float limit) {
  // vmaxps gives its second operand where one is NaN.
#if NLLX_VECTOR_BYTES == 64
  return bit_cast<Vec<float>>(_mm512_max_ps(_mm512_set1_ps(limit), bit_cast<__m512>(x)));
#elif NLLX_VECTOR_BYTES == 32
  return bit_cast<Vec<float>>(_mm256_max_ps(_mm256_set1_ps(limit), bit_cast<__m256>(x)));
#elif defined(__x86_64__) || defined(_M_X64)
  return bit_cast<Vec<float>>(_mm_max_ps(_mm_set1_ps(limit), bit_cast<__m128>(x)));
#else
  return select(x < limit, broadcast(limit), x);
#endif
}

// ---- lanes in another order ----

// Lanes of a and b by number, b's from kLanes on.
template <int... kLane, typename V>
NLLX_INLINE V pick(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kLane...);
#else
  typedef typename MaskOf<V>::type M;
  return __builtin_shuffle(a, b, M{kLane...});
#endif
}
// Exchanges the off-diagonal blocks of `kStep` lanes between vectors i and i + kStep.
template <int kStep, int... kLane, typename V>
NLLX_INLINE void exchange(V& a, V& b, Lanes<kLane...>) {
  constexpr int L = static_cast<int>(sizeof...(kLane));
  const V low = pick<((kLane & kStep) ? L + kLane - kStep : kLane)...>(a, b);
  const V high = pick<((kLane & kStep) ? L + kLane : kLane + kStep)...>(a, b);
  a = low;
  b = high;
}
// Even lanes of a and b to a, odd ones to b; and back.
template <typename V, int... kLane>
NLLX_INLINE void deinterleave(V& a, V& b, Lanes<kLane...>) {
  const V even = pick<(2 * kLane)...>(a, b), odd = pick<(2 * kLane + 1)...>(a, b);
  a = even;
  b = odd;
}
template <typename V, int... kLane>
NLLX_INLINE void interleave(V& a, V& b, Lanes<kLane...>) {
  constexpr int L = static_cast<int>(sizeof...(kLane));
  const V low = pick<(kLane % 2 * L + kLane / 2)...>(a, b);
  const V high = pick<(kLane % 2 * L + L / 2 + kLane / 2)...>(a, b);
  a = low;
  b = high;
}
#if NLLX_VECTOR_BYTES == 32
// First within the halves of a register, then between them: the compiler takes four permutations over both.
template <typename V>
NLLX_INLINE void deinterleave(V& a, V& b, Lanes<0, 1, 2, 3, 4, 5, 6, 7>) {
  const V even = pick<0, 2, 8, 10, 4, 6, 12, 14>(a, b), odd = pick<1, 3, 9, 11, 5, 7, 13, 15>(a, b);
  a = pick<0, 1, 4, 5, 2, 3, 6, 7>(even, even);
  b = pick<0, 1, 4, 5, 2, 3, 6, 7>(odd, odd);
}
template <typename V>
NLLX_INLINE void interleave(V& a, V& b, Lanes<0, 1, 2, 3, 4, 5, 6, 7>) {
  const V low = pick<0, 8, 1, 9, 4, 12, 5, 13>(a, b), high = pick<2, 10, 3, 11, 6, 14, 7, 15>(a, b);
  a = pick<0, 1, 2, 3, 8, 9, 10, 11>(low, high);
  b = pick<4, 5, 6, 7, 12, 13, 14, 15>(low, high);
}
#endif

// ---- blocks of 16 bytes of lanes, so that rows become columns without crossing them ----

template <typename acc>
constexpr int kBlock = 16 / static_cast<int>(sizeof(acc));

// Block b: the kBlock elements from p + b * stride on.
template <typename T>
NLLX_INLINE Vec<typename AccOf<T>::type> load_blocks(const T* p, int64_t stride) {
  using acc = typename AccOf<T>::type;
  [[maybe_unused]] constexpr int B = kBlock<acc>;
#if NLLX_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 2) {
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return halves_to_floats(
        _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(low), reinterpret_cast<const double*>(p + stride))), p);
  } else {
    const __m128 low = _mm_loadu_ps(reinterpret_cast<const float*>(p));
    return bit_cast<Vec<acc>>(
        _mm256_insertf128_ps(_mm256_castps128_ps256(low), _mm_loadu_ps(reinterpret_cast<const float*>(p + stride)), 1));
  }
#elif NLLX_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 2) {
    T lanes[kLanes<acc>];
    for (int b = 0; b < kLanes<acc> / B; ++b) memcpy(lanes + b * B, p + b * stride, B * sizeof(T));
    return load(lanes);
  } else {
    const auto block = [&](int b) __attribute__((always_inline)) {
      return _mm_loadu_ps(reinterpret_cast<const float*>(p + b * stride));
    };
    __m512 v = _mm512_castps128_ps512(block(0));
    v = _mm512_insertf32x4(v, block(1), 1);
    v = _mm512_insertf32x4(v, block(2), 2);
    return bit_cast<Vec<acc>>(_mm512_insertf32x4(v, block(3), 3));
  }
#else
  static_assert(kLanes<acc> == B, "a vector is one block");
  return load(p);
#endif
}
template <typename T>
NLLX_INLINE void store_blocks(T* p, int64_t stride, Vec<typename AccOf<T>::type> v) {
  using acc = typename AccOf<T>::type;
  constexpr int B = kBlock<acc>;
#if NLLX_VECTOR_BYTES == 32
  if constexpr (sizeof(T) > 2) {
    const __m256 w = bit_cast<__m256>(v);
    _mm_storeu_ps(reinterpret_cast<float*>(p), _mm256_castps256_ps128(w));
    _mm_storeu_ps(reinterpret_cast<float*>(p + stride), _mm256_extractf128_ps(w, 1));
    return;
  }
#elif NLLX_VECTOR_BYTES == 64
  if constexpr (sizeof(T) > 2) {
    const __m512 w = bit_cast<__m512>(v);
    _mm_storeu_ps(reinterpret_cast<float*>(p), _mm512_castps512_ps128(w));
    _mm_storeu_ps(reinterpret_cast<float*>(p + stride), _mm512_extractf32x4_ps(w, 1));
    _mm_storeu_ps(reinterpret_cast<float*>(p + 2 * stride), _mm512_extractf32x4_ps(w, 2));
    _mm_storeu_ps(reinterpret_cast<float*>(p + 3 * stride), _mm512_extractf32x4_ps(w, 3));
    return;
  }
#endif
  T lanes[kLanes<acc>];
  store(lanes, v);
  for (int b = 0; b < kLanes<acc> / B; ++b) memcpy(p + b * stride, lanes + b * B, B * sizeof(T));
}

// The lanes of the lower halves of the blocks of a and b in turns to a, those of the upper halves to b.
template <int B, typename V, int... kLane>
NLLX_INLINE void zip_blocks(V& a, V& b, Lanes<kLane...>) {
  constexpr int L = static_cast<int>(sizeof...(kLane));
  const V low = pick<(kLane / B * B + kLane % B / 2 + kLane % 2 * L)...>(a, b);
  const V high = pick<(kLane / B * B + kLane % B / 2 + kLane % 2 * L + B / 2)...>(a, b);
  a = low;
  b = high;
}
// v[i], lane j of a block, becomes v[j], lane i of the same block, for kBlock vectors.
template <typename acc>
NLLX_INLINE void transpose_blocks(Vec<acc>* v) {
  constexpr int B = kBlock<acc>;
  using All = typename LanesTo<kLanes<acc>>::type;
  if constexpr (B == 4) {
    zip_blocks<B>(v[0], v[2], All{});
    zip_blocks<B>(v[1], v[3], All{});
    zip_blocks<B>(v[2], v[3], All{});
  }
  zip_blocks<B>(v[0], v[1], All{});
}

// ---- what neighbouring rows need ----

// As many numbers as a vector of double has lanes, as double.
NLLX_INLINE Vec<double> load_doubles(const float* p) {
  typedef float half __attribute__((vector_size(NLLX_VECTOR_BYTES / 2)));
  half v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Vec<double>);
}
NLLX_INLINE Vec<double> load_doubles(const double* p) { return load(p); }

typedef int64_t vec_i64 __attribute__((vector_size(NLLX_VECTOR_BYTES)));
NLLX_INLINE bool any_lane(vec_i64 mask) {
#if NLLX_VECTOR_BYTES == 64
  return _mm512_test_epi64_mask(bit_cast<__m512i>(mask), bit_cast<__m512i>(mask)) != 0;
#elif NLLX_VECTOR_BYTES == 32
  return _mm256_testz_si256(bit_cast<__m256i>(mask), bit_cast<__m256i>(mask)) == 0;
#else
  return (mask[0] | mask[1]) != 0;
#endif
}
// The low 32 bits of the integers in a and b.
NLLX_INLINE Mask<float> low_halves(vec_i64 a, vec_i64 b) {
  Vec<float> low = bit_cast<Vec<float>>(a), high = bit_cast<Vec<float>>(b);
  deinterleave(low, high, typename LanesTo<kLanes<float>>::type{});
  return bit_cast<Mask<float>>(low);
}

template <typename acc>
NLLX_INLINE acc largest_lane(Vec<acc> v) {
  acc lanes[kLanes<acc>];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = kLanes<acc> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
  }
  return lanes[0];
}
// As a tree.
template <int n>
NLLX_INLINE double sum_of(double* lanes) {
#pragma GCC unroll 4
  for (int half = n / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}
// In double: the sum of a block is added to those of the other blocks.
template <typename acc>
NLLX_INLINE double sum_of_lanes(Vec<acc> v) {
  double lanes[kLanes<acc>];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<acc>; ++i) lanes[i] = static_cast<double>(v[i]);
  return sum_of<kLanes<acc>>(lanes);
}

// exp(x) for x ≤ 88 (float) or 709 (double); from -87.3 on down denormal (AVX2: up to 2^-127 too small), then (float:
// below -87.7, AVX2 -88, AVX-512 -103.9; double: at once) zero, for -inf too; NaN stays NaN.
//
// The float version is 2^n 2^f with n the multiple of 1/32 (AVX-512), 1/8 (AVX2) or 1 that is nearest to x log2 e. What
// is whole of n goes into the exponent, the rest into a table in registers, so that a short polynomial is left for 2^f,
// fitted here: it minimises the largest relative error under p(0) = 1, so that exp(0) is 1 exactly and the loss of a
// row that one class dominates is exact too. Its own error is at most 5.4e-8, 2.6e-8 or 9.1e-8. log2 e in one float
// would add 1.4e-8 |x|, ten roundings in the gradient of an improbable class; with the rest of it nothing grows with x.
// The table pays for that. The double version is the Taylor series to r^13 after a reduction by ln 2, whose remainder
// is below 2^-57.
//
// K vectors, step by step: the steps of one wait for each other.
#if NLLX_VECTOR_BYTES == 64
// 2^(i/32)
alignas(64) constexpr float kFractions[32] = {
    1.f,         1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};
#elif NLLX_VECTOR_BYTES == 32
// The bits of 2^(i/8), less i << 20, which the multiples of 1/8 bring along when they are shifted to the exponent.
alignas(32) constexpr uint32_t kFractions[8] = {0x3f800000u, 0x3f7b95c2u, 0x3f7837f0u, 0x3f75fed7u,
                                                0x3f7504f3u, 0x3f75672au, 0x3f7744fdu, 0x3f7ac0c7u};
#endif
template <int K, bool kLowPart = true>
NLLX_INLINE void exp_vecs(Vec<float>* x) {
  const float log2_e = 1.44269504f;
  Vec<float> n[K], f[K], p[K], power[K];
#define NLLX_EACH _Pragma("GCC unroll 8") for (int u = 0; u < K; ++u)
#if NLLX_VECTOR_BYTES == 64
  // The limit keeps -inf - -inf out of f.
  NLLX_EACH x[u] = at_least(x[u], -104.f);
  const float round = 393216.f;  // 1.5 * 2^18: rounds to a multiple of 1/32, and leaves their number in the low bits
#elif NLLX_VECTOR_BYTES == 32
  // At the limit n is -127, whose power of two is made as zero.
  NLLX_EACH x[u] = at_least(x[u], -88.02969f);
  const float round = 1572864.f;  // 1.5 * 2^20: rounds to a multiple of 1/8, and leaves their number in the low bits
#else
  NLLX_EACH x[u] = at_least(x[u], -88.02969f);
  const float round = 12583039.f;  // 1.5 * 2^23 + 127: rounds to an integer, and leaves the bits of 2^n in the low ones
#endif
  NLLX_EACH power[u] = x[u] * log2_e + round;
  NLLX_EACH n[u] = power[u] - round;
#if NLLX_VECTOR_BYTES > 16
  // The product must not be rounded before n is taken from it, and what float leaves of log2 e counts.
  NLLX_EACH f[u] = fused_minus(x[u], broadcast(log2_e), n[u]);
  if constexpr (kLowPart) NLLX_EACH f[u] += x[u] * 1.92596299e-8f;
#else
  // No fused multiply-add: ln 2 in two parts, n times the first of which is exact.
  NLLX_EACH f[u] = (x[u] - n[u] * 0.693359375f) * log2_e + n[u] * 3.0613187e-4f;
#endif
#if NLLX_VECTOR_BYTES == 64
  NLLX_EACH power[u] = bit_cast<Vec<float>>(
      _mm512_permutex2var_ps(_mm512_load_ps(kFractions), bit_cast<__m512i>(power[u]), _mm512_load_ps(kFractions + 16)));
  NLLX_EACH p[u] = f[u] * 2.40226448e-1f + 6.93157315e-1f;
  NLLX_EACH p[u] = p[u] * (f[u] * power[u]) + power[u];
  // vscalef multiplies by 2^n, n rounded down, whatever n is.
  NLLX_EACH x[u] = bit_cast<Vec<float>>(_mm512_scalef_ps(bit_cast<__m512>(p[u]), bit_cast<__m512>(n[u])));
#elif NLLX_VECTOR_BYTES == 32
  const __m256i fractions = _mm256_load_si256(reinterpret_cast<const __m256i*>(kFractions));
  NLLX_EACH power[u] =
      bit_cast<Vec<float>>(bit_cast<vec_u32>(_mm256_permutevar8x32_epi32(fractions, bit_cast<__m256i>(power[u]))) +
                           (bit_cast<vec_u32>(power[u]) << 20));
  NLLX_EACH p[u] = f[u] * 5.54890037e-2f + 2.40257517e-1f;
  NLLX_EACH p[u] = p[u] * f[u] + 6.93147242e-1f;
  NLLX_EACH x[u] = p[u] * (f[u] * power[u]) + power[u];
#else
  NLLX_EACH power[u] = bit_cast<Vec<float>>(bit_cast<vec_u32>(power[u]) << 23);
  NLLX_EACH p[u] = f[u] * 1.326472731e-3f + 9.671512991e-3f;
  NLLX_EACH p[u] = p[u] * f[u] + 5.550733581e-2f;
  NLLX_EACH p[u] = p[u] * f[u] + 2.402224243e-1f;
  NLLX_EACH p[u] = p[u] * f[u] + 6.931470037e-1f;
  NLLX_EACH p[u] = p[u] * f[u] + 1.f;
  NLLX_EACH x[u] = p[u] * power[u];
#endif
#undef NLLX_EACH
}
NLLX_INLINE Vec<float> exp_vec(Vec<float> x) {
  exp_vecs<1>(&x);
  return x;
}
NLLX_INLINE Vec<double> exp_vec(Vec<double> x) {
  typedef uint64_t vec_u64 __attribute__((vector_size(NLLX_VECTOR_BYTES)));
  const double lowest = -708.3964185322641;
  const Mask<double> flushed = x < lowest;
  x = select(flushed, broadcast(lowest), x);
  const Vec<double> shifted = x * 1.4426950408889634 + 6755399441055744.;  // 1.5 * 2^52
  const Vec<double> n = shifted - 6755399441055744.;
  Vec<double> r = x - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  Vec<double> p = r * (1. / 6227020800.) + 1. / 479001600.;
  p = p * r + 1. / 39916800.;
  p = p * r + 1. / 3628800.;
  p = p * r + 1. / 362880.;
  p = p * r + 1. / 40320.;
  p = p * r + 1. / 5040.;
  p = p * r + 1. / 720.;
  p = p * r + 1. / 120.;
  p = p * r + 1. / 24.;
  p = p * r + 1. / 6.;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.;
  const Vec<double> power = bit_cast<Vec<double>>((bit_cast<vec_u64>(shifted) << 52) + 0x3ff0000000000000ull);
  return select(flushed, Vec<double>{}, p * power);
}

template <int K, bool kLowPart = true>
NLLX_INLINE void exp_vecs(Vec<double>* x) {
#pragma GCC unroll 8
  for (int u = 0; u < K; ++u) x[u] = exp_vec(x[u]);
}

// Of terms of a sum of exponentials, the largest of which is 1, among other arithmetic. What float leaves of log2 e is
// left out: it counts in terms that are small, and by as little as they do. Two at once, as more do not stay in
// registers.
template <int K, typename acc>
NLLX_INLINE void exp_terms(Vec<acc>* x) {
  if constexpr (K % 2 != 0) exp_vecs<1, false>(x);
#pragma GCC unroll 4
  for (int u = K % 2; u < K; u += 2) exp_vecs<2, false>(x + u);
}

// log(x) for x ≥ 1, the sums of exponentials; zero gives -inf, NaN and inf themselves. x = 2^n m with m in [√½, √2),
// and the polynomial of Cephes logf (S. L. Moshier) in m - 1, error below 1 ulp.
NLLX_INLINE Vec<float> log_vec(Vec<float> x) {
  const vec_u32 bits = bit_cast<vec_u32>(x);
  const vec_u32 shifted = bits - 0x3f3504f3u;  // the bits of √½
  const Vec<float> n = __builtin_convertvector(bit_cast<Mask<float>>(shifted) >> 23, Vec<float>);
  const Vec<float> f = bit_cast<Vec<float>>((shifted & 0x7fffffu) + 0x3f3504f3u) - 1.f;
  const Vec<float> f2 = f * f;
  Vec<float> p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * f2 - n * 2.12194440e-4f - f2 * 0.5f;
  const Vec<float> result = (f + p) + n * 0.693359375f;
  const Vec<float> inf = broadcast(__builtin_inff());
  return select(x == 0.f, -inf, select((x < inf) & (x == x), result, x));
}
NLLX_INLINE Vec<double> log_vec(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = log(x[i]);
  return x;
}

}  // namespace
}  // namespace NLLX_CAPABILITY
}  // namespace nllx
