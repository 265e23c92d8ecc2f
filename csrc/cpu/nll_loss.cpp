// CPU entries of nll_loss.
#include <torch/library.h>

#include "capability.h"
#include "large_memory.h"
#include "reduce.h"

namespace nllx {

using at::Tensor;

namespace {

constexpr int64_t kGatheredRow = 128;

}  // namespace

std::tuple<Tensor, Tensor> nll_loss_forward_cpu(const Tensor& log_probs, const Tensor& target,
                                                const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                                OptionalDtype dtype) {
  const LossArguments args{"nll_loss", "log_probs", false, log_probs, target, weight, reduction, ignore_index};
  LossProblem loss = make_loss_problem(args, dtype);
  Tensor result = empty_loss(loss, reduction);
  Tensor total_weight = empty_beside(log_probs, {}, loss.acc_dtype);
  ChunkResult total;
  if (loss.rows() > 0) {
    NllLossForward p;
    const Arrays arrays = share_layout(loss, nullptr);
    p.extent = arrays.extent;
    p.log_probs = loss.input.const_data_ptr();
    p.strides = arrays.strides[0];
    p.targets = loss.targets;
    if (static_cast<Reduction>(reduction) == Reduction::kNone) p.row_loss = result.mutable_data_ptr();
    p.row_loss_is_acc = loss.loss_is_acc();
    // One number per row is read, whatever the layout; where rows are long, each comes from a page of its own, and
    // takes as long as some kGatheredRow logits that are read one after the other.
    Extent gathered = p.extent;
    if (gathered.classes > kGatheredRow) gathered.classes = kGatheredRow;
    const Chunks chunks(gathered, Layout::kRows);
    const auto kernel = cpu_capability().kernels->nll_loss_forward[static_cast<int>(loss.float_type())];
    total = sum_over_chunks(chunks, [&](int64_t chunk, ChunkResult& r) { kernel(p, chunks, chunk, r); });
    raise_if_bad(total, args, loss);
  }
  reduce(total, loss, reduction, result, total_weight);
  return {result, total_weight};
}

Tensor nll_loss_backward_cpu(const Tensor& grad_output, const Tensor& log_probs, const Tensor& target,
                             const OptionalTensor& weight, const Tensor& total_weight, int64_t reduction,
                             int64_t ignore_index) {
  const LossArguments args{"nll_loss", "log_probs", false, log_probs, target, weight, reduction, ignore_index};
  LossProblem loss = make_loss_problem(args, std::nullopt);
  NllLossBackward p;
  const Tensor g = incoming_gradient(grad_output, loss, args.op, reduction, p.grad_output, p.grad_output_stride);
  check_saved(args.op, "total_weight", total_weight, loss.acc_dtype, 1, log_probs);
  const Tensor divisor = aligned(total_weight);
  Tensor grad = empty_like_large(log_probs);
  if (loss.rows() == 0) return grad;
  Tensor computed = grad;
  const Arrays arrays = writable_arrays(computed, loss.class_dim);  // the input itself is not read
  p.extent = arrays.extent;
  p.layout = arrays.layout;
  p.targets = loss.targets;
  if (is_mean(static_cast<Reduction>(reduction))) p.total_weight = divisor.const_data_ptr();
  p.grad_log_probs = computed.mutable_data_ptr();
  p.grad_strides = arrays.strides[0];
  Chunks chunks(p.extent, p.layout);
  chunks.stream = is_streamed(computed);
  const auto kernel = cpu_capability().kernels->nll_loss_backward[static_cast<int>(loss.float_type())];
  raise_if_bad(sum_over_chunks(chunks, [&](int64_t chunk, ChunkResult& r) { kernel(p, chunks, chunk, r); }), args,
               loss);
  return finish_gradient(computed, grad, log_probs.scalar_type());
}

TORCH_LIBRARY_IMPL(nllx, CPU, m) {
  m.impl("nll_loss_forward", &nll_loss_forward_cpu);
  m.impl("nll_loss_backward", &nll_loss_backward_cpu);
}

}  // namespace nllx
