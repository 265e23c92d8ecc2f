// The problem that a kernel solves, as plain numbers and raw pointers. Includes no torch header, so that kernels
// compile in seconds and can be built and tested without torch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NLLX_MEMBER __host__ __device__
#else
#define NLLX_MEMBER
#endif

namespace nllx {

enum class FloatType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class IndexType : uint8_t { kInt64, kInt32, kInt16, kInt8, kUInt8, kUInt16, kUInt32, kUInt64 };

NLLX_MEMBER constexpr int bytes_of(IndexType type) {
  return type == IndexType::kInt64 || type == IndexType::kUInt64   ? 8
         : type == IndexType::kInt32 || type == IndexType::kUInt32 ? 4
         : type == IndexType::kInt16 || type == IndexType::kUInt16 ? 2
                                                                   : 1;
}

// The values are those of the `reduction` argument of the operators, of which the first three are ATen's.
// kMeanOrZero: the mean, and over nothing (where its divisor is zero) 0 and not NaN.
enum class Reduction : uint8_t { kNone = 0, kMean = 1, kSum = 2, kMeanOrZero = 3 };
constexpr bool is_mean(Reduction r) { return r == Reduction::kMean || r == Reduction::kMeanOrZero; }

// Every input is seen as an array (outer, classes, inner). Row `r` of the problem is the pair
// (r / inner, r % inner): `inner` varies fastest, which is the order of a contiguous index target.
struct Extent {
  int64_t outer = 0, classes = 0, inner = 0;
  NLLX_MEMBER constexpr int64_t rows() const { return outer * inner; }
};

// In elements.
struct Strides {
  int64_t outer = 0, classes = 0, inner = 0;
};

// kRows: the classes of a row are adjacent in memory (class stride 1), rows may lie anywhere.
// kPlanes: neighbouring rows are adjacent in memory (inner stride 1), classes may lie anywhere.
enum class Layout : uint8_t { kRows, kPlanes };

// What the rows are compared with: class indices or class probabilities, with the options that shape the loss.
// "acc" below is the type that the arithmetic is done in: double for double logits, float for all others.
struct Targets {
  const void* index = nullptr;  // rows() class indices, contiguous; null where the targets are probabilities
  IndexType index_type = IndexType::kInt64;
  const void* probabilities = nullptr;  // an array (outer, classes, inner) in the layout of the logits
  bool probabilities_are_acc = false;   // element type: acc, or that of the logits
  Strides probability_strides;
  const void* weight = nullptr;      // acc, one per class, contiguous; null: all ones
  const void* weight_sum = nullptr;  // acc, one number: the sum of `weight`; read only with smoothing
  int64_t ignore_index = -100;
  double label_smoothing = 0;
  // 1 - ε and ε / C in float32, for CUDA kernels, which have few units for float64; set by their launches.
  float scale = 1, uniform = 0;
  double zero_divisor = 0;  // what takes the place of a divisor of zero in the mean
};

// What a row's logits x are before they are compared, and what its loss is multiplied with. The classes are compared by
//   z = sharpness / temperature softcap tanh(scale logit_scale x / softcap)
// or without a softcap (0) by z = scale logit_scale sharpness / temperature x. Tensors are acc; null: ones.
struct RowOptions {
  const void* logit_scale = nullptr;  // one per row (stride 1) or one in all (stride 0), as the temperature
  int64_t logit_scale_stride = 0;
  const void* temperature = nullptr;
  int64_t temperature_stride = 0;
  double scale = 1, sharpness = 1, softcap = 0;
  // Of the losses of cross entropy.
  const void* sample_weight = nullptr;  // one per row
  double z_loss = 0;                    // of the square of the log-sum-exp

  constexpr bool map_logits() const {
    return logit_scale || temperature || scale != 1 || sharpness != 1 || softcap != 0;
  }
  constexpr bool any() const { return map_logits() || sample_weight || z_loss != 0; }
};

struct CrossEntropyForward {
  Extent extent;
  Layout layout = Layout::kRows;
  const void* logits = nullptr;
  Strides logits_strides;
  Targets targets;
  void* row_loss = nullptr;  // rows() losses, contiguous; may be null on the CPU
  bool row_loss_is_acc = false;
  void* row_stats = nullptr;            // rows() pairs (max, log_sum) of acc, contiguous; zeros for an ignored row
  const RowOptions* options = nullptr;  // in the host's memory; null: none
};

struct CrossEntropyBackward {
  Extent extent;
  Layout layout = Layout::kRows;
  const void* logits = nullptr;
  Strides logits_strides;
  Targets targets;
  const void* row_stats = nullptr;    // as the forward wrote them
  const void* grad_output = nullptr;  // acc; one per row (stride 1) or one in all (stride 0)
  int64_t grad_output_stride = 0;
  const void* total_weight = nullptr;  // acc; the divisor of the mean; null: no division
  void* grad_logits = nullptr;
  Strides grad_strides;
  const RowOptions* options = nullptr;
  void* grad_logit_scale = nullptr;  // as of SoftmaxStatisticsBackward
  bool scale_gradient = false;
  constexpr bool wants_scale_gradient() const { return scale_gradient || grad_logit_scale; }
};

struct NllLossForward {
  Extent extent;
  const void* log_probs = nullptr;
  Strides strides;
  Targets targets;
  void* row_loss = nullptr;
  bool row_loss_is_acc = false;
};

struct NllLossBackward {
  Extent extent;
  Layout layout = Layout::kRows;
  Targets targets;
  const void* grad_output = nullptr;
  int64_t grad_output_stride = 0;
  const void* total_weight = nullptr;
  void* grad_log_probs = nullptr;
  Strides grad_strides;
};

// Functions of the softmax of each row. `targets`: an index alone, or none.
struct SoftmaxStatisticsForward {
  Extent extent;
  Layout layout = Layout::kRows;
  const void* logits = nullptr;
  Strides logits_strides;
  Targets targets;
  // rows() numbers of acc each, contiguous; null where they are not asked for.
  void* log_prob = nullptr;
  void* logsumexp = nullptr;
  void* entropy = nullptr;
  int64_t* prediction = nullptr;
  void* row_stats =
      nullptr;  // rows() times (max, log_sum, mean of z - max under the softmax); zeros for an ignored row
  const RowOptions* options = nullptr;
};

struct SoftmaxStatisticsBackward {
  Extent extent;
  Layout layout = Layout::kRows;
  const void* logits = nullptr;
  Strides logits_strides;
  Targets targets;
  const void* row_stats = nullptr;
  // acc, one per row; null: zeros.
  const void* grad_log_prob = nullptr;
  const void* grad_logsumexp = nullptr;
  const void* grad_entropy = nullptr;
  void* grad_logits = nullptr;
  Strides grad_strides;
  const RowOptions* options = nullptr;
  // Null where it is not asked for, row by row. CPU: double, one for each unit of work (a row, or a segment of one), of
  // which a row's are added in order. CUDA: acc, one per row.
  void* grad_logit_scale = nullptr;
  bool scale_gradient = false;  // the sum over the rows is asked for; CPU only
  constexpr bool wants_scale_gradient() const { return scale_gradient || grad_logit_scale; }
};

struct LogSoftmaxForward {
  Extent extent;
  Layout layout = Layout::kRows;
  const void* input = nullptr;
  Strides input_strides;
  void* output = nullptr;
  Strides output_strides;
};

struct LogSoftmaxBackward {
  Extent extent;
  Layout layout = Layout::kRows;
  const void* grad_output = nullptr;
  Strides grad_output_strides;
  const void* output = nullptr;
  Strides output_strides;
  void* grad_input = nullptr;
  Strides grad_input_strides;
};

// Tensors of one shape, taken element by element in an order that suits their memory: the first dimension is the
// innermost.
struct Elements {
  static constexpr int kMostDims = 8;
  int64_t count = 0;  // of the elements: the product of the sizes
  int dims = 0;
  int64_t sizes[kMostDims] = {};
};

// Of one of them, in elements.
struct ElementStrides {
  int64_t of[Elements::kMostDims] = {};
  bool adjacent = false;  // element i in that order lies i elements behind the first one
};

// A loss that compares input and target element by element.
struct ElementwiseForward {
  Elements elements;
  const void* input = nullptr;
  ElementStrides input_strides;
  const void* target = nullptr;
  ElementStrides target_strides;
  const void* weight = nullptr;  // null: all ones
  bool weight_is_acc = false;    // element type: acc, or that of the input
  ElementStrides weight_strides;
  void* loss = nullptr;  // one for each element; null where only their sum is asked for
  bool loss_is_acc = false;
  ElementStrides loss_strides;
};

struct ElementwiseBackward {
  Elements elements;
  const void* input = nullptr;
  ElementStrides input_strides;
  const void* target = nullptr;
  ElementStrides target_strides;
  const void* weight = nullptr;
  bool weight_is_acc = false;
  ElementStrides weight_strides;
  const void* grad_output = nullptr;
  bool grad_output_is_acc = false;
  bool one_grad_output = false;  // for all elements
  ElementStrides grad_output_strides;
  const void* total_weight = nullptr;  // acc; the divisor of the mean; null: no division
  void* grad_input = nullptr;          // null where it is not asked for
  ElementStrides grad_input_strides;
  void* grad_target = nullptr;
  ElementStrides grad_target_strides;
};

}  // namespace nllx
