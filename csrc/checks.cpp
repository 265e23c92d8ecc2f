#include "checks.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "message.h"

namespace nllx {

using at::ScalarType;
using at::Tensor;

namespace {

bool is_index_dtype(ScalarType t) { return at::isIntegralType(t, /*includeBool=*/true); }

bool is_half(ScalarType t) { return t == ScalarType::Half || t == ScalarType::BFloat16; }

void check_index_target_shape(const LossArguments& a) {
  const Tensor& input = a.input;
  const Tensor& target = a.target;
  if (input.dim() == 1) {
    TORCH_CHECK_VALUE(target.dim() != 1 || target.size(0) == 1, a.op,
                      ": For 1D input, 1D target must have size 1, but got target size: ",
                      number(target.dim() == 1 ? target.size(0) : 0));
    TORCH_CHECK(target.dim() <= 1, a.op, ": 0D or 1D target tensor expected, multi-target not supported; ",
                a.input_name, " of shape ", list(input.sizes()),
                " is one sample, whose target is a single class index, but target has shape ", list(target.sizes()));
    return;
  }
  const int64_t target_batch = target.dim() == 0 ? 0 : target.size(0);
  TORCH_CHECK_VALUE(target_batch == input.size(0), a.op, ": Expected input batch_size (", number(input.size(0)),
                    ") to match target batch_size (", number(target_batch), "). ", a.input_name, " has shape ",
                    list(input.sizes()), ", target ", list(target.sizes()));
  if (input.dim() == 2) {
    TORCH_CHECK(target.dim() == 1, a.op, ": 0D or 1D target tensor expected, multi-target not supported; ",
                a.input_name, " of shape ", list(input.sizes()), " takes class indices of shape [",
                number(input.size(0)), "]", a.takes_probabilities ? " or class probabilities of its own shape" : "",
                ", but target has shape ", list(target.sizes()));
    return;
  }
  std::vector<int64_t> expected = input.sizes().vec();
  expected.erase(expected.begin() + 1);
  if (target.sizes() == at::IntArrayRef(expected)) return;
  TORCH_CHECK(
      input.dim() != 4 || target.dim() == 3, a.op,
      ": only batches of spatial targets supported (3D tensors) but got targets of dimension: ", number(target.dim()),
      ". ", a.input_name, " of shape ", list(input.sizes()), " takes class indices of shape ", list(expected));
  const bool last = target.sizes() == input.sizes().slice(0, input.dim() - 1);
  TORCH_CHECK(false, a.op, ": size mismatch (got input: ", list(input.sizes()), " , target: ", list(target.sizes()),
              "). Expected target size ", list(expected), ", got ", list(target.sizes()),
              "; the classes are dimension 1 of ", a.input_name, last ? ": they seem to be last here, so call " : "",
              last ? a.input_name : "", last ? ".movedim(-1, 1)" : "");
}

void check_weight(const LossArguments& a, bool probabilities) {
  if (!a.weight.has_value() || !a.weight->defined()) return;
  const Tensor& weight = *a.weight;
  const int64_t classes = a.input.size(a.input.dim() == 1 ? 0 : 1);
  // torch's loss of more than two dimensions looks at the number of elements alone.
  const bool any_shape = a.input.dim() > 2 && !probabilities;
  TORCH_CHECK(weight.numel() == classes && (any_shape || weight.dim() == 1), a.op,
              ": weight tensor should be defined either for all ", number(classes),
              " classes or no classes but got weight tensor of shape: ", list(weight.sizes()));
  if (probabilities) {
    TORCH_CHECK_NOT_IMPLEMENTED(!weight.is_complex(), a.op, ": weight must be real, but has dtype ",
                                weight.scalar_type(), "; a complex loss has no gradient to descend");
    return;
  }
  const bool takes_weight = weight.scalar_type() == a.input.scalar_type() ||
                            (is_half(a.input.scalar_type()) &&
                             (weight.scalar_type() == ScalarType::Float || weight.scalar_type() == ScalarType::Double));
  TORCH_CHECK(takes_weight, a.op, ": expected scalar type ", a.input.scalar_type(), " but found ", weight.scalar_type(),
              " for weight; it takes the dtype of ", a.input_name, " (or float32 or float64 beside half-precision ",
              a.input_name, "): call weight.to(", a.input_name, ".dtype)");
}

void check_devices(const LossArguments& a) {
  const auto check = [&](const char* name, const Tensor& t) {
    TORCH_CHECK(t.device() == a.input.device(), a.op,
                ": Expected all tensors to be on the same device, but found at least two devices, ",
                a.input.device().str(), " (", a.input_name, ") and ", t.device().str(), " (", name, "); call ", name,
                ".to(", a.input_name, ".device)");
  };
  check("target", a.target);
  if (a.weight.has_value() && a.weight->defined()) check("weight", *a.weight);
}

// Strides and sizes of the dimensions of more than one element, from the largest stride to the smallest, if each steps
// over all that follow together: no two elements share memory then. Nothing otherwise.
using StridesAndSizes = std::vector<std::pair<int64_t, int64_t>>;
std::optional<StridesAndSizes> nested_strides(const Tensor& t) {
  StridesAndSizes dims;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(dims.rbegin(), dims.rend());
  int64_t reach = 0;
  for (auto d = dims.rbegin(); d != dims.rend(); ++d) {
    if (d->first <= reach) return std::nullopt;
    reach += d->first * (d->second - 1);
  }
  return dims;
}

// Whether `distance` elements lie between some pair of elements of an array of nested strides.
bool is_distance_within(const StridesAndSizes& strides_and_sizes, size_t d, int64_t distance) {
  if (d == strides_and_sizes.size()) return distance == 0;
  const auto [stride, size] = strides_and_sizes[d];
  const int64_t steps = distance / stride;
  for (int64_t k = steps - 1; k <= steps + 1; ++k) {
    if (k > -size && k < size && is_distance_within(strides_and_sizes, d + 1, distance - k * stride)) return true;
  }
  return false;
}

// Whether two tensors share an element: exactly for views that step through memory alike, such as halves of one
// buffer; else whether the ranges of memory between their first and last elements meet. ATen's assert_no_overlap takes
// any two tensors of which one has gaps for apart.
bool may_overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto last = [](const Tensor& t) {
    int64_t offset = 0;
    for (int64_t d = 0; d < t.dim(); ++d) offset += (t.size(d) - 1) * t.stride(d);
    return offset;
  };
  const char* a_begin = static_cast<const char*>(a.const_data_ptr());
  const char* b_begin = static_cast<const char*>(b.const_data_ptr());
  if (a_begin + (last(a) + 1) * a.element_size() <= b_begin || b_begin + (last(b) + 1) * b.element_size() <= a_begin) {
    return false;
  }
  const int64_t bytes = b_begin - a_begin;
  if (a.sizes() != b.sizes() || a.strides() != b.strides() || a.element_size() != b.element_size() ||
      bytes % a.element_size() != 0) {
    return true;
  }
  const std::optional<StridesAndSizes> dims = nested_strides(a);
  return !dims || is_distance_within(*dims, 0, bytes / a.element_size());
}

}  // namespace

bool targets_are_probabilities(const LossArguments& a) {
  return a.takes_probabilities && a.input.sizes() == a.target.sizes();
}

void check_loss_arguments(const LossArguments& a) {
  const bool probabilities = targets_are_probabilities(a);
  TORCH_CHECK(
      !probabilities || at::isFloatingType(a.target.scalar_type()), a.op,
      ": Expected floating point type for target with class probabilities, got ", a.target.scalar_type(),
      ". A target of the shape of ", a.input_name, " (", list(a.input.sizes()),
      ") holds class probabilities; class indices have no class dimension: for one-hot targets call target.argmax(",
      a.input.dim() > 1 ? "1" : "0", ") or target.to(", a.input_name, ".dtype)",
      a.input.dim() > 1 ? "" : "; one number for each of several rows is for torch.nn.BCEWithLogitsLoss");
  if (a.takes_probabilities) {  // torch's exception types: its log_softmax comes first there
    TORCH_CHECK_INDEX(a.input.dim() > 0, a.op, ": Dimension out of range: ", a.input_name,
                      " has no dimension, expected (C), (N, C) or (N, C, d1, ..., dk)");
  } else {
    TORCH_CHECK_VALUE(a.input.dim() > 0, a.op, ": Expected 1 or more dimensions (got 0) in ", a.input_name,
                      ": (C), (N, C) or (N, C, d1, ..., dk)");
  }
  float_type(a.op, a.input_name, a.input.scalar_type());
  if (!probabilities) {
    check_index_target_shape(a);
    TORCH_CHECK(is_index_dtype(a.target.scalar_type()), a.op,
                ": expected target dtype to be Long or Byte (or another integer, or Bool), but got ",
                a.target.scalar_type(), ": target has dtype ", a.target.scalar_type(),
                " and the shape of class indices; call target.long()");
  }
  TORCH_CHECK(probabilities || a.target.scalar_type() != ScalarType::UInt64 || a.ignore_index != INT64_MAX, a.op,
              ": ignore_index ", number(a.ignore_index),
              " cannot be told from larger indices in a target of dtype UInt64; take another one");
  TORCH_CHECK_VALUE(a.reduction >= 0 && a.reduction <= 3, a.op, ": ", number(a.reduction),
                    " is not a valid value for reduction; the operator takes 0 (none), 1 (mean), 2 (sum) or 3 (mean, 0 "
                    "over nothing)");
  TORCH_CHECK(a.label_smoothing >= 0.0 && a.label_smoothing <= 1.0, a.op,
              ": label_smoothing must be between 0.0 and 1.0. Got: ", number(a.label_smoothing));
  TORCH_CHECK(!probabilities || a.ignore_index < 0, a.op,
              ": ignore_index is not supported for floating point target, got ignore_index=", number(a.ignore_index),
              "; give the rows to ignore zero probabilities instead (the mean counts them all the same)");
  check_weight(a, probabilities);
  check_devices(a);
}

void check_options(const char* op, const LossOptions& o, at::IntArrayRef row_sizes, const Tensor& input) {
  const auto check = [&](const char* name, const OptionalTensor& option, bool one_in_all) {
    if (!option.has_value() || !option->defined()) return;
    const Tensor& t = *option;
    TORCH_CHECK_TYPE(!t.is_complex(), op, "(): argument '", name, "' must be real, but has dtype ", t.scalar_type());
    TORCH_CHECK_VALUE(t.sizes() == row_sizes || (one_in_all && t.dim() == 0), op, ": ", name, " must be ",
                      one_in_all ? "a number, a tensor of no dimension or one number per row" : "one number per row",
                      ", of shape ", list(row_sizes), ", but got shape ", list(t.sizes()));
    TORCH_CHECK(t.device() == input.device(), op,
                ": Expected all tensors to be on the same device, but found at least two devices, ",
                input.device().str(), " (the input) and ", t.device().str(), " (", name, "); call ", name, ".to(\"",
                input.device().str(), "\")");
    check_memory(op, name, t);
  };
  check("sample_weight", o.sample_weight, false);
  check("logit_scale", o.logit_scale, true);
  check("temperature", o.temperature, true);
  TORCH_CHECK_VALUE(std::isfinite(o.scale) && std::isfinite(o.sharpness) && o.sharpness > 0, op,
                    ": logit_scale must be a finite number and temperature a positive one; their numbers are ",
                    number(o.scale), " and ", number(o.sharpness));
  TORCH_CHECK_VALUE(o.softcap >= 0 && std::isfinite(o.softcap), op,
                    ": softcap must be a positive number, or None, but got ", number(o.softcap));
  TORCH_CHECK_VALUE(std::isfinite(o.z_loss), op, ": z_loss must be a finite number, but got ", number(o.z_loss));
  if (input.scalar_type() == ScalarType::Double) return;
  for (const double value : {o.scale, o.sharpness, o.softcap, o.softcap * o.sharpness, o.z_loss}) {
    TORCH_CHECK_VALUE(std::fabs(value) <= std::numeric_limits<float>::max(), op,
                      ": logit_scale, softcap, temperature and z_loss must be numbers of float32, which ",
                      number(value), " is not, for logits of dtype ", input.scalar_type());
  }
}

void check_divisor(const char* op, const OptionalTensor& divisor, int64_t reduction, const Tensor& input) {
  if (!divisor.has_value() || !divisor->defined()) return;
  TORCH_CHECK_VALUE(is_mean(static_cast<Reduction>(reduction)), op,
                    ": divisor is what reduction 'mean' divides by; with another reduction divide the result");
  TORCH_CHECK_TYPE(!divisor->is_complex(), op, "(): argument 'divisor' must be real, but has dtype ",
                   divisor->scalar_type());
  TORCH_CHECK_VALUE(divisor->dim() == 0, op, ": divisor must be a number or a tensor of no dimension, but got shape ",
                    list(divisor->sizes()));
  TORCH_CHECK(divisor->device() == input.device(), op,
              ": Expected all tensors to be on the same device, but found at least two devices, ", input.device().str(),
              " (the input) and ", divisor->device().str(), " (divisor)");
  check_memory(op, "divisor", *divisor);
}

int64_t check_statistics_arguments(const char* op, const Tensor& logits, const OptionalTensor& target, int64_t dim,
                                   int64_t ignore_index) {
  TORCH_CHECK_INDEX(logits.dim() > 0, op,
                    ": Dimension out of range: logits has no dimension, expected one for classes");
  float_type(op, "logits", logits.scalar_type());
  const int64_t class_dim = c10::maybe_wrap_dim(dim, logits.dim());
  std::vector<int64_t> rows = logits.sizes().vec();
  rows.erase(rows.begin() + class_dim);
  TORCH_CHECK_INDEX(logits.size(class_dim) > 0 || std::find(rows.begin(), rows.end(), 0) != rows.end(), op,
                    ": Expected reduction dim ", number(class_dim), " to have non-zero size: logits of shape ",
                    list(logits.sizes()), " have no classes");
  if (!target.has_value() || !target->defined()) return class_dim;
  const at::ScalarType dtype = target->scalar_type();
  TORCH_CHECK(is_index_dtype(dtype), op,
              ": expected target dtype to be Long or Byte (or another integer, or Bool), but got ", dtype,
              "; call target.long()");
  TORCH_CHECK(target->sizes() == at::IntArrayRef(rows), op, ": Expected target size ", list(rows), ", got ",
              list(target->sizes()), ": one class index for each row of logits of shape ", list(logits.sizes()),
              ", whose classes are dimension ", number(class_dim));
  TORCH_CHECK(dtype != ScalarType::UInt64 || ignore_index != INT64_MAX, op, ": ignore_index ", number(ignore_index),
              " cannot be told from larger indices in a target of dtype UInt64; take another one");
  TORCH_CHECK(target->device() == logits.device(), op,
              ": Expected all tensors to be on the same device, but found at least two devices, ",
              logits.device().str(), " (logits) and ", target->device().str(),
              " (target); call target.to(logits.device)");
  return class_dim;
}

void raise_bad_target(const char* op, at::IntArrayRef sizes, int64_t row, int64_t value, int64_t classes,
                      int64_t ignore_index) {
  std::vector<int64_t> position(sizes.size());
  for (size_t d = sizes.size(); d-- > 0;) {
    position[d] = row % sizes[d];
    row /= sizes[d];
  }
  const std::string where = position.empty() ? "target" : "target" + list(position);
  TORCH_CHECK_INDEX(false, op, ": Target ", number(value), " is out of bounds. ", where, " is ", number(value),
                    ", expected a class from 0 to ", number(classes - 1), " or ignore_index (", number(ignore_index),
                    ")");
}

void check_memory(const char* op, const char* name, const Tensor& t) {
  if (t.numel() == 0) return;
  int64_t elements = t.storage_offset() + 1;
  for (int64_t d = 0; d < t.dim(); ++d) elements += (t.size(d) - 1) * t.stride(d);
  const size_t wanted = static_cast<size_t>(elements) * t.element_size(), there = t.storage().nbytes();
  TORCH_CHECK(wanted <= there && t.const_data_ptr(), op, ": the memory of ", name,
              " has been freed (by untyped_storage().resize_, say), or its data is not allocated yet: shape ",
              list(t.sizes()), " needs ", number(wanted), " bytes of a storage that has ", number(there));
}

void check_saved(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t numel,
                 const Tensor& input) {
  TORCH_CHECK(t.scalar_type() == dtype && t.numel() == numel && t.device() == input.device(), op, ": ", name,
              " must have ", number(numel), " elements of dtype ", dtype, " on ", input.device().str(),
              ", as the forward returns it, but got shape ", list(t.sizes()), " of dtype ", t.scalar_type(), " on ",
              t.device().str());
  check_memory(op, name, t);
}

void check_grad_output(const char* op, const Tensor& grad_output, int64_t numel, const Tensor& input) {
  TORCH_CHECK(at::isFloatingType(grad_output.scalar_type()) && grad_output.numel() == numel &&
                  grad_output.device() == input.device(),
              op, ": grad_output must be floating point with ", number(numel), " elements (the loss has) on ",
              input.device().str(), ", but got shape ", list(grad_output.sizes()), " of dtype ",
              grad_output.scalar_type(), " on ", grad_output.device().str());
  check_memory(op, "grad_output", grad_output);
}

Tensor apart_from(const Tensor& t, const Tensor& out) { return out.defined() && may_overlap(out, t) ? t.clone() : t; }

void check_no_internal_overlap(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK(t.numel() == 0 || nested_strides(t), op, ": elements of ", name, " share memory with each other (shape ",
              list(t.sizes()), ", strides ", list(t.strides()), "), so it cannot be written; call ", name,
              ".clone() first");
}

void check_out(const char* op, const Tensor& out, const Tensor& input, const Tensor& target,
               const std::optional<Tensor>& weight) {
  TORCH_CHECK(
      out.sizes() == input.sizes() && out.scalar_type() == input.scalar_type() && out.device() == input.device(), op,
      ": out must have shape ", list(input.sizes()), " and dtype ", input.scalar_type(), " on ", input.device().str(),
      ", as logits has, but got ", list(out.sizes()), " and ", out.scalar_type(), " on ", out.device().str());
  check_no_internal_overlap(op, "out", out);
  check_memory(op, "out", out);
  const bool same = out.const_data_ptr() == input.const_data_ptr() && out.strides() == input.strides();
  if (!same) check_apart(op, out, "logits", input);
  check_apart(op, out, "target", target);
  check_apart(op, out, "weight", weight);
}

void check_apart(const char* op, const Tensor& out, const char* name, const OptionalTensor& t) {
  TORCH_CHECK(!t.has_value() || !t->defined() || !may_overlap(out, *t), op, ": out shares memory with ", name,
              ", which is read while out is written; give out memory of its own, or call ", name, ".clone()");
}

void check_reduced(const char* op, int64_t reduction) {
  TORCH_CHECK_VALUE(static_cast<Reduction>(reduction) != Reduction::kNone, op,
                    ": reduction 'none' gives one loss per row, which has no gradient; take 'mean' or 'sum'");
}

FloatType float_type(const char* op, const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return FloatType::kFloat32;
    case ScalarType::Double:
      return FloatType::kFloat64;
    case ScalarType::BFloat16:
      return FloatType::kBFloat16;
    case ScalarType::Half:
      return FloatType::kFloat16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "\"", op, "\" not implemented for '", dtype, "' (dtype of ", name,
                                  "); it takes float32, float64, bfloat16 and float16");
  }
}

FloatType check_log_softmax_backward(const Tensor& grad_output, const Tensor& output) {
  TORCH_CHECK(grad_output.sizes() == output.sizes() && grad_output.scalar_type() == output.scalar_type() &&
                  grad_output.device() == output.device(),
              "log_softmax: grad_output must have shape ", list(output.sizes()), " and dtype ", output.scalar_type(),
              " on ", output.device().str(), ", but got ", list(grad_output.sizes()), " and ",
              grad_output.scalar_type(), " on ", grad_output.device().str());
  return float_type("log_softmax", "output", output.scalar_type());
}

IndexType index_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Long:
      return IndexType::kInt64;
    case ScalarType::Int:
      return IndexType::kInt32;
    case ScalarType::Short:
      return IndexType::kInt16;
    case ScalarType::Char:
      return IndexType::kInt8;
    case ScalarType::Byte:
    case ScalarType::Bool:
      return IndexType::kUInt8;
    case ScalarType::UInt16:
      return IndexType::kUInt16;
    case ScalarType::UInt32:
      return IndexType::kUInt32;
    case ScalarType::UInt64:
      return IndexType::kUInt64;
    default:
      TORCH_CHECK(false, "nllx: class indices must be integers or bool, but got ", dtype);
  }
}

}  // namespace nllx
