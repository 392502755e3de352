// The functions of the module that make a training call's passes in one crossing; `_native.pyi` has their signatures.

#pragma once

#include "arguments.hpp"

namespace bnlayer {

PyObject* py_finish_forward(PyObject*, PyObject* const* given, Py_ssize_t count);
PyObject* py_finish_backward(PyObject*, PyObject* const* given, Py_ssize_t count);
PyObject* py_sample(PyObject*, PyObject* const* given, Py_ssize_t count);
PyObject* py_train_alone(PyObject*, PyObject* const* given, Py_ssize_t count);
PyObject* py_pull_alone(PyObject*, PyObject* const* given, Py_ssize_t count);
PyObject* py_forward_at(PyObject*, PyObject* const* given, Py_ssize_t count);
PyObject* py_backward_at(PyObject*, PyObject* const* given, Py_ssize_t count);

}  // namespace bnlayer
