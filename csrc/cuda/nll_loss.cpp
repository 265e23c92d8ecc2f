// CUDA entries of nll_loss.
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

std::tuple<Tensor, Tensor> nll_loss_forward_cuda(const Tensor& log_probs, const Tensor& target,
                                                 const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                                 OptionalDtype dtype) {
  raise_pending_bad_target();
  const LossArguments args{"nll_loss", "log_probs", false, log_probs, target, weight, reduction, ignore_index};
  LossProblem loss = make_loss_problem(args, dtype);
  const c10::cuda::CUDAGuard guard(log_probs.device());
  Tensor result = empty_loss(loss, reduction);
  Tensor total_weight = at::empty({}, log_probs.options().dtype(loss.acc_dtype));
  if (loss.rows() == 0) {
    fill_empty(loss, reduction, result, total_weight);
    return {result, total_weight};
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  NllLossForward p;
  const Arrays arrays = share_layout(loss, nullptr);
  p.extent = arrays.extent;
  p.log_probs = loss.input.const_data_ptr();
  p.strides = arrays.strides[0];
  p.targets = loss.targets;
  if (is_per_row(reduction)) {
    p.row_loss = result.mutable_data_ptr();
    p.row_loss_is_acc = loss.loss_is_acc();
  }
  const Outputs outputs(reduction, result, total_weight, nll_loss_workspace(p), stream);
  C10_CUDA_CHECK(launch_nll_loss_forward(p, outputs.reduction, loss.float_type(), bad_target_record(), stream));
  raise_bad_target_if_synchronous(stream);
  return {result, total_weight};
}

Tensor nll_loss_backward_cuda(const Tensor& grad_output, const Tensor& log_probs, const Tensor& target,
                              const OptionalTensor& weight, const Tensor& total_weight, int64_t reduction,
                              int64_t ignore_index) {
  raise_pending_bad_target();
  const LossArguments args{"nll_loss", "log_probs", false, log_probs, target, weight, reduction, ignore_index};
  LossProblem loss = make_loss_problem(args, std::nullopt);
  const c10::cuda::CUDAGuard guard(log_probs.device());
  NllLossBackward p;
  const Tensor g = incoming_gradient(grad_output, loss, args.op, reduction, p.grad_output, p.grad_output_stride);
  check_saved(args.op, "total_weight", total_weight, loss.acc_dtype, 1, log_probs);
  const Tensor divisor = aligned(total_weight);
  Tensor grad = at::empty_like(log_probs);
  if (grad.numel() == 0) return grad;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  Tensor computed = grad;
  const Arrays arrays = writable_arrays(computed, loss.class_dim);
  p.extent = arrays.extent;
  p.layout = arrays.layout;
  p.targets = loss.targets;
  if (is_mean(static_cast<Reduction>(reduction))) p.total_weight = divisor.const_data_ptr();
  p.grad_log_probs = computed.mutable_data_ptr();
  p.grad_strides = arrays.strides[0];
  C10_CUDA_CHECK(launch_nll_loss_backward(p, loss.float_type(), current_cuda_device(), bad_target_record(), stream));
  raise_bad_target_if_synchronous(stream);
  return finish_gradient(computed, grad, log_probs.scalar_type());
}

TORCH_LIBRARY_IMPL(nllx, CUDA, m) {
  m.impl("nll_loss_forward", &nll_loss_forward_cuda);
  m.impl("nll_loss_backward", &nll_loss_backward_cuda);
}

}  // namespace nllx
