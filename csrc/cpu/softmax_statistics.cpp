#include "../entries/softmax_statistics.h"

#include "cross_entropy.h"
#include "device.h"

namespace nllx {

namespace {

struct CpuSoftmaxStatistics : Cpu {
  using Cpu::Cpu;

  void forward(const SoftmaxStatisticsForward& p, const LossArguments& args, const LossProblem& loss) const {
    raise_if_bad(run_softmax_statistics_forward(kernels(), p, static_cast<int>(loss.float_type())), args, loss);
  }
  void backward(const SoftmaxStatisticsBackward& p, const LossArguments& args, const LossProblem& loss,
                const at::Tensor& computed, at::Tensor& grad_scale) const {
    Chunks chunks(p.extent, p.layout, /*split_rows=*/true);
    chunks.stream = is_streamed(computed);
    sum_with_scale_gradient(p, chunks, kernels().softmax_statistics_backward, args, loss, grad_scale);
  }
};

TORCH_LIBRARY_IMPL(nllx, CPU, m) { SoftmaxStatisticsEntries<CpuSoftmaxStatistics>::implement(m); }

}  // namespace

}  // namespace nllx
