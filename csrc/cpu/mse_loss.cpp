// CPU entries of mse_loss.
#include <torch/library.h>

#include <array>

#include "../elementwise.h"
#include "../loss_problem.h"
#include "capability.h"
#include "large_memory.h"
#include "parallel.h"
#include "reduce.h"

namespace nllx {

using at::Tensor;

std::tuple<Tensor, Tensor> mse_loss_forward_cpu(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                                int64_t reduction, OptionalDtype dtype) {
  ElementwiseLoss loss = make_elementwise_loss({"mse_loss", input, target, weight, reduction}, dtype);
  const bool per_element = static_cast<Reduction>(reduction) == Reduction::kNone;
  Tensor result = empty_elementwise_loss(loss, reduction);
  if (is_streamed(result)) result = empty_like_large(result);  // what was not written to costs nothing
  Tensor total_weight = empty_beside(input, {}, loss.acc_dtype);
  ChunkResult total;
  if (input.numel() > 0) {
    Tensor computed = per_element ? result : Tensor();
    const ElementwiseForward p = elementwise_forward(loss, computed);
    Chunks chunks(p.elements);
    chunks.stream = per_element && is_streamed(computed);
    const auto kernel = cpu_capability().kernels->mse_loss_forward[static_cast<int>(loss.float_type())];
    total = sum_over_chunks(chunks, [&](int64_t chunk, ChunkResult& r) { kernel(p, chunks, chunk, r); });
    if (per_element && !computed.is_same(result)) result.copy_(computed);
  }
  set_scalar(total_weight, total.weight);
  if (!per_element) {
    set_scalar(result, static_cast<Reduction>(reduction) == Reduction::kSum ? total.loss : total.loss / total.weight);
  }
  return {result, total_weight};
}

std::tuple<Tensor, Tensor> mse_loss_backward_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                                 const OptionalTensor& weight, const Tensor& total_weight,
                                                 int64_t reduction, std::array<bool, 2> output_mask) {
  const ElementwiseArguments args{"mse_loss", input, target, weight, reduction};
  ElementwiseLoss loss = make_elementwise_loss(args, std::nullopt);
  Tensor g = elementwise_grad_output(args, loss, grad_output);
  check_saved(args.op, "total_weight", total_weight, loss.acc_dtype, 1, input);
  const Tensor divisor = is_mean(static_cast<Reduction>(reduction)) ? aligned(total_weight) : Tensor();
  Tensor grad_input, grad_target;
  if (output_mask[0]) grad_input = empty_like_large(input);
  if (output_mask[1]) grad_target = empty_like_large(target);
  if (input.numel() == 0 || !(output_mask[0] || output_mask[1])) return {grad_input, grad_target};

  Tensor computed_input = grad_input, computed_target = grad_target;
  const ElementwiseBackward p = elementwise_backward(loss, g, divisor, computed_input, computed_target);
  Chunks chunks(p.elements);
  chunks.stream = is_streamed(input);
  const auto kernel = cpu_capability().kernels->mse_loss_backward[static_cast<int>(loss.float_type())];
  for_each_chunk(chunks, [&](int64_t chunk) { kernel(p, chunks, chunk); });
  if (!computed_input.is_same(grad_input)) grad_input.copy_(computed_input);
  if (!computed_target.is_same(grad_target)) grad_target.copy_(computed_target);
  return {grad_input, grad_target};
}

TORCH_LIBRARY_IMPL(nllx, CPU, m) {
  m.impl("mse_loss_forward", &mse_loss_forward_cpu);
  m.impl("mse_loss_backward", &mse_loss_backward_cpu);
}

}  // namespace nllx
