// The variant of the kernels that this processor runs.

#pragma once

namespace bnlayer {

// The name of the widest variant that this processor has.
const char* chosen_variant();

}  // namespace bnlayer
