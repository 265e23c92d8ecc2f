// CPU entries of cross_entropy and nll_loss: checks, problem, chunks, kernel, reduction.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "../loss_problem.h"
#include "../online_softmax.h"
#include "../ops.h"
#include "capability.h"
#include "large_memory.h"
#include "parallel.h"

namespace nllx {

using at::Tensor;

namespace {

void set_scalar(Tensor& t, double value) {
  if (t.scalar_type() == at::kDouble) {
    *t.mutable_data_ptr<double>() = value;
  } else if (t.scalar_type() == at::kFloat) {
    *t.mutable_data_ptr<float>() = static_cast<float>(value);
  } else {
    t.fill_(value);
  }
}

// With fewer classes the target's place, written after the row, would bring much of it back from memory.
constexpr int64_t kStreamedRow = 256;

void raise_if_bad(const ChunkResult& result, const LossArguments& a, const LossProblem& loss) {
  if (result.bad_target < 0) return;
  raise_bad_target(a.op, a.target.sizes(), result.bad_target,
                   load_index(loss.targets.index, loss.targets.index_type, result.bad_target),
                   a.input.size(loss.class_dim), a.ignore_index);
}

ChunkResult run_forward(const CrossEntropyForward& p, int type) {
  const CpuKernels& kernels = *cpu_capability().kernels;
  const Chunks chunks(p.extent, p.layout, /*split_rows=*/true);
  if (chunks.segments == 1) {
    return sum_over_chunks(
        chunks, [&](int64_t chunk, ChunkResult& r) { kernels.cross_entropy_forward[type](p, chunks, chunk, r); });
  }
  std::vector<RowPart> parts(static_cast<size_t>(chunks.units));
  for_each_chunk(chunks, [&](int64_t chunk) {
    for (int64_t unit = chunks.begin(chunk); unit < chunks.end(chunk); ++unit) {
      kernels.cross_entropy_forward_segment[type](p, chunks, unit, parts[static_cast<size_t>(unit)]);
    }
  });
  ChunkResult total;
  for (int64_t row = 0; row < p.extent.rows(); ++row) {
    kernels.cross_entropy_forward_merge[type](p, row, &parts[static_cast<size_t>(row * chunks.segments)],
                                              chunks.segments, total);
  }
  return total;
}

// The mean over nothing is NaN, as torch has it.
void reduce(const ChunkResult& result, const LossProblem& loss, int64_t reduction, Tensor& loss_tensor,
            Tensor& total_weight) {
  const double weight = loss.probabilities_given ? loss.probability_rows() : index_divisor(loss.targets, result.weight);
  set_scalar(total_weight, weight);
  if (static_cast<Reduction>(reduction) == Reduction::kSum) set_scalar(loss_tensor, result.loss);
  if (static_cast<Reduction>(reduction) == Reduction::kMean) set_scalar(loss_tensor, result.loss / weight);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_cpu(const Tensor& logits, const Tensor& target,
                                                             const OptionalTensor& weight, int64_t reduction,
                                                             int64_t ignore_index, double label_smoothing,
                                                             OptionalDtype dtype) {
  const LossArguments args{"cross_entropy", "logits",  true,         logits,         target,
                           weight,          reduction, ignore_index, label_smoothing};
  LossProblem loss = make_loss_problem(args, dtype);
  Tensor result = empty_loss(loss, reduction);
  Tensor row_stats = at::empty(loss.stats_sizes(), logits.options().dtype(loss.acc_dtype));
  Tensor total_weight = at::empty({}, logits.options().dtype(loss.acc_dtype));
  ChunkResult total;
  if (loss.probabilities_given &&
      logits.numel() == 0) {  // a sum over no classes is zero, though its log-sum-exp is -inf
    result.zero_();
    row_stats.zero_();
  } else if (loss.rows() > 0) {
    CrossEntropyForward p;
    const Arrays arrays = share_layout(loss, nullptr);
    p.extent = arrays.extent;
    p.layout = arrays.layout;
    p.logits = loss.input.const_data_ptr();
    p.logits_strides = arrays.strides[0];
    p.targets = loss.targets;
    if (static_cast<Reduction>(reduction) == Reduction::kNone) p.row_loss = result.mutable_data_ptr();
    p.row_loss_is_acc = loss.loss_is_acc();
    p.row_stats = row_stats.mutable_data_ptr();
    total = run_forward(p, static_cast<int>(loss.float_type()));
    raise_if_bad(total, args, loss);
  }
  reduce(total, loss, reduction, result, total_weight);
  return {result, row_stats, total_weight};
}

Tensor cross_entropy_backward_cpu(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                                  const OptionalTensor& weight, const Tensor& row_stats, const Tensor& total_weight,
                                  int64_t reduction, int64_t ignore_index, double label_smoothing) {
  const LossArguments args{"cross_entropy", "logits",  true,         logits,         target,
                           weight,          reduction, ignore_index, label_smoothing};
  LossProblem loss = make_loss_problem(args, std::nullopt);
  CrossEntropyBackward p;
  const Tensor g = incoming_gradient(grad_output, loss, args.op, reduction, p.grad_output, p.grad_output_stride);
  check_saved(args.op, "row_stats", row_stats, loss.acc_dtype, 2 * loss.rows(), logits);
  check_saved(args.op, "total_weight", total_weight, loss.acc_dtype, 1, logits);
  Tensor grad = empty_like_large(loss.input);
  if (loss.rows() == 0) return grad.to(logits.scalar_type());
  Tensor computed = grad;
  const Arrays arrays = share_layout(loss, &computed);
  const Tensor contiguous_stats = row_stats.contiguous();
  p.extent = arrays.extent;
  p.layout = arrays.layout;
  p.logits = loss.input.const_data_ptr();
  p.logits_strides = arrays.strides[0];
  p.targets = loss.targets;
  p.row_stats = contiguous_stats.const_data_ptr();
  if (static_cast<Reduction>(reduction) == Reduction::kMean) p.total_weight = total_weight.const_data_ptr();
  p.grad_logits = computed.mutable_data_ptr();
  p.grad_strides = arrays.strides[loss.probabilities_given ? 2 : 1];
  Chunks chunks(p.extent, p.layout, /*split_rows=*/!loss.probabilities_given);
  chunks.stream = is_streamed(computed) && p.grad_logits != p.logits;
  const auto kernel = cpu_capability().kernels->cross_entropy_backward[static_cast<int>(loss.float_type())];
  raise_if_bad(sum_over_chunks(chunks, [&](int64_t chunk, ChunkResult& r) { kernel(p, chunks, chunk, r); }), args,
               loss);
  return finish_gradient(computed, grad, logits.scalar_type());
}

std::tuple<Tensor, Tensor> nll_loss_forward_cpu(const Tensor& log_probs, const Tensor& target,
                                                const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                                OptionalDtype dtype) {
  const LossArguments args{"nll_loss", "log_probs", false, log_probs, target, weight, reduction, ignore_index};
  LossProblem loss = make_loss_problem(args, dtype);
  Tensor result = empty_loss(loss, reduction);
  Tensor total_weight = at::empty({}, log_probs.options().dtype(loss.acc_dtype));
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
    Extent gathered = p.extent;  // one number per row is read, whatever the layout
    gathered.classes = 1;
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
  Tensor grad = empty_like_large(log_probs);
  if (loss.rows() == 0) return grad;
  Tensor computed = grad;
  const Arrays arrays = writable_arrays(computed, loss.class_dim);  // the input itself is not read
  p.extent = arrays.extent;
  p.layout = arrays.layout;
  p.targets = loss.targets;
  if (static_cast<Reduction>(reduction) == Reduction::kMean) p.total_weight = total_weight.const_data_ptr();
  p.grad_log_probs = computed.mutable_data_ptr();
  p.grad_strides = arrays.strides[0];
  Chunks chunks(p.extent, p.layout);
  chunks.stream = is_streamed(computed) && (p.layout == Layout::kPlanes || p.extent.classes >= kStreamedRow);
  const auto kernel = cpu_capability().kernels->nll_loss_backward[static_cast<int>(loss.float_type())];
  raise_if_bad(sum_over_chunks(chunks, [&](int64_t chunk, ChunkResult& r) { kernel(p, chunks, chunk, r); }), args,
               loss);
  return finish_gradient(computed, grad, log_probs.scalar_type());
}

TORCH_LIBRARY_IMPL(nllx, CPU, m) {
  m.impl("cross_entropy_forward", &cross_entropy_forward_cpu);
  m.impl("cross_entropy_backward", &cross_entropy_backward_cpu);
  m.impl("nll_loss_forward", &nll_loss_forward_cpu);
  m.impl("nll_loss_backward", &nll_loss_backward_cpu);
}

}  // namespace nllx
