// From a FloatType to the element type of a kernel.
#pragma once

#include "elements.cuh"

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

inline dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }
inline dim3 block_of(int threads) { return dim3(static_cast<unsigned>(threads)); }

}  // namespace nllx
