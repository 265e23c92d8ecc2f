#include "../entries/softmax_statistics.h"

#include "device.h"

namespace nllx {

namespace {

struct CudaSoftmaxStatistics : Cuda {
  using Cuda::Cuda;

  void forward(const SoftmaxStatisticsForward& p, const LossArguments& /*args*/, const LossProblem& loss) const {
    check(launch_softmax_statistics_forward(p, loss.float_type(), bad_target_record(), stream));
  }
  void backward(const SoftmaxStatisticsBackward& p, const LossArguments& /*args*/, const LossProblem& loss,
                const at::Tensor& /*computed*/, at::Tensor& grad_scale) const {
    with_scale_gradient(p, loss, grad_scale, [&](const SoftmaxStatisticsBackward& problem) {
      return launch_softmax_statistics_backward(problem, loss.float_type(), bad_target_record(), stream);
    });
  }
};

TORCH_LIBRARY_IMPL(nllx, CUDA, m) { SoftmaxStatisticsEntries<CudaSoftmaxStatistics>::implement(m); }

}  // namespace

}  // namespace nllx
