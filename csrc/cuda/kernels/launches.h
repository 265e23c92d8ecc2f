// The launches: plain structs, raw device pointers and a stream; no torch header. Operators' return cudaGetLastError().
#pragma once

#include <cuda_runtime_api.h>

#include "../../problem.h"
#include "plan.h"

namespace nllx {

// A class index out of range, written by a kernel into host memory that the device sees. The first one stays until the
// host has read it.
struct BadTarget {
  int claimed;  // by the thread that found it, with an atomic
  int ready;    // written last
  long long row, value, classes, ignore_index;
};

// Where the forward launches leave the loss, and what they need to add it up in one launch: each chunk of rows (see
// plan.h) or elements writes one partial sum, and the last block to finish adds them in fixed order.
struct LossReduction {
  Reduction reduction = Reduction::kMean;
  bool loss_is_acc = false;
  void* loss = nullptr;          // one number; not written for Reduction::kNone
  void* total_weight = nullptr;  // acc: the divisor of a mean
  double* partials = nullptr;    // as many numbers as the workspace says
  unsigned* counters = nullptr;  // kCounters zeros, and zeros again afterwards; of one launch at a time. Null where the
                                 // device is not to count blocks: then one more launch adds the partial sums
  void* row_parts = nullptr;     // as the workspace says: the states of rows that several blocks share
  void* divisor = nullptr;       // an acc, for value_and_grad: the divisor, before the losses are known
};
constexpr int kCounters = 1 + kMostSplitRows;

// What the workspaces of a launch have to hold.
struct LossWorkspace {
  int64_t partials = 0, row_part_bytes = 0;
  bool counters = false;
};
LossWorkspace cross_entropy_workspace(CudaOp op, const CrossEntropyForward& p, const CrossEntropyBackward* gradient,
                                      FloatType type, const CudaDevice& device);
LossWorkspace nll_loss_workspace(const NllLossForward& p);
LossWorkspace elementwise_workspace(const Elements& elements);

// The most blocks of a thread-block cluster on the current device.
struct ClusterBlocks {
  int most = 1;
  const char* error = "";  // why they are fewer than kMostClusterBlocks, for people; lives for ever
};
// `device`: its other properties.
ClusterBlocks most_cluster_blocks(const CudaDevice& device);

cudaError_t launch_cross_entropy_forward(const CrossEntropyForward& p, const LossReduction& r, FloatType type,
                                         const CudaDevice& device, BadTarget* bad, cudaStream_t stream);
// `mass`: workspace of rows() acc; used for probabilities only.
cudaError_t launch_cross_entropy_backward(const CrossEntropyBackward& p, FloatType type, const CudaDevice& device,
                                          void* mass, BadTarget* bad, cudaStream_t stream);
// The loss and its gradient, which may lie where the logits do. The logits are read once, where the row fits the chip.
cudaError_t launch_cross_entropy_value_and_grad(const CrossEntropyForward& p, const CrossEntropyBackward& gradient,
                                                const LossReduction& r, FloatType type, const CudaDevice& device,
                                                void* mass, BadTarget* bad, cudaStream_t stream);
// With the options of the problem, of which these kernels know alone. p.row_loss, one per row, is not null; row_weight,
// acc, is what each adds to the divisor of a mean, or null.
cudaError_t launch_cross_entropy_options_forward(const CrossEntropyForward& p, void* row_weight, FloatType type,
                                                 BadTarget* bad, cudaStream_t stream);
cudaError_t launch_cross_entropy_options_backward(const CrossEntropyBackward& p, FloatType type, BadTarget* bad,
                                                  cudaStream_t stream);
cudaError_t launch_nll_loss_forward(const NllLossForward& p, const LossReduction& r, FloatType type, BadTarget* bad,
                                    cudaStream_t stream);
cudaError_t launch_nll_loss_backward(const NllLossBackward& p, FloatType type, const CudaDevice& device, BadTarget* bad,
                                     cudaStream_t stream);
cudaError_t launch_softmax_statistics_forward(const SoftmaxStatisticsForward& p, FloatType type, BadTarget* bad,
                                              cudaStream_t stream);
cudaError_t launch_softmax_statistics_backward(const SoftmaxStatisticsBackward& p, FloatType type, BadTarget* bad,
                                               cudaStream_t stream);
cudaError_t launch_log_softmax_forward(const LogSoftmaxForward& p, FloatType type, const CudaDevice& device,
                                       cudaStream_t stream);
cudaError_t launch_log_softmax_backward(const LogSoftmaxBackward& p, FloatType type, const CudaDevice& device,
                                        cudaStream_t stream);
cudaError_t launch_mse_loss_forward(const ElementwiseForward& p, const LossReduction& r, FloatType type,
                                    cudaStream_t stream);
cudaError_t launch_mse_loss_backward(const ElementwiseBackward& p, FloatType type, cudaStream_t stream);
// What the launches of losses end with: adds the partial sums of `chunks` by one more launch, in the order of a block
// of `threads`, where there are several and no counters.
void launch_loss_sum(const LossReduction& r, const Targets& targets, int64_t chunks, FloatType type, int threads,
                     cudaStream_t stream);
cudaError_t launch_checked_target(const void* target, IndexType type, int64_t n, int64_t classes, int64_t ignore_index,
                                  int64_t* out, BadTarget* bad, cudaStream_t stream);

}  // namespace nllx
