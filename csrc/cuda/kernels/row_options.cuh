// What a row's logits are compared by, and the sums of rows that threads divide. Shared by the kernels that take
// options (RowOptions): statistics of the softmax, and the cross entropy of options.
#pragma once

#include "cross_entropy_planes.cuh"

namespace nllx {

__device__ __forceinline__ float tanh_acc(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_acc(double x) { return tanh(x); }

// RowOptions as kernels take them: the host computes with the numbers, since GPUs have few units for float64.
template <typename acc>
struct KernelOptions {
  const acc *logit_scale = nullptr, *temperature = nullptr, *sample_weight = nullptr;
  int64_t logit_scale_stride = 0, temperature_stride = 0;
  acc in = 1, out = 0, z_loss = 0;  // `in` and `out` of LogitMap for a logit_scale and a temperature of one
  bool capped = false;

  explicit KernelOptions(const RowOptions* options) {
    if (!options) return;
    const RowOptions& o = *options;
    logit_scale = static_cast<const acc*>(o.logit_scale);
    temperature = static_cast<const acc*>(o.temperature);
    sample_weight = static_cast<const acc*>(o.sample_weight);
    logit_scale_stride = o.logit_scale_stride;
    temperature_stride = o.temperature_stride;
    capped = o.softcap != 0;
    in = static_cast<acc>(capped ? o.scale / o.softcap : o.scale * o.sharpness);
    out = static_cast<acc>(o.softcap * o.sharpness);
    z_loss = static_cast<acc>(o.z_loss);
  }
};

// From a row's logits x to z, see RowOptions.
template <typename acc>
struct LogitMap {
  acc in, out, per_scale;  // z = in x, or out tanh(in x); `in` is per_scale times the row's logit_scale
  bool capped;

  __device__ __forceinline__ LogitMap(const KernelOptions<acc>& o, int64_t row)
      : out(o.out), per_scale(o.in), capped(o.capped) {
    if (o.temperature) {
      const acc temperature = o.temperature[row * o.temperature_stride];
      capped ? out /= temperature : per_scale /= temperature;
    }
    in = o.logit_scale ? per_scale * o.logit_scale[row * o.logit_scale_stride] : per_scale;
  }

  // The product is rounded, and not part of a sum: the maximum is one of these numbers.
  __device__ __forceinline__ acc operator()(acc x) const {
    const acc y = rounded_product(in, x);
    return capped ? rounded_product(out, tanh_acc(y)) : y;
  }
  // With dz / dx / in.
  __device__ __forceinline__ acc operator()(acc x, acc& slope) const {
    const acc y = rounded_product(in, x);
    slope = 1;
    if (!capped) return y;
    // Not 1 - tanh², which has no digits left where tanh is nearly 1.
    const acc e = exp_acc(acc(-2) * (y < acc(0) ? -y : y)), r = acc(1) / (acc(1) + e);
    slope = out * (acc(4) * e * (r * r));
    return rounded_product(out, tanh_acc(y));
  }

 private:
  static __device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
  static __device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }
};

// What a thread knows of the gradient of its row, summed for the row; called by all threads of the block.
template <typename acc>
__device__ __forceinline__ acc sum_of_row(acc v, int threads_per_row, acc* scratch) {
  return threads_per_row > 32 ? sum_in_block(v, scratch) : sum_in_warp(v, threads_per_row);
}

// The gradient of the logits from `Gradient`, that with respect to z: gradient(z, c) of class c,
// gradient.beside_target(z, c) but for what the target adds, gradient.at_target() that, gradient.target and
// gradient.counts. Returns what this thread's classes give to logit_scale. The gradient may lie over the logits.
template <typename T, int kAtOnce, typename Gradient>
__device__ __forceinline__ typename AccOf<T>::type write_row_gradient(const T* x, T* grad, int64_t classes, int t,
                                                                      int threads,
                                                                      const LogitMap<typename AccOf<T>::type>& map,
                                                                      const Gradient& gradient) {
  using acc = typename AccOf<T>::type;
  constexpr int kSize = Vector<T>::kSize;
  acc by_scale = 0;
  ClassReader<T, kAtOnce> reader(x, classes, t, threads);
  const bool aligned = elements_past_boundary(x) == elements_past_boundary(grad);
  // Once for the row, and not in each vector; read before its vector is written.
  const bool takes_target = gradient.counts && gradient.target >= 0 && reader.takes(gradient.target);
  const acc target_logit = takes_target ? to_acc(x[gradient.target]) : acc(0);
  const auto of = [&](acc value, acc of_z, acc slope) {
    const acc h = of_z * slope;
    // A masked class has a gradient of 0, and the product with its logit none.
    if (h != acc(0)) by_scale += h * value;
    return gradient.counts ? map.in * h : acc(0);  // whatever a row that does not count holds
  };
  reader.each(
      [&](int64_t c, T value) {
        acc slope;
        const acc z = map(to_acc(value), slope);
        grad[c] = from_acc<T>(of(to_acc(value), gradient(z, c), slope));
      },
      [&](int64_t c, int step, int64_t tail, const Vector<T>* vectors) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int64_t at = c + j * step;
          if (at >= tail) continue;
          acc values[kSize];
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            acc slope;
            const acc z = map(vectors[j][i], slope);
            values[i] = of(vectors[j][i], gradient.beside_target(z, at + i), slope);
          }
          store_whole_vector(grad + at, Vector<T>::of([&](int i) { return values[i]; }), aligned);
        }
      });
  if (takes_target) {
    acc slope;
    const acc z = map(target_logit, slope), added = gradient.at_target() * slope;
    if (added != acc(0)) by_scale += added * target_logit;  // the rest of it has come with its vector
    grad[gradient.target] = from_acc<T>(map.in * (gradient(z, gradient.target) * slope));
  }
  // The options of a row that does not count may be NaN too.
  return gradient.counts ? map.per_scale * by_scale : acc(0);
}

// The same of the classes of a plane, by one thread.
template <typename T, typename Gradient>
__device__ __forceinline__ typename AccOf<T>::type write_column_gradient(const T* x, int64_t stride, T* grad,
                                                                         int64_t grad_stride, int64_t classes,
                                                                         const LogitMap<typename AccOf<T>::type>& map,
                                                                         const Gradient& gradient) {
  using acc = typename AccOf<T>::type;
  constexpr int kAtOnce = 4, kBlock = 64;  // of a block: fewer additions to a large sum
  acc by_scale = 0;
  for (int64_t first = 0; first < classes; first += kBlock) {
    const int64_t end = classes - first < kBlock ? classes : first + kBlock;
    acc block = 0;
    for (int64_t start = first; start < end; start += kAtOnce) {
      acc values[kAtOnce];  // all before the stores, which may be over the logits: a load behind one waits for it
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) values[j] = start + j < end ? to_acc(x[(start + j) * stride]) : acc(0);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (start + j >= end) continue;
        acc slope;
        const acc z = map(values[j], slope), h = gradient(z, start + j) * slope;
        if (h != acc(0)) block += h * values[j];
        grad[(start + j) * grad_stride] = from_acc<T>(gradient.counts ? map.in * h : acc(0));
      }
    }
    by_scale += block;
  }
  return gradient.counts ? map.per_scale * by_scale : acc(0);
}

}  // namespace nllx
