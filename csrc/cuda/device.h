// A GPU as a device that csrc/entries runs on: launches on the current stream. No call waits for the device.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../loss_problem.h"
#include "../problem.h"
#include "bad_target.h"
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
    if (workspace.counters && !plans_are_conservative())
      this->reduction.counters = zero_counters(options, stream, counters);
  }
};

// What the devices of the operators derive from. Where `input` is on no GPU, the checks that follow refuse it.
class Cuda {
 public:
  explicit Cuda(const at::Tensor& input) {
    raise_pending_bad_target();
    if (input.is_cuda()) guard_.set_device(input.device());
    stream = c10::cuda::getCurrentCUDAStream();
  }

  static at::Tensor empty_like(const at::Tensor& like, std::optional<at::MemoryFormat> format = std::nullopt) {
    return at::empty_like(like, at::TensorOptions(), format);
  }
  static at::Tensor written(const at::Tensor& t) { return t; }

 protected:
  cudaStream_t stream = nullptr;

  // After a launch.
  void check(cudaError_t error) const {
    C10_CUDA_CHECK(error);
    raise_bad_target_if_synchronous(stream);
  }

  // A launch, and what the rows give to logit_scale, to `grad_scale`, which is undefined where nobody asks for it.
  template <typename Problem, typename Launch>
  void with_scale_gradient(Problem p, const LossProblem& loss, at::Tensor& grad_scale, const Launch& launch) const {
    at::Tensor rows;
    if (grad_scale.defined()) {
      rows = grad_scale.dim() > 0 ? grad_scale : at::empty({loss.rows()}, grad_scale.options());
      p.grad_logit_scale = rows.mutable_data_ptr();
    }
    check(launch(p));
    if (grad_scale.defined() && grad_scale.dim() == 0) grad_scale.copy_(rows.sum(at::kDouble));
  }

 private:
  c10::cuda::OptionalCUDAGuard guard_;
};

}  // namespace nllx
