// The passes of one variant, for `dispatch.cpp`.

#include "kernels/variant.hpp"

#define BNLAYER_TEXT(name) #name
#define BNLAYER_NAME(name) BNLAYER_TEXT(name)

namespace bnlayer::BNLAYER_VARIANT {

extern const Table table;
const Table table = {
    BNLAYER_NAME(BNLAYER_VARIANT),
    moments_workspace,
    moments,
    gradient_sums_workspace,
    gradient_sums,
    probe_workspace,
    probe,
    gradient_probe_workspace,
    gradient_probe,
    normalize_workspace,
    normalize,
    input_gradient_workspace,
    input_gradient,
    statistics,
    moved,
    coefficients,
    gradients,
};

}  // namespace bnlayer::BNLAYER_VARIANT
