// CUDA entries of cross_entropy and nll_loss: checks, problem, launches on the current stream. No call waits for the
// device.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>

#include "../loss_problem.h"
#include "../ops.h"
#include "bad_target.h"
#include "kernels.h"

namespace nllx {

using at::Tensor;

namespace {

// Where the losses of the rows go: into the result itself, or into a workspace that is then summed.
struct RowLoss {
  Tensor workspace;
  void* pointer;
  bool is_acc;
  RowLoss(const LossProblem& loss, int64_t reduction, Tensor& result) {
    const bool per_row = static_cast<Reduction>(reduction) == Reduction::kNone;
    workspace = per_row ? result : at::empty({loss.rows()}, loss.input.options().dtype(loss.acc_dtype));
    pointer = workspace.mutable_data_ptr();
    is_acc = per_row ? loss.loss_is_acc() : true;
  }
};

void reduce_rows(const LossProblem& loss, const Extent& extent, const RowLoss& rows, int64_t reduction, Tensor& result,
                 Tensor& total_weight, cudaStream_t stream) {
  LossReduction r;
  r.reduction = static_cast<Reduction>(reduction);
  r.loss_is_acc = loss.loss_is_acc();
  r.loss = result.mutable_data_ptr();
  r.total_weight = total_weight.mutable_data_ptr();
  const Tensor partials = at::empty({2 * loss_partials(loss.rows())}, loss.input.options().dtype(at::kDouble));
  r.partials = partials.mutable_data_ptr<double>();
  C10_CUDA_CHECK(launch_loss_reduction(r, extent, loss.targets, rows.pointer, rows.is_acc, loss.float_type(), stream));
}

// The loss of no rows, or of rows without classes.
void fill_empty(const LossProblem& loss, int64_t reduction, Tensor& result, Tensor& total_weight) {
  total_weight.fill_(loss.probability_rows());
  result.fill_(static_cast<Reduction>(reduction) == Reduction::kMean ? std::numeric_limits<double>::quiet_NaN() : 0.);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_cuda(const Tensor& logits, const Tensor& target,
                                                              const OptionalTensor& weight, int64_t reduction,
                                                              int64_t ignore_index, double label_smoothing,
                                                              OptionalDtype dtype) {
  raise_pending_bad_target();
  const c10::cuda::CUDAGuard guard(logits.device());
  const LossArguments args{"cross_entropy", "logits",  true,         logits,         target,
                           weight,          reduction, ignore_index, label_smoothing};
  LossProblem loss = make_loss_problem(args, dtype);
  Tensor result = empty_loss(loss, reduction);
  Tensor row_stats = at::empty(loss.stats_sizes(), logits.options().dtype(loss.acc_dtype));
  Tensor total_weight = at::empty({}, logits.options().dtype(loss.acc_dtype));
  if (loss.rows() == 0 || (loss.probabilities_given && logits.numel() == 0)) {
    row_stats.zero_();
    fill_empty(loss, reduction, result, total_weight);
    return {result, row_stats, total_weight};
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const RowLoss rows(loss, reduction, result);
  CrossEntropyForward p = forward_problem(loss, share_layout(loss, nullptr), row_stats);
  p.row_loss = rows.pointer;
  p.row_loss_is_acc = rows.is_acc;
  C10_CUDA_CHECK(launch_cross_entropy_forward(p, loss.float_type(), bad_target_record(), stream));
  reduce_rows(loss, p.extent, rows, reduction, result, total_weight, stream);
  raise_bad_target_if_synchronous(stream);
  return {result, row_stats, total_weight};
}

namespace {

// The gradient, in `out` where that is defined.
Tensor cross_entropy_gradient(const Tensor& grad_output, const LossArguments& args, const Tensor& row_stats,
                              const Tensor& total_weight, const Tensor& out) {
  raise_pending_bad_target();
  const c10::cuda::CUDAGuard guard(args.input.device());
  LossProblem loss = make_loss_problem(args, std::nullopt);
  const void* incoming = nullptr;
  int64_t incoming_stride = 0;
  const Tensor g = incoming_gradient(grad_output, loss, args.op, args.reduction, incoming, incoming_stride);
  check_saved(args.op, "row_stats", row_stats, loss.acc_dtype, 2 * loss.rows(), args.input);
  check_saved(args.op, "total_weight", total_weight, loss.acc_dtype, 1, args.input);
  if (out.defined()) check_out(args.op, out, args.input, args.target, args.weight);
  const bool direct = out.defined() && out.scalar_type() == loss.input.scalar_type();
  Tensor grad = direct ? out : at::empty_like(loss.input), computed = grad;
  if (grad.numel() > 0) {
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    const Arrays arrays = share_layout(loss, &computed);
    const Tensor contiguous_stats = row_stats.contiguous();
    CrossEntropyBackward p = backward_problem(loss, arrays, computed, contiguous_stats, total_weight, args.reduction);
    p.grad_output = incoming;
    p.grad_output_stride = incoming_stride;
    const Tensor mass =
        at::empty({loss.probabilities_given ? loss.rows() : 0}, args.input.options().dtype(loss.acc_dtype));
    C10_CUDA_CHECK(
        launch_cross_entropy_backward(p, loss.float_type(), mass.mutable_data_ptr(), bad_target_record(), stream));
    raise_bad_target_if_synchronous(stream);
  }
  return finish_gradient(computed, grad, args.input.scalar_type(), out);
}

// Forward and backward, one after the other.
std::tuple<Tensor, Tensor> value_and_grad(const LossArguments& args, OptionalDtype dtype, const Tensor& out) {
  check_reduced(args.op, args.reduction);
  auto [loss, row_stats, total_weight] = cross_entropy_forward_cuda(
      args.input, args.target, args.weight, args.reduction, args.ignore_index, args.label_smoothing, dtype);
  const Tensor one = at::ones({}, total_weight.options());
  return {loss, cross_entropy_gradient(one, args, row_stats, total_weight, out)};
}

}  // namespace

Tensor cross_entropy_backward_cuda(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                                   const OptionalTensor& weight, const Tensor& row_stats, const Tensor& total_weight,
                                   int64_t reduction, int64_t ignore_index, double label_smoothing) {
  return cross_entropy_gradient(
      grad_output, {"cross_entropy", "logits", true, logits, target, weight, reduction, ignore_index, label_smoothing},
      row_stats, total_weight, Tensor());
}

Tensor& cross_entropy_backward_out_cuda(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                                        const OptionalTensor& weight, const Tensor& row_stats,
                                        const Tensor& total_weight, int64_t reduction, int64_t ignore_index,
                                        double label_smoothing, Tensor& out) {
  cross_entropy_gradient(
      grad_output, {"cross_entropy", "logits", true, logits, target, weight, reduction, ignore_index, label_smoothing},
      row_stats, total_weight, out);
  return out;
}

std::tuple<Tensor, Tensor> cross_entropy_value_and_grad_cuda(const Tensor& logits, const Tensor& target,
                                                             const OptionalTensor& weight, int64_t reduction,
                                                             int64_t ignore_index, double label_smoothing,
                                                             OptionalDtype dtype) {
  return value_and_grad(
      {"cross_entropy", "logits", true, logits, target, weight, reduction, ignore_index, label_smoothing}, dtype,
      Tensor());
}

Tensor cross_entropy_value_and_grad_out_cuda(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                             int64_t reduction, int64_t ignore_index, double label_smoothing,
                                             OptionalDtype dtype, Tensor& out) {
  return std::get<0>(value_and_grad(
      {"cross_entropy", "logits", true, logits, target, weight, reduction, ignore_index, label_smoothing}, dtype, out));
}

std::tuple<Tensor, Tensor> nll_loss_forward_cuda(const Tensor& log_probs, const Tensor& target,
                                                 const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                                 OptionalDtype dtype) {
  raise_pending_bad_target();
  const c10::cuda::CUDAGuard guard(log_probs.device());
  const LossArguments args{"nll_loss", "log_probs", false, log_probs, target, weight, reduction, ignore_index};
  LossProblem loss = make_loss_problem(args, dtype);
  Tensor result = empty_loss(loss, reduction);
  Tensor total_weight = at::empty({}, log_probs.options().dtype(loss.acc_dtype));
  if (loss.rows() == 0) {
    fill_empty(loss, reduction, result, total_weight);
    return {result, total_weight};
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const RowLoss rows(loss, reduction, result);
  NllLossForward p;
  const Arrays arrays = share_layout(loss, nullptr);
  p.extent = arrays.extent;
  p.log_probs = loss.input.const_data_ptr();
  p.strides = arrays.strides[0];
  p.targets = loss.targets;
  p.row_loss = rows.pointer;
  p.row_loss_is_acc = rows.is_acc;
  C10_CUDA_CHECK(launch_nll_loss_forward(p, loss.float_type(), bad_target_record(), stream));
  reduce_rows(loss, p.extent, rows, reduction, result, total_weight, stream);
  raise_bad_target_if_synchronous(stream);
  return {result, total_weight};
}

Tensor nll_loss_backward_cuda(const Tensor& grad_output, const Tensor& log_probs, const Tensor& target,
                              const OptionalTensor& weight, const Tensor& total_weight, int64_t reduction,
                              int64_t ignore_index) {
  raise_pending_bad_target();
  const c10::cuda::CUDAGuard guard(log_probs.device());
  const LossArguments args{"nll_loss", "log_probs", false, log_probs, target, weight, reduction, ignore_index};
  LossProblem loss = make_loss_problem(args, std::nullopt);
  NllLossBackward p;
  const Tensor g = incoming_gradient(grad_output, loss, args.op, reduction, p.grad_output, p.grad_output_stride);
  check_saved(args.op, "total_weight", total_weight, loss.acc_dtype, 1, log_probs);
  Tensor grad = at::empty_like(log_probs);
  if (grad.numel() == 0) return grad;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  Tensor computed = grad;
  const Arrays arrays = writable_arrays(computed, loss.class_dim);
  p.extent = arrays.extent;
  p.layout = arrays.layout;
  p.targets = loss.targets;
  if (static_cast<Reduction>(reduction) == Reduction::kMean) p.total_weight = total_weight.const_data_ptr();
  p.grad_log_probs = computed.mutable_data_ptr();
  p.grad_strides = arrays.strides[0];
  C10_CUDA_CHECK(launch_nll_loss_backward(p, loss.float_type(), bad_target_record(), stream));
  raise_bad_target_if_synchronous(stream);
  return finish_gradient(computed, grad, log_probs.scalar_type());
}

Tensor checked_target_cuda(const Tensor& target, int64_t classes, int64_t ignore_index, std::string_view /*op*/) {
  raise_pending_bad_target();
  const c10::cuda::CUDAGuard guard(target.device());
  const Tensor source = target.contiguous();
  Tensor result = at::empty(target.sizes(), target.options().dtype(at::kLong));
  if (target.numel() == 0) return result;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(launch_checked_target(source.const_data_ptr(), index_type(source.scalar_type()), source.numel(),
                                       classes, ignore_index, result.mutable_data_ptr<int64_t>(), bad_target_record(),
                                       stream));
  raise_bad_target_if_synchronous(stream);
  return result;
}

TORCH_LIBRARY_IMPL(nllx, CUDA, m) {
  m.impl("cross_entropy_forward", &cross_entropy_forward_cuda);
  m.impl("cross_entropy_backward", &cross_entropy_backward_cuda);
  m.impl("cross_entropy_backward.out", &cross_entropy_backward_out_cuda);
  m.impl("cross_entropy_value_and_grad", &cross_entropy_value_and_grad_cuda);
  m.impl("cross_entropy_value_and_grad_out", &cross_entropy_value_and_grad_out_cuda);
  m.impl("nll_loss_forward", &nll_loss_forward_cuda);
  m.impl("nll_loss_backward", &nll_loss_backward_cuda);
  m.impl("_checked_target", &checked_target_cuda);
}

}  // namespace nllx
