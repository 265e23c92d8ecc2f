// From Python's arguments straight to the dispatcher. A call through torch.ops first matches them with the schema and
// boxes them, which takes longer than the kernel of a small problem.
#include "python_calls.h"

#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <functional>
#include <string>

#include "message.h"
#include "operators/cross_entropy.h"
#include "operators/log_softmax.h"
#include "operators/mse_loss.h"
#include "operators/nll_loss.h"

namespace nllx {

namespace {

// The arguments of one call, taken in order. nllx/functional.py gives all of them by position.
class Arguments {
 public:
  Arguments(const Schema& schema, PyObject* const* values, Py_ssize_t given) : schema_(schema), values_(values) {
    TORCH_CHECK_TYPE(given == static_cast<Py_ssize_t>(schema.argument_count), schema.name, "() takes ",
                     number(schema.argument_count), " arguments, but got ", number(given));
  }

  // Of the type of a parameter; tensors as they are, uncounted, since Python holds them during the call.
  template <typename Parameter>
  auto take() {
    PyObject* value = values_[place_++];
    using T = std::decay_t<Parameter>;
    if constexpr (std::is_same_v<T, at::Tensor>) {
      return std::cref(tensor(value));
    } else if constexpr (std::is_same_v<T, OptionalTensor>) {
      return value == Py_None ? OptionalTensor() : OptionalTensor(tensor(value));
    } else if constexpr (std::is_same_v<T, OptionalDtype>) {
      TORCH_CHECK_TYPE(value == Py_None || THPDtype_Check(value), schema_.name, "(): argument 'dtype' must be ",
                       "torch.dtype, not ", Py_TYPE(value)->tp_name);
      return value == Py_None ? OptionalDtype() : OptionalDtype(reinterpret_cast<THPDtype*>(value)->scalar_type);
    } else if constexpr (std::is_same_v<T, bool>) {
      return value == Py_True;
    } else if constexpr (std::is_same_v<T, double>) {
      const double real = PyFloat_AsDouble(value);
      if (real == -1. && PyErr_Occurred()) throw python_error();
      return real;
    } else {
      const int64_t integer = PyLong_AsLongLong(value);
      if (integer == -1 && PyErr_Occurred()) throw python_error();
      return T(integer);
    }
  }

 private:
  const at::Tensor& tensor(PyObject* value) const {
    // torch's functions call their first argument so.
    const std::string_view name = place_ == 1 ? "input" : schema_.arguments[place_ - 1];
    TORCH_CHECK_TYPE(THPVariable_Check(value), schema_.name, "(): argument '", name, "' must be Tensor, not ",
                     Py_TYPE(value)->tp_name);
    return THPVariable_Unpack(value);
  }

  const Schema& schema_;
  PyObject* const* values_;
  size_t place_ = 0;
};

// A loss as a function of Python. Other Python threads go on while it runs; NotImplemented while torch.jit.trace
// watches, which may be for ONNX.
template <typename Loss, typename Signature = typename Loss::Signature>
struct Call;
template <typename Loss, typename... A>
struct Call<Loss, at::Tensor(A...)> {
  static constexpr Schema kSchema = parse_schema(Loss::kSchema);

  static PyObject* run(PyObject*, PyObject* const* values, Py_ssize_t given) {
    HANDLE_TH_ERRORS
    Arguments arguments(kSchema, values, given);
    // Braces: in this order.
    const auto taken = std::tuple{arguments.take<A>()...};
    if (torch::jit::tracer::isTracing()) Py_RETURN_NOTIMPLEMENTED;
    at::Tensor result;
    {
      pybind11::gil_scoped_release no_gil;
      result = std::apply([](const auto&... a) { return call<Loss>(static_cast<A>(a)...); }, taken);
    }
    return THPVariable_Wrap(std::move(result));
    END_HANDLE_TH_ERRORS
  }
};

// For nllx.patch, which asks it of every call.
PyObject* py_are_plain(PyObject*, PyObject* const* values, Py_ssize_t given) {
  HANDLE_TH_ERRORS
  for (Py_ssize_t i = 0; i < given; ++i) {
    if (i > 0 && values[i] == Py_None) continue;
    if (!THPVariable_CheckExact(values[i])) Py_RETURN_FALSE;
    const at::Tensor& t = THPVariable_Unpack(values[i]);
    const at::ScalarType type = t.scalar_type();
    const bool taken = i > 0 ? !at::isComplexType(type)
                             : type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
    if (!taken || !t.is_cpu() || t.is_nested() || t.layout() != at::kStrided) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

// The functions that get what is saved now, from the innermost `with` on: for nllx.patch, which looks for checkpoints.
PyObject* py_pack_hooks(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  pybind11::list hooks;
  if (has_default_hooks()) {
    auto stack = at::SavedTensorDefaultHooks::get_tls_state().stack;
    for (; !stack.empty(); stack.pop()) {
      hooks.append(pybind11::reinterpret_borrow<pybind11::object>(stack.top().first.ptr(getPyInterpreter())));
    }
  }
  return hooks.release().ptr();
  END_HANDLE_TH_ERRORS
}

template <typename Function>
PyCFunction as_method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// A function of the operator's name and arguments, all of them by position.
template <typename Loss>
PyMethodDef method() {
  static const std::string name(parse_schema(Loss::kSchema).name);
  static const std::string text =
      std::string(Loss::kSchema) + "\n\ntorch.ops.nllx." + name + ", with less work for each call.";
  return {name.c_str(), as_method(&Call<Loss>::run), METH_FASTCALL, text.c_str()};
}

PyMethodDef methods[] = {
    method<CrossEntropy>(),
    method<NllLoss>(),
    method<LogSoftmax>(),
    method<MseLoss>(),
    {"are_plain", as_method(&py_are_plain), METH_FASTCALL,
     "are_plain(input, *others): whether all are strided CPU tensors of torch's own class, the first of a dtype that "
     "the "
     "losses take and the others not complex, or None."},
    {"pack_hooks", &py_pack_hooks, METH_NOARGS,
     "pack_hooks(): the functions that pack what autograd saves, the innermost first; as a rule there are none."},
    {nullptr, nullptr, 0, nullptr},
};

// Without a class of their own the nodes would be CppFunctions, which tools that draw graphs show by name, and no
// torch.autograd.graph.Node.
void add_node_classes() {
  const pybind11::object node = pybind11::module_::import("torch.autograd.graph").attr("Node");
  for (const NodeType& of : node_types()) {
    auto* type = new PyTypeObject{PyVarObject_HEAD_INIT(nullptr, 0)};  // as long as the process, as torch's own
    torch::autograd::_initFunctionPyTypeObject(*type, of.name, /*function_properties=*/nullptr,
                                               /*function_methods=*/nullptr);
    torch::autograd::registerCppFunction(*of.type, type);
    node.attr("register")(pybind11::handle(reinterpret_cast<PyObject*>(type)));
  }
}

}  // namespace

void add_python_calls(PyObject* module) {
  if (PyModule_AddFunctions(module, methods) != 0) throw pybind11::error_already_set();
  add_node_classes();
}

}  // namespace nllx
