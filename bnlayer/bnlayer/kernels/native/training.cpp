// What follows from a training call's totals, and from those of its backward pass: several passes in one crossing.

#include "training.hpp"

#include <cstring>

#include "passing.hpp"

namespace bnlayer {
namespace {

// What a training call finds of each channel, in one piece of memory, which its backward pass reads. The offsets are
// those of `results.Record`.
struct Record {
  static constexpr int64_t kBytes = 98;  // a channel

  double* rows;        // (8, C)
  int64_t* reach;      // (C,)
  float* singles;      // (6, C)
  uint8_t* nonfinite;  // (2, C)

  Record(uint8_t* memory, int64_t channels)
      : rows(reinterpret_cast<double*>(memory)),
        reach(reinterpret_cast<int64_t*>(memory + 64 * channels)),
        singles(reinterpret_cast<float*>(memory + 72 * channels)),
        nonfinite(memory + 96 * channels) {}
  float* moved(int64_t channels) const { return singles + 2 * channels; }
};

// All that follows from the totals of a training call, in one: what `statistics`, `moved`, `coefficients` and `normalize`
// do one after the other. Where a channel is refused, and that is not to be overlooked, the rest is left. Without totals
// they are those of the batch itself, all of whose values count: `moments` comes first.
struct ForwardCall {
  NormalizePass pass{};
  StatisticsPass statistics{};
  MovedPass moving{};
  CoefficientsPass of{};
  bool accepted = false;

  void writes(const Record& record) {
    statistics.rows = record.rows;
    statistics.rounded = record.singles;
    statistics.reach = record.reach;
    statistics.nonfinite = record.nonfinite;
  }

  Outcome run(const Table* table, const Sharing& sharing) {
    const int64_t channels = statistics.channels = moving.channels = of.channels = pass.batch.layout.channels;
    const Integers own(statistics.limbs == nullptr ? 6 * channels : 0);
    if (statistics.limbs == nullptr) {
      const MomentsPass summed{pass.batch, statistics.pivot, statistics.exponent};
      const Limbs merge{channels, 4, true};
      if (own.get() == nullptr ||
          !reduce_to(summed, sharing, table->moments_workspace, table->moments, 6 * channels, own.get(), merge)) {
        return Outcome::kNoMemory;
      }
      statistics.limbs = own.get();
    }
    statistics.about = statistics.rounded + channels;
    statistics.refused = statistics.nonfinite + channels;
    const bool refused = table->statistics(statistics);
    if (refused && !accepted) return Outcome::kRefused;
    moving.count = statistics.rows;
    moving.mean = statistics.rows + 2 * channels;
    moving.variance = statistics.rows + 3 * channels;
    moving.nonfinite = pass.nonfinite = statistics.nonfinite;
    moving.masked = statistics.e != 0.0;
    table->moved(moving);
    of.inverse_std = statistics.rows + 4 * channels;
    of.residual = statistics.rows + 5 * channels;
    of.scale = statistics.rounded + 4 * channels;
    of.shift = statistics.rounded + 5 * channels;
    table->coefficients(of);
    pass.mean = statistics.rounded;
    pass.scale = of.scale;
    pass.shift = of.shift;
    if (!wrote(pass, sharing, table->normalize_workspace, table->normalize)) return Outcome::kNoMemory;
    return refused ? Outcome::kRefused : Outcome::kDone;
  }
};

// Some 64 values of an array, of an odd stride: an even one would hit the same channels in each row.
PyObject* sampled(const Array& x) {
  const int64_t size = x.size(), stride = (size / 64) | 1, item = x.item();
  PyObject* made = PyBytes_FromStringAndSize(nullptr, (size + stride - 1) / stride * item);
  if (made == nullptr) return nullptr;
  char* to = PyBytes_AsString(made);
  for (int64_t at = 0; at < size; at += stride, to += item) {
    std::memcpy(to, x.data<char>() + at * item, static_cast<size_t>(item));
  }
  return made;
}

// A training call from its totals; or `alone`, from its batch: it returns a sample of it then, or None where it is refused.
PyObject* forward(PyObject* const* given, Py_ssize_t count, bool alone) {
  const char* name = alone ? "train_alone" : "finish_forward";
  Arguments arguments(given, count, name, alone ? 18 : 21);
  Array x, limbs, pivot, exponent, gamma, beta, old_mean, old_variance, new_mean, new_variance, record, y;
  ForwardCall call;
  const Table* table = arguments.variant();
  const Sharing shared = sharing(arguments);
  arguments.batch(x, call.pass.batch);
  const int64_t channels = call.pass.batch.layout.channels;
  if (!alone) call.statistics.limbs = arguments.elements<int64_t>(limbs, "limbs", Kind::kInt64, 6 * channels);
  call.statistics.pivot = arguments.elements<double>(pivot, "pivot", Kind::kFloat64, channels);
  call.statistics.exponent = arguments.elements<int64_t>(exponent, "exponent", Kind::kInt64, channels);
  call.statistics.epsilon = arguments.real("epsilon");
  if (!alone) call.statistics.e = arguments.real("e");
  if (!alone) call.accepted = arguments.truth("accepted");
  call.of.gamma = arguments.elements<float>(gamma, "gamma", Kind::kFloat32, channels, true);
  call.of.beta = arguments.elements<float>(beta, "beta", Kind::kFloat32, channels, true);
  call.moving.old_mean = arguments.elements<float>(old_mean, "old_mean", Kind::kFloat32, channels);
  call.moving.old_variance = arguments.elements<float>(old_variance, "old_variance", Kind::kFloat32, channels);
  call.moving.momentum = arguments.real("momentum");
  call.moving.synchronized = arguments.truth("synchronized");
  call.moving.unbiased = arguments.truth("unbiased");
  call.moving.new_mean = arguments.output<float>(new_mean, "new_mean", Kind::kFloat32, channels);
  call.moving.new_variance = arguments.output<float>(new_variance, "new_variance", Kind::kFloat32, channels);
  auto* memory = arguments.output<uint8_t>(record, "record", Kind::kTruths, Record::kBytes * channels);
  call.pass.y = arguments.alike(y, "y", call.pass.batch, true);
  if (arguments.sound() && call.pass.batch.storage == Storage::kFloat64) {
    arguments.fail(PyExc_TypeError, "%s: float64 batches have two folds.", name);
  }
  if (!arguments.sound()) return nullptr;
  call.writes(Record(memory, channels));
  const Outcome outcome = call.run(table, shared);
  if (outcome == Outcome::kNoMemory) return PyErr_NoMemory();
  if (!alone) return PyBool_FromLong(outcome == Outcome::kRefused);
  if (outcome == Outcome::kRefused) Py_RETURN_NONE;
  return sampled(x);
}

}  // namespace

PyObject* py_sample(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "sample", 1);
  Array x;
  return arguments.array(x, "x", Kind::kNumbers) ? sampled(x) : nullptr;
}

PyObject* py_finish_forward(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return forward(given, count, false);
}

PyObject* py_train_alone(PyObject*, PyObject* const* given, Py_ssize_t count) { return forward(given, count, true); }

namespace {

// The same of a backward pass: `gradients`, then `input_gradient`. Without totals, `gradient_sums` comes first, about
// `pivot`, with deviations that reach from `lowest` to `highest` as `BackwardGrid.reaching` says; a call with channels
// that are not finite is refused.
struct BackwardCall {
  InputGradientPass pass{};
  GradientsPass gradients{};
  const void* pivot = nullptr;
  const int64_t* reach = nullptr;
  int64_t lowest = 0, highest = 0;
  const double* forward = nullptr;  // the call's (8, C)
  bool accepted = false;

  Outcome run(const Table* table, const Sharing& sharing) {
    const int64_t channels = gradients.channels = pass.batch.layout.channels;
    const Integers own(gradients.limbs == nullptr ? 7 * channels : 0);
    if (gradients.limbs == nullptr) {
      int64_t *sums = own.get(), *deviations = sums + 6 * channels;
      if (sums == nullptr) return Outcome::kNoMemory;
      for (int64_t c = 0; c < channels; ++c) {
        if (gradients.forward_nonfinite[c] != 0) return Outcome::kRefused;
        const int64_t wide = reach[c] > gradients.deviation[c] ? reach[c] : gradients.deviation[c];
        deviations[c] = wide < lowest ? lowest : wide > highest ? highest : wide;
      }
      const GradientSumsPass summed{pass.batch, pass.dy, pivot, gradients.gradient, deviations, true};
      const Limbs merge{channels, 4, false};
      if (!reduce_to(
              summed, sharing, table->gradient_sums_workspace, table->gradient_sums, 6 * channels, sums, merge)) {
        return Outcome::kNoMemory;
      }
      gradients.deviation = deviations;
      gradients.limbs = sums;
    }
    gradients.follows(forward);
    gradients.slope = gradients.offset + channels;
    gradients.refused = gradients.nonfinite + channels;
    const bool refused = table->gradients(gradients);
    if (refused && !accepted) return Outcome::kRefused;
    pass.offset = gradients.offset;
    pass.slope = gradients.slope;
    pass.nonfinite = gradients.nonfinite;
    if (!wrote(pass, sharing, table->input_gradient_workspace, table->input_gradient)) return Outcome::kNoMemory;
    return refused ? Outcome::kRefused : Outcome::kDone;
  }
};

}  // namespace

PyObject* py_finish_backward(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "finish_backward", 18);
  Array x, dy, mask, limbs, gradient, deviation, forward, forward_nonfinite, mean, scale;
  Array rows, singles, flags, dx;
  BackwardCall call;
  const Table* table = arguments.variant();
  const Sharing shared = sharing(arguments);
  Batch& batch = call.pass.batch;
  arguments.batch(x, batch);
  call.pass.dy = arguments.alike(dy, "dy", batch, false);
  arguments.mask(mask, x, batch);
  const int64_t channels = batch.layout.channels;
  call.gradients.limbs = arguments.elements<int64_t>(limbs, "limbs", Kind::kInt64, 6 * channels);
  call.gradients.gradient = arguments.elements<int64_t>(gradient, "gradient", Kind::kInt64, channels);
  call.gradients.deviation = arguments.elements<int64_t>(deviation, "deviation", Kind::kInt64, channels);
  call.accepted = arguments.truth("accepted");
  call.forward = arguments.elements<double>(forward, "forward", Kind::kFloat64, 8 * channels);
  call.gradients.forward_nonfinite =
      arguments.elements<uint8_t>(forward_nonfinite, "forward_nonfinite", Kind::kTruths, channels);
  call.pass.mean = arguments.coefficients(mean, "mean", batch.storage, channels);
  call.pass.scale = arguments.coefficients(scale, "scale", batch.storage, channels);
  call.gradients.rows = arguments.output<double>(rows, "rows", Kind::kFloat64, 4 * channels);
  call.gradients.offset = arguments.output<float>(singles, "singles", Kind::kFloat32, 2 * channels);
  call.gradients.nonfinite = arguments.output<uint8_t>(flags, "flags", Kind::kTruths, 2 * channels);
  call.pass.dx = arguments.alike(dx, "dx", batch, true);
  if (arguments.sound() && batch.storage == Storage::kFloat64) {
    arguments.fail(PyExc_TypeError, "finish_backward: float64 batches have two folds.");
  }
  if (!arguments.sound()) return nullptr;
  const Outcome outcome = call.run(table, shared);
  return outcome == Outcome::kNoMemory ? PyErr_NoMemory() : PyBool_FromLong(outcome == Outcome::kRefused);
}

namespace {

// A float32 batch at an address, of which every value counts.
void batch_at(Arguments& arguments, Batch& batch) {
  const int64_t a = arguments.integer("A"), c = arguments.integer("C"), b = arguments.integer("B");
  batch.storage = Storage::kFloat32;
  batch.layout = c == 1 ? Layout{1, 1, a * b} : Layout{a, c, b};
  batch.x = arguments.address("x");
  batch.mask = Mask{nullptr, false, 1};
}

}  // namespace

// A training call of a world of one, on memory that is given by its addresses: 5 µs of a call at (32, 64) are the checks
// of a dozen arrays. Writes the moving statistics where the old ones are. False: nothing was written but y and the
// record; the grid does not fit, an address is null, or the moving statistics are not those of the record before.
PyObject* py_forward_at(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "forward_at", 21);
  Array pivot, exponent, before, record;
  ForwardCall call;
  const Table* table = arguments.variant();
  const Sharing shared = sharing(arguments);
  batch_at(arguments, call.pass.batch);
  const int64_t channels = call.pass.batch.layout.channels;
  call.pass.y = arguments.address("y");
  const bool affine = arguments.truth("affine");
  call.of.gamma = static_cast<const float*>(arguments.address("gamma"));
  call.of.beta = static_cast<const float*>(arguments.address("beta"));
  auto* mean = static_cast<float*>(arguments.address("mean"));
  auto* variance = static_cast<float*>(arguments.address("variance"));
  auto* calls = static_cast<int64_t*>(arguments.address("calls"));
  call.statistics.pivot = arguments.elements<double>(pivot, "pivot", Kind::kFloat64, channels);
  call.statistics.exponent = arguments.elements<int64_t>(exponent, "exponent", Kind::kInt64, channels);
  call.statistics.epsilon = arguments.real("epsilon");
  call.moving.momentum = arguments.real("momentum");
  call.moving.synchronized = true;
  call.moving.unbiased = arguments.truth("unbiased");
  const auto* last = arguments.elements<uint8_t>(before, "before", Kind::kTruths, Record::kBytes * channels);
  auto* memory = arguments.output<uint8_t>(record, "record", Kind::kTruths, Record::kBytes * channels);
  if (!arguments.sound()) return nullptr;
  const bool given_all = call.pass.batch.x != nullptr && call.pass.y != nullptr && mean != nullptr &&
                         variance != nullptr && calls != nullptr && affine == (call.of.gamma != nullptr) &&
                         affine == (call.of.beta != nullptr);
  const auto size = static_cast<size_t>(channels) * sizeof(float);
  const float* recorded = Record(const_cast<uint8_t*>(last), channels).moved(channels);
  if (!given_all || std::memcmp(mean, recorded, size) != 0 || std::memcmp(variance, recorded + channels, size) != 0) {
    Py_RETURN_FALSE;
  }
  const Record written(memory, channels);
  call.moving.old_mean = mean;
  call.moving.old_variance = variance;
  call.moving.new_mean = written.moved(channels);
  call.moving.new_variance = written.moved(channels) + channels;
  call.writes(written);
  const Outcome outcome = call.run(table, shared);
  if (outcome == Outcome::kNoMemory) return PyErr_NoMemory();
  if (outcome == Outcome::kDone) {
    std::memcpy(mean, written.moved(channels), size);
    std::memcpy(variance, written.moved(channels) + channels, size);
    ++*calls;
  }
  return PyBool_FromLong(outcome == Outcome::kDone);
}

namespace {

// The backward pass of a call that is known by its record alone, on the sums of its own batch. Writes the gradients of
// gamma and beta, rounded, where there are such. True: refused, and nothing that was written counts.
PyObject* pulled_by_record(
    BackwardCall& call, const Table* table, const Sharing& shared, uint8_t* memory, float* gamma, float* beta) {
  const int64_t channels = call.pass.batch.layout.channels;
  const Record of_call(memory, channels);
  call.forward = of_call.rows;
  call.reach = of_call.reach;
  call.gradients.forward_nonfinite = of_call.nonfinite;
  call.pass.mean = of_call.singles;
  call.pivot = of_call.singles + channels;
  call.pass.scale = of_call.singles + 4 * channels;
  const Integers own(4 * channels + channels + channels);  // (4, C) doubles, (2, C) singles, (2, C) truths
  if (own.get() == nullptr) return PyErr_NoMemory();
  call.gradients.rows = reinterpret_cast<double*>(own.get());
  call.gradients.offset = reinterpret_cast<float*>(own.get() + 4 * channels);
  call.gradients.nonfinite = reinterpret_cast<uint8_t*>(own.get() + 5 * channels);
  const Outcome outcome = call.run(table, shared);
  if (outcome == Outcome::kNoMemory) return PyErr_NoMemory();
  for (int64_t c = 0; outcome == Outcome::kDone && c < channels; ++c) {
    if (beta != nullptr) beta[c] = static_cast<float>(call.gradients.rows[c]);
    if (gamma != nullptr) gamma[c] = static_cast<float>(call.gradients.rows[channels + c]);
  }
  return PyBool_FromLong(outcome == Outcome::kRefused);
}

}  // namespace

// The backward pass in a world of one. It is refused, too, where a sample of the batch is given that it has no more.
PyObject* py_pull_alone(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "pull_alone", 15);
  Array x, dy, mask, record, gradient, deviation, gamma, beta, dx;
  BackwardCall call;
  const Table* table = arguments.variant();
  const Sharing shared = sharing(arguments);
  Batch& batch = call.pass.batch;
  arguments.batch(x, batch);
  call.pass.dy = arguments.alike(dy, "dy", batch, false);
  arguments.mask(mask, x, batch);
  PyObject* seen = arguments.object("seen");
  const int64_t channels = batch.layout.channels;
  auto* memory = arguments.elements<uint8_t>(record, "record", Kind::kTruths, Record::kBytes * channels);
  call.gradients.gradient = arguments.elements<int64_t>(gradient, "gradient", Kind::kInt64, channels);
  call.gradients.deviation = arguments.elements<int64_t>(deviation, "deviation", Kind::kInt64, channels);
  call.lowest = arguments.integer("lowest");
  call.highest = arguments.integer("highest");
  auto* of_gamma = arguments.output<float>(gamma, "gamma", Kind::kFloat32, channels, true);
  auto* of_beta = arguments.output<float>(beta, "beta", Kind::kFloat32, channels, true);
  call.pass.dx = arguments.alike(dx, "dx", batch, true);
  if (arguments.sound() && batch.storage == Storage::kFloat64) {
    arguments.fail(PyExc_TypeError, "pull_alone: float64 batches have two folds.");
  }
  if (!arguments.sound()) return nullptr;
  if (seen != Py_None) {
    PyObject* now = sampled(x);
    const int alike = now == nullptr ? -1 : PyObject_RichCompareBool(now, seen, Py_EQ);
    Py_XDECREF(now);
    if (alike < 0) return nullptr;
    if (alike == 0) Py_RETURN_TRUE;
  }
  return pulled_by_record(call, table, shared, memory, of_gamma, of_beta);
}

// The same on addresses, for a call of `forward_at`. False: refused, or an address is null.
PyObject* py_backward_at(PyObject*, PyObject* const* given, Py_ssize_t count) {
  Arguments arguments(given, count, "backward_at", 16);
  Array record, gradient, deviation;
  BackwardCall call;
  const Table* table = arguments.variant();
  const Sharing shared = sharing(arguments);
  batch_at(arguments, call.pass.batch);
  const int64_t channels = call.pass.batch.layout.channels;
  call.pass.dy = arguments.address("dy");
  call.pass.dx = arguments.address("dx");
  auto* gamma = static_cast<float*>(arguments.address("gamma"));
  auto* beta = static_cast<float*>(arguments.address("beta"));
  auto* memory = arguments.elements<uint8_t>(record, "record", Kind::kTruths, Record::kBytes * channels);
  call.gradients.gradient = arguments.elements<int64_t>(gradient, "gradient", Kind::kInt64, channels);
  call.gradients.deviation = arguments.elements<int64_t>(deviation, "deviation", Kind::kInt64, channels);
  call.lowest = arguments.integer("lowest");
  call.highest = arguments.integer("highest");
  if (!arguments.sound()) return nullptr;
  if (call.pass.batch.x == nullptr || call.pass.dy == nullptr || call.pass.dx == nullptr) Py_RETURN_FALSE;
  PyObject* refused = pulled_by_record(call, table, shared, memory, gamma, beta);
  if (refused == nullptr) return nullptr;
  const bool done = refused == Py_False;
  Py_DECREF(refused);
  return PyBool_FromLong(done);
}

}  // namespace bnlayer
