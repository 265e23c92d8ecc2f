// From Python's arguments straight to the dispatcher. A call through torch.ops first matches them with the schema and
// boxes them, which takes longer than the kernel of a small problem.
#include "python_calls.h"

#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "backward_node.h"
#include "message.h"
#include "ops.h"

namespace nllx {

namespace {

// The arguments of one call, taken in order. nllx/functional.py gives all of them by position.
class Arguments {
 public:
  Arguments(const char* op, PyObject* const* values, Py_ssize_t given, Py_ssize_t wanted) : op_(op), next_(values) {
    TORCH_CHECK_TYPE(given == wanted, op, "() takes ", number(wanted), " arguments, but got ", number(given));
  }

  const at::Tensor& tensor(const char* name) {
    PyObject* value = *next_++;
    TORCH_CHECK_TYPE(THPVariable_Check(value), op_, "(): argument '", name, "' must be Tensor, not ",
                     Py_TYPE(value)->tp_name);
    return THPVariable_Unpack(value);
  }
  OptionalTensor optional_tensor(const char* name) {
    if (*next_ != Py_None) return tensor(name);
    ++next_;
    return std::nullopt;
  }
  int64_t integer() {
    const int64_t value = PyLong_AsLongLong(*next_++);
    if (value == -1 && PyErr_Occurred()) throw python_error();
    return value;
  }
  double real() {
    const double value = PyFloat_AsDouble(*next_++);
    if (value == -1. && PyErr_Occurred()) throw python_error();
    return value;
  }
  bool boolean() { return *next_++ == Py_True; }

 private:
  const char* op_;
  PyObject* const* next_;
};

// Runs a loss while other Python threads go on, and gives its result to Python; NotImplemented while torch.jit.trace
// watches, which may be for ONNX.
template <typename Loss>
PyObject* call_without_gil(const Loss& loss) {
  if (torch::jit::tracer::isTracing()) Py_RETURN_NOTIMPLEMENTED;
  at::Tensor result;
  {
    pybind11::gil_scoped_release no_gil;
    result = loss();
  }
  return THPVariable_Wrap(std::move(result));
}

PyObject* py_cross_entropy(PyObject*, PyObject* const* values, Py_ssize_t given) {
  HANDLE_TH_ERRORS
  Arguments args("cross_entropy", values, given, 7);
  const at::Tensor &logits = args.tensor("input"), &target = args.tensor("target");
  const OptionalTensor weight = args.optional_tensor("weight");
  const int64_t reduction = args.integer(), ignore_index = args.integer();
  const double label_smoothing = args.real();
  const bool inplace_backward = args.boolean();
  return call_without_gil([&] {
    return nllx::cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing, std::nullopt,
                               inplace_backward);
  });
  END_HANDLE_TH_ERRORS
}

PyObject* py_nll_loss(PyObject*, PyObject* const* values, Py_ssize_t given) {
  HANDLE_TH_ERRORS
  Arguments args("nll_loss", values, given, 5);
  const at::Tensor &log_probs = args.tensor("input"), &target = args.tensor("target");
  const OptionalTensor weight = args.optional_tensor("weight");
  const int64_t reduction = args.integer(), ignore_index = args.integer();
  return call_without_gil(
      [&] { return nllx::nll_loss(log_probs, target, weight, reduction, ignore_index, std::nullopt); });
  END_HANDLE_TH_ERRORS
}

PyObject* py_log_softmax(PyObject*, PyObject* const* values, Py_ssize_t given) {
  HANDLE_TH_ERRORS
  Arguments args("log_softmax", values, given, 2);
  const at::Tensor& input = args.tensor("input");
  const int64_t dim = args.integer();
  return call_without_gil([&] { return nllx::log_softmax(input, dim, std::nullopt); });
  END_HANDLE_TH_ERRORS
}

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

PyMethodDef methods[] = {
    {"cross_entropy", as_method(&py_cross_entropy), METH_FASTCALL,
     "cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing, inplace_backward): "
     "torch.ops.nllx.cross_entropy, with less work for each call."},
    {"nll_loss", as_method(&py_nll_loss), METH_FASTCALL,
     "nll_loss(input, target, weight, reduction, ignore_index): torch.ops.nllx.nll_loss, likewise."},
    {"log_softmax", as_method(&py_log_softmax), METH_FASTCALL,
     "log_softmax(input, dim): torch.ops.nllx.log_softmax, likewise."},
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
