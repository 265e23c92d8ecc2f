#include "loss_problem.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/safe_numerics.h>

#include "message.h"

namespace nllx {

using at::ScalarType;
using at::Tensor;

namespace {

template <typename T>
Tensor sum_in_order(const Tensor& weight, const T* w) {
  double sum[8] = {};
  const int64_t n = weight.numel();
  for (int64_t i = 0; i < n; ++i) sum[i % 8] += static_cast<double>(w[i]);
  for (int step = 4; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) sum[i] += sum[i + step];
  }
  Tensor result = at::empty({}, weight.options());
  *result.mutable_data_ptr<T>() = static_cast<T>(sum[0]);
  return result;
}

// On the CPU Tensor::sum would add in an order that depends on the number of threads.
Tensor sum_in_order(const Tensor& weight) {
  if (!weight.is_cpu()) return weight.sum();
  return weight.scalar_type() == ScalarType::Double ? sum_in_order(weight, weight.const_data_ptr<double>())
                                                    : sum_in_order(weight, weight.const_data_ptr<float>());
}

}  // namespace

int64_t LossProblem::rows() const {
  int64_t n = 1;
  bool fits = true;
  for (const int64_t size : row_sizes) fits = fits && !c10::mul_overflows(n, size, &n);
  // Without classes a tensor may have any number of rows.
  TORCH_CHECK(fits && n <= std::numeric_limits<int64_t>::max() / 2, "nllx: the loss would have the shape ",
              list(row_sizes), ", and more rows than a 64-bit number counts");
  return n;
}

at::DimVector LossProblem::stats_sizes() const {
  at::DimVector sizes = row_sizes;
  sizes.push_back(2);
  return sizes;
}

LossProblem make_loss_problem(const LossArguments& args, std::optional<ScalarType> loss_dtype) {
  check_loss_arguments(args);
  LossProblem p;
  p.probabilities_given = targets_are_probabilities(args);
  p.class_dim = args.input.dim() == 1 ? 0 : 1;
  p.input = aligned(args.input);
  p.row_sizes = at::DimVector(args.input.sizes());
  p.row_sizes.erase(p.row_sizes.begin() + p.class_dim);
  const bool weighted = args.weight.has_value() && args.weight->defined();
  check_memory(args.op, "target", args.target);
  if (weighted) check_memory(args.op, "weight", *args.weight);

  p.loss_dtype = args.input.scalar_type();
  if (p.probabilities_given) {
    p.loss_dtype = c10::promoteTypes(p.loss_dtype, args.target.scalar_type());
    if (weighted) p.loss_dtype = c10::promoteTypes(p.loss_dtype, args.weight->scalar_type());
    float_type(args.op, "target", p.loss_dtype);
    if (p.loss_dtype == ScalarType::Double) p.input = p.input.to(ScalarType::Double);
  }
  const bool is_double = p.input.scalar_type() == ScalarType::Double;
  p.acc_dtype = is_double ? ScalarType::Double : ScalarType::Float;
  if (loss_dtype.has_value()) {
    TORCH_CHECK(*loss_dtype == p.loss_dtype || *loss_dtype == p.acc_dtype, args.op, ": dtype must be ", p.loss_dtype,
                " or ", p.acc_dtype, ", but got ", *loss_dtype);
    p.loss_dtype = *loss_dtype;
  }

  Targets& t = p.targets;
  if (p.probabilities_given) {
    p.probabilities = aligned(args.target);
    if (p.probabilities.scalar_type() != p.input.scalar_type()) p.probabilities = p.probabilities.to(p.acc_dtype);
    t.probabilities_are_acc = p.probabilities.scalar_type() == p.acc_dtype;
  } else {
    p.index = aligned(args.target.contiguous());
    t.index = p.index.const_data_ptr();
    t.index_type = index_type(p.index.scalar_type());
  }
  if (weighted) {
    p.weight = aligned(args.weight->to(p.acc_dtype).contiguous());
    t.weight = p.weight.const_data_ptr();
    if (args.label_smoothing > 0) {
      p.weight_sum = sum_in_order(p.weight);
      t.weight_sum = p.weight_sum.const_data_ptr();
    }
  }
  t.ignore_index = args.ignore_index;
  t.label_smoothing = args.label_smoothing;
  // Over infinity, loss and gradient are zero. With smoothing, torch's mean over nothing is NaN even if the sum of the
  // smoothing terms is not zero: it adds 0 / 0 to it.
  if (static_cast<Reduction>(args.reduction) == Reduction::kMeanOrZero) {
    t.zero_divisor = std::numeric_limits<double>::infinity();
  } else if (args.label_smoothing > 0 && !p.probabilities_given) {
    t.zero_divisor = std::numeric_limits<double>::quiet_NaN();
  }
  return p;
}

LossProblem make_statistics_problem(const char* op, const Tensor& logits, const OptionalTensor& target, int64_t dim,
                                    int64_t ignore_index) {
  LossProblem p;
  p.class_dim = check_statistics_arguments(op, logits, target, dim, ignore_index);
  p.input = aligned(logits);
  p.row_sizes = at::DimVector(logits.sizes());
  p.row_sizes.erase(p.row_sizes.begin() + p.class_dim);
  p.acc_dtype = p.loss_dtype = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (target.has_value() && target->defined()) {
    check_memory(op, "target", *target);
    p.index = aligned(target->contiguous());
    // Of no rows too: whether there is a target is whether there is an index.
    static const int64_t none = 0;
    p.targets.index = p.index.numel() > 0 ? p.index.const_data_ptr() : &none;
    p.targets.index_type = index_type(p.index.scalar_type());
  }
  p.targets.ignore_index = ignore_index;
  return p;
}

void take_options(LossProblem& p, const char* op, const LossOptions& o) {
  check_options(op, o, p.row_sizes, p.input);
  p.options.scale = o.scale;
  p.options.sharpness = o.sharpness;
  p.options.softcap = o.softcap;
  p.options.z_loss = o.z_loss;
  const auto take = [&](const OptionalTensor& option, Tensor& owner, const void*& pointer, int64_t* stride) {
    if (!option.has_value() || !option->defined()) return;
    owner = aligned(option->to(p.acc_dtype).contiguous());
    pointer = owner.const_data_ptr();
    if (stride) *stride = owner.dim() == 0 ? 0 : 1;
  };
  take(o.sample_weight, p.sample_weight, p.options.sample_weight, nullptr);
  take(o.logit_scale, p.logit_scale, p.options.logit_scale, &p.options.logit_scale_stride);
  take(o.temperature, p.temperature, p.options.temperature, &p.options.temperature_stride);
}

Tensor given_divisor(const Tensor& divisor, int64_t reduction) {
  if (static_cast<Reduction>(reduction) != Reduction::kMeanOrZero) return divisor;
  return divisor.masked_fill(divisor.eq(0), std::numeric_limits<double>::infinity());
}

void take_divisor(LossProblem& p, const char* op, const OptionalTensor& divisor, int64_t reduction) {
  check_divisor(op, divisor, reduction, p.input);
  if (divisor.has_value() && divisor->defined()) p.divisor = divisor->to(p.acc_dtype);
}

Tensor incoming_gradient(const Tensor& grad_output, const LossProblem& loss, const char* op, int64_t reduction,
                         const void*& pointer, int64_t& stride) {
  const bool per_row = is_per_row(reduction);
  check_grad_output(op, grad_output, per_row ? loss.rows() : 1, loss.input);
  const Tensor g = aligned(grad_output.to(loss.acc_dtype).contiguous());
  pointer = g.const_data_ptr();
  stride = per_row ? 1 : 0;
  return g;
}

Arrays share_layout(LossProblem& loss, Tensor* output) {
  check_memory("nllx", "the input", loss.input);
  c10::SmallVector<Tensor, 3> tensors{loss.input};
  if (loss.probabilities_given) tensors.push_back(loss.probabilities);
  if (output) tensors.push_back(*output);
  auto arrays = view_as_arrays(tensors, loss.class_dim);
  if (!arrays) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const bool is_output = output && i + 1 == tensors.size();
      tensors[i] = is_output ? at::empty_like(tensors[i], at::MemoryFormat::Contiguous) : tensors[i].contiguous();
    }
    loss.input = tensors[0];
    if (loss.probabilities_given) loss.probabilities = tensors[1];
    if (output) *output = tensors.back();
    arrays = view_as_arrays(tensors, loss.class_dim);
    TORCH_INTERNAL_ASSERT(arrays.has_value());
  }
  if (loss.probabilities_given) {
    loss.targets.probabilities = loss.probabilities.const_data_ptr();
    loss.targets.probability_strides = arrays->strides[1];
  }
  return *arrays;
}

// Without the dispatcher on the CPU: a small problem's memory would take as long as its arithmetic.
Tensor empty_beside(const Tensor& input, at::IntArrayRef sizes, ScalarType dtype) {
  return input.is_cpu() ? Tensor(at::detail::empty_cpu(sizes, dtype)) : at::empty(sizes, input.options().dtype(dtype));
}

Tensor empty_loss(const LossProblem& loss, int64_t reduction) {
  return empty_beside(loss.input, is_per_row(reduction) ? at::IntArrayRef(loss.row_sizes) : at::IntArrayRef(),
                      loss.loss_dtype);
}

void fill_empty(const LossProblem& loss, int64_t reduction, Tensor& result, Tensor& total_weight) {
  if (loss.divisor.defined()) {
    total_weight.copy_(given_divisor(loss.divisor, reduction));
    result.copy_(at::zeros_like(total_weight).div_(total_weight));
    return;
  }
  total_weight.fill_(loss.probability_rows());
  result.fill_(static_cast<Reduction>(reduction) == Reduction::kMean ? std::numeric_limits<double>::quiet_NaN() : 0.);
}

CrossEntropyForward forward_problem(const LossProblem& loss, const Arrays& arrays, const Tensor& row_stats) {
  auto p = problem_of<CrossEntropyForward>(loss, arrays);
  p.row_stats = row_stats.mutable_data_ptr();
  return p;
}

CrossEntropyBackward backward_problem(const LossProblem& loss, const Arrays& arrays, const Tensor& grad,
                                      const Tensor& row_stats) {
  auto p = problem_of<CrossEntropyBackward>(loss, arrays);
  p.row_stats = row_stats.const_data_ptr();
  p.grad_logits = grad.mutable_data_ptr();
  p.grad_strides = arrays.strides[loss.probabilities_given ? 2 : 1];
  return p;
}

Tensor finish_gradient(const Tensor& computed, Tensor& grad, ScalarType dtype, const Tensor& out) {
  if (!computed.is_same(grad)) grad.copy_(computed);
  if (!out.defined()) return grad.to(dtype);
  if (!out.is_same(grad)) out.copy_(grad);
  return out;
}

}  // namespace nllx
