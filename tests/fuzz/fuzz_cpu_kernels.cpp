// Fuzzes the CPU kernels of every capability that this CPU has, below torch: a problem is made of bytes, its arrays lie
// in heap blocks of exactly their size, and each kernel's results are compared with the definition in double precision.
//
// With clang's -fsanitize=fuzzer bytes come from libFuzzer, guided by coverage. With -DNLLX_STANDALONE there is a
// main() that makes them at random:
//
//   fuzz_cpu_kernels SECONDS [SEED]
//
// With -DNLLX_THREADS the chunks of a problem run on three threads at once, for the thread sanitizer. With
// -DNLLX_VALGRIND what no one has written is undefined to valgrind, which then reports what a result owes to it.
// tools/fuzz.sh builds and runs all of these.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cpu/capability.h"
#include "../../csrc/cpu/cross_entropy.h"
#include "../../csrc/cpu/kernels/kernels.h"
#include "../../csrc/cpu/parallel.h"
#include "../../csrc/online_softmax.h"

#ifdef NLLX_VALGRIND
#include <valgrind/memcheck.h>
#else
#define VALGRIND_MAKE_MEM_UNDEFINED(address, size) static_cast<void>(0)
#define VALGRIND_MAKE_MEM_DEFINED(address, size) static_cast<void>(0)
#define RUNNING_ON_VALGRIND false
#endif

namespace {

using namespace nllx;

unsigned long long this_run = 0, this_seed = 0;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "fuzz_cpu_kernels: run %llu of seed %llu: %s\n", this_run, this_seed, what.c_str());
  std::abort();
}

// Numbers from bytes; zeros when they are used up.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t byte() {
    if (at_ == size_) return 0;
    return data_[at_++];
  }
  uint64_t word() {
    uint64_t w = 0;
    for (int i = 0; i < 8; ++i) w = w << 8 | byte();
    return w;
  }
  int64_t below(int64_t n) {
    return n <= 1 ? 0 : static_cast<int64_t>((byte() << 8 | byte()) % static_cast<uint64_t>(n));
  }
  bool flip() { return byte() & 1; }
  bool left() const { return at_ < size_; }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

// Many values from a few bytes.
class Stream {
 public:
  explicit Stream(uint64_t seed) : state_(seed * 2654435769u + 1) {}
  uint64_t next() {  // xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators", 2016)
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 2685821657736338717u;
  }
  double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

uint16_t to_bfloat16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (v != v) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float from_bfloat16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
float from_float16(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  float v = exponent == 31
                ? (fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity())
            : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                            : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return h & 0x8000 ? -v : v;
}
// Rounds to nearest, ties to even.
uint16_t to_float16(float v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const float a = std::fabs(v);
  if (v != v) return 0x7e00;
  if (a >= 65520.f) return sign | 0x7c00;
  int exponent;
  std::frexp(a, &exponent);
  const int shift = std::max(exponent - 11, -24);
  const auto units = static_cast<int64_t>(std::nearbyint(std::ldexp(a, -shift)));
  if (shift == -24) return static_cast<uint16_t>(sign | units);
  return static_cast<uint16_t>(sign + ((shift + 24) << 10) + units);
}

size_t bytes_of(FloatType type) { return type == FloatType::kFloat64 ? 8 : type == FloatType::kFloat32 ? 4 : 2; }
double epsilon_of(FloatType type) {
  return type == FloatType::kFloat64    ? 0x1p-52
         : type == FloatType::kFloat32  ? 0x1p-23
         : type == FloatType::kBFloat16 ? 0x1p-7
                                        : 0x1p-10;
}

// A heap block of exactly the bytes that an array needs, behind up to 15 elements that make it misaligned.
class Array {
 public:
  Array(FloatType type, Extent e, Strides s, int64_t shift)
      : type_(type), extent_(e), strides_(s), shift_(shift), size_(window(e, s)) {
    const size_t total = static_cast<size_t>(size_ + shift_) * bytes_of(type_);
    block_.reset(std::malloc(total ? total : 1));
    std::memset(block_.get(), 0xAB, total);
    VALGRIND_MAKE_MEM_UNDEFINED(block_.get(), total);
    touched_.assign(static_cast<size_t>(size_), false);
    for (int64_t o = 0; o < e.outer; ++o)
      for (int64_t c = 0; c < e.classes; ++c)
        for (int64_t i = 0; i < e.inner; ++i) touched_[static_cast<size_t>(at(o, c, i))] = true;
  }
  static int64_t window(Extent e, Strides s) {
    if (e.outer < 1 || e.classes < 1 || e.inner < 1) return 0;
    return 1 + (e.outer - 1) * s.outer + (e.classes - 1) * s.classes + (e.inner - 1) * s.inner;
  }
  void* data() { return static_cast<uint8_t*>(block_.get()) + static_cast<size_t>(shift_) * bytes_of(type_); }
  int64_t at(int64_t o, int64_t c, int64_t i) const {
    return o * strides_.outer + c * strides_.classes + i * strides_.inner;
  }
  double get(int64_t index) {
    switch (type_) {
      case FloatType::kFloat64:
        return static_cast<double*>(data())[index];
      case FloatType::kFloat32:
        return static_cast<float*>(data())[index];
      case FloatType::kBFloat16:
        return from_bfloat16(static_cast<uint16_t*>(data())[index]);
      default:
        return from_float16(static_cast<uint16_t*>(data())[index]);
    }
  }
  double get(int64_t o, int64_t c, int64_t i) { return get(at(o, c, i)); }
  void set(int64_t index, double value) {
    switch (type_) {
      case FloatType::kFloat64:
        static_cast<double*>(data())[index] = value;
        break;
      case FloatType::kFloat32:
        static_cast<float*>(data())[index] = static_cast<float>(value);
        break;
      case FloatType::kBFloat16:
        static_cast<uint16_t*>(data())[index] = to_bfloat16(static_cast<float>(value));
        break;
      default:
        static_cast<uint16_t*>(data())[index] = to_float16(static_cast<float>(value));
    }
  }
  void set_bits(int64_t index, uint64_t bits) {
    std::memcpy(static_cast<uint8_t*>(data()) + static_cast<size_t>(index) * bytes_of(type_), &bits, bytes_of(type_));
  }
  int64_t size() const { return size_; }
  Strides strides() const { return strides_; }
  void allow_reads() { VALGRIND_MAKE_MEM_DEFINED(block_.get(), static_cast<size_t>(size_ + shift_) * bytes_of(type_)); }
  void copy_from(Array& other) { std::memcpy(data(), other.data(), static_cast<size_t>(size_) * bytes_of(type_)); }
  // Whether no two elements lie at one place.
  bool has_apart_elements() const {
    const auto places = std::count(touched_.begin(), touched_.end(), true);
    return places == extent_.outer * extent_.classes * extent_.inner;
  }
  // What lies between the elements, and in front of them, is as it was.
  void check_gaps(const char* name) {
    const auto check = [name](const uint8_t* first, size_t bytes, const char* where) {
      VALGRIND_MAKE_MEM_DEFINED(first, bytes);
      for (size_t b = 0; b < bytes; ++b) {
        if (first[b] != 0xAB) fail(std::string(name) + " was written " + where);
      }
    };
    check(static_cast<uint8_t*>(block_.get()), static_cast<size_t>(shift_) * bytes_of(type_), "before its beginning");
    for (int64_t index = 0; index < size_; ++index) {
      if (!is_element(index)) {
        check(static_cast<uint8_t*>(data()) + static_cast<size_t>(index) * bytes_of(type_), bytes_of(type_),
              "between its elements");
      }
    }
  }
  bool is_element(int64_t index) const { return touched_[static_cast<size_t>(index)]; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  FloatType type_;
  Extent extent_;
  Strides strides_;
  int64_t shift_, size_;
  std::unique_ptr<void, Free> block_;
  std::vector<bool> touched_;
};

// Strides of an array in a layout: dense, or with gaps; for what is only read also 0 and overlapping.
Strides strides_of(Bytes& in, Layout layout, const Extent& e, bool only_read) {
  Strides s;
  const int64_t gap = in.flip() ? in.below(9) : 0;
  if (layout == Layout::kRows) {
    s = {0, 1, e.classes + gap};
    s.outer = e.inner * s.inner + (in.flip() ? in.below(5) : 0);
    if (in.flip()) {  // (inner, outer, classes) in memory
      s.outer = e.classes + gap;
      s.inner = e.outer * s.outer;
    }
  } else {
    s = {0, e.inner + gap, 1};
    s.outer = e.classes * s.classes + (in.flip() ? in.below(5) : 0);
  }
  if (only_read && in.below(8) == 0) {
    s.outer = in.below(3);
    if (layout == Layout::kRows) s.inner = in.below(3);
    if (layout == Layout::kPlanes) s.classes = in.below(3);
  }
  return s;
}

enum class Values { kTame, kWide, kSpecial, kBits };

// What lies between the elements of what is only read may be read too, and may not count.
void fill(Array& a, Values values, Stream& random, bool probabilities, FloatType type) {
  static constexpr double kSpecial[] = {0.,
                                        -0.,
                                        1.,
                                        -1.,
                                        std::numeric_limits<double>::infinity(),
                                        -std::numeric_limits<double>::infinity(),
                                        std::numeric_limits<double>::quiet_NaN(),
                                        1e-310,
                                        -1e-40,
                                        6e-8,
                                        3.4e38,
                                        -3.4e38,
                                        1e308,
                                        -1e308,
                                        65504.,
                                        -65504.};
  a.allow_reads();
  for (int64_t i = 0; i < a.size(); ++i) {
    const double u = random.unit();
    if (!a.is_element(i)) continue;
    if (values == Values::kBits) {
      a.set_bits(i, random.next());
    } else if (values == Values::kSpecial && random.next() % 4 == 0) {
      a.set(i, kSpecial[random.next() % (sizeof kSpecial / sizeof *kSpecial)]);
    } else if (probabilities) {
      a.set(i, u);
    } else {
      a.set(i, (2 * u - 1) * (values == Values::kWide ? (type == FloatType::kFloat16 ? 2e4 : 1e5) : 8));
    }
  }
}

struct Problem {
  FloatType type;
  Layout layout;
  Extent extent;
  Values values;
  bool acc64, in_range;
  int64_t size() const { return extent.outer * extent.classes * extent.inner; }
};

Problem decode(Bytes& in) {
  Problem p;
  p.type = static_cast<FloatType>(in.below(4));
  p.acc64 = p.type == FloatType::kFloat64;
  p.layout = in.flip() ? Layout::kRows : Layout::kPlanes;
  static constexpr int64_t kClasses[] = {1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 127, 128, 255, 256, 257, 1000};
  const int64_t kind = in.below(8);
  p.extent.classes = kind < 5   ? kClasses[in.below(sizeof kClasses / sizeof *kClasses)]
                     : kind < 7 ? in.below(600)
                                : 15000 + in.below(20000);
  p.extent.outer = in.below(6);
  p.extent.inner = p.layout == Layout::kPlanes ? in.below(in.flip() ? 40 : 1200) : in.flip() ? 1 : in.below(200);
  while (p.size() > 40000) {  // several chunks, and a run of microseconds
    if (p.extent.inner > 1) {
      p.extent.inner /= 2;
    } else if (p.extent.outer > 1) {
      --p.extent.outer;
    } else {
      break;
    }
  }
  p.values = static_cast<Values>(in.below(4));
  p.in_range = in.below(4) != 0;
  return p;
}

void fill_indices(std::vector<uint8_t>& bytes, IndexType type, int64_t rows, int64_t classes, bool in_range,
                  Stream& random, int64_t ignore_index) {
  const size_t width = static_cast<size_t>(bytes_of(type));
  bytes.assign(static_cast<size_t>(rows) * width, 0);
  for (int64_t row = 0; row < rows; ++row) {
    uint64_t y = random.next();
    if (in_range) {
      // What the dtype cannot hold wraps, and may be out of range: that is part of the game.
      y = random.next() % 8 == 0 ? static_cast<uint64_t>(ignore_index)
                                 : y % static_cast<uint64_t>(std::max<int64_t>(classes, 1));
    } else if (random.next() % 2) {
      static constexpr int64_t kEnds[] = {-1, 0, INT64_MAX, INT64_MIN, INT32_MAX, INT32_MIN, 255, 256};
      const uint64_t pick = random.next() % 10;
      y = pick < 8 ? static_cast<uint64_t>(kEnds[pick]) : static_cast<uint64_t>(classes) - (pick - 8);
    }
    std::memcpy(&bytes[static_cast<size_t>(row) * width], &y, width);
  }
}

bool near(double actual, double expected, double tolerance) {
  if (std::isnan(expected) || std::isnan(actual)) return std::isnan(expected) && std::isnan(actual);
  // Valgrind has no long double: what is expected is itself a sum in double.
  static const double slack = RUNNING_ON_VALGRIND ? 1e4 : 1;
  return std::fabs(actual - expected) <= slack * tolerance || actual == expected;
}

// In more digits than any kernel has.
using Exact = long double;

Exact log_sum_exp(Array& x, const Extent& e, int64_t o, int64_t i) {
  Exact m = -std::numeric_limits<Exact>::infinity(), sum = 0;
  for (int64_t c = 0; c < e.classes; ++c) m = std::max(m, static_cast<Exact>(x.get(o, c, i)));
  for (int64_t c = 0; c < e.classes; ++c) sum += std::exp(x.get(o, c, i) - m);
  return m + std::log(sum);
}

// Options of the rows, or none, and what they say in more digits.
struct Mapping {
  RowOptions options;
  Array scale, temperature, weight;
  bool per_row = false, wants_gradient = false;

  Mapping(Bytes& in, Stream& random, FloatType acc, int64_t rows, bool losses)
      : scale(acc, {1, rows, 1}, {0, 1, 0}, 0),
        temperature(acc, {1, rows, 1}, {0, 1, 0}, 0),
        weight(acc, {1, rows, 1}, {0, 1, 0}, 0) {
    for (int64_t row = 0; row < rows; ++row) {
      scale.set(row, 2.5 * random.unit() - 0.5);  // some are negative
      temperature.set(row, 0.5 + random.unit());
      weight.set(row, 2 * random.unit());
    }
    if (in.flip()) return;
    if (in.flip()) {
      per_row = in.flip();
      options.logit_scale = scale.data();
      options.logit_scale_stride = per_row ? 1 : 0;
      wants_gradient = in.flip();
    }
    if (in.below(3) == 0) {
      options.temperature = temperature.data();
      options.temperature_stride = 1;
    }
    if (in.below(3) == 0) options.scale = 1.5;
    if (in.below(3) == 0) options.sharpness = 0.75;
    if (in.below(3) == 0) options.softcap = 4;
    if (losses && in.below(3) == 0) options.z_loss = 0.01;
    if (losses && in.below(3) == 0) options.sample_weight = weight.data();
  }

  const RowOptions* pointer() const { return options.any() ? &options : nullptr; }
  Exact sharpness(int64_t row) { return options.sharpness / (options.temperature ? temperature.get(row) : Exact{1}); }
  Exact factor(int64_t row) { return options.scale * (options.logit_scale ? scale.get(per_row ? row : 0) : Exact{1}); }
  Exact z(Exact x, int64_t row) {
    const Exact cap = options.softcap, inner = factor(row) * x;
    if (cap == 0 && !options.map_logits()) return x;
    return sharpness(row) * (cap == 0 ? inner : cap * std::tanh(inner / cap));
  }
  // dz / dx, and by the row's logit_scale.
  Exact per_scale(Exact x, int64_t row) {
    const Exact cap = options.softcap;
    Exact slope = sharpness(row) * options.scale;
    if (cap != 0) slope /= std::pow(std::cosh(factor(row) * x / cap), 2);
    return slope;
  }
  Exact slope(Exact x, int64_t row) {
    return per_scale(x, row) * (options.logit_scale ? scale.get(per_row ? row : 0) : Exact{1});
  }
  Exact sample_weight(int64_t row) { return options.sample_weight ? weight.get(row) : Exact{1}; }

  Exact log_sum_exp(Array& x, const Extent& e, int64_t row) {
    Exact m = -std::numeric_limits<Exact>::infinity(), sum = 0;
    const auto at = [&](int64_t c) { return z(x.get(row / e.inner, c, row % e.inner), row); };
    for (int64_t c = 0; c < e.classes; ++c) m = std::max(m, at(c));
    for (int64_t c = 0; c < e.classes; ++c) sum += std::exp(at(c) - m);
    return m + std::log(sum);
  }
};

template <typename P, typename Kernel>
ChunkResult run(const P& p, const Chunks& chunks, Kernel kernel) {
  return sum_over_chunks(chunks, [&](int64_t chunk, ChunkResult& r) { kernel(p, chunks, chunk, r); });
}

std::string describe(const Problem& p, const char* capability, const char* what) {
  char text[256];
  std::snprintf(text, sizeof text, "%s: %s, type %d, %s, (%lld, %lld, %lld), values %d", what, capability,
                static_cast<int>(p.type), p.layout == Layout::kRows ? "rows" : "planes",
                static_cast<long long>(p.extent.outer), static_cast<long long>(p.extent.classes),
                static_cast<long long>(p.extent.inner), static_cast<int>(p.values));
  return text;
}

void expect(bool good, const Problem& p, const char* capability, const char* what, double actual = 0,
            double expected = 0) {
  if (good) return;
  char numbers[96];
  std::snprintf(numbers, sizeof numbers, ": %.17g, expected %.17g", actual, expected);
  fail(describe(p, capability, what) + numbers);
}

void fuzz_losses(Bytes& in, const Problem& p, const std::vector<CpuCapability>& all) {
  const Extent& e = p.extent;
  const FloatType acc = p.acc64 ? FloatType::kFloat64 : FloatType::kFloat32;
  const int type = static_cast<int>(p.type);
  const int64_t rows = e.rows();
  Stream random(in.word());
  Array logits(p.type, e, strides_of(in, p.layout, e, true), in.below(16));
  fill(logits, p.values, random, false, p.type);

  Targets t;
  static constexpr int64_t kIgnored[] = {-100, 0, 1, 255, -1, INT64_MIN, INT64_MAX, 1 << 20};
  t.ignore_index = kIgnored[in.below(8)];
  static constexpr double kSmoothing[] = {0, 0, 0.1, 1, 0.5};
  t.label_smoothing = kSmoothing[in.below(5)];
  t.zero_divisor = in.flip() ? 0 : 1;
  std::vector<uint8_t> indices;
  std::unique_ptr<Array> probabilities;
  if (in.below(3) == 0) {
    t.probabilities_are_acc = in.flip() && acc != p.type;
    const FloatType element = t.probabilities_are_acc ? acc : p.type;
    probabilities = std::make_unique<Array>(element, e, strides_of(in, p.layout, e, true), in.below(16));
    fill(*probabilities, p.values == Values::kWide ? Values::kTame : p.values, random, true, element);
    t.probabilities = probabilities->data();
    t.probability_strides = probabilities->strides();
  } else {
    t.index_type = static_cast<IndexType>(in.below(8));
    fill_indices(indices, t.index_type, rows, e.classes, p.in_range, random, t.ignore_index);
    t.index = indices.data();
  }
  Array weight(acc, {1, e.classes, 1}, {0, 1, 0}, 0);
  Array weight_sum(acc, {1, 1, 1}, {0, 1, 0}, 0);
  if (in.below(3) == 0) {
    fill(weight, p.values == Values::kWide ? Values::kTame : p.values, random, true, acc);
    double sum = 0;
    for (int64_t c = 0; c < e.classes; ++c) sum += weight.get(c);
    weight_sum.set(0, sum);
    t.weight = weight.data();
    t.weight_sum = weight_sum.data();
  }
  const bool in_place = in.flip(), stream = in.flip(), per_row = in.flip(), in_turns = in.flip();
  const bool row_loss_is_acc = in.flip() || acc == p.type;
  const Strides written = strides_of(in, p.layout, e, false);
  const int64_t shift = in.below(16);
  Mapping map(in, random, acc, rows, /*losses=*/true);
  const bool comparable =
      p.values == Values::kTame || (p.values == Values::kWide && !probabilities && !map.options.any());

  // The definition: coefficients a_c of -log softmax.
  const auto coefficient = [&](int64_t o, int64_t c, int64_t i, int64_t y) -> Exact {
    const Exact w = t.weight ? weight.get(c) : 1, smooth = Exact{t.label_smoothing} / static_cast<Exact>(e.classes);
    if (probabilities) return w * ((1 - t.label_smoothing) * probabilities->get(o, c, i) + smooth);
    return w * ((c == y ? 1 - t.label_smoothing : 0) + smooth);
  };
  int64_t first_bad = -1;
  double total_weight = 0;
  for (int64_t row = 0; row < rows && t.index; ++row) {
    const int64_t y = load_index(t.index, t.index_type, row);
    if (y == t.ignore_index) continue;
    if (!is_class(y, e.classes)) {
      if (first_bad < 0) first_bad = row;
    } else {
      total_weight += (t.weight ? weight.get(y) : 1) * static_cast<double>(map.sample_weight(row));
    }
  }

  for (const CpuCapability& capability : all) {
    Array row_loss(row_loss_is_acc ? acc : p.type, {1, rows, 1}, {0, 1, 0}, 0);
    Array stats(acc, {1, 2 * rows, 1}, {0, 1, 0}, 0);
    CrossEntropyForward f;
    f.extent = e;
    f.layout = p.layout;
    f.logits = logits.data();
    f.logits_strides = logits.strides();
    f.targets = t;
    f.row_loss = per_row ? row_loss.data() : nullptr;
    f.row_loss_is_acc = row_loss_is_acc;
    f.row_stats = stats.data();
    f.options = map.pointer();
    if (rows == 0 || (probabilities && e.classes == 0)) continue;  // the operators answer without a kernel
    const ChunkResult total = run_cross_entropy_forward(*capability.kernels, f, type);
    if (t.index)
      expect(total.bad_target == first_bad, p, capability.name.c_str(), "first target out of range",
             static_cast<double>(total.bad_target), static_cast<double>(first_bad));
    if (t.index && first_bad >= 0) continue;  // the operators raise
    Exact sum = 0, scale = 0;
    for (int64_t row = 0; row < rows && comparable && e.classes > 0; ++row) {
      const int64_t o = row / e.inner, i = row % e.inner, y = t.index ? load_index(t.index, t.index_type, row) : -1;
      if (t.index && y == t.ignore_index) {
        if (per_row)
          expect(row_loss.get(row) == 0, p, capability.name.c_str(), "loss of an ignored row", row_loss.get(row), 0);
        continue;
      }
      const Exact lse = map.log_sum_exp(logits, e, row), square = map.options.z_loss * lse * lse;
      Exact exact_loss = square, size = 2 * square;
      for (int64_t c = 0; c < e.classes; ++c) {
        const Exact a = coefficient(o, c, i, y), l = lse - map.z(logits.get(o, c, i), row);
        exact_loss += a * l;
        size += std::fabs(a) * (std::fabs(l) + std::fabs(lse));
      }
      exact_loss *= map.sample_weight(row);
      size *= map.sample_weight(row);
      const auto loss = static_cast<double>(exact_loss);
      sum += loss;
      scale += size;
      const double tolerance = 64 * epsilon_of(acc) * static_cast<double>(1 + size) +
                               2 * epsilon_of(row_loss_is_acc ? acc : p.type) * std::fabs(loss);
      if (per_row && std::fabs(loss) < 6e4) {
        expect(near(row_loss.get(row), loss, tolerance), p, capability.name.c_str(), "loss of a row", row_loss.get(row),
               loss);
      }
    }
    if (comparable) {
      expect(near(total.loss, static_cast<double>(sum), 64 * epsilon_of(acc) * static_cast<double>(1 + scale)), p,
             capability.name.c_str(), "sum of losses", total.loss, static_cast<double>(sum));
      if (t.index) {
        expect(near(total.weight, total_weight, 1e-6 * (1 + total_weight)), p, capability.name.c_str(),
               "sum of weights", total.weight, total_weight);
      }
    }

    // Backward, or both passes in turns for each chunk (value_and_grad); over the logits, or into an array of its own
    // with other gaps.
    const bool over_logits = in_place && logits.has_apart_elements(), both = in_turns && !per_row;
    Array copy(p.type, e, logits.strides(), 3), gradient(p.type, e, written, shift);
    if (over_logits) copy.copy_from(logits);
    Array& result = over_logits ? copy : gradient;
    Array incoming(acc, {1, per_row ? rows : 1, 1}, {0, 1, 0}, 0);
    for (int64_t i = 0; i < incoming.size(); ++i) incoming.set(i, 2 * random.unit() - 1);
    Array divisor(acc, {1, 1, 1}, {0, 1, 0}, 0);
    divisor.set(0, 7);
    f.logits = over_logits ? copy.data() : logits.data();
    CrossEntropyBackward b;
    b.extent = e;
    b.layout = p.layout;
    b.logits = f.logits;
    b.logits_strides = logits.strides();
    b.targets = t;
    b.row_stats = stats.data();
    b.grad_output = incoming.data();
    b.grad_output_stride = per_row ? 1 : 0;
    b.total_weight = per_row ? nullptr : divisor.data();
    b.grad_logits = result.data();
    b.grad_strides = result.strides();
    b.options = map.pointer();
    Chunks chunks(e, p.layout, t.index != nullptr);
    chunks.stream = stream && !over_logits;
    std::vector<double> by_scale(static_cast<size_t>(rows * chunks.segments));
    const bool scale_gradient = map.wants_gradient && !both;
    if (scale_gradient && map.per_row) b.grad_logit_scale = by_scale.data();
    b.scale_gradient = scale_gradient;
    double of_scale = 0;
    Exact exact_of_scale = 0, size_of_scale = 1;
    if (both) {
      const ChunkResult again = run_cross_entropy_value_and_grad(*capability.kernels, f, b, chunks, type);
      expect(near(again.loss, total.loss, 0), p, capability.name.c_str(), "sum of losses, value and gradient",
             again.loss, total.loss);
    } else {
      of_scale = run(b, chunks, capability.kernels->cross_entropy_backward[type]).scale_gradient;
    }
    result.check_gaps("gradient");
    for (int64_t row = 0; row < rows && comparable && p.values == Values::kTame && e.classes > 0; ++row) {
      const int64_t o = row / e.inner, i = row % e.inner, y = t.index ? load_index(t.index, t.index_type, row) : -1;
      const bool ignored = t.index && y == t.ignore_index;
      const Exact lse = map.log_sum_exp(logits, e, row);
      const Exact g = map.sample_weight(row) * incoming.get(per_row ? row : 0) / (per_row ? Exact{1} : Exact{7});
      Exact mass = 0, of_row = 0, size_of_row = 1;
      for (int64_t c = 0; c < e.classes; ++c) mass += coefficient(o, c, i, y);
      const Exact with_square = mass + 2 * map.options.z_loss * lse;
      for (int64_t c = 0; c < e.classes; ++c) {
        const Exact x = logits.get(o, c, i);
        const Exact of_z = ignored ? 0 : g * (with_square * std::exp(map.z(x, row) - lse) - coefficient(o, c, i, y));
        of_row += of_z * map.per_scale(x, row) * x;
        size_of_row += (1 + mass) * std::fabs(map.per_scale(x, row) * x);
        const auto expected = static_cast<double>(of_z * map.slope(x, row));
        const double actual = result.get(o, c, i);
        const double tolerance =
            64 * epsilon_of(acc) * static_cast<double>(1 + mass) * (1 + std::fabs(static_cast<double>(lse))) *
                (1 + std::fabs(static_cast<double>(map.slope(x, row)))) +
            2 * epsilon_of(p.type) * std::fabs(expected) + (p.type == FloatType::kFloat16 ? 0x1p-24 : 0);
        expect(near(actual, expected, tolerance), p, capability.name.c_str(), "gradient", actual, expected);
      }
      exact_of_scale += of_row;
      size_of_scale += size_of_row;
      if (!scale_gradient || !map.per_row) continue;
      double found = 0;
      for (int64_t part = 0; part < chunks.segments; ++part) {
        found += by_scale[static_cast<size_t>(row * chunks.segments + part)];
      }
      expect(near(found, static_cast<double>(of_row), 64 * epsilon_of(acc) * static_cast<double>(size_of_row)), p,
             capability.name.c_str(), "gradient of a row's scale", found, static_cast<double>(of_row));
    }
    if (scale_gradient && comparable && p.values == Values::kTame && e.classes > 0) {
      expect(near(of_scale, static_cast<double>(exact_of_scale),
                  64 * epsilon_of(acc) * static_cast<double>(size_of_scale)),
             p, capability.name.c_str(), "gradient of the scale", of_scale, static_cast<double>(exact_of_scale));
    }
  }
}

void fuzz_nll_loss(Bytes& in, const Problem& p, const std::vector<CpuCapability>& all) {
  const Extent& e = p.extent;
  const FloatType acc = p.acc64 ? FloatType::kFloat64 : FloatType::kFloat32;
  const int type = static_cast<int>(p.type);
  const int64_t rows = e.rows();
  if (rows == 0) return;
  Stream random(in.word());
  Array log_probs(p.type, e, strides_of(in, p.layout, e, true), in.below(16));
  fill(log_probs, p.values, random, false, p.type);
  Targets t;
  t.ignore_index = in.flip() ? -100 : 1;
  t.index_type = static_cast<IndexType>(in.below(8));
  std::vector<uint8_t> indices;
  fill_indices(indices, t.index_type, rows, e.classes, p.in_range, random, t.ignore_index);
  t.index = indices.data();
  Array weight(acc, {1, e.classes, 1}, {0, 1, 0}, 0);
  if (in.flip()) {
    fill(weight, Values::kTame, random, true, acc);
    t.weight = weight.data();
  }
  const Strides written = strides_of(in, p.layout, e, false);
  const int64_t shift = in.below(16);
  const bool stream = in.flip(), per_row = in.flip();
  for (const CpuCapability& capability : all) {
    Array row_loss(acc, {1, rows, 1}, {0, 1, 0}, 0);
    NllLossForward f;
    f.extent = e;
    f.log_probs = log_probs.data();
    f.strides = log_probs.strides();
    f.targets = t;
    f.row_loss = row_loss.data();
    f.row_loss_is_acc = true;
    Extent gathered = e;
    gathered.classes = std::min<int64_t>(e.classes, 128);
    const ChunkResult total = run(f, Chunks(gathered, Layout::kRows), capability.kernels->nll_loss_forward[type]);
    if (total.bad_target >= 0) continue;
    for (int64_t row = 0; row < rows && p.values != Values::kBits && p.values != Values::kSpecial; ++row) {
      const int64_t y = load_index(t.index, t.index_type, row);
      const double expected =
          y == t.ignore_index ? 0 : -(t.weight ? weight.get(y) : 1) * log_probs.get(row / e.inner, y, row % e.inner);
      expect(near(row_loss.get(row), expected, 4 * epsilon_of(acc) * std::fabs(expected)), p, capability.name.c_str(),
             "nll_loss of a row", row_loss.get(row), expected);
    }
    Array gradient(p.type, e, written, shift);
    Array incoming(acc, {1, per_row ? rows : 1, 1}, {0, 1, 0}, 0);
    for (int64_t i = 0; i < incoming.size(); ++i) incoming.set(i, random.unit());
    NllLossBackward b;
    b.extent = e;
    b.layout = p.layout;
    b.targets = t;
    b.grad_output = incoming.data();
    b.grad_output_stride = per_row ? 1 : 0;
    b.grad_log_probs = gradient.data();
    b.grad_strides = written;
    Chunks chunks(e, p.layout);
    chunks.stream = stream;
    run(b, chunks, capability.kernels->nll_loss_backward[type]);
    gradient.check_gaps("gradient of nll_loss");
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t y = load_index(t.index, t.index_type, row);
      for (int64_t c = 0; c < e.classes; ++c) {
        const double expected =
            c == y && y != t.ignore_index ? -incoming.get(per_row ? row : 0) * (t.weight ? weight.get(y) : 1) : 0;
        const double actual = gradient.get(row / e.inner, c, row % e.inner);
        expect(near(actual, expected, 2 * epsilon_of(p.type) * std::fabs(expected) + 0x1p-24), p,
               capability.name.c_str(), "gradient of nll_loss", actual, expected);
      }
    }
  }
}

void fuzz_softmax_statistics(Bytes& in, const Problem& p, const std::vector<CpuCapability>& all) {
  const Extent& e = p.extent;
  if (p.size() == 0) return;
  const FloatType acc = p.acc64 ? FloatType::kFloat64 : FloatType::kFloat32;
  const int type = static_cast<int>(p.type);
  const int64_t rows = e.rows();
  Stream random(in.word());
  Array logits(p.type, e, strides_of(in, p.layout, e, true), in.below(16));
  fill(logits, p.values, random, false, p.type);
  Targets t;
  t.ignore_index = in.flip() ? -100 : 1;
  t.index_type = static_cast<IndexType>(in.below(8));
  std::vector<uint8_t> indices;
  fill_indices(indices, t.index_type, rows, e.classes, p.in_range, random, t.ignore_index);
  if (in.below(4) != 0) t.index = indices.data();
  const bool with_entropy = in.flip(), with_prediction = in.flip(), stream = in.flip();
  const int64_t grads = in.below(8), shift = in.below(16);
  const Strides written = strides_of(in, p.layout, e, false);
  Mapping map(in, random, acc, rows, /*losses=*/false);
  const Extent numbers{1, rows, 1};
  const Strides one_each{0, 1, 0};
  for (const CpuCapability& capability : all) {
    const char* name = capability.name.c_str();
    Array log_prob(acc, numbers, one_each, 0), logsumexp(acc, numbers, one_each, 0), entropy(acc, numbers, one_each, 0),
        stats(acc, {1, 3 * rows, 1}, one_each, 0);
    std::vector<int64_t> prediction(static_cast<size_t>(rows), -7);
    SoftmaxStatisticsForward f;
    f.extent = e;
    f.layout = p.layout;
    f.logits = logits.data();
    f.logits_strides = logits.strides();
    f.targets = t;
    if (t.index) f.log_prob = log_prob.data();
    f.logsumexp = logsumexp.data();
    if (with_entropy) f.entropy = entropy.data();
    if (with_prediction) f.prediction = prediction.data();
    f.row_stats = stats.data();
    f.options = map.pointer();
    const ChunkResult total = run_softmax_statistics_forward(*capability.kernels, f, type);
    if (total.bad_target >= 0) continue;  // the operator raises

    Array of_log_prob(acc, numbers, one_each, 0), of_logsumexp(acc, numbers, one_each, 0),
        of_entropy(acc, numbers, one_each, 0), gradient(p.type, e, written, shift);
    for (int64_t row = 0; row < rows; ++row) {
      of_log_prob.set(row, 2 * random.unit() - 1);
      of_logsumexp.set(row, 2 * random.unit() - 1);
      of_entropy.set(row, 2 * random.unit() - 1);
    }
    SoftmaxStatisticsBackward b;
    b.extent = e;
    b.layout = p.layout;
    b.logits = logits.data();
    b.logits_strides = logits.strides();
    b.targets = t;
    b.row_stats = stats.data();
    if (t.index && (grads & 1)) b.grad_log_prob = of_log_prob.data();
    if (grads & 2) b.grad_logsumexp = of_logsumexp.data();
    if (grads & 4) b.grad_entropy = of_entropy.data();
    b.grad_logits = gradient.data();
    b.grad_strides = written;
    b.options = map.pointer();
    b.scale_gradient = map.wants_gradient;
    Chunks chunks(e, p.layout, /*split_rows=*/true);
    chunks.stream = stream;
    const double of_scale = run(b, chunks, capability.kernels->softmax_statistics_backward[type]).scale_gradient;
    Exact exact_of_scale = 0, size_of_scale = 1;
    gradient.check_gaps("gradient of softmax_statistics");

    for (int64_t row = 0; row < rows; ++row) {
      const int64_t o = row / e.inner, i = row % e.inner, y = t.index ? load_index(t.index, t.index_type, row) : -1;
      const bool ignored = t.index && y == t.ignore_index;
      if (with_prediction) {
        // As torch.argmax has it: the first of the largest, and NaN is the largest.
        int64_t largest = ignored ? -1 : 0;
        for (int64_t c = 1; c < e.classes && !ignored; ++c) {
          const double best = logits.get(o, largest, i), x = logits.get(o, c, i);
          if (!std::isnan(best) && (std::isnan(x) || x > best)) largest = c;
        }
        // What a map rounds to the same number is not known here.
        expect(map.options.map_logits() || prediction[static_cast<size_t>(row)] == largest, p, name, "prediction",
               static_cast<double>(prediction[static_cast<size_t>(row)]), static_cast<double>(largest));
      }
      if (ignored) {
        expect(logsumexp.get(row) == 0, p, name, "logsumexp of an ignored row", logsumexp.get(row), 0);
        for (int64_t c = 0; c < e.classes; ++c) {
          expect(gradient.get(o, c, i) == 0, p, name, "gradient of an ignored row", gradient.get(o, c, i), 0);
        }
        continue;
      }
      if (p.values != Values::kTame) continue;
      const Exact lse = map.log_sum_exp(logits, e, row);
      Exact exact_entropy = 0;
      for (int64_t c = 0; c < e.classes; ++c) {
        const Exact l = map.z(logits.get(o, c, i), row) - lse;
        exact_entropy -= std::exp(l) * l;
      }
      const double tolerance = 64 * epsilon_of(acc) * (1 + std::fabs(static_cast<double>(lse)) + 16);
      expect(near(logsumexp.get(row), static_cast<double>(lse), tolerance), p, name, "logsumexp", logsumexp.get(row),
             static_cast<double>(lse));
      if (with_entropy) {
        expect(near(entropy.get(row), static_cast<double>(exact_entropy), tolerance), p, name, "entropy",
               entropy.get(row), static_cast<double>(exact_entropy));
      }
      if (t.index) {
        const auto expected = static_cast<double>(map.z(logits.get(o, y, i), row) - lse);
        expect(near(log_prob.get(row), expected, tolerance), p, name, "log_prob", log_prob.get(row), expected);
      }
      const double g_y = b.grad_log_prob ? of_log_prob.get(row) : 0,
                   g_lse = b.grad_logsumexp ? of_logsumexp.get(row) : 0,
                   g_entropy = b.grad_entropy ? of_entropy.get(row) : 0;
      for (int64_t c = 0; c < e.classes; ++c) {
        const Exact x = logits.get(o, c, i), l = map.z(x, row) - lse;
        const Exact of_z = std::exp(l) * (g_lse - g_y - g_entropy * (l + exact_entropy)) + (c == y ? g_y : 0);
        const auto expected = static_cast<double>(of_z * map.slope(x, row));
        exact_of_scale += of_z * map.per_scale(x, row) * x;
        size_of_scale += std::fabs(map.per_scale(x, row) * x) * (1 + std::fabs(lse));
        expect(near(gradient.get(o, c, i), expected,
                    tolerance * (1 + std::fabs(static_cast<double>(map.slope(x, row)))) +
                        2 * epsilon_of(p.type) * std::fabs(expected) + (p.type == FloatType::kFloat16 ? 0x1p-24 : 0)),
               p, name, "gradient of softmax_statistics", gradient.get(o, c, i), expected);
      }
    }
    if (map.wants_gradient && p.values == Values::kTame) {
      expect(near(of_scale, static_cast<double>(exact_of_scale),
                  64 * epsilon_of(acc) * static_cast<double>(size_of_scale)),
             p, name, "gradient of the scale, statistics", of_scale, static_cast<double>(exact_of_scale));
    }
  }
}

void fuzz_log_softmax(Bytes& in, const Problem& p, const std::vector<CpuCapability>& all) {
  const Extent& e = p.extent;
  if (p.size() == 0) return;
  const int type = static_cast<int>(p.type);
  const FloatType acc = p.acc64 ? FloatType::kFloat64 : FloatType::kFloat32;
  Stream random(in.word());
  Array x(p.type, e, strides_of(in, p.layout, e, true), in.below(16));
  Array incoming(p.type, e, strides_of(in, p.layout, e, true), in.below(16));
  fill(x, p.values, random, false, p.type);
  fill(incoming, p.values, random, false, p.type);
  const Strides written = strides_of(in, p.layout, e, false), written_back = strides_of(in, p.layout, e, false);
  const int64_t shift = in.below(16);
  const bool stream = in.flip();
  for (const CpuCapability& capability : all) {
    Array y(p.type, e, written, shift), gradient(p.type, e, written_back, shift);
    Chunks chunks(e, p.layout);
    chunks.stream = stream;
    const LogSoftmaxForward f{e, p.layout, x.data(), x.strides(), y.data(), written};
    for_each_chunk(chunks, [&](int64_t chunk) { capability.kernels->log_softmax_forward[type](f, chunks, chunk); });
    y.check_gaps("log_softmax");
    const LogSoftmaxBackward b{e,        p.layout, incoming.data(), incoming.strides(),
                               y.data(), written,  gradient.data(), written_back};
    for_each_chunk(chunks, [&](int64_t chunk) { capability.kernels->log_softmax_backward[type](b, chunks, chunk); });
    gradient.check_gaps("gradient of log_softmax");
    if (p.values != Values::kTame) continue;
    for (int64_t row = 0; row < e.rows(); ++row) {
      const int64_t o = row / e.inner, i = row % e.inner;
      const Exact lse = log_sum_exp(x, e, o, i);
      double sum = 0, size = 0;
      for (int64_t c = 0; c < e.classes; ++c) {
        const auto expected = static_cast<double>(x.get(o, c, i) - lse);
        const double actual = y.get(o, c, i);
        expect(near(actual, expected,
                    64 * epsilon_of(acc) * (1 + std::fabs(expected)) + epsilon_of(p.type) * std::fabs(expected)),
               p, capability.name.c_str(), "log_softmax", actual, expected);
        sum += incoming.get(o, c, i);
        size += std::fabs(incoming.get(o, c, i));
      }
      for (int64_t c = 0; c < e.classes; ++c) {
        const double softmax = std::exp(y.get(o, c, i)), g = incoming.get(o, c, i), expected = g - softmax * sum;
        const double tolerance = 64 * epsilon_of(acc) * (1 + std::fabs(g) + softmax * size) +
                                 2 * epsilon_of(p.type) * (std::fabs(expected)) + 0x1p-20;
        expect(near(gradient.get(o, c, i), expected, tolerance), p, capability.name.c_str(), "gradient of log_softmax",
               gradient.get(o, c, i), expected);
      }
    }
  }
}

// An array as elements, in an order of the fuzzer's: (inner, classes, outer), the first one innermost, or the reverse.
ElementStrides element_strides(const Elements& elements, const Strides& s, bool reversed) {
  ElementStrides strides{{s.inner, s.classes, s.outer}, true};
  if (reversed) std::swap(strides.of[0], strides.of[2]);
  int64_t stride = 1;
  for (int d = 0; d < elements.dims; ++d) {
    if (elements.sizes[d] != 1 && strides.of[d] != stride) strides.adjacent = false;
    stride *= elements.sizes[d];
  }
  return strides;
}

void fuzz_mse_loss(Bytes& in, const Problem& p, const std::vector<CpuCapability>& all) {
  const Extent& e = p.extent;
  if (p.size() == 0) return;
  const int type = static_cast<int>(p.type);
  const FloatType acc = p.acc64 ? FloatType::kFloat64 : FloatType::kFloat32;
  Stream random(in.word());
  const bool reversed = in.below(4) == 0;
  Elements elements{p.size(), 3, {e.inner, e.classes, e.outer}};
  if (reversed) std::swap(elements.sizes[0], elements.sizes[2]);
  const auto strides = [&](const Array& a) { return element_strides(elements, a.strides(), reversed); };
  const auto read = [&](FloatType of) {
    auto array = std::make_unique<Array>(of, e, strides_of(in, in.flip() ? Layout::kRows : Layout::kPlanes, e, true),
                                         in.below(16));
    fill(*array, p.values, random, false, of);
    return array;
  };
  const FloatType of_weight = in.flip() ? acc : p.type, of_incoming = in.flip() ? acc : p.type;
  const auto x = read(p.type), t = read(p.type), weight = read(of_weight), incoming = read(of_incoming);
  const bool weighted = in.flip(), per_element = in.flip(), loss_is_acc = in.flip(), stream = in.flip();
  const bool one_incoming = in.flip(), divided = in.flip();
  const Strides written[3] = {strides_of(in, p.layout, e, false), strides_of(in, p.layout, e, false),
                              strides_of(in, p.layout, e, false)};
  const int64_t shift = in.below(16);
  Array divisor(acc, {1, 1, 1}, {0, 1, 0}, 0);
  divisor.set(0, 7);
  Chunks chunks(elements);
  chunks.stream = stream;
  for (const CpuCapability& capability : all) {
    Array loss(loss_is_acc ? acc : p.type, e, written[0], shift);
    ElementwiseForward f;
    f.elements = elements;
    f.input = x->data();
    f.input_strides = strides(*x);
    f.target = t->data();
    f.target_strides = strides(*t);
    f.weight = weighted ? weight->data() : nullptr;
    f.weight_is_acc = of_weight == acc;
    f.weight_strides = strides(*weight);
    f.loss = per_element ? loss.data() : nullptr;
    f.loss_is_acc = loss_is_acc;
    f.loss_strides = strides(loss);
    const ChunkResult total = run(f, chunks, capability.kernels->mse_loss_forward[type]);
    loss.check_gaps("mse_loss");
    Array grad_input(p.type, e, written[1], shift), grad_target(p.type, e, written[2], shift);
    ElementwiseBackward b;
    b.elements = elements;
    b.input = f.input;
    b.input_strides = f.input_strides;
    b.target = f.target;
    b.target_strides = f.target_strides;
    b.weight = f.weight;
    b.weight_is_acc = f.weight_is_acc;
    b.weight_strides = f.weight_strides;
    b.grad_output = incoming->data();
    b.grad_output_is_acc = of_incoming == acc;
    b.one_grad_output = one_incoming;
    b.grad_output_strides = strides(*incoming);
    b.total_weight = one_incoming && divided ? divisor.data() : nullptr;
    b.grad_input = grad_input.data();
    b.grad_input_strides = strides(grad_input);
    b.grad_target = grad_target.data();
    b.grad_target_strides = strides(grad_target);
    for_each_chunk(chunks, [&](int64_t chunk) { capability.kernels->mse_loss_backward[type](b, chunks, chunk); });
    grad_input.check_gaps("gradient of mse_loss");
    grad_target.check_gaps("gradient of mse_loss");
    if (p.values != Values::kTame) continue;
    double sum = 0, size = 0, total_weight = 0, weight_size = 0;
    for (int64_t o = 0; o < e.outer; ++o) {
      for (int64_t c = 0; c < e.classes; ++c) {
        for (int64_t i = 0; i < e.inner; ++i) {
          const double w = weighted ? weight->get(o, c, i) : 1, d = x->get(o, c, i) - t->get(o, c, i);
          const double square = w * d * d,
                       g = one_incoming ? incoming->get(0) / (divided ? 7 : 1) : incoming->get(o, c, i);
          const double gradient = 2 * g * w * d, least = p.type == FloatType::kFloat16 ? 0x1p-24 : 1e-37;
          sum += square;
          size += std::fabs(square);
          total_weight += w;
          weight_size += std::fabs(w);
          const auto tolerance = [&](double value, FloatType rounded) {
            return (8 * epsilon_of(acc) + epsilon_of(rounded)) * std::fabs(value) + least;
          };
          if (per_element && std::fabs(square) < 6e4) {
            expect(near(loss.get(o, c, i), square, tolerance(square, loss_is_acc ? acc : p.type)), p,
                   capability.name.c_str(), "mse_loss of an element", loss.get(o, c, i), square);
          }
          if (std::fabs(gradient) > 6e4) continue;
          expect(near(grad_input.get(o, c, i), gradient, tolerance(gradient, p.type)), p, capability.name.c_str(),
                 "gradient of mse_loss", grad_input.get(o, c, i), gradient);
          expect(grad_target.get(o, c, i) == -grad_input.get(o, c, i), p, capability.name.c_str(),
                 "gradient of the target", grad_target.get(o, c, i), -gradient);
        }
      }
    }
    const double ulps = acc == FloatType::kFloat64 ? 64 : 8;
    if (!per_element) {
      expect(near(total.loss, sum, ulps * epsilon_of(acc) * size), p, capability.name.c_str(), "sum of mse_loss",
             total.loss, sum);
    }
    expect(near(total.weight, total_weight, 64 * 0x1p-52 * weight_size), p, capability.name.c_str(), "sum of weights",
           total.weight, total_weight);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<CpuCapability> all = runnable_cpu_capabilities();
  Bytes in(data, size);
  const Problem p = decode(in);
  switch (in.below(6)) {
    case 0:
      fuzz_nll_loss(in, p, all);
      break;
    case 2:
      fuzz_mse_loss(in, p, all);
      break;
    case 1:
      fuzz_log_softmax(in, p, all);
      break;
    case 3:
      fuzz_softmax_statistics(in, p, all);
      break;
    default:
      fuzz_losses(in, p, all);
  }
  return 0;
}

#ifdef NLLX_STANDALONE
#include <chrono>

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const auto start = std::chrono::steady_clock::now();
  uint64_t runs = 0;
  for (;; ++runs) {
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds) break;
    Stream random(seed * 1000003 + runs);
    uint8_t bytes[128];
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(random.next() >> 32);
    this_run = runs;
    this_seed = seed;
    LLVMFuzzerTestOneInput(bytes, sizeof bytes);
  }
  std::string names;
  for (const CpuCapability& capability : runnable_cpu_capabilities()) names += " " + capability.name;
  std::printf("%llu problems, seed %llu, capabilities:%s\n", static_cast<unsigned long long>(runs),
              static_cast<unsigned long long>(seed), names.c_str());
  return 0;
}
#endif
