// Chooses, once, among the variants that were compiled (BNLAYER_HAS_…).

#include "dispatch.hpp"

#define BNLAYER_DECLARE(name) \
  namespace name {            \
  const char* variant();      \
  }

namespace bnlayer {

#if BNLAYER_HAS_BASELINE
BNLAYER_DECLARE(baseline)
#endif
#if BNLAYER_HAS_AVX2
BNLAYER_DECLARE(avx2)
#endif
#if BNLAYER_HAS_AVX512
BNLAYER_DECLARE(avx512)
#endif
#if BNLAYER_HAS_NEON
BNLAYER_DECLARE(neon)
#endif

const char* chosen_variant() {
#if BNLAYER_HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return avx512::variant();
  }
#endif
#if BNLAYER_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::variant();
  }
#endif
#if BNLAYER_HAS_NEON
  return neon::variant();
#else
  return baseline::variant();
#endif
}

}  // namespace bnlayer
