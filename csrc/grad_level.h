// The graph of one level of torch.func.grad, whose other parts are in nllx/_operators/functorch.py.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <string>

namespace nllx {

// Makes `results` those of the operator `name` called with `arguments`, if one of these is to be differentiated.
// Tensors are functorch's wrappers for the level; `plain` are the arguments that they wrap. torch.autograd.Function
// would do, and takes longer than the kernels of a small problem.
void differentiate_level(const std::string& name, const pybind11::tuple& arguments, const pybind11::tuple& plain,
                         const pybind11::tuple& results);

}  // namespace nllx
