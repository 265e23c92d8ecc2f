// CPU entries of cross_entropy: checks, problem, chunks, kernel, reduction.
#include <torch/library.h>

#include "capability.h"
#include "cross_entropy.h"
#include "large_memory.h"
#include "reduce.h"

namespace nllx {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_cpu(const Tensor& logits, const Tensor& target,
                                                             const OptionalTensor& weight, int64_t reduction,
                                                             int64_t ignore_index, double label_smoothing,
                                                             OptionalDtype dtype) {
  const LossArguments args{"cross_entropy", "logits",  true,         logits,         target,
                           weight,          reduction, ignore_index, label_smoothing};
  LossProblem loss = make_loss_problem(args, dtype);
  Tensor result = empty_loss(loss, reduction);
  Tensor row_stats = empty_beside(logits, loss.stats_sizes(), loss.acc_dtype);
  Tensor total_weight = empty_beside(logits, {}, loss.acc_dtype);
  ChunkResult total;
  if (loss.probabilities_given &&
      logits.numel() == 0) {  // a sum over no classes is zero, though its log-sum-exp is -inf
    result.zero_();
    row_stats.zero_();
  } else if (loss.rows() > 0) {
    CrossEntropyForward p = forward_problem(loss, share_layout(loss, nullptr), row_stats);
    if (static_cast<Reduction>(reduction) == Reduction::kNone) p.row_loss = result.mutable_data_ptr();
    p.row_loss_is_acc = loss.loss_is_acc();
    total = run_cross_entropy_forward(*cpu_capability().kernels, p, static_cast<int>(loss.float_type()));
    raise_if_bad(total, args, loss);
  }
  reduce(total, loss, reduction, result, total_weight);
  return {result, row_stats, total_weight};
}

namespace {

// A gradient's memory: that of `out`, if it is given, has the dtype that is computed in, and can be written.
Tensor empty_gradient(const LossProblem& loss, const Tensor& out) {
  if (out.defined() && out.scalar_type() == loss.input.scalar_type() && is_aligned(out)) return out;
  return empty_like_large(loss.input);
}

// The gradient, in `out` where that is defined.
Tensor cross_entropy_gradient(const Tensor& grad_output, const LossArguments& args, const Tensor& row_stats,
                              const Tensor& total_weight, const Tensor& out) {
  LossProblem loss = make_loss_problem(args, std::nullopt);
  const void* incoming = nullptr;
  int64_t incoming_stride = 0;
  const Tensor g =
      incoming_gradient(apart_from(grad_output, out), loss, args.op, args.reduction, incoming, incoming_stride);
  check_saved(args.op, "row_stats", row_stats, loss.acc_dtype, 2 * loss.rows(), args.input);
  check_saved(args.op, "total_weight", total_weight, loss.acc_dtype, 1, args.input);
  if (out.defined()) check_out(args.op, out, args.input, args.target, args.weight);
  Tensor grad = empty_gradient(loss, out), computed = grad;
  if (loss.rows() > 0) {
    const Arrays arrays = share_layout(loss, &computed);
    const Tensor contiguous_stats = aligned(apart_from(row_stats, out).contiguous()),
                 divisor = aligned(apart_from(total_weight, out));
    CrossEntropyBackward p = backward_problem(loss, arrays, computed, contiguous_stats, divisor, args.reduction);
    p.grad_output = incoming;
    p.grad_output_stride = incoming_stride;
    Chunks chunks(p.extent, p.layout, /*split_rows=*/!loss.probabilities_given);
    chunks.stream = is_streamed(computed) && p.grad_logits != p.logits;
    const auto kernel = cpu_capability().kernels->cross_entropy_backward[static_cast<int>(loss.float_type())];
    raise_if_bad(sum_over_chunks(chunks, [&](int64_t chunk, ChunkResult& r) { kernel(p, chunks, chunk, r); }), args,
                 loss);
  }
  return finish_gradient(computed, grad, args.input.scalar_type(), out);
}

// The divisor of the mean, before any row is looked at. A class out of range raises.
double divisor_of(const LossProblem& loss, const LossArguments& args) {
  if (loss.probabilities_given) return loss.probability_rows();
  Extent targets{loss.rows(), 1, 1};
  const Chunks chunks(targets, Layout::kRows);
  const int64_t classes = args.input.size(loss.class_dim);
  const Targets& t = loss.targets;
  const auto weight_of = [&](int64_t y) {
    if (!t.weight) return 1.;
    return loss.acc_dtype == at::kDouble ? static_cast<const double*>(t.weight)[y]
                                         : static_cast<double>(static_cast<const float*>(t.weight)[y]);
  };
  const ChunkResult total = sum_over_chunks(chunks, [&](int64_t chunk, ChunkResult& r) {
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      const int64_t y = load_index(t.index, t.index_type, row);
      if (y == t.ignore_index) continue;
      if (is_class(y, classes)) {
        r.weight += weight_of(y);
      } else if (r.bad_target < 0) {
        r.bad_target = row;
      }
    }
  });
  raise_if_bad(total, args, loss);
  return index_divisor(t, total.weight);
}

std::tuple<Tensor, Tensor> value_and_grad(const LossArguments& args, OptionalDtype dtype, const Tensor& out) {
  LossProblem loss = make_loss_problem(args, dtype);
  check_reduced(args.op, args.reduction);
  if (out.defined()) check_out(args.op, out, args.input, args.target, args.weight);
  const double divisor = divisor_of(loss, args);
  Tensor value = empty_loss(loss, args.reduction), grad = empty_gradient(loss, out), computed = grad;
  ChunkResult total;
  if (loss.rows() > 0 && args.input.numel() > 0) {
    const Tensor row_stats = empty_beside(args.input, loss.stats_sizes(), loss.acc_dtype);
    Tensor one = empty_beside(args.input, {}, loss.acc_dtype),
           total_weight = empty_beside(args.input, {}, loss.acc_dtype);
    set_scalar(one, 1.);
    set_scalar(total_weight, divisor);
    const Arrays arrays = share_layout(loss, &computed);
    const CrossEntropyForward f = forward_problem(loss, arrays, row_stats);
    CrossEntropyBackward b = backward_problem(loss, arrays, computed, row_stats, total_weight, args.reduction);
    b.grad_output = one.const_data_ptr();
    const int type = static_cast<int>(loss.float_type());
    const CpuKernels& kernels = *cpu_capability().kernels;
    Chunks chunks(f.extent, f.layout, /*split_rows=*/!loss.probabilities_given);
    chunks.stream = is_streamed(computed) && b.grad_logits != b.logits;
    total = run_cross_entropy_value_and_grad(kernels, f, b, chunks, type);
  }
  set_scalar(value, static_cast<Reduction>(args.reduction) == Reduction::kSum ? total.loss : total.loss / divisor);
  return {value, finish_gradient(computed, grad, args.input.scalar_type(), out)};
}

}  // namespace

Tensor cross_entropy_backward_cpu(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                                  const OptionalTensor& weight, const Tensor& row_stats, const Tensor& total_weight,
                                  int64_t reduction, int64_t ignore_index, double label_smoothing) {
  return cross_entropy_gradient(
      grad_output, {"cross_entropy", "logits", true, logits, target, weight, reduction, ignore_index, label_smoothing},
      row_stats, total_weight, Tensor());
}

Tensor& cross_entropy_backward_out_cpu(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                                       const OptionalTensor& weight, const Tensor& row_stats,
                                       const Tensor& total_weight, int64_t reduction, int64_t ignore_index,
                                       double label_smoothing, Tensor& out) {
  cross_entropy_gradient(
      grad_output, {"cross_entropy", "logits", true, logits, target, weight, reduction, ignore_index, label_smoothing},
      row_stats, total_weight, out);
  return out;
}

std::tuple<Tensor, Tensor> cross_entropy_value_and_grad_cpu(const Tensor& logits, const Tensor& target,
                                                            const OptionalTensor& weight, int64_t reduction,
                                                            int64_t ignore_index, double label_smoothing,
                                                            OptionalDtype dtype) {
  return value_and_grad(
      {"cross_entropy", "logits", true, logits, target, weight, reduction, ignore_index, label_smoothing}, dtype,
      Tensor());
}

Tensor cross_entropy_value_and_grad_out_cpu(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                            int64_t reduction, int64_t ignore_index, double label_smoothing,
                                            OptionalDtype dtype, Tensor& out) {
  return std::get<0>(value_and_grad(
      {"cross_entropy", "logits", true, logits, target, weight, reduction, ignore_index, label_smoothing}, dtype, out));
}

TORCH_LIBRARY_IMPL(nllx, CPU, m) {
  m.impl("cross_entropy_forward", &cross_entropy_forward_cpu);
  m.impl("cross_entropy_backward", &cross_entropy_backward_cpu);
  m.impl("cross_entropy_backward.out", &cross_entropy_backward_out_cpu);
  m.impl("cross_entropy_value_and_grad", &cross_entropy_value_and_grad_cpu);
  m.impl("cross_entropy_value_and_grad_out", &cross_entropy_value_and_grad_out_cpu);
}

}  // namespace nllx
