// Python's arguments as what the passes take: arrays by the buffer protocol, checked before anything is read.

#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>

#include "passes.hpp"

namespace bnlayer {

// What an array holds.
enum class Kind { kNumbers, kFloat32, kFloat64, kInt64, kTruths };

// An array's memory, held for as long as this lives.
class Array {
 public:
  Array() = default;
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() {
    if (held_) PyBuffer_Release(&buffer_);
  }

  // Takes hold of an array in one piece; false: a Python error is set.
  bool take(PyObject* from, const char* name, Kind kind, bool written);

  int64_t size() const;
  int dimensions() const { return buffer_.ndim; }
  int64_t shape(int axis) const { return buffer_.shape[axis]; }
  int64_t item() const { return buffer_.itemsize; }  // bytes
  Storage storage() const { return storage_; }
  template <class T>
  T* data() const {
    return static_cast<T*>(buffer_.buf);
  }

 private:
  Py_buffer buffer_{};
  Storage storage_ = Storage::kFloat32;
  bool held_ = false;
};

// One call's arguments, taken one after the other; after the first that is wrong, nothing more is taken.
class Arguments {
 public:
  Arguments(PyObject* const* given, Py_ssize_t count, const char* function, Py_ssize_t expected);

  bool sound() const { return sound_; }
  int64_t integer(const char* name);
  double real(const char* name);
  bool truth(const char* name);
  PyObject* object(const char* name) { return next(name); }  // borrowed
  void* address(const char* name);                           // an integer; null: 0
  bool array(Array& to, const char* name, Kind kind, bool written = false);
  // Of so many elements, or null for None where that is allowed.
  template <class T>
  T* elements(Array& to, const char* name, Kind kind, int64_t size, bool optional = false) {
    return static_cast<T*>(memory(to, name, kind, size, false, optional));
  }
  template <class T>
  T* output(Array& to, const char* name, Kind kind, int64_t size, bool optional = false) {
    return static_cast<T*>(memory(to, name, kind, size, true, optional));
  }
  // Numbers as a batch is computed with.
  const void* coefficients(Array& to, const char* name, Storage storage, int64_t size) {
    return memory(to, name, storage == Storage::kFloat64 ? Kind::kFloat64 : Kind::kFloat32, size, false, false);
  }
  // (A, C, B) numbers; its layout with channels in the last axis, or as runs.
  bool batch(Array& to, Batch& batch);
  // An array of the batch's shape and storage.
  void* alike(Array& to, const char* name, const Batch& batch, bool written);
  // (A, 1, 1) where the channels come last, or (A, C, M), each truth for B/M values side by side; None: all count.
  bool mask(Array& to, const Array& x, Batch& batch);
  const Table* variant();
  bool fail(PyObject* kind, const char* format, ...);

 private:
  PyObject* next(const char* name);
  void* memory(Array& to, const char* name, Kind kind, int64_t size, bool written, bool optional);

  PyObject* const* given_;
  const char* function_;
  Py_ssize_t at_ = 0;
  bool sound_;
};

}  // namespace bnlayer
