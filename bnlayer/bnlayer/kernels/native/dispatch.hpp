// The variants of the kernels that were compiled, and those that this processor runs.

#pragma once

#include "passes.hpp"

namespace bnlayer {

constexpr int kVariants = 4;

// The variants that this processor runs, the widest first, then nulls.
const Table* const* variants();

// The names of all that were compiled, then nulls.
const char* const* compiled();

}  // namespace bnlayer
