// The launches: plain structs, raw device pointers and a stream; no torch header. Each returns cudaGetLastError().
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace nllx {

// A class index out of range, written by a kernel into host memory that the device sees. The first one stays until the
// host has read it.
struct BadTarget {
  int claimed;  // by the thread that found it, with an atomic
  int ready;    // written last
  long long row, value, classes, ignore_index;
};

// What the forward launches need beside the problem.
struct LossReduction {
  Reduction reduction = Reduction::kMean;
  bool loss_is_acc = false;
  void* loss = nullptr;          // one number, or none for Reduction::kNone
  void* total_weight = nullptr;  // acc
  double* partials = nullptr;    // 2 * loss_partials(rows)
};
// The rows of a loss are added in fixed groups, one block each, and the groups by one block: the result does not depend
// on the device.
constexpr int64_t kRowsPerPartial = 4096;
constexpr int64_t loss_partials(int64_t rows) { return (rows + kRowsPerPartial - 1) / kRowsPerPartial; }

cudaError_t launch_cross_entropy_forward(const CrossEntropyForward& p, FloatType type, BadTarget* bad,
                                         cudaStream_t stream);
// `mass`: workspace of rows() acc; used for probabilities only.
cudaError_t launch_cross_entropy_backward(const CrossEntropyBackward& p, FloatType type, void* mass, BadTarget* bad,
                                          cudaStream_t stream);
cudaError_t launch_nll_loss_forward(const NllLossForward& p, FloatType type, BadTarget* bad, cudaStream_t stream);
cudaError_t launch_nll_loss_backward(const NllLossBackward& p, FloatType type, BadTarget* bad, cudaStream_t stream);
cudaError_t launch_loss_reduction(const LossReduction& r, const Extent& extent, const Targets& targets,
                                  const void* row_loss, bool row_loss_is_acc, FloatType type, cudaStream_t stream);
cudaError_t launch_log_softmax_forward(const LogSoftmaxForward& p, FloatType type, cudaStream_t stream);
cudaError_t launch_log_softmax_backward(const LogSoftmaxBackward& p, FloatType type, cudaStream_t stream);
cudaError_t launch_checked_target(const void* target, IndexType type, int64_t n, int64_t classes, int64_t ignore_index,
                                  int64_t* out, BadTarget* bad, cudaStream_t stream);

}  // namespace nllx
