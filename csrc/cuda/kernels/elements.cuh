// Element types and 16-byte access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <string.h>

#include <type_traits>

#include "../../online_softmax.h"
#include "cuda_launch.h"
#include "launches.h"

namespace nllx {

__device__ __forceinline__ float to_acc(float v) { return v; }
__device__ __forceinline__ double to_acc(double v) { return v; }
__device__ __forceinline__ float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_acc(__half v) { return __half2float(v); }

template <typename T>
struct FromAcc {
  static __device__ __forceinline__ T convert(T v) { return v; }
};
template <>
struct FromAcc<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 convert(float v) { return __float2bfloat16(v); }
};
template <>
struct FromAcc<__half> {
  static __device__ __forceinline__ __half convert(float v) { return __float2half(v); }
};
template <typename T, typename acc>
__device__ __forceinline__ T from_acc(acc v) {
  return FromAcc<T>::convert(v);
}

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }  // not the NaN of two
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// Two half elements in a word: packed, the larger of each, and one of them. Written so that nvcc makes one instruction
// of each.
template <typename T>
__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
  uint32_t word = 0;
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
    return word;
  } else if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
    return word;
  }
#endif
  if constexpr (sizeof(T) == 2) {
    const T halves[2] = {from_acc<T>(low), from_acc<T>(high)};
    memcpy(&word, halves, 4);
  }
  return word;
}
__device__ __forceinline__ float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
__device__ __forceinline__ uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
template <typename T>
__device__ __forceinline__ float half_of(uint32_t word, int i) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return float_of_bits(i == 0 ? word << 16 : word & 0xffff0000u);
  } else if constexpr (sizeof(T) == 2) {
    const uint16_t bits = static_cast<uint16_t>(i == 0 ? word : word >> 16);
    T half;
    memcpy(&half, &bits, 2);
    return to_acc(half);
  }
  return 0;
}
template <typename T>
__device__ __forceinline__ uint32_t larger_halves(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Pair x, y;
  memcpy(&x, &a, 4);
  memcpy(&y, &b, 4);
  x = __hmax2(x, y);
  uint32_t word;
  memcpy(&word, &x, 4);
  return word;
#else
  const auto of = [&](int i) { return larger(half_of<T>(a, i), half_of<T>(b, i)); };
  return pack_halves<T>(of(0), of(1));
#endif
}
// The same of words of elements of any type of up to 32 bits.
template <typename T>
__device__ __forceinline__ float of_word(uint32_t word, int i) {
  return sizeof(T) == 4 ? float_of_bits(word) : half_of<T>(word, i);
}
template <typename T, typename Value>
__device__ __forceinline__ uint32_t word_of(Value value) {
  if constexpr (sizeof(T) == 2) return pack_halves<T>(value(0), value(1));
  return bits_of_float(value(0));
}
template <typename T>
__device__ __forceinline__ uint32_t larger_word(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 2) return larger_halves<T>(a, b);
  return bits_of_float(larger(float_of_bits(a), float_of_bits(b)));
}
template <typename T>
constexpr uint32_t kMinusInfinityWord = 0xff800000u;  // float
template <>
inline constexpr uint32_t kMinusInfinityWord<double> = 0xfff00000u;  // the upper word
template <>
inline constexpr uint32_t kMinusInfinityWord<__nv_bfloat16> = 0xff80ff80u;
template <>
inline constexpr uint32_t kMinusInfinityWord<__half> = 0xfc00fc00u;

// exp of a number that is not positive, where a sum or a gradient needs many: by the hardware's power of two, which
// errs by two units in the last place, after x log2 e, which is off by 7e-8 |x|: nothing in a sum that has a one in it,
// some fifty units in the gradient of a class next to the smallest probability. expf errs by one, and takes three times
// the instructions, which kernels that are to run as fast as memory do not have.
__device__ __forceinline__ float exp_of_many(float x) { return exp2_approximate(x * 1.44269504f); }
__device__ __forceinline__ double exp_of_many(double x) { return exp(x); }

// How many blocks of a kernel share a multiprocessor, which bounds the registers of a thread: for half types, float32
// and float64.
template <typename T>
constexpr int resident(int half, int single, int twice) {
  return sizeof(T) == 2 ? half : sizeof(T) == 4 ? single : twice;
}

// Of the forward that streams rows: ptxas takes more registers for other architectures than Hopper, and for half types
// more for Turing, which converts them in more steps, and from Blackwell on, where two blocks have loads enough on
// their way, as they run ahead.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kSingleBlocks = 3;
#else
constexpr int kSingleBlocks = 4;
#endif
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1000)
constexpr int kHalfBlocks = 2;
#else
constexpr int kHalfBlocks = 3;
#endif

// 16 bytes of elements, moved by one instruction and kept as they came: as 32-bit words, not as elements, since two
// half elements would take two registers. Elements are unpacked where they are used.
template <typename T>
struct alignas(16) Vector {
  using acc = typename AccOf<T>::type;
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  uint32_t words[4];

  static __device__ __forceinline__ Vector load(const void* p) {
    const uint4 bits = *static_cast<const uint4*>(p);
    return {{bits.x, bits.y, bits.z, bits.w}};
  }
  __device__ __forceinline__ void store(void* p) const {
    store_bytes(p, uint4{words[0], words[1], words[2], words[3]});
  }

  // Element i, as it is.
  __device__ __forceinline__ T element(int i) const {
    T value;
    memcpy(&value, reinterpret_cast<const char*>(words) + i * sizeof(T), sizeof(T));
    return value;
  }
  __device__ __forceinline__ void set_element(int i, T value) {
    memcpy(reinterpret_cast<char*>(words) + i * sizeof(T), &value, sizeof(T));
  }
  __device__ __forceinline__ acc operator[](int i) const { return unpack(words, i, static_cast<T*>(nullptr)); }

  // The vector of value(0), value(1), ..., rounded.
  template <typename Value>
  static __device__ __forceinline__ Vector of(Value value) {
    Vector v;
    if (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < kSize; i += 2)
        v.words[i / 2] = pack_halves<T>(static_cast<float>(value(i)), static_cast<float>(value(i + 1)));
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) v.set_element(i, from_acc<T>(static_cast<acc>(value(i))));
    }
    return v;
  }
  static __device__ __forceinline__ Vector minus_infinities() {
    constexpr uint32_t kWord = kMinusInfinityWord<T>;
    return {{sizeof(T) == 8 ? 0 : kWord, kWord, sizeof(T) == 8 ? 0 : kWord, kWord}};
  }

 private:
  static __device__ __forceinline__ float unpack(const uint32_t* w, int i, float*) { return float_of_bits(w[i]); }
  template <typename Half>
  static __device__ __forceinline__ float unpack(const uint32_t* w, int i, Half*) {
    return half_of<Half>(w[i / 2], i % 2);
  }
  static __device__ __forceinline__ double unpack(const uint32_t* w, int i, double*) {
    double d;
    memcpy(&d, w + 2 * i, 8);
    return d;
  }
};

// The largest element, not NaN if there is a number.
template <typename T>
__device__ __forceinline__ typename AccOf<T>::type largest_of(const Vector<T>& v) {
  typename AccOf<T>::type m = v[0];
#pragma unroll
  for (int i = 1; i < Vector<T>::kSize; ++i) m = larger(m, v[i]);
  return m;
}
// Of two vectors element by element; half types in pairs, before they are converted.
template <typename T>
__device__ __forceinline__ Vector<T> larger(const Vector<T>& a, const Vector<T>& b) {
  Vector<T> m;
  if (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) m.words[i] = larger_halves<T>(a.words[i], b.words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i)
      m.set_element(i, from_acc<T>(static_cast<typename AccOf<T>::type>(larger(a[i], b[i]))));
  }
  return m;
}

template <typename T>
__device__ __forceinline__ T minus_infinity_of() {
  return from_acc<T>(-static_cast<typename AccOf<T>::type>(__builtin_inff()));
}

// Elements by which `p` lies past a 16-byte boundary.
template <typename T>
__device__ __forceinline__ int elements_past_boundary(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// The elements [c, c + kSize) of a row of n, which lie at a 16-byte boundary: -inf where the row has none. No memory
// outside of the row is read. Index: int where it is enough, which takes half of the registers.
template <typename T, typename Index>
__device__ __forceinline__ Vector<T> load_vector(const T* row, Index c, Index n) {
  if (c >= 0 && c + Vector<T>::kSize <= n) return Vector<T>::load(row + c);
  Vector<T> v = Vector<T>::minus_infinities();
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    if (c + i >= 0 && c + i < n) v.set_element(i, row[c + i]);
  }
  return v;
}

// The reverse; `aligned`: the elements lie at a 16-byte boundary.
template <typename T, typename Index>
__device__ __forceinline__ void store_vector(T* row, Index c, Index n, const Vector<T>& v, bool aligned) {
  if (aligned && c >= 0 && c + Vector<T>::kSize <= n) {
    v.store(row + c);
    return;
  }
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    if (c + i >= 0 && c + i < n) row[c + i] = v.element(i);
  }
}

// A whole vector.
template <typename T>
__device__ __forceinline__ void store_whole_vector(T* p, const Vector<T>& v, bool aligned) {
  if (aligned) {
    v.store(p);
    return;
  }
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) p[i] = v.element(i);
}

// kCount vectors, `step` elements apart, of the whole vectors of a row, which end at `tail`: -inf beyond.
template <typename T, int kCount>
struct Batch {
  Vector<T> vectors[kCount];
  __device__ __forceinline__ void load(const T* row, int64_t c, int step, int64_t tail) {
    const T* p = row + c;
    if (c + (kCount - 1) * step < tail) {  // all but the last batch of a row: one address, no conditions
#pragma unroll
      for (int j = 0; j < kCount; ++j) vectors[j] = Vector<T>::load(p + j * step);
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        vectors[j] = c + j * step < tail ? Vector<T>::load(p + j * step) : Vector<T>::minus_infinities();
    }
  }
};

// How a row of any alignment is read in 16 bytes by `threads` threads: single elements up to the first aligned address
// and after the last whole vector, vectors between.
template <typename T>
struct RowVectors {
  int64_t head, tail;  // the whole vectors lie between
  __device__ __forceinline__ RowVectors(const T* row, int64_t classes) {
    constexpr int kSize = Vector<T>::kSize;
    const int past = elements_past_boundary(row);
    const int64_t until = past == 0 ? 0 : kSize - past;
    head = until < classes ? until : classes;
    tail = head + (classes - head) / kSize * kSize;
  }
};

// Which vectors of a row a thread takes, as classes: first, first + step, ... (kCount of them, a batch), then the same
// `next` further on. `width` threads side by side, a warp or all of fewer, take kCount * width vectors that follow each
// other: where it is a constant the addresses of a batch differ by constants.
template <typename T, int kCount>
struct Share {
  int64_t first, next;
  int step;
  __device__ __forceinline__ Share(const RowVectors<T>& row, int t, int threads, int width)
      : first(row.head + (t / 32 * kCount * 32 + t % 32) * Vector<T>::kSize),  // of fewer than 32 threads: t
        next(static_cast<int64_t>(threads) * kCount * Vector<T>::kSize),
        step(width * Vector<T>::kSize) {}
};

// What thread `t` takes of a row's single elements, loaded before all else, since the end of a row would wait for them.
template <typename T>
struct SingleElements {
  int64_t last;
  T of_head, of_end;
  __device__ __forceinline__ SingleElements(const T* row, int64_t classes, const RowVectors<T>& part, int t)
      : last(part.tail + t),
        of_head(t < part.head ? row[t] : minus_infinity_of<T>()),
        of_end(last < classes ? row[last] : minus_infinity_of<T>()) {}
  template <typename One>
  __device__ __forceinline__ void use(const T* row, int64_t classes, const RowVectors<T>& part, int t, int threads,
                                      One one) const {
    if (t < part.head) one(int64_t(t), of_head);
    if (last < classes) one(last, of_end);
    // Fewer threads than a vector has elements.
    for (int64_t c = t + threads; c < part.head; c += threads) one(c, row[c]);
    for (int64_t c = last + threads; c < classes; c += threads) one(c, row[c]);
  }
};

// Calls many(c, step, tail, vectors) for the vectors that thread `t` takes, kCount at a time: those at c, c + step, ...
// that begin before `tail`; and one(c, x) for its single elements.
template <typename T, int kCount, typename One, typename Many>
__device__ __forceinline__ void for_classes(const T* row, int64_t classes, int t, int threads, One one, Many many) {
  const RowVectors<T> part(row, classes);
  const Share<T, kCount> share(part, t, threads, 32);
  const SingleElements<T> singles(row, classes, part, t);
  int64_t c = share.first;
  Batch<T, kCount> now;
  for (; c < part.tail; c += share.next) {
    now.load(row, c, share.step, part.tail);
    many(c, share.step, part.tail, now.vectors);
  }
  singles.use(row, classes, part, t, threads, one);
}

// The same in two steps: the loads of the first batch begin when it is made, and go on while the thread finds out what
// to do with them. `threads`: a power of two.
template <typename T, int kCount>
class ClassReader {
 public:
  __device__ __forceinline__ ClassReader(const T* row, int64_t classes, int t, int threads)
      : row_(row),
        classes_(classes),
        t_(t),
        threads_(threads),
        part_(row, classes),
        share_(part_, t, threads, threads < 32 ? threads : 32),
        singles_(row, classes, part_, t) {
    batch_.load(row, share_.first, share_.step, part_.tail);
  }

  // Whether class c lies in a vector of this thread's.
  __device__ __forceinline__ bool takes(int64_t c) const {
    const uint32_t v = static_cast<uint32_t>((c - part_.head) / Vector<T>::kSize);
    const uint32_t thread = (v / (kCount * 32) * 32 + v % 32) & static_cast<uint32_t>(threads_ - 1);
    return c >= part_.head && c < part_.tail && thread == static_cast<uint32_t>(t_);
  }

  // Once.
  template <typename One, typename Many>
  __device__ __forceinline__ void each(One one, Many many) {
    for (int64_t c = share_.first; c < part_.tail;) {
      many(c, share_.step, part_.tail, batch_.vectors);
      c += share_.next;
      if (c < part_.tail) batch_.load(row_, c, share_.step, part_.tail);
    }
    singles_.use(row_, classes_, part_, t_, threads_, one);
  }

 private:
  const T* row_;
  int64_t classes_;
  int t_, threads_;
  RowVectors<T> part_;
  Share<T, kCount> share_;
  SingleElements<T> singles_;
  Batch<T, kCount> batch_;
};

// Where the vectors of a row are in shared memory: those that a warp takes at once lie side by side, kCount * 32 of
// them, and each is read by the thread that has put it there. first(slot, c) is the first vector of a thread's batch,
// of the classes from c on, and the next ones are 32 vectors further on each. A ring has room for a few batches of a
// block, one in each slot:
template <typename T, int kCount>
struct RingPlace {
  Vector<T>* of_thread;
  int slot_vectors;
  __device__ __forceinline__ RingPlace(Vector<T>* memory, int t, int threads)
      : of_thread(memory + t / 32 * 32 * kCount + t % 32), slot_vectors(threads * kCount) {}
  __device__ __forceinline__ bool holds(int64_t) const { return true; }
  __device__ __forceinline__ Vector<T>* first(int slot, int64_t) const { return of_thread + slot * slot_vectors; }
};
// …or the first `kept` vectors of the row have a place for each, a multiple of 32 * kCount:
template <typename T, int kCount>
struct KeptPlace {
  Vector<T>* memory;
  int64_t head, end;  // classes
  __device__ __forceinline__ KeptPlace(Vector<T>* memory, int kept, int64_t head)
      : memory(memory), head(head), end(head + static_cast<int64_t>(kept) * Vector<T>::kSize) {}
  __device__ __forceinline__ bool holds(int64_t c) const { return c < end; }
  __device__ __forceinline__ Vector<T>* first(int, int64_t c) const {
    return memory + static_cast<int>(c - head) / Vector<T>::kSize;
  }
};

// A batch of a row's whole vectors, which end at `tail`, from its place in shared memory, if it has one; -inf beyond.
template <typename T, int kCount, typename Place>
__device__ __forceinline__ void load_batch(const Place& place, int slot, const T* row, int64_t c, int64_t tail,
                                           Vector<T>* vectors) {
  constexpr int kStep = 32 * Vector<T>::kSize;
  if (!place.holds(c)) {
    Batch<T, kCount> batch;
    batch.load(row, c, kStep, tail);
#pragma unroll
    for (int j = 0; j < kCount; ++j) vectors[j] = batch.vectors[j];
    return;
  }
  const Vector<T>* const first = place.first(slot, c);
  if (c + (kCount - 1) * kStep < tail) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) vectors[j] = first[j * 32];
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) vectors[j] = c + j * kStep < tail ? first[j * 32] : Vector<T>::minus_infinities();
  }
}

// As for_classes, by copies to shared memory that run `ahead` batches ahead of the arithmetic: loads are on their way
// all the time and take no registers. Slots from 0 to `ahead` follow each other.
template <typename T, int kCount, typename Place, typename One, typename Many>
__device__ __forceinline__ void for_classes_ahead(const T* row, int64_t classes, int t, int threads, int ahead,
                                                  const Place& place, One one, Many many) {
  constexpr int kStep = 32 * Vector<T>::kSize;
  const RowVectors<T> part(row, classes);
  const Share<T, kCount> share(part, t, threads, 32);
  const SingleElements<T> singles(row, classes, part, t);
  int64_t next = share.first;
  int to = 0, from = 0;
  const auto copy = [&] {
    if (next < part.tail && place.holds(next)) {
      Vector<T>* const first = place.first(to, next);
      const T* const source = row + next;
      if (next + (kCount - 1) * kStep < part.tail) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) copy_async(first + j * 32, source + j * kStep);
      } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j)
          if (next + j * kStep < part.tail) copy_async(first + j * 32, source + j * kStep);
      }
    }
    commit_copies();  // of the end of the row too: groups are counted
    next += share.next;
    to = to == ahead ? 0 : to + 1;
  };
  for (int i = 0; i < ahead; ++i) copy();
  for (int64_t c = share.first; c < part.tail; c += share.next) {
    wait_for_copies(ahead - 1);  // the oldest group is this batch
    copy();                      // where the batch before was
    Vector<T> now[kCount];
    load_batch<T, kCount>(place, from, row, c, part.tail, now);
    from = from == ahead ? 0 : from + 1;
    many(c, kStep, part.tail, now);
  }
  singles.use(row, classes, part, t, threads, one);
}

// How the threads of a block read a row, for_classes or for_classes_ahead: through a ring of `ahead` + 1 slots in
// shared memory, where kAhead, or not.
template <typename T, int kCount, bool kAhead>
struct Stream {
  Vector<T>* memory;
  int ahead;
  template <typename One, typename Many>
  __device__ __forceinline__ void operator()(const T* row, int64_t classes, int t, int threads, One one,
                                             Many many) const {
    if (kAhead && copies_are_async(ahead)) {
      for_classes_ahead<T, kCount>(row, classes, t, threads, ahead, RingPlace<T, kCount>(memory, t, threads), one,
                                   many);
    } else {
      for_classes<T, kCount>(row, classes, t, threads, one, many);
    }
  }
};
// …keeping the first `kept` vectors of the row in shared memory.
template <typename T, int kCount>
struct Keep {
  Vector<T>* memory;
  int kept, ahead;
  __device__ __forceinline__ KeptPlace<T, kCount> place(const RowVectors<T>& part) const {
    return KeptPlace<T, kCount>(memory, kept, part.head);
  }
  template <typename One, typename Many>
  __device__ __forceinline__ void operator()(const T* row, int64_t classes, int t, int threads, One one,
                                             Many many) const {
    const KeptPlace<T, kCount> place = this->place(RowVectors<T>(row, classes));
    if (copies_are_async(ahead)) {
      for_classes_ahead<T, kCount>(row, classes, t, threads, kMostAhead, place, one, many);
    } else {
      for_classes<T, kCount>(row, classes, t, threads, one,
                             [&](int64_t c, int step, int64_t tail, const Vector<T>* vectors) {
                               if (place.holds(c)) {
                                 Vector<T>* const first = place.first(0, c);
#pragma unroll
                                 for (int j = 0; j < kCount; ++j) first[j * 32] = vectors[j];
                               }
                               many(c, step, tail, vectors);
                             });
    }
  }
};

// Calls each(c, tail, vectors) for the batches of a row that Keep gave to this thread of the block, with those that it
// kept from shared memory: the vectors at c, c + 32 * kSize, ... that begin before `tail`. Unless `any`, nothing is
// read, and they may be anything.
template <typename T, int kCount, typename Each>
__device__ __forceinline__ void for_kept(const RowVectors<T>& part, const Keep<T, kCount>& keep, bool any, const T* row,
                                         Each each) {
  const Share<T, kCount> share(part, threadIdx.x, blockDim.x, 32);
  const KeptPlace<T, kCount> place = keep.place(part);
  for (int64_t c = share.first; c < part.tail; c += share.next) {
    Vector<T> values[kCount];
    if (any) {
      load_batch<T, kCount>(place, 0, row, c, part.tail, values);
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) values[j] = Vector<T>::minus_infinities();
    }
    each(c, part.tail, values);
  }
}

// Of a power of two. Threads are divided among rows by shifts: a division takes twenty instructions.
__device__ __forceinline__ int log2_of(int power) { return __ffs(power) - 1; }

// Row r of an extent as its outer and inner index, without a division where there is nothing to divide.
__device__ __forceinline__ void split_row(const Extent& extent, int64_t row, int64_t& outer, int64_t& inner) {
  if (extent.inner == 1) {
    outer = row;
    inner = 0;
  } else {
    outer = row / extent.inner;
    inner = row - outer * extent.inner;
  }
}

}  // namespace nllx
