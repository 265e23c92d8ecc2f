// The losses as functions of the Python module, for nllx/functional.py.
#pragma once

#include <Python.h>

namespace nllx {

// Adds cross_entropy, nll_loss and log_softmax to a module.
void add_python_calls(PyObject* module);

}  // namespace nllx
