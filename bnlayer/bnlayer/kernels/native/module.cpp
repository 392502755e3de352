// The extension module, in the stable ABI: bnlayer.kernels._native. `_native.pyi` has the signatures.
//
// Each function checks its arguments, lets go of the interpreter, and makes one pass.

#include "arguments.hpp"
#include "dispatch.hpp"
#include "passing.hpp"
#include "training.hpp"

namespace bnlayer {
namespace {

template <class Pass, class Merge>
PyObject* reduced(
    const Pass& pass, const Sharing& sharing, int64_t (*workspace_of)(const Pass&),
    void (*reduce)(const Pass&, const Part&, void*, int64_t*), int64_t words, int64_t* to, Merge merge) {
  if (!reduce_to(pass, sharing, workspace_of, reduce, words, to, merge)) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

template <class Pass>
PyObject* written(
    const Pass& pass, const Sharing& sharing, int64_t (*workspace_of)(const Pass&),
    void (*write)(const Pass&, const Part&, void*)) {
  if (!wrote(pass, sharing, workspace_of, write)) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject* names(const Table* const* tables) {
  PyObject* made = PyList_New(0);
  for (; made != nullptr && *tables != nullptr; ++tables) {
    PyObject* name = PyUnicode_FromString((*tables)->name);
    const bool added = name != nullptr && PyList_Append(made, name) == 0;
    Py_XDECREF(name);
    if (!added) Py_CLEAR(made);
  }
  return made;
}

PyObject* runnable(PyObject*, PyObject*) { return names(variants()); }

PyObject* all_compiled(PyObject*, PyObject*) {
  PyObject* made = PyList_New(0);
  for (const char* const* at = compiled(); made != nullptr && *at != nullptr; ++at) {
    PyObject* name = PyUnicode_FromString(*at);
    const bool added = name != nullptr && PyList_Append(made, name) == 0;
    Py_XDECREF(name);
    if (!added) Py_CLEAR(made);
  }
  return made;
}

PyObject* py_probe(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "probe", 6);
  Array x, mask, best;
  ProbePass pass{};
  const Table* table = arguments.variant();
  const Sharing shared = sharing(arguments);
  arguments.batch(x, pass.batch);
  arguments.mask(mask, x, pass.batch);
  const int64_t words = 2 * pass.batch.layout.channels;
  int64_t* to = arguments.output<int64_t>(best, "best", Kind::kInt64, words);
  if (!arguments.sound()) return nullptr;
  return reduced(pass, shared, table->probe_workspace, table->probe, words, to, Largest{words});
}

PyObject* py_moments(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "moments", 8);
  Array x, mask, pivot, exponent, limbs;
  MomentsPass pass{};
  const Table* table = arguments.variant();
  const Sharing shared = sharing(arguments);
  arguments.batch(x, pass.batch);
  arguments.mask(mask, x, pass.batch);
  const int64_t channels = pass.batch.layout.channels, sums = sums_of(pass.batch.storage);
  pass.pivot = arguments.elements<double>(pivot, "pivot", Kind::kFloat64, channels);
  pass.exponent = arguments.elements<int64_t>(exponent, "exponent", Kind::kInt64, channels);
  int64_t* to = arguments.output<int64_t>(limbs, "limbs", Kind::kInt64, (sums + 2) * channels);
  if (!arguments.sound()) return nullptr;
  return reduced(
      pass, shared, table->moments_workspace, table->moments, (sums + 2) * channels, to, Limbs{channels, sums, true});
}

PyObject* py_gradient_probe(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "gradient_probe", 7);
  Array x, dy, pivot, best;
  GradientProbePass pass{};
  const Table* table = arguments.variant();
  const Sharing shared = sharing(arguments);
  arguments.batch(x, pass.batch);
  pass.dy = arguments.alike(dy, "dy", pass.batch, false);
  const int64_t words = 2 * pass.batch.layout.channels;
  pass.pivot = arguments.coefficients(pivot, "pivot", pass.batch.storage, pass.batch.layout.channels);
  int64_t* to = arguments.output<int64_t>(best, "best", Kind::kInt64, words);
  if (!arguments.sound()) return nullptr;
  return reduced(pass, shared, table->gradient_probe_workspace, table->gradient_probe, words, to, Largest{words});
}

PyObject* py_gradient_sums(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "gradient_sums", 11);
  Array x, dy, mask, pivot, gradient, deviation, limbs;
  GradientSumsPass pass{};
  const Table* table = arguments.variant();
  const Sharing shared = sharing(arguments);
  arguments.batch(x, pass.batch);
  pass.dy = arguments.alike(dy, "dy", pass.batch, false);
  arguments.mask(mask, x, pass.batch);
  const int64_t channels = pass.batch.layout.channels, sums = sums_of(pass.batch.storage);
  pass.pivot = arguments.coefficients(pivot, "pivot", pass.batch.storage, channels);
  pass.gradient = arguments.elements<int64_t>(gradient, "gradient", Kind::kInt64, channels);
  pass.deviation = arguments.elements<int64_t>(deviation, "deviation", Kind::kInt64, channels);
  pass.fits = arguments.truth("fits");
  int64_t* to = arguments.output<int64_t>(limbs, "limbs", Kind::kInt64, (sums + 2) * channels);
  if (!arguments.sound()) return nullptr;
  return reduced(
      pass, shared, table->gradient_sums_workspace, table->gradient_sums, (sums + 2) * channels, to,
      Limbs{channels, sums, false});
}

PyObject* py_normalize(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "normalize", 9);
  Array x, mean, scale, shift, nonfinite, y;
  NormalizePass pass{};
  const Table* table = arguments.variant();
  const Sharing shared = sharing(arguments);
  arguments.batch(x, pass.batch);
  const Storage storage = pass.batch.storage;
  const int64_t channels = pass.batch.layout.channels;
  pass.mean = arguments.coefficients(mean, "mean", storage, channels);
  pass.scale = arguments.coefficients(scale, "scale", storage, channels);
  pass.shift = arguments.coefficients(shift, "shift", storage, channels);
  pass.nonfinite = arguments.elements<uint8_t>(nonfinite, "nonfinite", Kind::kTruths, channels);
  pass.y = arguments.alike(y, "y", pass.batch, true);
  if (!arguments.sound()) return nullptr;
  return written(pass, shared, table->normalize_workspace, table->normalize);
}

PyObject* py_input_gradient(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "input_gradient", 12);
  Array x, dy, mask, mean, offset, slope, scale, nonfinite, dx;
  InputGradientPass pass{};
  const Table* table = arguments.variant();
  const Sharing shared = sharing(arguments);
  arguments.batch(x, pass.batch);
  pass.dy = arguments.alike(dy, "dy", pass.batch, false);
  arguments.mask(mask, x, pass.batch);
  const Storage storage = pass.batch.storage;
  const int64_t channels = pass.batch.layout.channels;
  pass.mean = arguments.coefficients(mean, "mean", storage, channels);
  pass.offset = arguments.coefficients(offset, "offset", storage, channels);
  pass.slope = arguments.coefficients(slope, "slope", storage, channels);
  pass.scale = arguments.coefficients(scale, "scale", storage, channels);
  pass.nonfinite = arguments.elements<uint8_t>(nonfinite, "nonfinite", Kind::kTruths, channels);
  pass.dx = arguments.alike(dx, "dx", pass.batch, true);
  if (!arguments.sound()) return nullptr;
  return written(pass, shared, table->input_gradient_workspace, table->input_gradient);
}

// What follows from sums is over sooner than another thread would have the interpreter: it keeps it.

PyObject* py_statistics(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "statistics", 10);
  Array limbs, pivot, exponent, rows, singles, reach, flags;
  StatisticsPass pass{};
  const Table* table = arguments.variant();
  if (!arguments.array(limbs, "limbs", Kind::kInt64)) return nullptr;
  const int64_t channels = pass.channels = limbs.size() / 6;
  pass.limbs = limbs.data<int64_t>();
  pass.pivot = arguments.elements<double>(pivot, "pivot", Kind::kFloat64, channels);
  pass.exponent = arguments.elements<int64_t>(exponent, "exponent", Kind::kInt64, channels);
  pass.epsilon = arguments.real("epsilon");
  pass.e = arguments.real("e");
  pass.rows = arguments.output<double>(rows, "rows", Kind::kFloat64, 8 * channels);
  pass.rounded = arguments.output<float>(singles, "singles", Kind::kFloat32, 2 * channels);
  pass.reach = arguments.output<int64_t>(reach, "reach", Kind::kInt64, channels);
  pass.nonfinite = arguments.output<uint8_t>(flags, "flags", Kind::kTruths, 2 * channels);
  if (!arguments.sound()) return nullptr;
  pass.about = pass.rounded + channels;
  pass.refused = pass.nonfinite + channels;
  return PyBool_FromLong(table->statistics(pass));
}

PyObject* py_moved(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "moved", 10);
  Array rows, nonfinite, old_mean, old_variance, made;
  MovedPass pass{};
  const Table* table = arguments.variant();
  if (!arguments.array(rows, "rows", Kind::kFloat64)) return nullptr;
  const int64_t channels = pass.channels = rows.size() / 8;
  const double* values = rows.data<double>();
  pass.count = values;
  pass.mean = values + 2 * channels;
  pass.variance = values + 3 * channels;
  pass.nonfinite = arguments.elements<uint8_t>(nonfinite, "nonfinite", Kind::kTruths, channels);
  pass.old_mean = arguments.elements<float>(old_mean, "old_mean", Kind::kFloat32, channels);
  pass.old_variance = arguments.elements<float>(old_variance, "old_variance", Kind::kFloat32, channels);
  pass.momentum = arguments.real("momentum");
  pass.synchronized = arguments.truth("synchronized");
  pass.masked = arguments.truth("masked");
  pass.unbiased = arguments.truth("unbiased");
  pass.new_mean = arguments.output<float>(made, "new", Kind::kFloat32, 2 * channels);
  if (!arguments.sound()) return nullptr;
  pass.new_variance = pass.new_mean + channels;
  table->moved(pass);
  Py_RETURN_NONE;
}

PyObject* py_coefficients(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "coefficients", 5);
  Array rows, gamma, beta, made;
  CoefficientsPass pass{};
  const Table* table = arguments.variant();
  if (!arguments.array(rows, "rows", Kind::kFloat64)) return nullptr;
  const int64_t channels = pass.channels = rows.size() / 8;
  pass.inverse_std = rows.data<double>() + 4 * channels;
  pass.residual = rows.data<double>() + 5 * channels;
  pass.gamma = arguments.elements<float>(gamma, "gamma", Kind::kFloat32, channels, true);
  pass.beta = arguments.elements<float>(beta, "beta", Kind::kFloat32, channels, true);
  pass.scale = arguments.output<float>(made, "made", Kind::kFloat32, 2 * channels);
  if (!arguments.sound()) return nullptr;
  pass.shift = pass.scale + channels;
  table->coefficients(pass);
  Py_RETURN_NONE;
}

PyObject* py_gradients(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "gradients", 9);
  Array limbs, gradient, deviation, forward, forward_nonfinite, rows, singles, flags;
  GradientsPass pass{};
  const Table* table = arguments.variant();
  if (!arguments.array(limbs, "limbs", Kind::kInt64)) return nullptr;
  const int64_t channels = pass.channels = limbs.size() / 6;
  pass.limbs = limbs.data<int64_t>();
  pass.gradient = arguments.elements<int64_t>(gradient, "gradient", Kind::kInt64, channels);
  pass.deviation = arguments.elements<int64_t>(deviation, "deviation", Kind::kInt64, channels);
  const double* of_forward = arguments.elements<double>(forward, "forward", Kind::kFloat64, 8 * channels);
  pass.forward_nonfinite = arguments.elements<uint8_t>(forward_nonfinite, "forward_nonfinite", Kind::kTruths, channels);
  pass.rows = arguments.output<double>(rows, "rows", Kind::kFloat64, 4 * channels);
  pass.offset = arguments.output<float>(singles, "singles", Kind::kFloat32, 2 * channels);
  pass.nonfinite = arguments.output<uint8_t>(flags, "flags", Kind::kTruths, 2 * channels);
  if (!arguments.sound()) return nullptr;
  pass.follows(of_forward);
  pass.slope = pass.offset + channels;
  pass.refused = pass.nonfinite + channels;
  return PyBool_FromLong(table->gradients(pass));
}

#define BNLAYER_METHOD(name, function) \
  {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr}

PyMethodDef methods[] = {
    {"variants", runnable, METH_NOARGS, "The variants that this processor runs, the widest first."},
    {"compiled", all_compiled, METH_NOARGS, "The variants that are in this module."},
    BNLAYER_METHOD("probe", py_probe),
    BNLAYER_METHOD("moments", py_moments),
    BNLAYER_METHOD("gradient_probe", py_gradient_probe),
    BNLAYER_METHOD("gradient_sums", py_gradient_sums),
    BNLAYER_METHOD("normalize", py_normalize),
    BNLAYER_METHOD("input_gradient", py_input_gradient),
    BNLAYER_METHOD("statistics", py_statistics),
    BNLAYER_METHOD("moved", py_moved),
    BNLAYER_METHOD("coefficients", py_coefficients),
    BNLAYER_METHOD("gradients", py_gradients),
    BNLAYER_METHOD("finish_forward", py_finish_forward),
    BNLAYER_METHOD("finish_backward", py_finish_backward),
    BNLAYER_METHOD("train_alone", py_train_alone),
    BNLAYER_METHOD("pull_alone", py_pull_alone),
    BNLAYER_METHOD("sample", py_sample),
    BNLAYER_METHOD("forward_at", py_forward_at),
    BNLAYER_METHOD("backward_at", py_backward_at),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace bnlayer

// Python forms the name from the module's.
// NOLINTNEXTLINE(bugprone-reserved-identifier,cert-dcl37-c,cert-dcl51-cpp)
PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&bnlayer::module); }
