// What a row is compared with, read on the device.
#pragma once

#include "row_state.cuh"

namespace nllx {

__device__ __forceinline__ void report_bad_target(BadTarget* bad, int64_t row, int64_t value, int64_t classes,
                                                  int64_t ignore_index) {
  // The record lies in the host's memory, behind the bus: where many rows are bad, a warp reads it once, and no row
  // waits for an atomic there.
  if (*const_cast<volatile int*>(&bad->claimed) != 0) return;
  // The host writes the same word: an atomic for this device alone could undo that.
  if (atomicCAS_system(&bad->claimed, 0, 1) != 0) return;
  __threadfence_system();  // what the host has read of the record, it read before it gave the word back
  bad->row = row;
  bad->value = value;
  bad->classes = classes;
  bad->ignore_index = ignore_index;
  __threadfence_system();  // the host reads the rest once it has seen `ready`
  *const_cast<volatile int*>(&bad->ready) = 1;
}

// For rows whose index is needed later.
__device__ __forceinline__ void prefetch_index(const Targets& t, int64_t row) {
  if (!t.index) return;
  prefetch(static_cast<const char*>(t.index) + row * bytes_of(t.index_type));
}

template <typename acc>
struct IndexTarget {
  int64_t index;
  bool counts, bad;  // neither: ignored
  acc weight;
};

template <typename acc>
__device__ __forceinline__ IndexTarget<acc> target_of_index(const Targets& t, int64_t classes, int64_t index) {
  IndexTarget<acc> y;
  y.index = index;
  const bool ignored = y.index == t.ignore_index;
  y.bad = !ignored && !is_class(y.index, classes);
  y.counts = !ignored && !y.bad;
  y.weight = !y.counts ? acc(0) : t.weight ? static_cast<const acc*>(t.weight)[y.index] : acc(1);
  return y;
}

template <typename acc>
__device__ __forceinline__ IndexTarget<acc> index_target(const Targets& t, int64_t classes, int64_t row) {
  return target_of_index<acc>(t, classes, load_index(t.index, t.index_type, row));
}

// 1 - ε
template <typename acc>
__device__ __forceinline__ acc scale_of(const Targets& t) {
  return sizeof(acc) == 4 ? static_cast<acc>(t.scale) : static_cast<acc>(1. - t.label_smoothing);
}

// The coefficients a_c of a row's classes: w_c ε / C for index targets, w_c ((1 - ε) p_c + ε / C) for probabilities.
template <typename T>
struct ClassTerms {
  using acc = typename AccOf<T>::type;
  const void* probabilities;
  bool are_acc;
  int64_t offset, stride;
  const acc* weight;
  acc scale, uniform;

  __device__ __forceinline__ ClassTerms(const Targets& t, int64_t classes, int64_t outer, int64_t inner)
      : probabilities(t.probabilities),
        are_acc(t.probabilities_are_acc),
        offset(outer * t.probability_strides.outer + inner * t.probability_strides.inner),
        stride(t.probability_strides.classes),
        weight(static_cast<const acc*>(t.weight)),
        scale(scale_of<acc>(t)),
        uniform(sizeof(acc) == 4 ? static_cast<acc>(t.uniform)
                                 : static_cast<acc>(t.label_smoothing / static_cast<double>(classes))) {}

  __device__ __forceinline__ acc operator()(int64_t c) const {
    acc a = uniform;
    if (probabilities) {
      const int64_t i = offset + c * stride;
      a += scale *
           (are_acc ? static_cast<const acc*>(probabilities)[i] : to_acc(static_cast<const T*>(probabilities)[i]));
    }
    return weight ? a * weight[c] : a;
  }

  // Whether all classes have the same coefficient.
  __device__ __forceinline__ bool are_equal() const { return !probabilities && !weight; }

  // The coefficients of a vector's classes, from `c` on; probabilities in 16 bytes where they lie so.
  __device__ __forceinline__ void load(int64_t c, acc* a) const {
    constexpr int kSize = Vector<T>::kSize;
    if (!probabilities) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) a[i] = uniform;
    } else if (are_acc) {
      load_probabilities(static_cast<const acc*>(probabilities) + offset + c * stride, a);
    } else {
      load_probabilities(static_cast<const T*>(probabilities) + offset + c * stride, a);
    }
    if (!weight) return;
#pragma unroll
    for (int i = 0; i < kSize; ++i) a[i] *= weight[c + i];
  }

  template <typename P>
  __device__ __forceinline__ void load_probabilities(const P* p, acc* a) const {
    constexpr int kSize = Vector<T>::kSize, kOf = Vector<P>::kSize;
    if (stride == 1 && elements_past_boundary(p) == 0) {
#pragma unroll
      for (int j = 0; j < kSize; j += kOf) {
        const Vector<P> v = Vector<P>::load(p + j);
#pragma unroll
        for (int i = 0; i < kOf; ++i) a[j + i] = uniform + scale * static_cast<acc>(v[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) a[i] = uniform + scale * static_cast<acc>(to_acc(p[i * stride]));
    }
  }

  // A without the target's own term, for index targets.
  __device__ __forceinline__ acc uniform_mass(const Targets& t, int64_t classes) const {
    return uniform * (weight ? *static_cast<const acc*>(t.weight_sum) : static_cast<acc>(classes));
  }
};

__device__ __forceinline__ bool has_terms(const Targets& t) {
  return t.probabilities != nullptr || t.label_smoothing > 0;
}

template <typename T>
__device__ __forceinline__ void store_row_loss(void* row_loss, bool is_acc, int64_t row, typename AccOf<T>::type loss) {
  using acc = typename AccOf<T>::type;
  if (is_acc) {
    static_cast<acc*>(row_loss)[row] = loss;
  } else {
    static_cast<T*>(row_loss)[row] = from_acc<T>(loss);
  }
}

// The loss of a row from its state: A log s - Σ a (x - m), and the target's own term for an index.
template <typename acc>
__device__ __forceinline__ acc row_loss_of(const RowState<acc>& s, const RowStats<acc>& stats, bool terms, bool index,
                                           acc target_weight, acc target_logit) {
  acc loss = index ? -weighted(target_weight, (target_logit - stats.max) - stats.log_sum) : acc(0);
  if (terms) loss += s.mass * stats.log_sum - s.dot;
  return loss;
}

// `grad_output` may be null: the gradient of the loss itself.
template <typename acc>
__device__ __forceinline__ acc incoming_gradient(const void* grad_output, int64_t stride, const void* total_weight,
                                                 int64_t row) {
  const acc g = grad_output ? static_cast<const acc*>(grad_output)[row * stride] : acc(1);
  return total_weight ? g / *static_cast<const acc*>(total_weight) : g;
}

}  // namespace nllx
