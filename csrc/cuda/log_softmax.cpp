#include "../entries/log_softmax.h"

#include "device.h"

namespace nllx {

namespace {

struct CudaLogSoftmax : Cuda {
  using Cuda::Cuda;

  void forward(const LogSoftmaxForward& p, FloatType type, const at::Tensor& /*computed*/) const {
    check(launch_log_softmax_forward(p, type, current_cuda_device(), stream));
  }
  void backward(const LogSoftmaxBackward& p, FloatType type, const at::Tensor& /*computed*/) const {
    check(launch_log_softmax_backward(p, type, current_cuda_device(), stream));
  }
};

TORCH_LIBRARY_IMPL(nllx, CUDA, m) { LogSoftmaxEntries<CudaLogSoftmax>::implement(m); }

}  // namespace

}  // namespace nllx
