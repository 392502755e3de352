// Which variants were compiled (BNLAYER_HAS_…), and which of them this processor runs.

#include "dispatch.hpp"

#define BNLAYER_DECLARE(name) \
  namespace name {            \
  extern const Table table;   \
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

namespace {

struct Available {
  const Table* runnable[kVariants + 1] = {};
  const char* names[kVariants + 1] = {};

  Available() {
#if defined(__x86_64__)
    __builtin_cpu_init();  // may be called before the compiler's own initialization
#endif
    int compiled = 0, runs = 0;
    const auto add = [&](const Table& table, bool supported) {
      names[compiled++] = table.name;
      if (supported) runnable[runs++] = &table;
    };
#if BNLAYER_HAS_AVX512
    add(avx512::table, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"));
#endif
#if BNLAYER_HAS_AVX2
    add(avx2::table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"));
#endif
#if BNLAYER_HAS_NEON
    add(neon::table, true);
#endif
#if BNLAYER_HAS_BASELINE
    add(baseline::table, true);
#endif
  }
};

// When the module is loaded. A static variable of a function would need the C++ library for its guard, which the module
// does without: that way it is linked on any system.
const Available available;

}  // namespace

const Table* const* variants() { return available.runnable; }
const char* const* compiled() { return available.names; }

}  // namespace bnlayer
