#include "layout.h"

#include <ATen/ops/clone.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/safe_numerics.h>

#include <limits>

namespace nllx {

namespace {

struct Dim {
  int64_t size = 1, stride = 0;
};

// Dimensions [begin, end) as one, if their strides allow it. Those of a tensor without elements mean nothing, and
// contiguous() leaves them; its sizes may have a product that no number holds, which is then the largest.
std::optional<Dim> collapse(const at::Tensor& t, int64_t begin, int64_t end) {
  Dim result;
  if (t.numel() == 0) {
    result.stride = 1;
    for (int64_t d = begin; d < end; ++d) {
      if (t.size(d) == 0) return Dim{0, 1};
      if (c10::mul_overflows(result.size, t.size(d), &result.size)) result.size = std::numeric_limits<int64_t>::max();
    }
    return result;
  }
  for (int64_t d = end - 1; d >= begin; --d) {
    if (t.size(d) == 1) continue;
    if (result.size == 1) {
      result = {t.size(d), t.stride(d)};
    } else if (t.stride(d) == result.stride * result.size) {
      result.size *= t.size(d);
    } else {
      return std::nullopt;
    }
  }
  return result;
}

// kFlippedPlanes: a transposed matrix, whose outer dimension is adjacent in memory, is one plane.
enum class Form { kRows, kFlippedPlanes, kPlanes };

bool view(const at::Tensor& t, int64_t class_dim, Form form, Extent& extent, Strides& strides) {
  const auto outer = collapse(t, 0, class_dim), inner = collapse(t, class_dim + 1, t.dim());
  if (!outer || !inner) return false;
  const Dim classes{t.size(class_dim), t.stride(class_dim)};
  extent = {outer->size, classes.size, inner->size};
  strides = {outer->stride, classes.stride, inner->stride};
  switch (form) {
    case Form::kRows:
      return classes.stride == 1 || classes.size == 1;
    case Form::kPlanes:
      return inner->stride == 1 || inner->size == 1;
    case Form::kFlippedPlanes:
      extent = {1, classes.size, outer->size};
      strides = {0, classes.stride, outer->stride};
      return inner->size == 1 && (outer->stride == 1 || outer->size == 1);
  }
  return false;
}

}  // namespace

bool is_aligned(const at::Tensor& t) {
  return reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % t.element_size() == 0;
}

at::Tensor aligned(const at::Tensor& t) { return is_aligned(t) ? t : t.clone(); }

std::optional<Arrays> view_as_arrays(at::ArrayRef<at::Tensor> tensors, int64_t class_dim) {
  for (const Form form : {Form::kRows, Form::kFlippedPlanes, Form::kPlanes}) {
    Arrays a;
    a.layout = form == Form::kRows ? Layout::kRows : Layout::kPlanes;
    bool fits = true;
    for (size_t i = 0; i < tensors.size() && fits; ++i)
      fits = view(tensors[i], class_dim, form, a.extent, a.strides[i]);
    if (fits) return a;
  }
  return std::nullopt;
}

Arrays writable_arrays(at::Tensor& output, int64_t class_dim) {
  auto arrays = view_as_arrays({output}, class_dim);
  if (!arrays) {
    output = at::empty_like(output, at::MemoryFormat::Contiguous);
    arrays = view_as_arrays({output}, class_dim);
  }
  return *arrays;
}

Arrays arrays_of_one_layout(at::ArrayRef<at::Tensor*> inputs, at::Tensor& output, int64_t class_dim) {
  const auto view = [&] {
    c10::SmallVector<at::Tensor, 3> tensors;
    for (const at::Tensor* input : inputs) tensors.push_back(*input);
    tensors.push_back(output);
    return view_as_arrays(tensors, class_dim);
  };
  auto arrays = view();
  if (!arrays) {
    for (at::Tensor* input : inputs) {
      // An expanded gradient, as sum() gives, is copied so that the others stay where they are.
      if (!view_as_arrays({*input, output}, class_dim)) *input = at::empty_like(output).copy_(*input);
    }
    arrays = view();
  }
  if (!arrays) {
    for (at::Tensor* input : inputs) *input = input->contiguous();
    output = at::empty_like(output, at::MemoryFormat::Contiguous);
    arrays = view();
  }
  TORCH_INTERNAL_ASSERT(arrays.has_value());
  return *arrays;
}

}  // namespace nllx
