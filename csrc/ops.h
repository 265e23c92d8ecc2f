// Every C++ function behind the operators of ops.cpp: the table of contents of csrc.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace nllx {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalDtype = std::optional<at::ScalarType>;

// The operators with derivatives, which transforms take one by one.
inline constexpr std::array<const char*, 6> kOperations = {"cross_entropy_forward", "cross_entropy_backward",
                                                           "nll_loss_forward",      "nll_loss_backward",
                                                           "log_softmax_forward",   "log_softmax_backward"};

// Through the dispatcher.
at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                         int64_t reduction, c10::SymInt ignore_index, double label_smoothing, OptionalDtype dtype,
                         bool inplace_backward);
at::Tensor nll_loss(const at::Tensor& log_probs, const at::Tensor& target, const OptionalTensor& weight,
                    int64_t reduction, c10::SymInt ignore_index, OptionalDtype dtype);
at::Tensor log_softmax(const at::Tensor& input, int64_t dim, OptionalDtype dtype);
std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_forward(const at::Tensor& logits, const at::Tensor& target,
                                                                     const OptionalTensor& weight, int64_t reduction,
                                                                     c10::SymInt ignore_index, double label_smoothing,
                                                                     OptionalDtype dtype);
at::Tensor cross_entropy_backward(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
                                  const OptionalTensor& weight, const at::Tensor& row_stats,
                                  const at::Tensor& total_weight, int64_t reduction, c10::SymInt ignore_index,
                                  double label_smoothing);
std::tuple<at::Tensor, at::Tensor> nll_loss_forward(const at::Tensor& log_probs, const at::Tensor& target,
                                                    const OptionalTensor& weight, int64_t reduction,
                                                    c10::SymInt ignore_index, OptionalDtype dtype);
at::Tensor nll_loss_backward(const at::Tensor& grad_output, const at::Tensor& log_probs, const at::Tensor& target,
                             const OptionalTensor& weight, const at::Tensor& total_weight, int64_t reduction,
                             c10::SymInt ignore_index);
at::Tensor log_softmax_forward(const at::Tensor& input, int64_t dim);
at::Tensor log_softmax_backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim);
// The gradient is written to `out`, which may be the logits.
at::Tensor& cross_entropy_backward_out(const at::Tensor& grad_output, const at::Tensor& logits,
                                       const at::Tensor& target, const OptionalTensor& weight,
                                       const at::Tensor& row_stats, const at::Tensor& total_weight, int64_t reduction,
                                       c10::SymInt ignore_index, double label_smoothing, at::Tensor& out);

// With autograd, and without a turn through the dispatcher: what the losses are made of.
std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_forward_autograd(
    const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
    c10::SymInt ignore_index, double label_smoothing, OptionalDtype dtype);
std::tuple<at::Tensor, at::Tensor> nll_loss_forward_autograd(const at::Tensor& log_probs, const at::Tensor& target,
                                                             const OptionalTensor& weight, int64_t reduction,
                                                             c10::SymInt ignore_index, OptionalDtype dtype);
at::Tensor log_softmax_forward_autograd(const at::Tensor& input, int64_t dim);
// torch's index losses have no derivative with respect to the weights, and say so.
void check_weight_gradient(const char* op, const at::Tensor& target, const OptionalTensor& weight);
at::Tensor cross_entropy_inplace_backward(const at::Tensor& logits, const at::Tensor& target,
                                          const OptionalTensor& weight, int64_t reduction, c10::SymInt ignore_index,
                                          double label_smoothing, OptionalDtype dtype);

// cpu/
std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_forward_cpu(const at::Tensor& logits,
                                                                         const at::Tensor& target,
                                                                         const OptionalTensor& weight,
                                                                         int64_t reduction, int64_t ignore_index,
                                                                         double label_smoothing, OptionalDtype dtype);
at::Tensor cross_entropy_backward_cpu(const at::Tensor& grad_output, const at::Tensor& logits, const at::Tensor& target,
                                      const OptionalTensor& weight, const at::Tensor& row_stats,
                                      const at::Tensor& total_weight, int64_t reduction, int64_t ignore_index,
                                      double label_smoothing);
std::tuple<at::Tensor, at::Tensor> nll_loss_forward_cpu(const at::Tensor& log_probs, const at::Tensor& target,
                                                        const OptionalTensor& weight, int64_t reduction,
                                                        int64_t ignore_index, OptionalDtype dtype);
at::Tensor nll_loss_backward_cpu(const at::Tensor& grad_output, const at::Tensor& log_probs, const at::Tensor& target,
                                 const OptionalTensor& weight, const at::Tensor& total_weight, int64_t reduction,
                                 int64_t ignore_index);
at::Tensor& cross_entropy_backward_out_cpu(const at::Tensor& grad_output, const at::Tensor& logits,
                                           const at::Tensor& target, const OptionalTensor& weight,
                                           const at::Tensor& row_stats, const at::Tensor& total_weight,
                                           int64_t reduction, int64_t ignore_index, double label_smoothing,
                                           at::Tensor& out);
std::tuple<at::Tensor, at::Tensor> cross_entropy_value_and_grad_cpu(const at::Tensor& logits, const at::Tensor& target,
                                                                    const OptionalTensor& weight, int64_t reduction,
                                                                    int64_t ignore_index, double label_smoothing,
                                                                    OptionalDtype dtype);
at::Tensor log_softmax_forward_cpu(const at::Tensor& input, int64_t dim);
at::Tensor log_softmax_backward_cpu(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim);

}  // namespace nllx
