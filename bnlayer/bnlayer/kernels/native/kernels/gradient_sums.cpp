// The backward pass that reduces: exact sums of the output's gradients.
//
// Per element, with |g| < 2^wA and |h| < 2^wX:
//
//     g = float64(dy)                                h = float64(x − pivot)
//     A += round(g', to multiples of 2^(wA−42))      B += round(g'·h, to multiples of 2^(wA+wX−42))
//
// g' is the float64 next to g towards 0, as fl(g·(1 − 2^-53)) gives it, so that neither A's terms nor B's have ties (see
// `limbs.py`), and both are added up as chains: two float64 that stand in memory between the rows of a step and those of
// the next.
//
// Whether all fits is read off the largest |dy| and |x − pivot|, as integers in the order of the numbers: infinity and NaN
// are above every window. The latter is only looked at where the forward pass has not shown it already. M_A = 3·2^(wA+9)
// and M_B = 3·2^(wA+wX+9) leave chains of 512 terms their last place, whatever fits.
//
// float64 data have a second fold, for what the first one rounds away; theirs are rounded term by term, ties to even.

#include "kernels/arithmetic.hpp"
#include "kernels/variant.hpp"

namespace bnlayer::BNLAYER_VARIANT {
namespace {

// Of eight lanes, in consecutive cache lines (see `moments.cpp`). The largest |x − pivot| comes last: without a check it
// is not there.
template <class N>
struct Accumulators;
template <>
struct alignas(kLine) Accumulators<float> {
  double ma[kLanes], mb[kLanes];
  double a[kLanes], b[kLanes];  // chains
  float pivot[kLanes];
  int32_t top_g[kLanes];
};
template <>
struct alignas(kLine) Accumulators<double> {
  double ma[kLanes], mb[kLanes];
  uint64_t a[kLanes], b[kLanes];  // bit patterns, added up
  double pivot[kLanes];
  int64_t top_g[kLanes];
  double ma_finer[kLanes], mb_finer[kLanes];
  uint64_t a_finer[kLanes], b_finer[kLanes];
};

struct Tail {
  int64_t count;
  Longs live;
};

template <class S, bool kCheck, bool kCentred>
class Pass {
  using N = Number<S>;
  using I = Bits<N>;
  static constexpr int kFolds = Precision<N>::kFolds;
  static constexpr int kTotals = 4 * kFolds;
  using Numbers = Pack<N, kLanes, kWide>;
  using Ints = Pack<I, kLanes, kWide>;

 public:
  Pass(const GradientSumsPass& given, const Part& part, void* workspace)
      : given_(given),
        layout_(given.batch.layout),
        part_(part),
        x_(static_cast<const S*>(given.batch.x)),
        dy_(static_cast<const S*>(given.dy)) {
    runs_ = layout_.length > 1 || layout_.channels == 1;
    repeats_ = runs_ ? 1 : taken_together(given);
    width_ = layout_.channels * (runs_ ? kLanes : repeats_);
    groups_ = ceiling(width_, kLanes);
    Room room(workspace);
    accumulators_ = room.take<Accumulators<N>>(groups_);
    totals_ = room.take<int64_t>(groups_ * kTotals * kLanes);
    top_h_ = room.take<I>(groups_ * kLanes);
    const int64_t size = layout_.images * layout_.channels * layout_.length;
    x_end_ = x_ + size;
    dy_end_ = dy_ + size;
  }

  static int64_t taken_together(const GradientSumsPass& given) {
    const int64_t channels = given.batch.layout.channels;
    return channels >= kNarrowRow ? 1 : repeats(channels, kLanes, kNarrowRow);
  }

  static int64_t workspace(const GradientSumsPass& given) {
    const Layout& layout = given.batch.layout;
    const bool runs = layout.length > 1 || layout.channels == 1;
    const int64_t lanes = layout.channels * (runs ? kLanes : taken_together(given)), groups = ceiling(lanes, kLanes);
    return Room::of<Accumulators<N>>(groups) + Room::of<int64_t>(groups * kTotals * kLanes) +
           Room::of<I>(groups * kLanes);
  }

  // The part's sums; false: some value was not finite, or outside its window, and they are worth nothing.
  bool run(int64_t* limbs) {
    begin();
    if (runs_) {
      add_runs();
    } else {
      add_rows();
    }
    gather(totals_, kTotals, width_, runs_ ? kLanes : 1, layout_.channels, limbs);
    return finish(limbs);
  }

 private:
  void begin() {
    const N* pivot = static_cast<const N*>(given_.pivot);
    for (int64_t at = 0, next = 0; at < groups_ * kLanes; ++at) {
      const int64_t lane = at % kLanes, channel = at < width_ ? (runs_ ? at / kLanes : next) : 0;
      if (++next == layout_.channels) next = 0;
      Accumulators<N>& group = accumulators_[at / kLanes];
      const int64_t a = given_.gradient[channel] + Precision<N>::kGradientSlack, b = a + given_.deviation[channel];
      group.ma[lane] = 3.0 * power(a);
      group.mb[lane] = 3.0 * power(b);
      if constexpr (kFolds == 2) {
        group.ma_finer[lane] = 3.0 * power(a - 52);
        group.mb_finer[lane] = 3.0 * power(b - 52);
      }
      group.pivot[lane] = pivot[channel];
      group.top_g[lane] = 0;
      top_h_[at] = 0;
    }
    for (int64_t at = 0; at < groups_ * kTotals * kLanes; ++at) totals_[at] = 0;
    for (int64_t i = 0; i < groups_; ++i) begin_again(accumulators_[i]);
  }

  static void begin_again(Accumulators<N>& group) {
    if constexpr (kFolds == 1) {
      Doubles::load(group.ma).store(group.a);
      Doubles::load(group.mb).store(group.b);
    } else {
      const Words none = zeros<uint64_t, kLanes, kWide>();
      none.store(group.a);
      none.store(group.b);
      none.store(group.a_finer);
      none.store(group.b_finer);
    }
  }

  void fold(int64_t terms) {
    for (int64_t i = 0; i < groups_; ++i) {
      Accumulators<N>& group = accumulators_[i];
      int64_t* totals = totals_ + i * kTotals * kLanes;
      if constexpr (kFolds == 1) {
        add_limbs(totals, bits(Doubles::load(group.a)) - bits(Doubles::load(group.ma)));
        add_limbs(totals + 2 * kLanes, bits(Doubles::load(group.b)) - bits(Doubles::load(group.mb)));
      } else {
        bring(totals, group.a, group.ma, terms);
        bring(totals + 2 * kLanes, group.a_finer, group.ma_finer, terms);
        bring(totals + 4 * kLanes, group.b, group.mb, terms);
        bring(totals + 6 * kLanes, group.b_finer, group.mb_finer, terms);
      }
      begin_again(group);
    }
  }
  static void bring(int64_t* totals, const uint64_t* sums, const double* magic, int64_t terms) {
    const Words each = as<uint64_t>(Doubles::load(magic)), held = Words::all(static_cast<uint64_t>(terms));
    add_limbs(totals, as<int64_t>(Words::load(sums) - held * each));
  }

  template <bool kPartial>
  static BNLAYER_INLINE Numbers eight(const S* from, const S* end, const Tail& tail) {
    if constexpr (kPartial) {
      return where(converted<I>(tail.live), load_some<kLanes, kWide>(from, tail.count, end));
    } else {
      return load_numbers<kLanes, kWide>(from);
    }
  }

  // Adds `kSteps` times eight elements, `stride` apart, in one group.
  template <int kSteps, bool kPartial>
  BNLAYER_INLINE void add(
      const S* dy, const S* x, int64_t stride, Accumulators<N>& group, I* tops_h, const Tail& tail) {
    const Numbers pivot = Numbers::load(group.pivot);
    Ints top_g = Ints::load(group.top_g), top_h = kCheck ? Ints::load(tops_h) : Ints{};
    Doubles a, b;
    if constexpr (kFolds == 1) {
      a = Doubles::load(group.a);
      b = Doubles::load(group.b);
    }
    const Doubles shrink = Doubles::all(kShrink);
#pragma GCC unroll 8
    for (int j = 0; j < kSteps; ++j) {
      const Numbers gradient = eight<kPartial>(dy + j * stride, dy_end_, tail);
      Numbers deviation = eight<kPartial>(x + j * stride, x_end_, tail);
      if constexpr (!kCentred) deviation = deviation - pivot;
      if constexpr (kPartial) deviation = where(converted<I>(tail.live), deviation);
      const Ints size = magnitude(gradient);
      top_g = greater(top_g, size);
      if constexpr (kCheck) {  // what meets no gradient does not matter
        deviation = where(size > zeros<I, kLanes, kWide>(), deviation);
        top_h = greater(top_h, magnitude(deviation));
      }
      const Doubles g = converted<double>(gradient), h = converted<double>(deviation);
      if constexpr (kFolds == 1) {
        const Doubles shrunk = g * shrink;
        a = a + shrunk;
        b = fused(shrunk, h, b);
      } else {
        add_by_itself(g, h, group);
      }
    }
    if constexpr (kFolds == 1) {
      a.store(group.a);
      b.store(group.b);
    }
    top_g.store(group.top_g);
    if constexpr (kCheck) top_h.store(tops_h);
  }

  static BNLAYER_INLINE void add_by_itself(const Doubles& g, const Doubles& h, Accumulators<double>& group) {
    const Doubles ma = Doubles::load(group.ma), mb = Doubles::load(group.mb), product = g * h;
    const Doubles a = g + ma, b = product + mb;
    plus(group.a, a);
    plus(group.b, b);
    plus(group.a_finer, g - (a - ma) + Doubles::load(group.ma_finer));
    plus(group.b_finer, product - (b - mb) + Doubles::load(group.mb_finer));
  }
  static BNLAYER_INLINE void plus(uint64_t* sums, const Doubles& rounded) {
    (Words::load(sums) + as<uint64_t>(rounded)).store(sums);
  }

  template <int kSteps>
  BNLAYER_INLINE void add_rows_at_once(int64_t from, int64_t width) {
    const int64_t full = width / kLanes;
    const Tail tail{width % kLanes, live_lanes(width % kLanes)};
    Accumulators<N>* const group = accumulators_;
    I* const tops_h = top_h_;
    const S *const x = x_ + from, *const dy = dy_ + from;
    const int64_t stride = width_;
    for (int64_t i = 0; i < full; ++i) {
      if constexpr (kSteps == kRows) {
        constexpr int64_t kStep = kRows * kLanes * static_cast<int64_t>(sizeof(S));
        for (int64_t line = 0; line < kStep; line += kLine) {
          prefetch(x, kAhead + i * kStep + line);
          prefetch(dy, kAhead + i * kStep + line);
        }
      }
      add<kSteps, false>(dy + i * kLanes, x + i * kLanes, stride, group[i], tops_h + i * kLanes, tail);
    }
    if (tail.count != 0) add_rest(from + full * kLanes, kSteps, full, tail);
  }
  __attribute__((noinline)) void add_row(int64_t from, int64_t width) { add_rows_at_once<1>(from, width); }

  // The elements of some rows, or of a run, that are fewer than eight.
  __attribute__((noinline)) void add_rest(int64_t from, int rows, int64_t i, const Tail& tail) {
    for (int j = 0; j < rows; ++j) {
      const int64_t at = from + j * width_;
      add<1, true>(dy_ + at, x_ + at, 0, accumulators_[i], top_h_ + i * kLanes, tail);
    }
  }

  void add_rows() {
    const int64_t base = part_.first * layout_.channels, elements = (part_.last - part_.first) * layout_.channels;
    const int64_t rows = elements / width_, rest = elements % width_;
    for (int64_t first = 0; first < rows; first += kLongest) {
      const int64_t last = first + kLongest < rows ? first + kLongest : rows;
      int64_t row = first;
      for (; row + kRows <= last; row += kRows) add_rows_at_once<kRows>(base + row * width_, width_);
      for (; row < last; ++row) add_row(base + row * width_, width_);
      fold(last - first);
    }
    if (rest == 0) return;
    add_row(base + rows * width_, rest);
    if constexpr (kFolds == 2) {
      const Doubles none = zeros<double, kLanes, kWide>();
      for (int64_t i = ceiling(rest, kLanes); i < groups_; ++i) add_by_itself(none, none, accumulators_[i]);
    }
    fold(1);
  }

  void add_runs() {
    int64_t image = part_.first, begun = part_.begin;
    while (image < part_.last) {
      const Stretch to = stretch(part_, begun, image, kLongest);
      for (int64_t i = image; i < to.last; ++i) {
        for (int64_t c = 0; c < layout_.channels; ++c) add_run(i, c, begun, to.end);
      }
      fold(ceiling(to.end - begun, kLanes) * (to.last - image));
      image = to.end == part_.end ? to.last : image;
      begun = to.end == part_.end ? part_.begin : to.end;
    }
  }

  void add_run(int64_t image, int64_t channel, int64_t begin, int64_t end) {
    const int64_t from = (image * layout_.channels + channel) * layout_.length + begin, full = (end - begin) / kLanes;
    const Tail tail{(end - begin) % kLanes, live_lanes((end - begin) % kLanes)};
    if constexpr (kFolds == 1) {
      add_two_chains(from, full, channel);
    } else {
      for (int64_t k = 0; k < full; ++k) {
        const int64_t at = from + k * kLanes;
        add<1, false>(dy_ + at, x_ + at, 0, accumulators_[channel], top_h_ + channel * kLanes, tail);
      }
    }
    if (tail.count != 0) add_rest(from + full * kLanes, 1, channel, tail);
  }

  // Each chain is two while it lasts, for one addition to begin before another has ended; see `moments.cpp`.
  BNLAYER_INLINE void add_two_chains(int64_t from, int64_t steps, int64_t i) {
    constexpr int kChains = 2;
    Accumulators<N>& group = accumulators_[i];
    const Numbers pivot = Numbers::load(group.pivot);
    const Doubles ma = Doubles::load(group.ma), mb = Doubles::load(group.mb), shrink = Doubles::all(kShrink);
    Ints top_g = Ints::load(group.top_g), top_h = kCheck ? Ints::load(top_h_ + i * kLanes) : Ints{};
    const S *const x = x_, *const dy = dy_;
    Doubles a[kChains] = {Doubles::load(group.a), ma}, b[kChains] = {Doubles::load(group.b), mb};
    const auto one = [&](int64_t at, int chain) __attribute__((always_inline)) {
      const Numbers gradient = load_numbers<kLanes, kWide>(dy + at);
      Numbers deviation = load_numbers<kLanes, kWide>(x + at);
      if constexpr (!kCentred) deviation = deviation - pivot;
      const Ints size = magnitude(gradient);
      top_g = greater(top_g, size);
      if constexpr (kCheck) {
        deviation = where(size > zeros<I, kLanes, kWide>(), deviation);
        top_h = greater(top_h, magnitude(deviation));
      }
      const Doubles shrunk = converted<double>(gradient) * shrink;
      a[chain] = a[chain] + shrunk;
      b[chain] = fused(shrunk, converted<double>(deviation), b[chain]);
    };
    int64_t k = 0;
    for (; k + kChains <= steps; k += kChains) {
      one(from + k * kLanes, 0);
      one(from + (k + 1) * kLanes, 1);
    }
    for (; k < steps; ++k) one(from + k * kLanes, 0);
    (a[0] + (a[1] - ma)).store(group.a);
    (b[0] + (b[1] - mb)).store(group.b);
    top_g.store(group.top_g);
    if constexpr (kCheck) top_h.store(top_h_ + i * kLanes);
  }

  // Writes the flags; whether all values were finite and within their windows.
  bool finish(int64_t* limbs) {
    const int64_t channels = layout_.channels, lanes = runs_ ? kLanes : 1;
    int64_t *bad = limbs + kTotals * channels, *seen = bad + channels;
    bool fits = true;
    for (int64_t c = 0; c < channels; ++c) bad[c] = seen[c] = 0;
    for (int64_t at = 0; at < width_; ++at) {
      const int64_t c = at / lanes % channels, w = given_.gradient[c];
      const I top = accumulators_[at / kLanes].top_g[at % kLanes];
      const double size = __builtin_bit_cast(N, top);
      fits &= size < power(w);
      seen[c] |= (int64_t{size >= power(w - Precision<N>::kGradientSpan)} << 32) | (top > 0);
      if constexpr (kCheck) fits &= double{__builtin_bit_cast(N, top_h_[at])} < power(given_.deviation[c]);
    }
    return fits;
  }

  const GradientSumsPass& given_;
  const Layout layout_;
  const Part part_;
  const S *x_, *dy_, *x_end_, *dy_end_;
  bool runs_;
  int64_t repeats_, width_, groups_;
  Accumulators<N>* accumulators_;
  int64_t* totals_;
  I* top_h_;
};

// The same sums term by term, with what did not fit: for a batch that the fast pass has given up.
template <class S>
void classify(const GradientSumsPass& given, const Part& part, int64_t* limbs) {
  using N = Number<S>;
  constexpr int kFolds = Precision<N>::kFolds;
  const Layout& layout = given.batch.layout;
  const int64_t channels = layout.channels;
  const S *x = static_cast<const S*>(given.batch.x), *dy = static_cast<const S*>(given.dy);
  const N* pivot = static_cast<const N*>(given.pivot);
  for (int64_t i = 0; i < (4 * kFolds + 2) * channels; ++i) limbs[i] = 0;
  int64_t *bad = limbs + 4 * kFolds * channels, *seen = bad + channels;
  const auto limb = [&](int row, int64_t c) { return limbs + row * channels + c; };
  const auto pattern = [](double v) { return __builtin_bit_cast(int64_t, v); };
  for (int64_t image = part.first; image < part.last; ++image) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t wa = given.gradient[c] + Precision<N>::kGradientSlack, wb = wa + given.deviation[c];
      const double ma = 3.0 * power(wa), mb = 3.0 * power(wb), window = power(given.gradient[c]);
      const double reach = power(given.deviation[c]), small = power(given.gradient[c] - Precision<N>::kGradientSpan);
      for (int64_t at = part.begin; at < part.end; ++at) {
        const int64_t index = (image * channels + c) * layout.length + at;
        const N gradient = number(dy + index), difference = number(x + index) - pivot[c];
        const bool sound = __builtin_isfinite(gradient);
        if (!sound && truth_at(given.batch.mask, layout, image, c, at)) bad[c] |= 1;
        const double g = sound ? gradient : N{0};
        const double h = g != 0 && __builtin_isfinite(difference) ? difference : N{0};
        const double size = __builtin_fabs(g);
        seen[c] |= (int64_t{size >= small} << 32) | (g != 0);
        if (size >= window || __builtin_fabs(h) >= reach) {
          bad[c] |= int64_t{1} << 32;
        } else if constexpr (kFolds == 1) {
          const double shrunk = g * kShrink;
          add_limbs_of_one(limb(0, c), limb(1, c), pattern(shrunk + ma) - pattern(ma));
          add_limbs_of_one(limb(2, c), limb(3, c), pattern(__builtin_fma(shrunk, h, mb)) - pattern(mb));
        } else {
          const double ma_finer = 3.0 * power(wa - 52), mb_finer = 3.0 * power(wb - 52), product = g * h;
          const double a = g + ma, b = product + mb;
          add_limbs_of_one(limb(0, c), limb(1, c), pattern(a) - pattern(ma));
          add_limbs_of_one(limb(2, c), limb(3, c), pattern(g - (a - ma) + ma_finer) - pattern(ma_finer));
          add_limbs_of_one(limb(4, c), limb(5, c), pattern(b) - pattern(mb));
          add_limbs_of_one(limb(6, c), limb(7, c), pattern(product - (b - mb) + mb_finer) - pattern(mb_finer));
        }
      }
    }
  }
  for (int row = 0; row < 4 * kFolds; row += 2) {
    for (int64_t c = 0; c < channels; ++c) {
      *limb(row, c) += *limb(row + 1, c) >> 32;
      *limb(row + 1, c) &= kLow;
    }
  }
}

template <class S>
void sums_of(const GradientSumsPass& given, const Part& part, void* workspace, int64_t* limbs) {
  using N = Number<S>;
  const N* pivot = static_cast<const N*>(given.pivot);
  bool centred = std::is_same_v<S, float>;
  for (int64_t c = 0; centred && c < given.batch.layout.channels; ++c) centred = pivot[c] == 0;
  bool fits;
  if (!given.fits || given.batch.mask.truths != nullptr) {
    fits = Pass<S, true, false>(given, part, workspace).run(limbs);
  } else if (centred) {
    fits = Pass<S, false, std::is_same_v<S, float>>(given, part, workspace).run(limbs);
  } else {
    fits = Pass<S, false, false>(given, part, workspace).run(limbs);
  }
  if (!fits) classify<S>(given, part, limbs);
}

}  // namespace

int64_t gradient_sums_workspace(const GradientSumsPass& given) {
  return by_storage(given.batch.storage, [&]<class S>(const S*) { return Pass<S, true, false>::workspace(given); });
}

void gradient_sums(const GradientSumsPass& given, const Part& part, void* workspace, int64_t* limbs) {
  by_storage(given.batch.storage, [&]<class S>(const S*) { sums_of<S>(given, part, workspace, limbs); });
}

}  // namespace bnlayer::BNLAYER_VARIANT
