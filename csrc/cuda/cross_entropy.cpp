// CUDA entries of cross_entropy: checks, problem, launches on the current stream. No call waits for the device.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "bad_target.h"
#include "outputs.h"

namespace nllx {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_cuda(const Tensor& logits, const Tensor& target,
                                                              const OptionalTensor& weight, int64_t reduction,
                                                              int64_t ignore_index, double label_smoothing,
                                                              OptionalDtype dtype) {
  raise_pending_bad_target();
  const LossArguments args{"cross_entropy", "logits",  true,         logits,         target,
                           weight,          reduction, ignore_index, label_smoothing};
  LossProblem loss = make_loss_problem(args, dtype);  // refuses logits that are not on a GPU
  const c10::cuda::CUDAGuard guard(logits.device());
  Tensor result = empty_loss(loss, reduction);
  Tensor row_stats = at::empty(loss.stats_sizes(), logits.options().dtype(loss.acc_dtype));
  Tensor total_weight = at::empty({}, logits.options().dtype(loss.acc_dtype));
  if (loss.rows() == 0 || (loss.probabilities_given && logits.numel() == 0)) {
    row_stats.zero_();
    fill_empty(loss, reduction, result, total_weight);
    return {result, row_stats, total_weight};
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  CrossEntropyForward p = forward_problem(loss, share_layout(loss, nullptr), row_stats);
  if (is_per_row(reduction)) {
    p.row_loss = result.mutable_data_ptr();
    p.row_loss_is_acc = loss.loss_is_acc();
  }
  const FloatType type = loss.float_type();
  const CudaDevice device = current_cuda_device();
  const Outputs outputs(reduction, result, total_weight,
                        cross_entropy_workspace(CudaOp::kForward, p, nullptr, type, device), stream);
  C10_CUDA_CHECK(launch_cross_entropy_forward(p, outputs.reduction, type, device, bad_target_record(), stream));
  raise_bad_target_if_synchronous(stream);
  return {result, row_stats, total_weight};
}

namespace {

// The gradient, in `out` where that is defined.
Tensor cross_entropy_gradient(const Tensor& grad_output, const LossArguments& args, const Tensor& row_stats,
                              const Tensor& total_weight, const Tensor& out) {
  raise_pending_bad_target();
  LossProblem loss = make_loss_problem(args, std::nullopt);
  const c10::cuda::CUDAGuard guard(args.input.device());
  const void* incoming = nullptr;
  int64_t incoming_stride = 0;
  const Tensor g =
      incoming_gradient(apart_from(grad_output, out), loss, args.op, args.reduction, incoming, incoming_stride);
  check_saved(args.op, "row_stats", row_stats, loss.acc_dtype, 2 * loss.rows(), args.input);
  check_saved(args.op, "total_weight", total_weight, loss.acc_dtype, 1, args.input);
  if (out.defined()) check_out(args.op, out, args.input, args.target, args.weight);
  const bool direct = out.defined() && out.scalar_type() == loss.input.scalar_type() && is_aligned(out);
  Tensor grad = direct ? out : at::empty_like(loss.input), computed = grad;
  if (grad.numel() > 0) {
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    const Arrays arrays = share_layout(loss, &computed);
    const Tensor contiguous_stats = aligned(apart_from(row_stats, out).contiguous()),
                 divisor = aligned(apart_from(total_weight, out));
    CrossEntropyBackward p = backward_problem(loss, arrays, computed, contiguous_stats, divisor, args.reduction);
    p.grad_output = incoming;
    p.grad_output_stride = incoming_stride;
    const Tensor mass =
        at::empty({loss.probabilities_given ? loss.rows() : 0}, args.input.options().dtype(loss.acc_dtype));
    C10_CUDA_CHECK(launch_cross_entropy_backward(p, loss.float_type(), current_cuda_device(), mass.mutable_data_ptr(),
                                                 bad_target_record(), stream));
    raise_bad_target_if_synchronous(stream);
  }
  return finish_gradient(computed, grad, args.input.scalar_type(), out);
}

// In one pass over the logits where the row fits the chip, the gradient in `out` where that is defined.
std::tuple<Tensor, Tensor> value_and_grad(const LossArguments& args, OptionalDtype dtype, const Tensor& out) {
  check_reduced(args.op, args.reduction);
  raise_pending_bad_target();
  LossProblem loss = make_loss_problem(args, dtype);
  const c10::cuda::CUDAGuard guard(args.input.device());
  if (out.defined()) check_out(args.op, out, args.input, args.target, args.weight);
  const at::TensorOptions accs = loss.input.options().dtype(loss.acc_dtype);
  Tensor result = empty_loss(loss, args.reduction), total_weight = at::empty({2}, accs);
  const bool direct = out.defined() && out.scalar_type() == loss.input.scalar_type() && is_aligned(out);
  Tensor grad = direct ? out : at::empty_like(loss.input), computed = grad;
  if (loss.rows() == 0 || loss.input.numel() == 0) {
    // Rows without classes have a loss, and no gradient.
    auto [value, row_stats, weight] = cross_entropy_forward_cuda(args.input, args.target, args.weight, args.reduction,
                                                                 args.ignore_index, args.label_smoothing, dtype);
    return {value, finish_gradient(computed, grad, args.input.scalar_type(), out)};
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Tensor row_stats = at::empty(loss.stats_sizes(), accs);
  const Arrays arrays = share_layout(loss, &computed);
  const CrossEntropyForward p = forward_problem(loss, arrays, row_stats);
  CrossEntropyBackward b = backward_problem(loss, arrays, computed, row_stats, total_weight, args.reduction);
  b.total_weight = nullptr;  // known to the launch
  const FloatType type = loss.float_type();
  const CudaDevice device = current_cuda_device();
  Outputs outputs(args.reduction, result, total_weight,
                  cross_entropy_workspace(CudaOp::kValueAndGrad, p, &b, type, device), stream);
  outputs.reduction.divisor = static_cast<char*>(total_weight.mutable_data_ptr()) + total_weight.element_size();
  const Tensor mass = at::empty({loss.probabilities_given ? loss.rows() : 0}, accs);
  C10_CUDA_CHECK(launch_cross_entropy_value_and_grad(p, b, outputs.reduction, type, device, mass.mutable_data_ptr(),
                                                     bad_target_record(), stream));
  raise_bad_target_if_synchronous(stream);
  return {result, finish_gradient(computed, grad, args.input.scalar_type(), out)};
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

TORCH_LIBRARY_IMPL(nllx, CUDA, m) {
  m.impl("cross_entropy_forward", &cross_entropy_forward_cuda);
  m.impl("cross_entropy_backward", &cross_entropy_backward_cuda);
  m.impl("cross_entropy_backward.out", &cross_entropy_backward_out_cuda);
  m.impl("cross_entropy_value_and_grad", &cross_entropy_value_and_grad_cuda);
  m.impl("cross_entropy_value_and_grad_out", &cross_entropy_value_and_grad_out_cuda);
}

}  // namespace nllx
