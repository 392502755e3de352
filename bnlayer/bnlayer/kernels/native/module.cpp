// The extension module, in the stable ABI: bnlayer.kernels._native.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "dispatch.hpp"

namespace {

PyObject* variant(PyObject*, PyObject*) { return PyUnicode_FromString(bnlayer::chosen_variant()); }

PyMethodDef methods[] = {
    {"variant", variant, METH_NOARGS, "The name of the kernels' variant that this processor runs."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
