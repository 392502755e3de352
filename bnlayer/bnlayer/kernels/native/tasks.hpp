// A pass by several threads, each over a part of the batch.

#pragma once

#include <cstdint>

#include "passes.hpp"

namespace bnlayer {

constexpr int kMostParts = 64;

struct Parts {
  Part part[kMostParts];
  int count;
};

// Cuts a batch in parts, at most `threads`, of `worth` elements at least: one at least.
Parts split(const Layout& layout, int64_t threads, int64_t worth);

// Calls `call(context, i)` for each i below `count`, by as many threads, of which the caller is one. Where other threads
// can't be had, the caller does it all.
void over(int count, void (*call)(void* context, int i), void* context);

// Memory of the calling thread that begins with a cache line, until the next call; null: there is not so much.
void* workspace(int64_t bytes);

}  // namespace bnlayer
