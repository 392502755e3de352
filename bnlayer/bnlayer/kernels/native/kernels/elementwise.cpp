// The passes that write: y and dx. One rounding per operation, in the precision that the data are computed with.
//
// What is written begins where a cache line does: NumPy's arrays begin 16 bytes behind, and every other store would then
// touch two lines, which takes a quarter longer. So rows are taken from the first such place on, and the coefficients are
// turned by as many. Inputs and output don't overlap: some elements are written twice, with the same values.
//
// A nonfinite channel has a scale of NaN: then so is all that is written.

#include "kernels/arithmetic.hpp"
#include "kernels/variant.hpp"

namespace bnlayer::BNLAYER_VARIANT {
namespace {

constexpr int64_t kLong = 256;           // elements: a shorter run is not worth a beginning of its own
constexpr int64_t kWidestTurned = 4096;  // elements: longer rows are taken one by one, wherever they begin

template <class N>
constexpr int kVector = kRegisterBytes / static_cast<int>(sizeof(N));

// A formula has `kCount` coefficients per channel, and inputs: for `kVector<N>` elements at a time, `of`, and for one that
// is left over, `one`. Both compute in float32 or float64, whatever is stored, and must give the same bits.
template <class S>
struct Normal {
  using N = Number<S>;
  using V = Pack<N, kVector<N>, kVector<N>>;
  static constexpr int kCount = 3;
  const S* x;

  BNLAYER_INLINE V of(int64_t at, const V* c) const {
    return (load_numbers<kVector<N>, kVector<N>>(x + at) - c[0]) * c[1] + c[2];
  }
  BNLAYER_INLINE N one(int64_t at, const N* c) const { return (number(x + at) - c[0]) * c[1] + c[2]; }
};

template <class S>
struct Gradient {
  using N = Number<S>;
  using V = Pack<N, kVector<N>, kVector<N>>;
  static constexpr int kCount = 4;
  const S *dy, *x;

  BNLAYER_INLINE V of(int64_t at, const V* c) const {
    const V g = load_numbers<kVector<N>, kVector<N>>(dy + at), v = load_numbers<kVector<N>, kVector<N>>(x + at);
    return ((g - c[1]) - (v - c[0]) * c[2]) * c[3];
  }
  BNLAYER_INLINE N one(int64_t at, const N* c) const {
    return ((number(dy + at) - c[1]) - (number(x + at) - c[0]) * c[2]) * c[3];
  }
};

template <class S>
BNLAYER_INLINE void store_one(S* to, Number<S> value) {
  if constexpr (std::is_same_v<S, Half> || std::is_same_v<S, Brain>) {
    constexpr int kL = kVector<float>;
    S held[kL];
    store_numbers<kL, kL, S>(held, Pack<float, kL, kL>::all(value));
    *to = held[0];
  } else {
    *to = value;
  }
}

template <class S, template <class> class F>
class Writing {
  using Formula = F<S>;
  using N = Number<S>;
  using V = typename Formula::V;
  static constexpr int kCount = Formula::kCount;
  static constexpr int64_t kStep = kVector<N>;

 public:
  Writing(
      const Formula& formula, const Layout& layout, const N* const* coefficients, const uint8_t* nonfinite, S* out,
      void* workspace)
      : formula_(formula), layout_(layout), given_(coefficients), nonfinite_(nonfinite), out_(out), room_(workspace) {}

  static int64_t repeats_of(int64_t channels) { return repeats(channels, kStep, 256); }
  static int64_t workspace(const Layout& layout) {
    const int64_t turned = layout.channels * repeats_of(layout.channels);
    return kCount * Room::of<N>(turned > kWidestTurned ? layout.channels : turned);
  }

  void over(const Part& part) {
    if (layout_.length > 1 || layout_.channels == 1) {
      runs(part);
    } else if (layout_.channels * repeats_of(layout_.channels) > kWidestTurned) {
      rows_one_by_one(part);
    } else {
      rows(part);
    }
  }

 private:
  N coefficient(int which, int64_t channel) const {
    return which == kScale && nonfinite_[channel] != 0 ? static_cast<N>(__builtin_nan("")) : given_[which][channel];
  }
  void coefficients(int64_t channel, N* values) const {
    for (int k = 0; k < kCount; ++k) values[k] = coefficient(k, channel);
  }

  // How many elements from `begin` on lie before the next place where a whole vector's bytes begin.
  int64_t unaligned(int64_t begin, int64_t end) const {
    constexpr uintptr_t kBytes = kStep * sizeof(S);
    const int64_t before = static_cast<int64_t>((-reinterpret_cast<uintptr_t>(out_ + begin)) % kBytes / sizeof(S));
    return before < end - begin ? before : end - begin;
  }

  void one(int64_t at, int64_t channel) const {
    N values[kCount];
    coefficients(channel, values);
    store_one(out_ + at, formula_.one(at, values));
  }

  // As wide as `repeats` rows, for rows that begin `by` elements later.
  void turned(int64_t by, int64_t width, N** made) {
    const int64_t channels = layout_.channels;
    for (int k = 0; k < kCount; ++k) {
      made[k] = room_.take<N>(width);
      for (int64_t at = 0, c = by % channels; at < width; ++at, c = c + 1 < channels ? c + 1 : 0) {
        made[k][at] = coefficient(k, c);
      }
    }
  }

  BNLAYER_INLINE void vector(int64_t at, N* const* made, int64_t c) const {
    V values[kCount];
    for (int k = 0; k < kCount; ++k) values[k] = V::load(made[k] + c);
    store_numbers<kVector<N>, kVector<N>>(out_ + at, formula_.of(at, values));
  }

  void rows(const Part& part) {
    const int64_t channels = layout_.channels, width = channels * repeats_of(channels);
    const int64_t first = part.first * channels, last = part.last * channels;
    const int64_t begin = first + unaligned(first, last), end = begin + (last - begin) / width * width;
    for (int64_t at = first; at < begin; ++at) one(at, at % channels);
    N* made[kCount];
    turned(begin, width, made);
    for (int64_t start = begin; start < end; start += width) {
      for (int64_t c = 0; c < width; c += kStep) vector(start + c, made, c);
    }
    int64_t c = 0;
    for (; end + c + kStep <= last; c += kStep) vector(end + c, made, c);
    for (; end + c < last; ++c) one(end + c, (end + c) % channels);
  }

  void rows_one_by_one(const Part& part) {
    const int64_t channels = layout_.channels;
    N* made[kCount];
    turned(0, channels, made);
    for (int64_t row = part.first; row < part.last; ++row) {
      const int64_t start = row * channels;
      int64_t c = 0;
      for (; c + kStep <= channels; c += kStep) vector(start + c, made, c);
      for (; c < channels; ++c) one(start + c, c);
    }
  }

  void runs(const Part& part) {
    for (int64_t image = part.first; image < part.last; ++image) {
      for (int64_t channel = 0; channel < layout_.channels; ++channel) {
        const int64_t run = (image * layout_.channels + channel) * layout_.length;
        run_of(run + part.begin, run + part.end, channel);
      }
    }
  }

  void run_of(int64_t start, int64_t end, int64_t channel) const {
    N values[kCount];
    V all[kCount];
    coefficients(channel, values);
    for (int k = 0; k < kCount; ++k) all[k] = V::all(values[k]);
    const auto eight = [&](int64_t at) { store_numbers<kVector<N>, kVector<N>>(out_ + at, formula_.of(at, all)); };
    if (end - start < kStep) {
      for (int64_t at = start; at < end; ++at) store_one(out_ + at, formula_.one(at, values));
      return;
    }
    int64_t at = start;
    if (end - start >= kLong && unaligned(start, end) != 0) {
      eight(start);
      at += unaligned(start, end);
    }
    for (; at + kStep <= end; at += kStep) eight(at);
    if (at < end) eight(end - kStep);
  }

  // Which coefficient is the scale: of mean, scale, shift; or of mean, offset, slope, scale.
  static constexpr int kScale = kCount == 3 ? 1 : 3;

  const Formula& formula_;
  const Layout layout_;
  const N* const* given_;
  const uint8_t* nonfinite_;
  S* out_;
  Room room_;
};

// dy·scale where the mask is 0: such a position was not in the statistics. Other places of dx stay.
template <class S>
void scale_masked(const InputGradientPass& given, const Part& part) {
  using N = Number<S>;
  const Layout& layout = given.batch.layout;
  const Mask& mask = given.batch.mask;
  const S* dy = static_cast<const S*>(given.dy);
  const N* scale = static_cast<const N*>(given.scale);
  S* dx = static_cast<S*>(given.dx);
  const auto scaled = [&](int64_t at, int64_t c) {
    const N factor = given.nonfinite[c] != 0 ? static_cast<N>(__builtin_nan("")) : scale[c];
    store_one(dx + at, number(dy + at) * factor);
  };
  for (int64_t image = part.first; image < part.last; ++image) {
    if (mask.rows && mask.truths[image] != 0) continue;
    for (int64_t c = 0; c < layout.channels; ++c) {
      const int64_t run = image * layout.channels + c;
      const uint8_t* truths = mask.rows ? nullptr : mask.truths + run * (layout.length / mask.repeat);
      for (int64_t at = part.begin; at < part.end;) {
        const int64_t stop = mask.rows ? part.end : (at / mask.repeat + 1) * mask.repeat;
        const int64_t until = stop < part.end ? stop : part.end;
        if (truths == nullptr || truths[at / mask.repeat] == 0) {
          for (int64_t i = at; i < until; ++i) scaled(run * layout.length + i, c);
        }
        at = until;
      }
    }
  }
}

}  // namespace

int64_t normalize_workspace(const NormalizePass& given) {
  return by_storage(
      given.batch.storage, [&]<class S>(const S*) { return Writing<S, Normal>::workspace(given.batch.layout); });
}

void normalize(const NormalizePass& given, const Part& part, void* workspace) {
  by_storage(given.batch.storage, [&]<class S>(const S*) {
    using N = Number<S>;
    const N* coefficients[] = {
        static_cast<const N*>(given.mean), static_cast<const N*>(given.scale), static_cast<const N*>(given.shift)};
    const Normal<S> formula{static_cast<const S*>(given.batch.x)};
    Writing<S, Normal>(formula, given.batch.layout, coefficients, given.nonfinite, static_cast<S*>(given.y), workspace)
        .over(part);
  });
}

int64_t input_gradient_workspace(const InputGradientPass& given) {
  return by_storage(
      given.batch.storage, [&]<class S>(const S*) { return Writing<S, Gradient>::workspace(given.batch.layout); });
}

void input_gradient(const InputGradientPass& given, const Part& part, void* workspace) {
  by_storage(given.batch.storage, [&]<class S>(const S*) {
    using N = Number<S>;
    const N* coefficients[] = {
        static_cast<const N*>(given.mean), static_cast<const N*>(given.offset), static_cast<const N*>(given.slope),
        static_cast<const N*>(given.scale)};
    const Gradient<S> formula{static_cast<const S*>(given.dy), static_cast<const S*>(given.batch.x)};
    Writing<S, Gradient>(
        formula, given.batch.layout, coefficients, given.nonfinite, static_cast<S*>(given.dx), workspace)
        .over(part);
    if (given.batch.mask.truths != nullptr) scale_masked<S>(given, part);
  });
}

}  // namespace bnlayer::BNLAYER_VARIANT
