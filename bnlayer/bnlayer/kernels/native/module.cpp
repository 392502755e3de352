// The extension module, in the stable ABI: bnlayer.kernels._native. `_native.pyi` has the signatures.
//
// Each function checks its arguments, lets go of the interpreter, and makes one pass.

#include "arguments.hpp"
#include "dispatch.hpp"
#include "tasks.hpp"

namespace bnlayer {
namespace {

// How many threads may share a pass, and how many elements are worth one.
struct Sharing {
  int64_t threads, worth;
};
Sharing sharing(Arguments& arguments) {
  const int64_t threads = arguments.integer("threads"), worth = arguments.integer("worth");
  return {threads, worth};
}

template <class Pass>
struct Work {
  const Pass& pass;
  const Parts& parts;
  char* workspace;
  int64_t bytes;   // of a part's workspace
  int64_t* found;  // of all parts, one after the other
  int64_t words;   // of what one part finds
  void (*reduce)(const Pass&, const Part&, void*, int64_t*);
  void (*write)(const Pass&, const Part&, void*);
};

template <class Pass>
void do_part(void* given, int i) {
  const auto& work = *static_cast<Work<Pass>*>(given);
  void* workspace = work.workspace + i * work.bytes;
  if (work.reduce != nullptr) {
    work.reduce(work.pass, work.parts.part[i], workspace, work.found + i * work.words);
  } else {
    work.write(work.pass, work.parts.part[i], workspace);
  }
}

// Makes a pass that reduces; `merge(total, part)` joins what the other parts have found to the first one's. False: there
// is not so much memory.
template <class Pass, class Merge>
bool reduce_to(
    const Pass& pass, const Sharing& sharing, int64_t (*workspace_of)(const Pass&),
    void (*reduce)(const Pass&, const Part&, void*, int64_t*), int64_t words, int64_t* to, Merge merge) {
  if (words == 0) return true;  // no channels
  const Parts parts = split(pass.batch.layout, sharing.threads, sharing.worth);
  const int64_t bytes = workspace_of(pass), result = parts.count > 1 ? (words * 8 + 63) / 64 * 8 : 0;
  auto* memory = static_cast<char*>(workspace(parts.count * (bytes + result * 8)));
  if (memory == nullptr) return false;
  int64_t* found = parts.count > 1 ? reinterpret_cast<int64_t*>(memory) : to;
  Work<Pass> work{pass, parts, memory + parts.count * result * 8, bytes, found, result, reduce, nullptr};
  Py_BEGIN_ALLOW_THREADS;
  over(parts.count, do_part<Pass>, &work);
  for (int i = 1; i < parts.count; ++i) merge(found, found + i * result);
  for (int64_t at = 0; parts.count > 1 && at < words; ++at) to[at] = found[at];
  Py_END_ALLOW_THREADS;
  return true;
}

template <class Pass, class Merge>
PyObject* reduced(
    const Pass& pass, const Sharing& sharing, int64_t (*workspace_of)(const Pass&),
    void (*reduce)(const Pass&, const Part&, void*, int64_t*), int64_t words, int64_t* to, Merge merge) {
  if (!reduce_to(pass, sharing, workspace_of, reduce, words, to, merge)) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

template <class Pass>
bool wrote(
    const Pass& pass, const Sharing& sharing, int64_t (*workspace_of)(const Pass&),
    void (*write)(const Pass&, const Part&, void*)) {
  if (pass.batch.layout.images == 0 || pass.batch.layout.channels == 0) return true;
  const Parts parts = split(pass.batch.layout, sharing.threads, sharing.worth);
  const int64_t bytes = workspace_of(pass);
  auto* memory = static_cast<char*>(workspace(parts.count * bytes));
  if (memory == nullptr) return false;
  Work<Pass> work{pass, parts, memory, bytes, nullptr, 0, nullptr, write};
  Py_BEGIN_ALLOW_THREADS;
  over(parts.count, do_part<Pass>, &work);
  Py_END_ALLOW_THREADS;
  return true;
}

template <class Pass>
PyObject* written(
    const Pass& pass, const Sharing& sharing, int64_t (*workspace_of)(const Pass&),
    void (*write)(const Pass&, const Part&, void*)) {
  if (!wrote(pass, sharing, workspace_of, write)) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// Adds the limbs of one part to those of another: sums are added and carried, the last rows joined.
struct Limbs {
  int64_t channels, sums;
  bool counts;  // whether the row after the sums is a number, and not a flag

  void operator()(int64_t* total, const int64_t* part) const {
    for (int64_t row = 0; row < sums; row += 2) {
      int64_t *hi = total + row * channels, *lo = hi + channels;
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t low = lo[c] + part[(row + 1) * channels + c];
        hi[c] += part[row * channels + c] + (low >> 32);
        lo[c] = low & 0xFFFF'FFFF;
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      int64_t *first = total + sums * channels + c, *second = first + channels;
      const int64_t other = part[sums * channels + c];
      *first = counts ? *first + other : *first | other;
      *second |= part[(sums + 1) * channels + c];
    }
  }
};

struct Largest {
  int64_t size;
  void operator()(int64_t* total, const int64_t* part) const {
    for (int64_t at = 0; at < size; ++at) total[at] = part[at] > total[at] ? part[at] : total[at];
  }
};

// Integers of one call, which outlive the workspace of a pass.
class Integers {
 public:
  explicit Integers(int64_t size) : memory_(static_cast<int64_t*>(PyMem_Malloc(static_cast<size_t>(size) * 8))) {}
  Integers(const Integers&) = delete;
  Integers& operator=(const Integers&) = delete;
  ~Integers() { PyMem_Free(memory_); }
  int64_t* get() const { return memory_; }

 private:
  int64_t* memory_;
};

int64_t sums_of(Storage storage) { return storage == Storage::kFloat64 ? 8 : 4; }

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
  const double* found = rows.data<double>();
  pass.count = found;
  pass.mean = found + 2 * channels;
  pass.variance = found + 3 * channels;
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
  pass.divisor = of_forward + channels;
  pass.inverse_std = of_forward + 4 * channels;
  pass.residual = of_forward + 5 * channels;
  pass.mean_share = of_forward + 6 * channels;
  pass.pivot_residual = of_forward + 7 * channels;
  pass.slope = pass.offset + channels;
  pass.refused = pass.nonfinite + channels;
  return PyBool_FromLong(table->gradients(pass));
}

// All that follows from the totals of a training call, in one: what `statistics`, `moved`, `coefficients` and `normalize`
// do one after the other. Where a channel is refused, and that is not to be overlooked, the rest is left. Without totals
// they are those of the batch itself, all of whose values count: `moments` comes first.
PyObject* py_finish_forward(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "finish_forward", 22);
  Array x, limbs, pivot, exponent, gamma, beta, old_mean, old_variance, rows, singles, reach, flags, y;
  NormalizePass pass{};
  StatisticsPass found{};
  MovedPass moving{};
  CoefficientsPass of{};
  const Table* table = arguments.variant();
  const Sharing shared = sharing(arguments);
  arguments.batch(x, pass.batch);
  const int64_t channels = pass.batch.layout.channels;
  found.channels = moving.channels = of.channels = channels;
  found.limbs = arguments.elements<int64_t>(limbs, "limbs", Kind::kInt64, 6 * channels, true);
  found.pivot = arguments.elements<double>(pivot, "pivot", Kind::kFloat64, channels);
  found.exponent = arguments.elements<int64_t>(exponent, "exponent", Kind::kInt64, channels);
  found.epsilon = arguments.real("epsilon");
  found.e = arguments.real("e");
  const bool accepted = arguments.truth("accepted");
  of.gamma = arguments.elements<float>(gamma, "gamma", Kind::kFloat32, channels, true);
  of.beta = arguments.elements<float>(beta, "beta", Kind::kFloat32, channels, true);
  moving.old_mean = arguments.elements<float>(old_mean, "old_mean", Kind::kFloat32, channels);
  moving.old_variance = arguments.elements<float>(old_variance, "old_variance", Kind::kFloat32, channels);
  moving.momentum = arguments.real("momentum");
  moving.synchronized = arguments.truth("synchronized");
  moving.masked = found.e != 0.0;
  moving.unbiased = arguments.truth("unbiased");
  found.rows = arguments.output<double>(rows, "rows", Kind::kFloat64, 8 * channels);
  found.rounded = arguments.output<float>(singles, "singles", Kind::kFloat32, 6 * channels);
  found.reach = arguments.output<int64_t>(reach, "reach", Kind::kInt64, channels);
  found.nonfinite = arguments.output<uint8_t>(flags, "flags", Kind::kTruths, 2 * channels);
  pass.y = arguments.alike(y, "y", pass.batch, true);
  if (arguments.sound() && pass.batch.storage == Storage::kFloat64) {
    arguments.fail(PyExc_TypeError, "finish_forward: float64 batches have two folds.");
  }
  if (!arguments.sound()) return nullptr;
  const Integers own(found.limbs == nullptr ? 6 * channels : 0);
  if (found.limbs == nullptr) {
    const MomentsPass summed{pass.batch, found.pivot, found.exponent};
    if (own.get() == nullptr ||
        !reduce_to(summed, shared, table->moments_workspace, table->moments, 6 * channels, own.get(), Limbs{channels, 4, true})) {
      return PyErr_NoMemory();
    }
    found.limbs = own.get();
  }
  found.about = found.rounded + channels;
  found.refused = found.nonfinite + channels;
  const bool refused = table->statistics(found);
  if (refused && !accepted) Py_RETURN_TRUE;
  moving.count = found.rows;
  moving.mean = found.rows + 2 * channels;
  moving.variance = found.rows + 3 * channels;
  moving.nonfinite = pass.nonfinite = found.nonfinite;
  moving.new_mean = found.rounded + 2 * channels;
  moving.new_variance = found.rounded + 3 * channels;
  table->moved(moving);
  of.inverse_std = found.rows + 4 * channels;
  of.residual = found.rows + 5 * channels;
  of.scale = found.rounded + 4 * channels;
  of.shift = found.rounded + 5 * channels;
  table->coefficients(of);
  pass.mean = found.rounded;
  pass.scale = of.scale;
  pass.shift = of.shift;
  if (!wrote(pass, shared, table->normalize_workspace, table->normalize)) return PyErr_NoMemory();
  return PyBool_FromLong(refused);
}

// The same of a backward pass: `gradients`, then `input_gradient`. Without totals, `gradient_sums` comes first, about
// `pivot`, with deviations that reach from `lowest` to `highest` as `BackwardGrid.reaching` says; a call with channels
// that are not finite is refused.
PyObject* py_finish_backward(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "finish_backward", 22);
  Array x, dy, mask, limbs, gradient, deviation, forward, forward_nonfinite, mean, scale, rows, singles, flags, dx;
  Array pivot, reach;
  GradientSumsPass summed{};
  InputGradientPass pass{};
  GradientsPass found{};
  const Table* table = arguments.variant();
  const Sharing shared = sharing(arguments);
  arguments.batch(x, pass.batch);
  pass.dy = arguments.alike(dy, "dy", pass.batch, false);
  arguments.mask(mask, x, pass.batch);
  const Storage storage = pass.batch.storage;
  const int64_t channels = pass.batch.layout.channels;
  found.channels = channels;
  found.limbs = arguments.elements<int64_t>(limbs, "limbs", Kind::kInt64, 6 * channels, true);
  found.gradient = arguments.elements<int64_t>(gradient, "gradient", Kind::kInt64, channels);
  found.deviation = arguments.elements<int64_t>(deviation, "deviation", Kind::kInt64, channels);
  summed.pivot = arguments.coefficients(pivot, "pivot", storage, channels);
  const int64_t* farthest = arguments.elements<int64_t>(reach, "reach", Kind::kInt64, channels);
  const int64_t lowest = arguments.integer("lowest"), highest = arguments.integer("highest");
  const bool accepted = arguments.truth("accepted");
  const double* of_forward = arguments.elements<double>(forward, "forward", Kind::kFloat64, 8 * channels);
  found.forward_nonfinite =
      arguments.elements<uint8_t>(forward_nonfinite, "forward_nonfinite", Kind::kTruths, channels);
  pass.mean = arguments.coefficients(mean, "mean", storage, channels);
  pass.scale = arguments.coefficients(scale, "scale", storage, channels);
  found.rows = arguments.output<double>(rows, "rows", Kind::kFloat64, 4 * channels);
  found.offset = arguments.output<float>(singles, "singles", Kind::kFloat32, 2 * channels);
  found.nonfinite = arguments.output<uint8_t>(flags, "flags", Kind::kTruths, 2 * channels);
  pass.dx = arguments.alike(dx, "dx", pass.batch, true);
  if (arguments.sound() && storage == Storage::kFloat64) {
    arguments.fail(PyExc_TypeError, "finish_backward: float64 batches have two folds.");
  }
  if (!arguments.sound()) return nullptr;
  const Integers own(found.limbs == nullptr ? 7 * channels : 0);
  if (found.limbs == nullptr) {
    int64_t *sums = own.get(), *deviations = sums + 6 * channels;
    if (sums == nullptr) return PyErr_NoMemory();
    for (int64_t c = 0; c < channels; ++c) {
      if (found.forward_nonfinite[c] != 0) Py_RETURN_TRUE;
      const int64_t wide = farthest[c] > found.deviation[c] ? farthest[c] : found.deviation[c];
      deviations[c] = wide < lowest ? lowest : wide > highest ? highest : wide;
    }
    summed.batch = pass.batch;
    summed.dy = pass.dy;
    summed.gradient = found.gradient;
    summed.deviation = found.deviation = deviations;
    summed.fits = true;
    if (!reduce_to(
            summed, shared, table->gradient_sums_workspace, table->gradient_sums, 6 * channels, sums,
            Limbs{channels, 4, false})) {
      return PyErr_NoMemory();
    }
    found.limbs = sums;
  }
  found.divisor = of_forward + channels;
  found.inverse_std = of_forward + 4 * channels;
  found.residual = of_forward + 5 * channels;
  found.mean_share = of_forward + 6 * channels;
  found.pivot_residual = of_forward + 7 * channels;
  found.slope = found.offset + channels;
  found.refused = found.nonfinite + channels;
  const bool refused = table->gradients(found);
  if (refused && !accepted) Py_RETURN_TRUE;
  pass.offset = found.offset;
  pass.slope = found.slope;
  pass.nonfinite = found.nonfinite;
  if (!wrote(pass, shared, table->input_gradient_workspace, table->input_gradient)) return PyErr_NoMemory();
  return PyBool_FromLong(refused);
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
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace bnlayer

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&bnlayer::module); }
