// From tensors to arrays (outer, classes, inner).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "problem.h"

namespace nllx {

// aligned: t, or a copy of it where its elements do not begin at multiples of their size, as in memory from outside of
// torch (torch.frombuffer with an odd offset): no C++ type may lie there.
bool is_aligned(const at::Tensor& t);
at::Tensor aligned(const at::Tensor& t);

// A view of up to three tensors of one shape as arrays of one extent and one layout.
struct Arrays {
  Extent extent;
  Layout layout = Layout::kRows;
  std::array<Strides, 3> strides;
};

// The tensors as rows or planes with the classes in `class_dim`, without copying; nothing where they have no layout in
// common. Contiguous tensors always have.
std::optional<Arrays> view_as_arrays(at::ArrayRef<at::Tensor> tensors, int64_t class_dim);

// `output` as arrays to write; where it is neither rows nor planes it is replaced by a contiguous temporary.
Arrays writable_arrays(at::Tensor& output, int64_t class_dim);

// Input tensors of `log_softmax` with its output, in a layout that all share. Tensors are replaced by copies only where
// they share none: first those before the last in the last one's layout, then all in the contiguous one.
Arrays arrays_of_one_layout(at::ArrayRef<at::Tensor*> inputs, at::Tensor& output, int64_t class_dim);

}  // namespace nllx
