#include <ATen/ops/ones.h>

#include "../entries/cross_entropy.h"
#include "device.h"

namespace nllx {

namespace {

struct CudaCrossEntropy : Cuda {
  using Cuda::Cuda;

  void forward(const CrossEntropyForward& p, const LossArguments& args, const LossProblem& loss, at::Tensor& result,
               at::Tensor& total_weight) const {
    if (loss.row_options() || loss.divisor.defined()) {
      return forward_with_options(p, args, loss, result, total_weight);
    }
    const FloatType type = loss.float_type();
    const CudaDevice device = current_cuda_device();
    const Outputs outputs(args.reduction, result, total_weight,
                          cross_entropy_workspace(CudaOp::kForward, p, nullptr, type, device), stream);
    check(launch_cross_entropy_forward(p, outputs.reduction, type, device, bad_target_record(), stream));
  }
  void backward(const CrossEntropyBackward& p, const LossArguments& /*args*/, const LossProblem& loss,
                const at::Tensor& /*computed*/, at::Tensor& grad_scale) const {
    if (loss.row_options()) {
      with_scale_gradient(p, loss, grad_scale, [&](const CrossEntropyBackward& problem) {
        return launch_cross_entropy_options_backward(problem, loss.float_type(), bad_target_record(), stream);
      });
      return;
    }
    const at::Tensor mass = row_masses(loss);
    check(launch_cross_entropy_backward(p, loss.float_type(), current_cuda_device(), mass.mutable_data_ptr(),
                                        bad_target_record(), stream));
    if (grad_scale.defined()) grad_scale.zero_();
  }
  void value_and_grad(const CrossEntropyForward& f, CrossEntropyBackward& b, const LossArguments& args,
                      const LossProblem& loss, const at::Tensor& computed, at::Tensor& value) const {
    const FloatType type = loss.float_type();
    if (loss.row_options() || loss.divisor.defined()) {
      at::Tensor total_weight = empty_beside(loss.input, {}, loss.acc_dtype);
      forward_with_options(f, args, loss, value, total_weight);
      const at::Tensor one = at::ones({}, total_weight.options());
      b.grad_output = one.const_data_ptr();
      if (is_mean(static_cast<Reduction>(args.reduction))) b.total_weight = total_weight.const_data_ptr();
      at::Tensor none;
      return backward(b, args, loss, computed, none);
    }
    const CudaDevice device = current_cuda_device();
    at::Tensor total_weight = empty_beside(loss.input, {2}, loss.acc_dtype);  // and the divisor of the launch
    Outputs outputs(args.reduction, value, total_weight,
                    cross_entropy_workspace(CudaOp::kValueAndGrad, f, &b, type, device), stream);
    outputs.reduction.divisor = static_cast<char*>(total_weight.mutable_data_ptr()) + total_weight.element_size();
    const at::Tensor mass = row_masses(loss);
    check(launch_cross_entropy_value_and_grad(f, b, outputs.reduction, type, device, mass.mutable_data_ptr(),
                                              bad_target_record(), stream));
  }

 private:
  static at::Tensor row_masses(const LossProblem& loss) {
    return empty_beside(loss.input, {loss.probabilities_given ? loss.rows() : 0}, loss.acc_dtype);
  }

  // The losses of the rows by the kernels of options; sum and mean by torch, whose sums on a GPU are the same in every
  // run.
  void forward_with_options(CrossEntropyForward p, const LossArguments& args, const LossProblem& loss,
                            at::Tensor& result, at::Tensor& total_weight) const {
    const bool per_row = is_per_row(args.reduction), is_mean = nllx::is_mean(static_cast<Reduction>(args.reduction));
    at::Tensor losses = result;
    if (!per_row) {
      losses = empty_beside(loss.input, {loss.rows()}, loss.acc_dtype);
      p.row_loss = losses.mutable_data_ptr();
      p.row_loss_is_acc = true;
    }
    const at::Tensor weights = empty_beside(loss.input, {loss.rows()}, loss.acc_dtype);
    check(launch_cross_entropy_options_forward(p, weights.mutable_data_ptr(), loss.float_type(), bad_target_record(),
                                               stream));
    at::Tensor divisor = weights.sum(at::kDouble);
    if (loss.divisor.defined()) {
      divisor = given_divisor(loss.divisor, args.reduction).to(at::kDouble);
    } else {
      divisor = divisor.masked_fill(divisor.eq(0), loss.targets.zero_divisor);
    }
    total_weight.copy_(divisor);
    if (per_row) return;
    const at::Tensor sum = losses.sum(at::kDouble);
    result.copy_(is_mean ? sum.div(divisor) : sum);
  }
};

TORCH_LIBRARY_IMPL(nllx, CUDA, m) { CrossEntropyEntries<CudaCrossEntropy>::implement(m); }

}  // namespace

}  // namespace nllx
