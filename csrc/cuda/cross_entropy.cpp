#include "../entries/cross_entropy.h"

#include "device.h"

namespace nllx {

namespace {

struct CudaCrossEntropy : Cuda {
  using Cuda::Cuda;

  void forward(const CrossEntropyForward& p, const LossArguments& args, const LossProblem& loss, at::Tensor& result,
               at::Tensor& total_weight) const {
    const FloatType type = loss.float_type();
    const CudaDevice device = current_cuda_device();
    const Outputs outputs(args.reduction, result, total_weight,
                          cross_entropy_workspace(CudaOp::kForward, p, nullptr, type, device), stream);
    check(launch_cross_entropy_forward(p, outputs.reduction, type, device, bad_target_record(), stream));
  }
  void backward(const CrossEntropyBackward& p, const LossArguments& /*args*/, const LossProblem& loss,
                const at::Tensor& /*computed*/) const {
    const at::Tensor mass = row_masses(loss);
    check(launch_cross_entropy_backward(p, loss.float_type(), current_cuda_device(), mass.mutable_data_ptr(),
                                        bad_target_record(), stream));
  }
  void value_and_grad(const CrossEntropyForward& f, CrossEntropyBackward& b, const LossArguments& args,
                      const LossProblem& loss, const at::Tensor& /*computed*/, at::Tensor& value) const {
    const FloatType type = loss.float_type();
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
};

TORCH_LIBRARY_IMPL(nllx, CUDA, m) { CrossEntropyEntries<CudaCrossEntropy>::implement(m); }

}  // namespace

}  // namespace nllx
