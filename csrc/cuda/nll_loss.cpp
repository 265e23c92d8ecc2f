#include "../entries/nll_loss.h"

#include "device.h"

namespace nllx {

namespace {

struct CudaNllLoss : Cuda {
  using Cuda::Cuda;

  void forward(const NllLossForward& p, const LossArguments& args, const LossProblem& loss, at::Tensor& result,
               at::Tensor& total_weight) const {
    const Outputs outputs(args.reduction, result, total_weight, nll_loss_workspace(p), stream);
    check(launch_nll_loss_forward(p, outputs.reduction, loss.float_type(), bad_target_record(), stream));
  }
  void backward(const NllLossBackward& p, const LossArguments& /*args*/, const LossProblem& loss,
                const at::Tensor& /*computed*/) const {
    check(launch_nll_loss_backward(p, loss.float_type(), current_cuda_device(), bad_target_record(), stream));
  }
};

TORCH_LIBRARY_IMPL(nllx, CUDA, m) { NllLossEntries<CudaNllLoss>::implement(m); }

}  // namespace

}  // namespace nllx
