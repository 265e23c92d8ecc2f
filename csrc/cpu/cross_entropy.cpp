#include "cross_entropy.h"

#include "../entries/cross_entropy.h"
#include "device.h"

namespace nllx {

namespace {

// The divisor of the mean, before any row is looked at. A class out of range raises.
double divisor_beforehand(const LossProblem& loss, const LossArguments& args) {
  const auto factor_of = [&](int64_t row) {
    const void* factors = loss.options.sample_weight;
    if (!factors) return 1.;
    return loss.acc_dtype == at::kDouble ? static_cast<const double*>(factors)[row]
                                         : static_cast<double>(static_cast<const float*>(factors)[row]);
  };
  ChunkResult total;
  const int64_t classes = args.input.size(loss.class_dim);
  const Targets& t = loss.targets;
  const auto weight_of = [&](int64_t y) {
    if (!t.weight) return 1.;
    return loss.acc_dtype == at::kDouble ? static_cast<const double*>(t.weight)[y]
                                         : static_cast<double>(static_cast<const float*>(t.weight)[y]);
  };
  if (!loss.probabilities_given || loss.options.sample_weight) {
    const Chunks chunks({loss.rows(), 1, 1}, Layout::kRows);
    total = sum_over_chunks(chunks, [&](int64_t chunk, ChunkResult& r) {
      for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
        if (loss.probabilities_given) {
          r.weight += factor_of(row);
          continue;
        }
        const int64_t y = load_index(t.index, t.index_type, row);
        if (y == t.ignore_index) continue;
        if (is_class(y, classes)) {
          const double weight = factor_of(row) * weight_of(y);  // rounded as the kernels round it
          r.weight += loss.acc_dtype == at::kDouble ? weight : static_cast<double>(static_cast<float>(weight));
        } else if (r.bad_target < 0) {
          r.bad_target = row;
        }
      }
    });
    raise_if_bad(total, args, loss);
  }
  return divisor_of(total, loss, args.reduction);
}

struct CpuCrossEntropy : Cpu {
  using Cpu::Cpu;

  void forward(const CrossEntropyForward& p, const LossArguments& args, const LossProblem& loss, at::Tensor& result,
               at::Tensor& total_weight) const {
    const ChunkResult total = run_cross_entropy_forward(kernels(), p, static_cast<int>(loss.float_type()));
    raise_if_bad(total, args, loss);
    set_loss(total, divisor_of(total, loss, args.reduction), args.reduction, result, total_weight);
  }
  void backward(const CrossEntropyBackward& p, const LossArguments& args, const LossProblem& loss,
                const at::Tensor& computed, at::Tensor& grad_scale) const {
    sum_with_scale_gradient(p, chunks_of(p, loss, computed), kernels().cross_entropy_backward, args, loss, grad_scale);
  }
  void value_and_grad(const CrossEntropyForward& f, CrossEntropyBackward& b, const LossArguments& args,
                      const LossProblem& loss, const at::Tensor& computed, at::Tensor& value) const {
    at::Tensor one = empty_beside(args.input, {}, loss.acc_dtype),
               total_weight = empty_beside(args.input, {}, loss.acc_dtype);
    const double divisor = divisor_beforehand(loss, args);
    set_scalar(one, 1.);
    set_scalar(total_weight, divisor);
    b.grad_output = one.const_data_ptr();
    if (is_mean(static_cast<Reduction>(args.reduction))) b.total_weight = total_weight.const_data_ptr();
    const ChunkResult total = run_cross_entropy_value_and_grad(kernels(), f, b, chunks_of(b, loss, computed),
                                                               static_cast<int>(loss.float_type()));
    set_loss(total, divisor, args.reduction, value, total_weight);
  }

 private:
  static Chunks chunks_of(const CrossEntropyBackward& p, const LossProblem& loss, const at::Tensor& computed) {
    Chunks chunks(p.extent, p.layout, /*split_rows=*/!loss.probabilities_given);
    chunks.stream = is_streamed(computed) && p.grad_logits != p.logits;
    return chunks;
  }
};

TORCH_LIBRARY_IMPL(nllx, CPU, m) { CrossEntropyEntries<CpuCrossEntropy>::implement(m); }

}  // namespace

}  // namespace nllx
