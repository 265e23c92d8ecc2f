#include "../entries/mse_loss.h"

#include "device.h"

namespace nllx {

namespace {

struct CudaMseLoss : Cuda {
  using Cuda::Cuda;

  void forward(const ElementwiseForward& p, const ElementwiseArguments& args, const ElementwiseLoss& loss,
               const at::Tensor& /*computed*/, at::Tensor& result, at::Tensor& total_weight) const {
    const Outputs outputs(args.reduction, result, total_weight, elementwise_workspace(p.elements), stream);
    check(launch_mse_loss_forward(p, outputs.reduction, loss.float_type(), stream));
  }
  void backward(const ElementwiseBackward& p, const ElementwiseLoss& loss) const {
    check(launch_mse_loss_backward(p, loss.float_type(), stream));
  }
};

TORCH_LIBRARY_IMPL(nllx, CUDA, m) { MseLossEntries<CudaMseLoss>::implement(m); }

}  // namespace

}  // namespace nllx
