// The gradient of a row of logits: k (A exp((x - m) - log_sum) - a_c).
#pragma once

#include "targets.cuh"

namespace nllx {

// What the gradient of a row needs, the same for all its classes.
template <typename T>
struct RowGradient {
  using acc = typename AccOf<T>::type;
  ClassTerms<T> terms;
  bool has_terms, counts;
  int64_t target;  // -1: none
  acc target_term, k;
  acc ka;  // k A exp(-log_sum)
  acc max;

  // `coefficients`: whether the targets have them; a constant where the kernel is compiled for one case. `mass`: A of a
  // row of probabilities, which need not sum to one.
  __device__ __forceinline__ RowGradient(const Targets& t, int64_t classes, int64_t outer, int64_t inner,
                                         const IndexTarget<acc>& y, acc mass, acc k, const RowStats<acc>& stats,
                                         bool coefficients)
      : terms(t, classes, outer, inner),
        has_terms(coefficients),
        counts(y.counts),
        target(t.index && y.counts ? y.index : -1),
        target_term(0),
        k(k),
        max(stats.max) {
    if (t.index) {
      target_term = has_terms ? terms.scale * y.weight : y.weight;
      mass = target_term;
      if (has_terms) mass += terms.uniform_mass(t, classes);
    }
    ka = k * mass * exp_acc(-stats.log_sum);
  }

  // Of a class that is not the target; without coefficients, and only in rows that count, `probable` is the same.
  __device__ __forceinline__ acc of_other(acc x, int64_t c) const { return at(x, has_terms ? terms(c) : acc(0)); }
  __device__ __forceinline__ acc probable(acc x) const { return ka * exp_of_many(x - max); }

  __device__ __forceinline__ acc operator()(acc x, int64_t c) const {
    return at(x, (has_terms ? terms(c) : acc(0)) + (c == target ? target_term : acc(0)));
  }

  __device__ __forceinline__ Vector<T> operator()(const Vector<T>& x, int64_t c) const {
    acc a[Vector<T>::kSize];
    if (has_terms) terms.load(c, a);
    return of_vector(x, a, place_of_target(c));
  }
  // The same but at the target, whose element this leaves wrong.
  __device__ __forceinline__ Vector<T> beside_target(const Vector<T>& x, int64_t c) const {
    acc a[Vector<T>::kSize];
    if (has_terms) terms.load(c, a);
    return of_vector(x, a, -1);
  }
  // The same where some of the vector's classes lie outside of the row, and have no probability and no weight to read.
  __device__ __forceinline__ Vector<T> partly(const Vector<T>& x, int c, int classes) const {
    acc a[Vector<T>::kSize];
    if (has_terms) {
      if (c >= 0 && c + Vector<T>::kSize <= classes) {
        terms.load(c, a);
      } else {
#pragma unroll
        for (int i = 0; i < Vector<T>::kSize; ++i) a[i] = c + i >= 0 && c + i < classes ? terms(c + i) : acc(0);
      }
    }
    return of_vector(x, a, place_of_target(c));
  }

 private:
  // In the vector that begins with class c, or -1. One comparison of 64 bits for all of its elements.
  __device__ __forceinline__ int place_of_target(int64_t c) const {
    const int64_t ahead = target - c;
    return ahead >= 0 && ahead < Vector<T>::kSize ? static_cast<int>(ahead) : -1;
  }
  __device__ __forceinline__ Vector<T> of_vector(const Vector<T>& x, const acc* a, int place) const {
    Vector<T> v;
    if (has_terms || place >= 0) {
      v = Vector<T>::of(
          [&](int i) { return less_term(x[i], (has_terms ? a[i] : acc(0)) + (i == place ? target_term : acc(0))); });
    } else {  // almost all
      v = Vector<T>::of([&](int i) { return probable(x[i]); });
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) v.words[i] = counts ? v.words[i] : 0;  // once for a vector, not for each element
    return v;
  }
  __device__ __forceinline__ acc at(acc x, acc a) const { return counts ? less_term(x, a) : acc(0); }
  __device__ __forceinline__ acc less_term(acc x, acc a) const {
    const acc g = probable(x);
    return a == acc(0) ? g : g - k * a;  // k may be infinite where the divisor of the mean is zero
  }
};

// Of a row whose statistics the forward has saved. `mass`: of all rows, for probabilities.
template <typename T>
__device__ __forceinline__ RowGradient<T> saved_row_gradient(const CrossEntropyBackward& p, int64_t row, int64_t outer,
                                                             int64_t inner, const void* mass, bool reports,
                                                             BadTarget* bad, bool coefficients) {
  using acc = typename AccOf<T>::type;
  IndexTarget<acc> y{0, true, false, acc(1)};
  acc a = 0;
  if (p.targets.index) {
    y = index_target<acc>(p.targets, p.extent.classes, row);
    if (y.bad && reports) report_bad_target(bad, row, y.index, p.extent.classes, p.targets.ignore_index);
  } else {
    a = static_cast<const acc*>(mass)[row];
  }
  const acc k = incoming_gradient<acc>(p.grad_output, p.grad_output_stride, p.total_weight, row);
  return RowGradient<T>(p.targets, p.extent.classes, outer, inner, y, a, k,
                        static_cast<const RowStats<acc>*>(p.row_stats)[row], coefficients);
}

}  // namespace nllx
