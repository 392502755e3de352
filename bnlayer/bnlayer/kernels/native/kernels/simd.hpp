// Explicit vectors: `Pack<T, N, L>` holds N numbers, L of them in a register.
//
// A loop that a compiler fails to vectorize gives no message, and takes many times as long. What is written with packs is
// vectorized because it says so. Every operation rounds once; what is fused says so (`fused`).
//
// All sums are integers, or floats whose additions are exact, so the number of lanes can't be seen in any result.

#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 of its own header; Clang does not know it
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define BNLAYER_INLINE inline __attribute__((always_inline))

namespace bnlayer::BNLAYER_VARIANT {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

constexpr int kLanes = 8;                    // channels of a group: a cache line of float64
constexpr int kWide = kRegisterBytes / 8;    // float64 in a register
constexpr int kNarrow = kRegisterBytes / 4;  // float32 in a register

template <class T, int L>
struct RegisterOf {
  typedef T type __attribute__((vector_size(L * sizeof(T))));
};
template <class T, int L>
using Register = typename RegisterOf<T, L>::type;

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = int32_t;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
};
template <class T>
using Bits = typename BitsOf<T>::type;

template <class T, int N, int L>
struct Pack {
  static_assert(N % L == 0);
  static constexpr int kCount = N / L;
  using Element = T;
  using Reg = Register<T, L>;
  Reg reg[kCount];

  static BNLAYER_INLINE Pack all(T value) {
    Pack made;
    for (int i = 0; i < kCount; ++i) made.reg[i] = value - Reg{};  // not a sum: −0 + 0 is +0
    return made;
  }
  static BNLAYER_INLINE Pack load(const T* from) {
    Pack made;
    for (int i = 0; i < kCount; ++i) __builtin_memcpy(&made.reg[i], from + i * L, sizeof(Reg));
    return made;
  }
  BNLAYER_INLINE void store(T* to) const {
    for (int i = 0; i < kCount; ++i) __builtin_memcpy(to + i * L, &reg[i], sizeof(Reg));
  }
};

template <class T, int N, int L>
BNLAYER_INLINE Pack<T, N, L> zeros() {
  return Pack<T, N, L>{};
}

#define BNLAYER_OPERATOR(op)                                                          \
  template <class T, int N, int L>                                                    \
  BNLAYER_INLINE Pack<T, N, L> operator op(Pack<T, N, L> a, const Pack<T, N, L>& b) { \
    for (int i = 0; i < a.kCount; ++i) a.reg[i] = a.reg[i] op b.reg[i];               \
    return a;                                                                         \
  }
BNLAYER_OPERATOR(+)
BNLAYER_OPERATOR(-)
BNLAYER_OPERATOR(*)
BNLAYER_OPERATOR(/)
BNLAYER_OPERATOR(|)
BNLAYER_OPERATOR(&)
BNLAYER_OPERATOR(^)
#undef BNLAYER_OPERATOR

// Comparisons: all ones where they hold, all zeros where they don't, as integers as wide as what is compared.
#define BNLAYER_COMPARISON(op)                                                               \
  template <class T, int N, int L>                                                           \
  BNLAYER_INLINE auto operator op(const Pack<T, N, L>& a, const Pack<T, N, L>& b) {          \
    using I = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;                          \
    Pack<I, N, L> made;                                                                      \
    for (int i = 0; i < a.kCount; ++i) made.reg[i] = (Register<I, L>)(a.reg[i] op b.reg[i]); \
    return made;                                                                             \
  }
BNLAYER_COMPARISON(<)
BNLAYER_COMPARISON(>)
BNLAYER_COMPARISON(<=)
BNLAYER_COMPARISON(>=)
BNLAYER_COMPARISON(==)
#undef BNLAYER_COMPARISON

// The same bits as another type of the same width.
template <class To, class T, int N, int L>
BNLAYER_INLINE Pack<To, N, L> as(const Pack<T, N, L>& a) {
  static_assert(sizeof(To) == sizeof(T));
  Pack<To, N, L> made;
  for (int i = 0; i < a.kCount; ++i) made.reg[i] = (Register<To, L>)a.reg[i];
  return made;
}
template <class T, int N, int L>
BNLAYER_INLINE auto bits(const Pack<T, N, L>& a) {
  return as<Bits<T>>(a);
}

// The same values as another type. GCC 12 takes apart what one instruction does: those that matter are named.
template <class To, class T, int L>
BNLAYER_INLINE Register<To, L> converted_register(const Register<T, L>& a) {
  [[maybe_unused]] constexpr bool kWidened = std::is_same_v<T, float> && std::is_same_v<To, double>;
  [[maybe_unused]] constexpr bool kTruths = std::is_same_v<T, uint8_t> && std::is_same_v<To, int64_t>;
  [[maybe_unused]] constexpr bool kPatterns = std::is_same_v<T, uint16_t> && std::is_same_v<To, uint32_t>;
#if defined(__AVX512F__)
  if constexpr (kWidened && L == 8) return (Register<To, L>)_mm512_cvtps_pd((__m256)a);
  if constexpr (kTruths && L == 8) return (Register<To, L>)_mm512_cvtepu8_epi64(_mm_cvtsi64_si128((long long)a));
  if constexpr (kPatterns && L == 16) return (Register<To, L>)_mm512_cvtepu16_epi32((__m256i)a);
#endif
#if defined(__AVX2__)
  if constexpr (kWidened && L == 4) return (Register<To, L>)_mm256_cvtps_pd((__m128)a);
  if constexpr (kTruths && L == 4) return (Register<To, L>)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128((int)a));
  if constexpr (kPatterns && L == 8) return (Register<To, L>)_mm256_cvtepu16_epi32((__m128i)a);
#endif
  return __builtin_convertvector(a, Register<To, L>);
}
template <class To, class T, int N, int L>
BNLAYER_INLINE Pack<To, N, L> converted(const Pack<T, N, L>& a) {
  Pack<To, N, L> made;
  for (int i = 0; i < a.kCount; ++i) made.reg[i] = converted_register<To, T, L>(a.reg[i]);
  return made;
}

template <int Places, class T, int N, int L>
BNLAYER_INLINE Pack<T, N, L> shifted_right(Pack<T, N, L> a) {
  for (int i = 0; i < a.kCount; ++i) a.reg[i] = a.reg[i] >> Places;
  return a;
}
template <int Places, class T, int N, int L>
BNLAYER_INLINE Pack<T, N, L> shifted_left(Pack<T, N, L> a) {
  for (int i = 0; i < a.kCount; ++i) a.reg[i] = a.reg[i] << Places;
  return a;
}

// `value` where a truth holds, and +0 elsewhere: whatever stands there, NaN included, is gone.
template <class T, class I, int N, int L>
BNLAYER_INLINE Pack<T, N, L> where(const Pack<I, N, L>& truth, const Pack<T, N, L>& value) {
  return as<T>(as<I>(value) & truth);
}
template <class T, class I, int N, int L>
BNLAYER_INLINE Pack<T, N, L> either(
    const Pack<I, N, L>& truth, const Pack<T, N, L>& value, const Pack<T, N, L>& other) {
  return as<T>(((as<I>(value) ^ as<I>(other)) & truth) ^ as<I>(other));
}

template <class T, int N, int L>
BNLAYER_INLINE Pack<T, N, L> greater(Pack<T, N, L> a, const Pack<T, N, L>& b) {
  for (int i = 0; i < a.kCount; ++i) a.reg[i] = a.reg[i] > b.reg[i] ? a.reg[i] : b.reg[i];
  return a;
}

template <class T, int N, int L>
BNLAYER_INLINE bool any(const Pack<T, N, L>& truths) {
  Register<T, L> seen = truths.reg[0];
  for (int i = 1; i < truths.kCount; ++i) seen |= truths.reg[i];
  T seen_bits = 0;
  for (int lane = 0; lane < L; ++lane) seen_bits |= seen[lane];
  return seen_bits != 0;
}

// |a| as an integer in the order of the numbers: infinity above all of them, NaN above infinity.
template <class T, int N, int L>
BNLAYER_INLINE auto magnitude(const Pack<T, N, L>& a) {
  using I = Bits<T>;
  constexpr I kMask = sizeof(T) == 4 ? I(0x7FFF'FFFF) : I(0x7FFF'FFFF'FFFF'FFFF);
  return bits(a) & Pack<I, N, L>::all(kMask);
}

template <class T>
constexpr Bits<T> kInfinity = sizeof(T) == 4 ? Bits<T>(0x7F80'0000) : Bits<T>(0x7FF0'0000'0000'0000);

template <class T, int N, int L>
BNLAYER_INLINE auto finite(const Pack<T, N, L>& a) {
  return magnitude(a) < Pack<Bits<T>, N, L>::all(kInfinity<T>);
}

#if !defined(__AVX512F__) && !defined(__FMA__) && !defined(__aarch64__)
// The lanes that lie half-way, by the C library, which rounds once.
__attribute__((noinline, cold)) inline Register<double, 2> fused_ties(
    Register<double, 2> a, Register<double, 2> b, Register<double, 2> c) {
  return Register<double, 2>{__builtin_fma(a[0], b[0], c[0]), __builtin_fma(a[1], b[1], c[1])};
}
#endif

// a·b + c, rounded once.
//
// Where the processor has no such instruction, for |a·b| below half of |c|, and below 2^51 units of c's last place: the
// product is rounded by itself, and then the sum. That is the same, unless the rounded product lies half-way between two
// multiples of the sum's last place: a half-way point is a float64 itself, so rounding the product never crosses one.
template <int L>
BNLAYER_INLINE Register<double, L> fused_register(Register<double, L> a, Register<double, L> b, Register<double, L> c) {
#if defined(__AVX512F__)
  if constexpr (L == 8) return (Register<double, L>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#endif
#if defined(__FMA__)
  if constexpr (L == 4) return (Register<double, L>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  if constexpr (L == 2) return (Register<double, L>)_mm_fmadd_pd((__m128d)a, (__m128d)b, (__m128d)c);
#elif defined(__aarch64__)
  if constexpr (L == 2) return vfmaq_f64(c, a, b);
#elif !defined(__AVX512F__)
  static_assert(L == 2);
  const Register<double, L> product = a * b, sum = c + product, rest = product - (sum - c);
  const Register<int64_t, L> binade = (Register<int64_t, L>)c & (Register<int64_t, L>{} + 0x7FF0'0000'0000'0000);
  const Register<double, L> half = (Register<double, L>)binade * 0x1p-53;
  const Register<int64_t, L> tie = (rest == half) | (rest == -half);
  if (__builtin_expect((tie[0] | tie[1]) != 0, 0)) return fused_ties(a, b, c);
  return sum;
#endif
}
template <int N, int L>
BNLAYER_INLINE Pack<double, N, L> fused(
    const Pack<double, N, L>& a, const Pack<double, N, L>& b, Pack<double, N, L> c) {
  for (int i = 0; i < c.kCount; ++i) c.reg[i] = fused_register<L>(a.reg[i], b.reg[i], c.reg[i]);
  return c;
}

// 2^exponent for exponents of normal numbers; infinity above them.
template <int N, int L>
BNLAYER_INLINE Pack<double, N, L> power(const Pack<int64_t, N, L>& exponent) {
  using Longs = Pack<int64_t, N, L>;
  const Longs biased = exponent + Longs::all(1023), most = Longs::all(2047), least = Longs::all(0);
  const Longs below = either(biased > most, most, biased);
  return as<double>(shifted_left<52>(either(below < least, least, below)));
}
inline double power(int64_t exponent) {
  const int64_t biased = exponent + 1023, held = biased < 0 ? 0 : biased > 2047 ? 2047 : biased;
  return __builtin_bit_cast(double, held << 52);
}

// Has the cache line of an element brought to the second-level cache; it may lie behind the array's end. (Not to the
// first: what is asked for far enough ahead would push out what is needed before it.)
BNLAYER_INLINE void prefetch(const void* from, int64_t bytes) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes)), 0, 2);
}

}  // namespace bnlayer::BNLAYER_VARIANT
