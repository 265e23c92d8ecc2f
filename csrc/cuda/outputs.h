// Where a loss leaves its results on a GPU.
#pragma once

#include <ATen/ops/empty.h>

#include <limits>

#include "../loss_problem.h"
#include "kernels/launches.h"
#include "workspace.h"

namespace nllx {

// Where a forward leaves its results, and the memory that it needs for a moment.
struct Outputs {
  LossReduction reduction;
  at::Tensor partials, row_parts, counters;  // owners

  Outputs(int64_t reduction, at::Tensor& result, at::Tensor& total_weight, const LossWorkspace& workspace,
          cudaStream_t stream) {
    const at::TensorOptions options = total_weight.options();
    this->reduction.reduction = static_cast<Reduction>(reduction);
    this->reduction.loss_is_acc = result.scalar_type() == total_weight.scalar_type();
    this->reduction.loss = result.mutable_data_ptr();
    this->reduction.total_weight = total_weight.mutable_data_ptr();
    if (workspace.partials > 0) {
      partials = at::empty({workspace.partials}, options.dtype(at::kDouble));
      this->reduction.partials = partials.mutable_data_ptr<double>();
    }
    if (workspace.row_part_bytes > 0) {
      row_parts = at::empty({workspace.row_part_bytes}, options.dtype(at::kByte));
      this->reduction.row_parts = row_parts.mutable_data_ptr();
    }
    if (workspace.counters) this->reduction.counters = zero_counters(options, stream, counters);
  }
};

inline bool is_per_row(int64_t reduction) { return static_cast<Reduction>(reduction) == Reduction::kNone; }

// The loss of no rows, or of rows without classes.
inline void fill_empty(const LossProblem& loss, int64_t reduction, at::Tensor& result, at::Tensor& total_weight) {
  total_weight.fill_(loss.probability_rows());
  result.fill_(static_cast<Reduction>(reduction) == Reduction::kMean ? std::numeric_limits<double>::quiet_NaN() : 0.);
}

}  // namespace nllx
