// From a FloatType to the element type of a kernel.
#pragma once

#include <type_traits>

#include "elements.cuh"
#include "plan.h"

namespace nllx {

template <typename T>
struct TypeTag {
  using type = T;
};

template <typename Body>
void with_element_type(FloatType type, Body body) {
  switch (type) {
    case FloatType::kFloat32:
      return body(TypeTag<float>());
    case FloatType::kFloat64:
      return body(TypeTag<double>());
    case FloatType::kBFloat16:
      return body(TypeTag<__nv_bfloat16>());
    case FloatType::kFloat16:
      return body(TypeTag<__half>());
  }
}

// A problem of the cross entropy as its kernels take it.
template <typename Problem>
Problem with_float_coefficients(Problem p) {
  p.targets.scale = static_cast<float>(1. - p.targets.label_smoothing);
  p.targets.uniform = static_cast<float>(p.targets.label_smoothing / static_cast<double>(p.extent.classes));
  return p;
}

// One instantiation with coefficients of the classes and one without, which needs half of the registers.
template <typename Body>
void with_terms(const Targets& t, Body body) {
  if (t.probabilities != nullptr || t.label_smoothing > 0) {
    body(std::true_type());
  } else {
    body(std::false_type());
  }
}

// No more than CUDA launches, and whole clusters: kernels whose blocks are as many as their units walk over them.
inline dim3 grid_of(int64_t blocks, int cluster = 1) {
  const int64_t most = INT32_MAX / cluster * cluster;
  return dim3(static_cast<unsigned>(blocks < most ? blocks : most));
}
inline dim3 block_of(int threads) { return dim3(static_cast<unsigned>(threads)); }

// Of kernels of one plan alone. The threads of a row: as many as have a few vectors each, up to a warp, or the block.
inline int threads_of_row(int64_t classes, int element_bytes) {
  const int64_t vectors = classes * element_bytes / 16;
  int threads = 1;
  while (threads < 32 && threads * kVectorsAtOnce < vectors) threads *= 2;
  return vectors > 32 * kVectorsAtOnce * 2 ? kStatisticsThreads : threads;
}

inline dim3 grid_for_rows(const Extent& extent, Layout layout, int threads_per_row) {
  if (layout == Layout::kPlanes) {
    return grid_of(extent.outer * ((extent.inner + kStatisticsThreads - 1) / kStatisticsThreads));
  }
  const int rows_at_once = kStatisticsThreads / threads_per_row;
  return grid_of((extent.rows() + rows_at_once - 1) / rows_at_once);
}

}  // namespace nllx
