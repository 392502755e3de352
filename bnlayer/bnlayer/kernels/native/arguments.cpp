#include "arguments.hpp"

#include <cstdarg>
#include <cstring>

#include "dispatch.hpp"

namespace bnlayer {
namespace {

// A dtype that names the machine's own order of bytes is the same as one that does not.
const char* in_native_order(const char* format) {
  constexpr char kOrder = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? '<' : '>';
  return format != nullptr && (format[0] == kOrder || format[0] == '=' || format[0] == '@') ? format + 1 : format;
}

bool is_one_of(const char* format, const char* kinds) {
  return format != nullptr && format[0] != '\0' && format[1] == '\0' && std::strchr(kinds, format[0]) != nullptr;
}

// What a kind of array is, as errors name it.
const char* described(Kind kind) {
  switch (kind) {
    case Kind::kNumbers:
      return "float32, float64, float16 or bfloat16 (as uint16)";
    case Kind::kFloat32:
      return "float32";
    case Kind::kFloat64:
      return "float64";
    case Kind::kInt64:
      return "int64";
    case Kind::kTruths:
      return "bool or uint8";
  }
  return "";
}

}  // namespace

bool Array::take(PyObject* from, const char* name, Kind kind, bool written) {
  const int flags = PyBUF_ND | PyBUF_FORMAT | (written ? PyBUF_WRITABLE : 0);
  if (PyObject_GetBuffer(from, &buffer_, flags) != 0) return false;
  held_ = true;
  const char* format = in_native_order(buffer_.format);
  const Py_ssize_t item = buffer_.itemsize;
  bool fits = false;
  switch (kind) {
    case Kind::kNumbers:
      fits = is_one_of(format, "fdeH");
      if (fits) {
        storage_ = format[0] == 'f'   ? Storage::kFloat32
                   : format[0] == 'd' ? Storage::kFloat64
                   : format[0] == 'e' ? Storage::kFloat16
                                      : Storage::kBfloat16;
      }
      break;
    case Kind::kFloat32:
      fits = is_one_of(format, "f");
      break;
    case Kind::kFloat64:
      fits = is_one_of(format, "d");
      break;
    case Kind::kInt64:
      fits = is_one_of(format, "lq") && item == 8;
      break;
    case Kind::kTruths:
      fits = is_one_of(format, "?B");
      break;
  }
  const auto address = reinterpret_cast<uintptr_t>(buffer_.buf);
  // Without elements there is nothing to lie aligned: NumPy says so of such an array, and makes no copy of it.
  if (fits && (address % static_cast<uintptr_t>(item) == 0 || size() == 0)) return true;
  PyErr_Format(
      PyExc_TypeError, "%s: expected an aligned array of %s, received one of format '%s'%s.", name, described(kind),
      format == nullptr ? "" : format, fits ? " that is not aligned" : "");
  return false;
}

int64_t Array::size() const {
  int64_t size = 1;
  for (int axis = 0; axis < buffer_.ndim; ++axis) size *= buffer_.shape[axis];
  return size;
}

Arguments::Arguments(PyObject* const* given, Py_ssize_t count, const char* function, Py_ssize_t expected)
    : given_(given), function_(function), sound_(count == expected) {
  if (!sound_) PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, received %zd.", function, expected, count);
}

PyObject* Arguments::next(const char*) { return sound_ ? given_[at_++] : nullptr; }

bool Arguments::fail(PyObject* kind, const char* format, ...) {
  if (!sound_) return false;
  sound_ = false;
  va_list values;
  va_start(values, format);
  PyErr_FormatV(kind, format, values);
  va_end(values);
  return false;
}

int64_t Arguments::integer(const char* name) {
  PyObject* value = next(name);
  if (value == nullptr) return 0;
  const long long number = PyLong_AsLongLong(value);
  if (number == -1 && PyErr_Occurred() != nullptr) sound_ = false;
  return number;
}

double Arguments::real(const char* name) {
  PyObject* value = next(name);
  if (value == nullptr) return 0.0;
  const double number = PyFloat_AsDouble(value);
  if (number == -1.0 && PyErr_Occurred() != nullptr) sound_ = false;
  return number;
}

bool Arguments::truth(const char* name) {
  PyObject* value = next(name);
  if (value == nullptr) return false;
  const int number = PyObject_IsTrue(value);
  if (number < 0) sound_ = false;
  return number > 0;
}

void* Arguments::address(const char* name) {
  PyObject* value = next(name);
  if (value == nullptr) return nullptr;
  void* number = PyLong_AsVoidPtr(value);
  if (number == nullptr && PyErr_Occurred() != nullptr) sound_ = false;
  return number;
}

bool Arguments::array(Array& to, const char* name, Kind kind, bool written) {
  PyObject* value = next(name);
  if (value == nullptr) return false;
  sound_ = to.take(value, name, kind, written);
  return sound_;
}

void* Arguments::memory(Array& to, const char* name, Kind kind, int64_t size, bool written, bool optional) {
  PyObject* value = next(name);
  if (value == nullptr || (optional && value == Py_None)) return nullptr;
  sound_ = to.take(value, name, kind, written);
  if (sound_ && to.size() != size) {
    fail(
        PyExc_ValueError, "%s: expected %s of %lld elements, received %lld.", function_, name,
        static_cast<long long>(size), static_cast<long long>(to.size()));
  }
  return sound_ ? to.data<void>() : nullptr;
}

bool Arguments::batch(Array& to, Batch& batch) {
  if (!array(to, "x", Kind::kNumbers)) return false;
  if (to.dimensions() != 3) return fail(PyExc_ValueError, "%s: expected x of shape (A, C, B).", function_);
  const int64_t a = to.shape(0), c = to.shape(1), b = to.shape(2);
  batch.storage = to.storage();
  batch.layout = a * b == 0 ? Layout{0, c, 1} : c == 1 ? Layout{1, 1, a * b} : Layout{a, c, b};
  batch.x = to.data<void>();
  batch.mask = Mask{nullptr, false, 1};
  return true;
}

void* Arguments::alike(Array& to, const char* name, const Batch& batch, bool written) {
  if (!array(to, name, Kind::kNumbers, written)) return nullptr;
  const int64_t size = batch.layout.images * batch.layout.channels * batch.layout.length;
  if (to.size() != size || to.storage() != batch.storage) {
    fail(PyExc_ValueError, "%s: expected %s of x's shape and dtype.", function_, name);
    return nullptr;
  }
  return to.data<void>();
}

bool Arguments::mask(Array& to, const Array& x, Batch& batch) {
  if (!sound_) return false;
  if (given_[at_] == Py_None) {
    ++at_;
    return true;
  }
  if (!array(to, "mask", Kind::kTruths)) return false;
  const int64_t a = x.shape(0), c = x.shape(1), b = x.shape(2);
  const bool fits = to.dimensions() == 3 && to.shape(0) == a;
  const int64_t truths = fits ? to.shape(2) : 0;
  const bool rows = fits && to.shape(1) == 1 && truths == 1 && b == 1 && c > 1;
  const bool elements = fits && to.shape(1) == c && (truths > 0 ? b % truths == 0 : b == 0);
  if (!rows && !elements) {
    return fail(
        PyExc_ValueError, "%s: expected a mask of shape (A, 1, 1) for channels in the last axis, or (A, C, M).",
        function_);
  }
  batch.mask = Mask{to.data<const uint8_t>(), rows, rows || b == 0 ? 1 : b / truths};
  return true;
}

const Table* Arguments::variant() {
  const int64_t index = integer("variant");
  if (!sound_) return nullptr;
  const Table* const* all = variants();
  for (int i = 0; i < kVariants && all[i] != nullptr; ++i) {
    if (i == index) return all[i];
  }
  fail(PyExc_ValueError, "%s: there is no variant %lld.", function_, static_cast<long long>(index));
  return nullptr;
}

}  // namespace bnlayer
