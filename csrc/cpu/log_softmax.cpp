#include "../entries/log_softmax.h"

#include "device.h"

namespace nllx {

namespace {

struct CpuLogSoftmax : Cpu {
  using Cpu::Cpu;

  void forward(const LogSoftmaxForward& p, FloatType type, const at::Tensor& computed) const {
    map(p, Chunks(p.extent, p.layout), kernels().log_softmax_forward, type, is_streamed(computed));
  }
  void backward(const LogSoftmaxBackward& p, FloatType type, const at::Tensor& computed) const {
    map(p, Chunks(p.extent, p.layout), kernels().log_softmax_backward, type, is_streamed(computed));
  }
};

TORCH_LIBRARY_IMPL(nllx, CPU, m) { LogSoftmaxEntries<CpuLogSoftmax>::implement(m); }

}  // namespace

}  // namespace nllx
