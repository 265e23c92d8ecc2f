#include "../entries/nll_loss.h"

#include "device.h"

namespace nllx {

namespace {

// One number per row is read, whatever the layout; where rows are long, each comes from a page of its own, and takes as
// long as some kGatheredRow logits that are read one after the other.
constexpr int64_t kGatheredRow = 128;

struct CpuNllLoss : Cpu {
  using Cpu::Cpu;

  void forward(const NllLossForward& p, const LossArguments& args, const LossProblem& loss, at::Tensor& result,
               at::Tensor& total_weight) const {
    Extent gathered = p.extent;
    if (gathered.classes > kGatheredRow) gathered.classes = kGatheredRow;
    const Chunks chunks(gathered, Layout::kRows);
    const ChunkResult total = sum(p, chunks, kernels().nll_loss_forward, args, loss);
    set_loss(total, divisor_of(total, loss), args.reduction, result, total_weight);
  }
  void backward(const NllLossBackward& p, const LossArguments& args, const LossProblem& loss,
                const at::Tensor& computed) const {
    Chunks chunks(p.extent, p.layout);
    chunks.stream = is_streamed(computed);
    sum(p, chunks, kernels().nll_loss_backward, args, loss);
  }
};

TORCH_LIBRARY_IMPL(nllx, CPU, m) { NllLossEntries<CpuNllLoss>::implement(m); }

}  // namespace

}  // namespace nllx
