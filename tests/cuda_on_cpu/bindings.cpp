// The launches and plans of csrc/cuda under C names, as addresses, and the sizes of the structs that they take.
#include "cuda/kernels/counters.h"
#include "cuda/kernels/launches.h"
#include "cuda/kernels/plan.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

#define EXPORT_FUNCTION(name) \
  EXPORT void* const name;    \
  void* const name = reinterpret_cast<void*>(&nllx::name);

EXPORT_FUNCTION(launch_cross_entropy_forward)
EXPORT_FUNCTION(launch_cross_entropy_backward)
EXPORT_FUNCTION(launch_nll_loss_forward)
EXPORT_FUNCTION(launch_nll_loss_backward)
EXPORT_FUNCTION(launch_cross_entropy_value_and_grad)
EXPORT_FUNCTION(launch_cross_entropy_options_forward)
EXPORT_FUNCTION(launch_cross_entropy_options_backward)
EXPORT_FUNCTION(launch_softmax_statistics_forward)
EXPORT_FUNCTION(launch_softmax_statistics_backward)
EXPORT_FUNCTION(launch_log_softmax_forward)
EXPORT_FUNCTION(launch_log_softmax_backward)
EXPORT_FUNCTION(launch_mse_loss_forward)
EXPORT_FUNCTION(launch_mse_loss_backward)
EXPORT_FUNCTION(launch_checked_target)
EXPORT_FUNCTION(cross_entropy_workspace)
EXPORT_FUNCTION(nll_loss_workspace)
EXPORT_FUNCTION(elementwise_workspace)
EXPORT_FUNCTION(cuda_plan)
EXPORT_FUNCTION(counters_of_stream)

#define EXPORT_SIZE(name)             \
  EXPORT const int64_t sizeof_##name; \
  const int64_t sizeof_##name = sizeof(nllx::name);

EXPORT_SIZE(RowOptions)
EXPORT_SIZE(CrossEntropyForward)
EXPORT_SIZE(CrossEntropyBackward)
EXPORT_SIZE(NllLossForward)
EXPORT_SIZE(NllLossBackward)
EXPORT_SIZE(SoftmaxStatisticsForward)
EXPORT_SIZE(SoftmaxStatisticsBackward)
EXPORT_SIZE(LogSoftmaxForward)
EXPORT_SIZE(LogSoftmaxBackward)
EXPORT_SIZE(Elements)
EXPORT_SIZE(ElementStrides)
EXPORT_SIZE(ElementwiseForward)
EXPORT_SIZE(ElementwiseBackward)
EXPORT_SIZE(LossReduction)
EXPORT_SIZE(BadTarget)
EXPORT_SIZE(LossWorkspace)
EXPORT_SIZE(CudaProblem)
EXPORT_SIZE(CudaDevice)
EXPORT_SIZE(CudaPlan)
