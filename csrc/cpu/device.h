// The CPU as a device that csrc/entries runs on: chunks on torch's thread pool, and from their sums to the result.
#pragma once

#include <vector>

#include "../loss_problem.h"
#include "../online_softmax.h"
#include "capability.h"
#include "large_memory.h"
#include "parallel.h"

namespace nllx {

// `value` to a tensor of one element. Without the dispatcher but for half types: it takes as long as a small problem.
inline void set_scalar(at::Tensor& t, double value) {
  if (t.scalar_type() == at::kDouble) {
    *t.mutable_data_ptr<double>() = value;
  } else if (t.scalar_type() == at::kFloat) {
    *t.mutable_data_ptr<float>() = static_cast<float>(value);
  } else {
    t.fill_(value);
  }
}

// Sum or mean to `result`, which has the losses themselves where there is no reduction.
inline void set_loss(const ChunkResult& total, double divisor, int64_t reduction, at::Tensor& result,
                     at::Tensor& total_weight) {
  set_scalar(total_weight, divisor);
  if (static_cast<Reduction>(reduction) == Reduction::kSum) set_scalar(result, total.loss);
  if (is_mean(static_cast<Reduction>(reduction))) set_scalar(result, total.loss / divisor);
}

// The mean over nothing is NaN, as torch has it, unless zero is asked for.
inline double divisor_of(const ChunkResult& total, const LossProblem& loss) {
  if (loss.options.sample_weight) return total.weight == 0. ? loss.targets.zero_divisor : total.weight;
  return loss.probabilities_given ? loss.probability_rows() : index_divisor(loss.targets, total.weight);
}

// …or what was given.
inline double divisor_of(const ChunkResult& total, const LossProblem& loss, int64_t reduction) {
  if (!loss.divisor.defined()) return divisor_of(total, loss);
  return given_divisor(loss.divisor, reduction).item<double>();
}

inline void raise_if_bad(const ChunkResult& total, const LossArguments& a, const LossProblem& loss) {
  if (total.bad_target < 0) return;
  raise_bad_target(a.op, a.target.sizes(), total.bad_target,
                   load_index(loss.targets.index, loss.targets.index_type, total.bad_target),
                   a.input.size(loss.class_dim), a.ignore_index);
}

// What the devices of the operators derive from.
struct Cpu {
  explicit Cpu(const at::Tensor& /*input*/) {}

  static at::Tensor empty_like(const at::Tensor& like, std::optional<at::MemoryFormat> format = std::nullopt) {
    return empty_like_large(like, format);
  }
  // What nothing was written to yet, in memory that is kept.
  static at::Tensor written(const at::Tensor& t) { return is_streamed(t) ? empty_like_large(t) : t; }

 protected:
  static const CpuKernels& kernels() { return *cpu_capability().kernels; }

  template <typename Problem>
  static ChunkResult sum(const Problem& p, const Chunks& chunks, const CpuKernels::LossKernel<Problem> (&of_types)[4],
                         FloatType type) {
    const auto kernel = of_types[static_cast<int>(type)];
    return sum_over_chunks(chunks, [&](int64_t chunk, ChunkResult& r) { kernel(p, chunks, chunk, r); });
  }
  // …of which a class index out of range raises.
  template <typename Problem>
  static ChunkResult sum(const Problem& p, const Chunks& chunks, const CpuKernels::LossKernel<Problem> (&of_types)[4],
                         const LossArguments& args, const LossProblem& loss) {
    const ChunkResult total = sum(p, chunks, of_types, loss.float_type());
    raise_if_bad(total, args, loss);
    return total;
  }
  // …and what the rows give to logit_scale, to `grad_scale`, which is undefined where nobody asks for it: for each row,
  // or their sum, in the order of the rows.
  template <typename Problem>
  static void sum_with_scale_gradient(Problem p, const Chunks& chunks,
                                      const CpuKernels::LossKernel<Problem> (&of_types)[4], const LossArguments& args,
                                      const LossProblem& loss, at::Tensor& grad_scale) {
    const bool per_row = grad_scale.defined() && grad_scale.dim() > 0;
    std::vector<double> parts(per_row ? static_cast<size_t>(loss.rows() * chunks.segments) : 0);
    if (per_row) p.grad_logit_scale = parts.data();
    p.scale_gradient = grad_scale.defined();
    const ChunkResult total = sum(p, chunks, of_types, args, loss);
    if (!per_row) {
      if (grad_scale.defined()) set_scalar(grad_scale, total.scale_gradient);
      return;
    }
    const auto store = [&](auto* rows) {
      for (int64_t row = 0; row < loss.rows(); ++row) {
        double of_row = 0;
        for (int64_t i = 0; i < chunks.segments; ++i) of_row += parts[static_cast<size_t>(row * chunks.segments + i)];
        rows[row] = static_cast<std::decay_t<decltype(*rows)>>(of_row);
      }
    };
    loss.acc_dtype == at::kDouble ? store(grad_scale.mutable_data_ptr<double>())
                                  : store(grad_scale.mutable_data_ptr<float>());
  }
  template <typename Problem>
  static void map(const Problem& p, Chunks chunks, const CpuKernels::MapKernel<Problem> (&of_types)[4], FloatType type,
                  bool stream) {
    chunks.stream = stream;
    const auto kernel = of_types[static_cast<int>(type)];
    for_each_chunk(chunks, [&](int64_t chunk) { kernel(p, chunks, chunk); });
  }
};

}  // namespace nllx
