// How a pass is made: by one thread or several, each over a part of the batch, with the interpreter let go of.

#pragma once

#include "arguments.hpp"
#include "tasks.hpp"

namespace bnlayer {

// How many threads may share a pass, and how many elements are worth one.
struct Sharing {
  int64_t threads, worth;
};
inline Sharing sharing(Arguments& arguments) {
  const int64_t threads = arguments.integer("threads"), worth = arguments.integer("worth");
  return {threads, worth};
}

template <class Pass>
struct Work {
  const Pass& pass;
  const Parts& parts;
  char* workspace;
  int64_t bytes;     // of a part's workspace
  int64_t* results;  // of all parts, one after the other
  int64_t words;     // of what one part finds
  void (*reduce)(const Pass&, const Part&, void*, int64_t*);
  void (*write)(const Pass&, const Part&, void*);
};

template <class Pass>
void do_part(void* given, int i) {
  const auto& work = *static_cast<Work<Pass>*>(given);
  void* workspace = work.workspace + i * work.bytes;
  if (work.reduce != nullptr) {
    work.reduce(work.pass, work.parts.part[i], workspace, work.results + i * work.words);
  } else {
    work.write(work.pass, work.parts.part[i], workspace);
  }
}

// Makes a pass that reduces; `merge(total, part)` joins what the other parts have results to the first one's. False: there
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
  int64_t* results = parts.count > 1 ? reinterpret_cast<int64_t*>(memory) : to;
  Work<Pass> work{pass, parts, memory + parts.count * result * 8, bytes, results, result, reduce, nullptr};
  Py_BEGIN_ALLOW_THREADS;
  over(parts.count, do_part<Pass>, &work);
  for (int i = 1; i < parts.count; ++i) merge(results, results + i * result);
  for (int64_t at = 0; parts.count > 1 && at < words; ++at) to[at] = results[at];
  Py_END_ALLOW_THREADS;
  return true;
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

enum class Outcome { kDone, kRefused, kNoMemory };

inline int64_t sums_of(Storage storage) { return storage == Storage::kFloat64 ? 8 : 4; }

}  // namespace bnlayer
