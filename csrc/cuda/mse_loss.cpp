// CUDA entries of mse_loss: checks, problem, launches on the current stream. No call waits for the device.
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <limits>

#include "../elementwise.h"
#include "../layout.h"
#include "../loss_problem.h"
#include "kernels/launches.h"
#include "outputs.h"

namespace nllx {

using at::Tensor;

std::tuple<Tensor, Tensor> mse_loss_forward_cuda(const Tensor& input, const Tensor& target,
                                                 const OptionalTensor& weight, int64_t reduction, OptionalDtype dtype) {
  ElementwiseLoss loss = make_elementwise_loss({"mse_loss", input, target, weight, reduction}, dtype);
  const c10::cuda::CUDAGuard guard(input.device());
  const bool per_element = static_cast<Reduction>(reduction) == Reduction::kNone;
  Tensor result = empty_elementwise_loss(loss, reduction);
  Tensor total_weight = empty_beside(input, {}, loss.acc_dtype);
  if (input.numel() == 0) {
    total_weight.zero_();
    result.fill_(is_mean(static_cast<Reduction>(reduction)) ? std::numeric_limits<double>::quiet_NaN() : 0.);
    return {result, total_weight};
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  Tensor computed = per_element ? result : Tensor();
  const ElementwiseForward p = elementwise_forward(loss, computed);
  const Outputs outputs(reduction, result, total_weight, elementwise_workspace(p.elements), stream);
  C10_CUDA_CHECK(launch_mse_loss_forward(p, outputs.reduction, loss.float_type(), stream));
  if (per_element && !computed.is_same(result)) result.copy_(computed);
  return {result, total_weight};
}

std::tuple<Tensor, Tensor> mse_loss_backward_cuda(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                                  const OptionalTensor& weight, const Tensor& total_weight,
                                                  int64_t reduction, std::array<bool, 2> output_mask) {
  const ElementwiseArguments args{"mse_loss", input, target, weight, reduction};
  ElementwiseLoss loss = make_elementwise_loss(args, std::nullopt);
  const c10::cuda::CUDAGuard guard(input.device());
  Tensor g = elementwise_grad_output(args, loss, grad_output);
  check_saved(args.op, "total_weight", total_weight, loss.acc_dtype, 1, input);
  const Tensor divisor = is_mean(static_cast<Reduction>(reduction)) ? aligned(total_weight) : Tensor();
  Tensor grad_input, grad_target;
  if (output_mask[0]) grad_input = at::empty_like(input);
  if (output_mask[1]) grad_target = at::empty_like(target);
  if (input.numel() == 0 || !(output_mask[0] || output_mask[1])) return {grad_input, grad_target};
  Tensor computed_input = grad_input, computed_target = grad_target;
  const ElementwiseBackward p = elementwise_backward(loss, g, divisor, computed_input, computed_target);
  C10_CUDA_CHECK(launch_mse_loss_backward(p, loss.float_type(), c10::cuda::getCurrentCUDAStream()));
  if (!computed_input.is_same(grad_input)) grad_input.copy_(computed_input);
  if (!computed_target.is_same(grad_target)) grad_target.copy_(computed_target);
  return {grad_input, grad_target};
}

TORCH_LIBRARY_IMPL(nllx, CUDA, m) {
  m.impl("mse_loss_forward", &mse_loss_forward_cuda);
  m.impl("mse_loss_backward", &mse_loss_backward_cuda);
}

}  // namespace nllx
