// What follows from the sums of float32 data, eight channels at a time: a dozen small NumPy calls in one.
//
// Each function computes, operation by operation, what the one of its name does in `formulas.py`, where the formulas are
// explained.

#include "kernels/arithmetic.hpp"
#include "kernels/variant.hpp"

namespace bnlayer::BNLAYER_VARIANT {
namespace {

using Floats = Pack<float, kLanes, kWide>;
constexpr int64_t kLowest = Precision<float>::kLowest;

// Eight elements of an array of channels from `c` on, of which `count` are there.
template <class T>
BNLAYER_INLINE Pack<T, kLanes, kWide> in(const T* from, int64_t c, int64_t count) {
  if (count >= kLanes) return Pack<T, kLanes, kWide>::load(from + c);
  T held[kLanes] = {};
  std::memcpy(held, from + c, static_cast<size_t>(count) * sizeof(T));
  return Pack<T, kLanes, kWide>::load(held);
}
template <class T>
BNLAYER_INLINE void out(T* to, int64_t c, int64_t count, const Pack<T, kLanes, kWide>& value) {
  if (count >= kLanes) return value.store(to + c);
  T held[kLanes];
  value.store(held);
  std::memcpy(to + c, held, static_cast<size_t>(count) * sizeof(T));
}
BNLAYER_INLINE Longs in_truths(const uint8_t* from, int64_t c, int64_t count) {
  return count >= kLanes ? load_truths(from + c) : load_some_truths(from + c, count);
}
BNLAYER_INLINE void out_truths(uint8_t* to, int64_t c, int64_t count, const Longs& truths) {
  int64_t held[kLanes];
  truths.store(held);
  for (int64_t lane = 0; lane < kLanes && lane < count; ++lane) to[c + lane] = held[lane] != 0;
}

BNLAYER_INLINE Longs negated(const Longs& truths) { return truths ^ Longs::all(-1); }
BNLAYER_INLINE Doubles absolute(const Doubles& a) { return as<double>(magnitude(a)); }
BNLAYER_INLINE Doubles square_root(Doubles a) {
  for (int i = 0; i < a.kCount; ++i) {
#if defined(__AVX512F__)
    a.reg[i] = (Doubles::Reg)_mm512_sqrt_pd((__m512d)a.reg[i]);
#elif defined(__AVX2__)
    a.reg[i] = (Doubles::Reg)_mm256_sqrt_pd((__m256d)a.reg[i]);
#elif defined(__x86_64__)
    a.reg[i] = (Doubles::Reg)_mm_sqrt_pd((__m128d)a.reg[i]);
#elif defined(__aarch64__)
    a.reg[i] = vsqrtq_f64(a.reg[i]);
#else
    for (int lane = 0; lane < kWide; ++lane) a.reg[i][lane] = __builtin_sqrt(a.reg[i][lane]);
#endif
  }
  return a;
}

// The value of a pair of limbs: `limbs.as_float`.
BNLAYER_INLINE Doubles as_float(const Longs& hi, const Longs& lo) {
  const Longs carried = hi + shifted_right<32>(lo), low = lo & Longs::all(kLow);
  return converted<double>(carried) * Doubles::all(0x1p32) + converted<double>(low);
}

// The e with a < 2^e ≤ 2a, and `kLowest` where a is not above 0: `precision.exponent_above`. As frexp has it, 0 of infinity.
BNLAYER_INLINE Longs exponent_above(const Doubles& a) {
  const Longs small = a < Doubles::all(0x1p-1022);
  const Longs field = shifted_right<52>(magnitude(either(small, a * Doubles::all(0x1p64), a)));
  Longs exponent = field - Longs::all(1022) - (small & Longs::all(64));
  exponent = either(field == Longs::all(2047), Longs{}, exponent);
  return either(a > Doubles{}, exponent, Longs::all(kLowest));
}

}  // namespace

bool statistics(const StatisticsPass& p) {
  constexpr int kSlack = Precision<float>::kSlack;
  const Doubles zero{}, one = Doubles::all(1.0), e = Doubles::all(p.e), epsilon = Doubles::all(p.epsilon);
  Longs remeasured{};
  for (int64_t c = 0; c < p.channels; c += kLanes) {
    const int64_t left = p.channels - c;
    const auto limb = [&](int row) { return in(p.limbs + row * p.channels, c, left); };
    const Longs count = limb(4), flags = limb(5), w = in(p.exponent, c, left);
    const Longs out_of_range = shifted_right<32>(flags) > Longs{}, not_finite = (flags & Longs::all(kLow)) > Longs{};
    const Doubles pivot = in(p.pivot, c, left), n = converted<double>(count);
    const Doubles some = converted<double>(either(count > Longs::all(1), count, Longs::all(1)));
    const Doubles u2 = power(w + w - Longs::all(52));
    const Doubles a = as_float(limb(0), limb(1)) * power(w + Longs::all(kSlack - 51)) / some;
    const Doubles difference = as_float(limb(2), limb(3)) * u2 / some - a * a;
    const Doubles spread = either(difference <= zero, zero, difference);
    const Doubles of_mean = absolute(a) * power(w + Longs::all(kSlack - 52));
    const Doubles unit = either(of_mean > u2, of_mean, u2), limit = Doubles::all(0x1p42) / some;
    const Doubles many = either(limit < Doubles::all(0x1p22), limit, Doubles::all(0x1p22));
    const Longs coarse = (w > Longs::all(kLowest)) & (count > Longs{}) & (spread + epsilon < unit * many);
    const Longs refused = (out_of_range | coarse) & negated(not_finite);
    remeasured = remeasured | (refused & live_lanes(left));
    const Doubles divisor = either(n + e > zero, n + e, one), share = e / divisor;
    const Doubles center = pivot + a, delta = center * share, mean = center - delta;
    const Doubles variance = (spread + delta * delta) * (n / divisor);
    const Floats rounded = converted<float>(mean);
    const Doubles residual = ((pivot - converted<double>(rounded)) + a) - delta;
    const Doubles farthest = square_root(n * (spread + Doubles::all(128.0) * u2));
    const Longs from_mean =
        exponent_above(farthest + absolute(delta) + Doubles::all(0x1p-23) * absolute(mean)) + Longs::all(1);
    const Longs from_zero = exponent_above(farthest + absolute(a)) + Longs::all(1);
    const Longs about_zero = pivot == zero;
    const Doubles rows[] = {
        n,
        divisor,
        mean,
        variance,
        one / square_root(variance + epsilon),
        residual,
        mean * share,
        either(about_zero, mean, residual)};
    for (int row = 0; row < 8; ++row) out(p.rows + row * p.channels, c, left, rows[row]);
    out(p.rounded, c, left, rounded);
    out(p.about, c, left, where(converted<int32_t>(negated(about_zero)), rounded));
    out(p.reach, c, left, either(about_zero, either(w < from_zero, w, from_zero), from_mean));
    out_truths(p.nonfinite, c, left, not_finite | out_of_range);
    out_truths(p.refused, c, left, refused);
  }
  return any(remeasured);
}

void moved(const MovedPass& p) {
  const Longs local = Longs::all(p.synchronized ? 0 : -1), masked = Longs::all(p.masked ? -1 : 0);
  const Doubles nan = Doubles::all(__builtin_nan("")), one = Doubles::all(1.0);
  const Doubles momentum = Doubles::all(p.momentum), rest = Doubles::all(1.0 - p.momentum);
  for (int64_t c = 0; c < p.channels; c += kLanes) {
    const int64_t left = p.channels - c;
    const Longs nonfinite = in_truths(p.nonfinite, c, left);
    const Floats old_mean = in(p.old_mean, c, left), old_variance = in(p.old_variance, c, left);
    Doubles count = in(p.count, c, left), spread = in(p.variance, c, left);
    if (p.unbiased) {  // a channel of one value has no such variance: it counts as one without a value
      const Longs several = count > one;
      const Doubles others = either(several, count - one, one);
      count = either(several, count, Doubles{});
      spread = spread * (count / others);
    }
    const auto towards = [&](const Floats& old, const Doubles& batch) {
      const Doubles value = either(nonfinite & local, nan, batch);
      return converted<float>(converted<double>(old) * momentum + value * rest);
    };
    const Floats mean = towards(old_mean, in(p.mean, c, left)), variance = towards(old_variance, spread);
    const Longs some = count > Doubles{};
    const Longs sound = negated(nonfinite) & converted<int64_t>(finite(mean) & finite(variance));
    const auto apply = converted<int32_t>(either(local, some | masked, some & sound));
    out(p.new_mean, c, left, either(apply, mean, old_mean));
    out(p.new_variance, c, left, either(apply, variance, old_variance));
  }
}

void coefficients(const CoefficientsPass& p) {
  for (int64_t c = 0; c < p.channels; c += kLanes) {
    const int64_t left = p.channels - c;
    Doubles scale = in(p.inverse_std, c, left), shift{};
    if (p.gamma != nullptr) scale = converted<double>(in(p.gamma, c, left)) * scale;
    if (p.beta != nullptr) shift = converted<double>(in(p.beta, c, left));
    out(p.scale, c, left, converted<float>(scale));
    out(p.shift, c, left, converted<float>(shift - in(p.residual, c, left) * scale));
  }
}

bool gradients(const GradientsPass& p) {
  constexpr int kUnit = Precision<float>::kGradientSlack - 51;
  const Doubles nan = Doubles::all(__builtin_nan(""));
  Longs remeasured{};
  for (int64_t c = 0; c < p.channels; c += kLanes) {
    const int64_t left = p.channels - c;
    const auto limb = [&](int row) { return in(p.limbs + row * p.channels, c, left); };
    const auto high = [](const Longs& flags) { return shifted_right<32>(flags) > Longs{}; };
    const auto low = [](const Longs& flags) { return (flags & Longs::all(kLow)) > Longs{}; };
    const Longs unfit = limb(4), sizes = limb(5), not_finite = low(unfit);
    const Longs refused = (high(unfit) | (low(sizes) & negated(high(sizes)))) & negated(not_finite);
    remeasured = remeasured | (refused & live_lanes(left));
    const Longs unit = in(p.gradient, c, left) + Longs::all(kUnit);
    const Doubles s = in(p.inverse_std, c, left), divisor = in(p.divisor, c, left);
    const Doubles a = as_float(limb(0), limb(1)) * power(unit);
    const Doubles about = as_float(limb(2), limb(3)) * power(unit + in(p.deviation, c, left));
    const Doubles b = about - a * in(p.pivot_residual, c, left);
    const Doubles slope = s * s * b / divisor;
    const Doubles offset = a / divisor - slope * (in(p.residual, c, left) + in(p.mean_share, c, left));
    const Longs bad = in_truths(p.forward_nonfinite, c, left) | not_finite | high(unfit);
    const Doubles rows[] = {either(bad, nan, a), either(bad, nan, s * b), offset, slope};
    for (int row = 0; row < 4; ++row) out(p.rows + row * p.channels, c, left, rows[row]);
    out(p.offset, c, left, converted<float>(offset));
    out(p.slope, c, left, converted<float>(slope));
    out_truths(p.nonfinite, c, left, bad);
    out_truths(p.refused, c, left, refused);
  }
  return any(remeasured);
}

}  // namespace bnlayer::BNLAYER_VARIANT
