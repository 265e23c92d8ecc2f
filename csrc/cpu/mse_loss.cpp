#include "../entries/mse_loss.h"

#include "device.h"

namespace nllx {

namespace {

struct CpuMseLoss : Cpu {
  using Cpu::Cpu;

  void forward(const ElementwiseForward& p, const ElementwiseArguments& args, const ElementwiseLoss& loss,
               const at::Tensor& computed, at::Tensor& result, at::Tensor& total_weight) const {
    Chunks chunks(p.elements);
    chunks.stream = computed.defined() && is_streamed(computed);
    const ChunkResult total = sum(p, chunks, kernels().mse_loss_forward, loss.float_type());
    set_loss(total, total.weight, args.reduction, result, total_weight);
  }
  void backward(const ElementwiseBackward& p, const ElementwiseLoss& loss) const {
    map(p, Chunks(p.elements), kernels().mse_loss_backward, loss.float_type(), is_streamed(loss.input));
  }
};

TORCH_LIBRARY_IMPL(nllx, CPU, m) { MseLossEntries<CpuMseLoss>::implement(m); }

}  // namespace

}  // namespace nllx
