// How numbers are stored, and how they are computed with: float16 and bfloat16 as float32, into which they convert exactly.

#pragma once

#include <cstring>
#include <type_traits>

#include "kernels/simd.hpp"
#include "passes.hpp"

namespace bnlayer::BNLAYER_VARIANT {

struct Half {
  uint16_t bits;
};
struct Brain {  // bfloat16
  uint16_t bits;
};

template <class S>
using Number = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class S, int N, int L>
BNLAYER_INLINE Pack<uint32_t, N, L> load_patterns(const S* from) {
  Pack<uint32_t, N, L> made;
  for (int i = 0; i < made.kCount; ++i) {
    Register<uint16_t, L> narrow;
    __builtin_memcpy(&narrow, from + i * L, sizeof(narrow));
    made.reg[i] = converted_register<uint32_t, uint16_t, L>(narrow);
  }
  return made;
}

template <int N, int L>
BNLAYER_INLINE Pack<float, N, L> from_half(const Half* from) {
#if defined(__F16C__) || defined(__AVX512F__)
  if constexpr (L >= 4) {
    Pack<float, N, L> made;
    for (int i = 0; i < made.kCount; ++i) {
      const void* at = from + i * L;
#if defined(__AVX512F__)
      if constexpr (L == 16) {
        made.reg[i] = (Register<float, L>)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
      }
#endif
#if defined(__F16C__)
      if constexpr (L == 8) {
        made.reg[i] = (Register<float, L>)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(at)));
      } else if constexpr (L == 4) {
        made.reg[i] = (Register<float, L>)_mm_cvtph_ps(_mm_loadl_epi64(static_cast<const __m128i*>(at)));
      }
#elif defined(__AVX512VL__)
      if constexpr (L == 8) {
        const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(at)));
        made.reg[i] = (Register<float, L>)_mm512_castps512_ps256(_mm512_cvtph_ps(twice));
      } else if constexpr (L == 4) {
        const __m256i once = _mm256_castsi128_si256(_mm_loadl_epi64(static_cast<const __m128i*>(at)));
        made.reg[i] = (Register<float, L>)_mm512_castps512_ps128(_mm512_cvtph_ps(once));
      }
#endif
    }
    return made;
  }
#endif
  // The exponent is moved to float32's. A subnormal number is one too many of the smallest normal ones.
  using Words = Pack<uint32_t, N, L>;
  const Words pattern = load_patterns<Half, N, L>(from);
  const Words size = shifted_left<13>(pattern & Words::all(0x7FFF)), exponent = size & Words::all(0x7C00u << 13);
  const Words moved = size + Words::all(112u << 23);
  const auto special = as<int32_t>(exponent) == as<int32_t>(Words::all(0x7C00u << 13));
  const auto tiny = as<int32_t>(exponent) == zeros<int32_t, N, L>();
  const Words shown = either(special, moved + Words::all(112u << 23), moved);
  const auto smallest = Pack<float, N, L>::all(__builtin_bit_cast(float, 113u << 23));
  const auto below = as<float>(moved + Words::all(1u << 23)) - smallest;
  const auto made = either(tiny, below, as<float>(shown));
  return as<float>(as<uint32_t>(made) | shifted_left<16>(pattern & Words::all(0x8000)));
}

// Numbers as they are computed with.
template <int N, int L, class S>
BNLAYER_INLINE Pack<Number<S>, N, L> load_numbers(const S* from) {
  if constexpr (std::is_same_v<S, Half>) {
    return from_half<N, L>(from);
  } else if constexpr (std::is_same_v<S, Brain>) {
    return as<float>(shifted_left<16>(load_patterns<Brain, N, L>(from)));
  } else {
    return Pack<S, N, L>::load(from);
  }
}

template <int N, int L>
BNLAYER_INLINE Pack<uint32_t, N, L> to_brain(const Pack<float, N, L>& value) {
  using Words = Pack<uint32_t, N, L>;
  const Words pattern = as<uint32_t>(value), odd = shifted_right<16>(pattern) & Words::all(1);
  const Words rounded = shifted_right<16>(pattern + Words::all(0x7FFF) + odd);
  const Words quiet = shifted_right<16>(pattern) | Words::all(0x40);
  return either(magnitude(value) > Pack<int32_t, N, L>::all(kInfinity<float>), quiet, rounded);
}

template <int N, int L>
BNLAYER_INLINE Pack<uint32_t, N, L> to_half(const Pack<float, N, L>& value) {
  // Subnormal results by an addition that rounds where their last place is; the others by adding half of it.
  using Words = Pack<uint32_t, N, L>;
  using Ints = Pack<int32_t, N, L>;
  const Words sign = shifted_right<16>(as<uint32_t>(value)) & Words::all(0x8000);
  const Ints size = magnitude(value);
  const float last = __builtin_bit_cast(float, 126u << 23);  // 0.5, whose last place is 2^-24
  const Words small = as<uint32_t>(as<float>(size) + Pack<float, N, L>::all(last)) - Words::all(126u << 23);
  const Words odd = shifted_right<13>(as<uint32_t>(size)) & Words::all(1);
  const Words usual = shifted_right<13>(as<uint32_t>(size) - Words::all(112u << 23) + Words::all(0xFFF) + odd);
  Words made = either(size < Ints::all(113 << 23), small, usual);
  made = either(size >= Ints::all(143 << 23), Words::all(0x7C00), made);
  made = either(size > Ints::all(kInfinity<float>), Words::all(0x7E00), made);
  return made | sign;
}

// Numbers as they are stored, rounded once.
template <int N, int L, class S>
BNLAYER_INLINE void store_numbers(S* to, const Pack<Number<S>, N, L>& value) {
  if constexpr (std::is_same_v<S, Half> || std::is_same_v<S, Brain>) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, Half> && L == 16) {
      for (int i = 0; i < value.kCount; ++i) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * L), _mm512_cvtps_ph((__m512)value.reg[i], 0));
      }
      return;
    }
#endif
#if defined(__F16C__)
    if constexpr (std::is_same_v<S, Half> && L == 8) {
      for (int i = 0; i < value.kCount; ++i) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * L), _mm256_cvtps_ph((__m256)value.reg[i], 0));
      }
      return;
    }
#endif
    Pack<uint32_t, N, L> patterns;
    if constexpr (std::is_same_v<S, Half>) {
      patterns = to_half(value);
    } else {
      patterns = to_brain(value);
    }
    for (int i = 0; i < value.kCount; ++i) {
      const auto narrow = __builtin_convertvector(patterns.reg[i], Register<uint16_t, L>);
      __builtin_memcpy(to + i * L, &narrow, sizeof(narrow));
    }
  } else {
    value.store(to);
  }
}

// The first `count` elements of N, and 0 after them. Where N of them lie before `end`, the rest is what comes next.
template <int N, int L, class S>
BNLAYER_INLINE Pack<Number<S>, N, L> load_some(const S* from, int64_t count, const S* end) {
  if (end - from >= N) return load_numbers<N, L>(from);
  S held[N] = {};
  std::memcpy(held, from, static_cast<size_t>(count) * sizeof(S));
  return load_numbers<N, L>(held);
}

// One number by itself.
template <class S>
BNLAYER_INLINE Number<S> number(const S* from) {
  if constexpr (std::is_same_v<S, Half> || std::is_same_v<S, Brain>) {
    S held[kLanes] = {*from};
    return load_numbers < kLanes, kWide<4 ? 4 : kWide>(held).reg[0][0];
  } else {
    return *from;
  }
}

// Calls `call` with a null pointer of the type in which numbers are stored.
template <class Call>
BNLAYER_INLINE auto by_storage(Storage storage, Call call) {
  switch (storage) {
    case Storage::kFloat64:
      return call(static_cast<const double*>(nullptr));
    case Storage::kFloat16:
      return call(static_cast<const Half*>(nullptr));
    case Storage::kBfloat16:
      return call(static_cast<const Brain*>(nullptr));
    default:
      return call(static_cast<const float*>(nullptr));
  }
}

}  // namespace bnlayer::BNLAYER_VARIANT
