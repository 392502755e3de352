// The forward pass that reduces: exact moments.
//
// Per element of float32 data, or of what converts into it,
//
//     d = float64(x) − pivot        S += round(d·(1 − 2^-53), to 2^(w−46))        T += round(d·d, to 2^(2w−52))
//
// with one rounding each (`fused`). Neither can be a tie (see `limbs.py`). So a term's rounding does not depend on what
// it is added to, as long as the last place of that is the unit: terms are added as floats, one after the other, to
// M1 = 3·2^(w+5) and M2 = 4^w themselves, and only the sum of some hundreds becomes an integer, that of the terms' own.
//
// Such a chain keeps its last place while the squares' sum stays below 4^w, which M2's exponent shows afterwards: no
// square is negative. Then no partial sum of 512 deviations reaches 2^(w+5) either (Cauchy and Schwarz). 512 terms hold if
// they are as large as the largest that the probe saw. Where they have grown, the part since the last fold is added again
// with shorter chains, and so is the rest of the pass; where a single term does not hold, it is not finite, or outside its
// window, and a slower pass tells which.
//
// float64 data have a second fold, for what the first one rounds away. A term of 53 digits has ties, and its remainder
// must not depend on what came before it: theirs are rounded term by term, ties to even, and their bits are added.

#include "kernels/arithmetic.hpp"
#include "kernels/variant.hpp"

namespace bnlayer::BNLAYER_VARIANT {
namespace {

// What eight lanes need, in consecutive cache lines: an array for each would put them 4 KB apart at 512 channels, in the
// same set of a first-level cache whose ways the rows of the batch take already.
template <class N>
struct Accumulators;
template <>
struct alignas(kLine) Accumulators<float> {
  double m1[kLanes], m2[kLanes];
  double s[kLanes], t[kLanes];  // chains
  double pivot[kLanes];
};
template <>
struct alignas(kLine) Accumulators<double> {
  double m1[kLanes], m2[kLanes];
  uint64_t s[kLanes], t[kLanes];  // bit patterns, added up
  double pivot[kLanes];
  double m1_finer[kLanes], m2_finer[kLanes];
  uint64_t s_finer[kLanes], t_finer[kLanes];
};

// Of eight lanes, those that a row's or a run's last elements fall on.
struct Tail {
  int64_t count;
  Longs live;
};

template <class S, bool kCentred, bool kMasked>
class Pass {
  using N = Number<S>;
  static constexpr int kFolds = Precision<N>::kFolds;
  static constexpr int kTotals = 4 * kFolds;

 public:
  Pass(const MomentsPass& given, const Part& part, void* workspace)
      : given_(given), layout_(given.batch.layout), part_(part), x_(static_cast<const S*>(given.batch.x)) {
    const Layout& layout = layout_;
    runs_ = layout.length > 1 || layout.channels == 1;
    repeats_ = runs_ ? 1 : taken_together(given);
    width_ = runs_ ? layout.channels * kLanes : layout.channels * repeats_;
    groups_ = ceiling(width_, kLanes);
    Room room(workspace);
    accumulators_ = room.take<Accumulators<N>>(groups_);
    totals_ = room.take<int64_t>(groups_ * kTotals * kLanes);
    pending_ = room.take<int64_t>(groups_ * kLanes);
    counted_ = room.take<int64_t>(groups_ * kLanes);
    truths_ = room.take<uint8_t>(kLongest * kLanes);
    end_ = x_ + layout.images * layout.channels * layout.length;
  }

  // A step's own cost is spread over a row: rows of few channels are taken together, wider ones where there are many rows.
  static int64_t taken_together(const MomentsPass& given) {
    const Layout& layout = given.batch.layout;
    const bool rows_left_out = given.batch.mask.truths != nullptr && given.batch.mask.rows;
    if (rows_left_out || (layout.channels >= kNarrowRow && layout.channels % kLanes != 0)) return 1;
    const int64_t width = layout.images * layout.channels >= kManyElements ? kWideRow : kNarrowRow;
    return repeats(layout.channels, kLanes, width);
  }

  static int64_t workspace(const MomentsPass& given) {
    const Layout& layout = given.batch.layout;
    const bool runs = layout.length > 1 || layout.channels == 1;
    const int64_t lanes = layout.channels * (runs ? kLanes : taken_together(given)), groups = ceiling(lanes, kLanes);
    return Room::of<Accumulators<N>>(groups) + Room::of<int64_t>(groups * kTotals * kLanes) +
           2 * Room::of<int64_t>(groups * kLanes) + Room::of<uint8_t>(kLongest * kLanes);
  }

  // The part's moments; false: some value was not finite, or outside its window, and they are worth nothing.
  bool run(int64_t* limbs) {
    begin();
    if (!(runs_ ? add_runs() : add_rows())) return false;
    const int64_t channels = layout_.channels;
    gather(totals_, kTotals, width_, runs_ ? kLanes : 1, channels, limbs);
    int64_t *count = limbs + kTotals * channels, *flags = count + channels;
    for (int64_t c = 0; c < channels; ++c) count[c] = flags[c] = 0;
    if constexpr (kMasked) {
      const int64_t lanes = runs_ ? kLanes : 1;
      for (int64_t at = 0; at < width_; ++at) count[at / lanes % channels] += counted_[at];
    } else {
      const int64_t all = (part_.last - part_.first) * (part_.end - part_.begin);
      for (int64_t c = 0; c < channels; ++c) count[c] = runs_ ? all : live_rows_;
    }
    return true;
  }

 private:
  void begin() {
    // A division takes as long as all else that is done for a lane.
    for (int64_t at = 0, next = 0; at < groups_ * kLanes; ++at) {
      const int64_t lane = at % kLanes, channel = at < width_ ? (runs_ ? at / kLanes : next) : 0;
      if (++next == layout_.channels) next = 0;
      Accumulators<N>& group = accumulators_[at / kLanes];
      const int64_t w = given_.exponent[channel];
      group.m1[lane] = 3.0 * power(w + Precision<N>::kSlack);
      group.m2[lane] = power(2 * w);
      if constexpr (kFolds == 2) {
        group.m1_finer[lane] = 3.0 * power(w - 52);
        group.m2_finer[lane] = 1.5 * power(2 * w - 51);
      }
      group.pivot[lane] = given_.pivot[channel];
    }
    for (int64_t at = 0; at < groups_ * kTotals * kLanes; ++at) totals_[at] = 0;
    for (int64_t at = 0; at < groups_ * kLanes; ++at) counted_[at] = 0;
    begin_again();
  }

  void begin_again() {
    for (int64_t i = 0; i < groups_; ++i) {
      Accumulators<N>& group = accumulators_[i];
      if constexpr (kFolds == 1) {
        Doubles::load(group.m1).store(group.s);
        Doubles::load(group.m2).store(group.t);
      } else {
        const Words none = zeros<uint64_t, kLanes, kWide>();
        none.store(group.s);
        none.store(group.t);
        none.store(group.s_finer);
        none.store(group.t_finer);
      }
    }
    if constexpr (kMasked) {
      for (int64_t at = 0; at < groups_ * kLanes; ++at) pending_[at] = 0;
    }
    odd_ = zeros<int64_t, kLanes, kWide>();
  }

  // Whether squares have kept the exponents of their M2: the sums of chains, or each by itself.
  bool held() {
    if constexpr (kFolds == 1) {
      for (int64_t i = 0; i < groups_; ++i) {
        odd_ = odd_ | (bits(Doubles::load(accumulators_[i].t)) ^ bits(Doubles::load(accumulators_[i].m2)));
      }
    }
    return !any(shifted_right<52>(as<uint64_t>(odd_)));
  }

  // Brings what was added since the last time into the totals, if it held, or forgets it; whether it did.
  bool folded(int64_t terms) {
    if (!held()) {
      begin_again();
      return false;
    }
    for (int64_t i = 0; i < groups_; ++i) {
      Accumulators<N>& group = accumulators_[i];
      int64_t* totals = totals_ + i * kTotals * kLanes;
      if constexpr (kFolds == 1) {
        const Doubles m1 = Doubles::load(group.m1), m2 = Doubles::load(group.m2);
        add_limbs(totals, bits(Doubles::load(group.s)) - bits(m1));
        add_limbs(totals + 2 * kLanes, bits(Doubles::load(group.t)) - bits(m2));
        m1.store(group.s);
        m2.store(group.t);
      } else {
        bring(totals, group.s, group.m1, terms);
        bring(totals + 2 * kLanes, group.s_finer, group.m1_finer, terms);
        bring(totals + 4 * kLanes, group.t, group.m2, terms);
        bring(totals + 6 * kLanes, group.t_finer, group.m2_finer, terms);
      }
    }
    if constexpr (kMasked) {
      for (int64_t at = 0; at < groups_ * kLanes; ++at) {
        counted_[at] += pending_[at];
        pending_[at] = 0;
      }
    }
    return true;
  }

  static void bring(int64_t* totals, uint64_t* sums, const double* magic, int64_t terms) {
    const Words each = as<uint64_t>(Doubles::load(magic)), held = Words::all(static_cast<uint64_t>(terms));
    add_limbs(totals, as<int64_t>(Words::load(sums) - held * each));
    zeros<uint64_t, kLanes, kWide>().store(sums);
  }

  // Eight deviations; 0 where nothing counts.
  template <bool kPartial>
  BNLAYER_INLINE Doubles
  deviation(const S* from, const uint8_t* truths, const Doubles& pivot, const Tail& tail, Longs& count) const {
    Doubles d;
    if constexpr (kPartial) {
      d = converted<double>(load_some<kLanes, kWide>(from, tail.count, end_));
    } else {
      d = converted<double>(load_numbers<kLanes, kWide>(from));
    }
    if constexpr (!kCentred) d = d - pivot;
    if constexpr (kMasked) {
      const Longs truth = kPartial ? load_some_truths(truths, tail.count) : load_truths(truths);
      count = count - truth;
      return where(truth, d);
    } else if constexpr (kPartial) {
      return where(tail.live, d);
    }
    return d;
  }

  // Adds `kSteps` times eight elements in one group.
  template <int kSteps, bool kPartial>
  BNLAYER_INLINE void add(
      const S* const* from, const uint8_t* const* truths, int64_t at, Accumulators<N>& group, int64_t* pending,
      const Tail& tail) {
    const Doubles pivot = Doubles::load(group.pivot);
    Longs count = kMasked ? Longs::load(pending) : Longs{};
    if constexpr (kFolds == 1) {
      const Doubles shrink = Doubles::all(kShrink);
      Doubles s = Doubles::load(group.s), t = Doubles::load(group.t);
#pragma GCC unroll 8
      for (int j = 0; j < kSteps; ++j) {
        const Doubles d = deviation<kPartial>(from[j] + at, kMasked ? truths[j] + at : nullptr, pivot, tail, count);
        s = fused(d, shrink, s);
        t = fused(d, d, t);
      }
      s.store(group.s);
      t.store(group.t);
    } else {
      for (int j = 0; j < kSteps; ++j) {
        const Doubles d = deviation<kPartial>(from[j] + at, kMasked ? truths[j] + at : nullptr, pivot, tail, count);
        add_by_itself(d, group);
      }
    }
    if constexpr (kMasked) count.store(pending);
  }

  // float64 data: adds the bits of eight rounded terms, and of what the rounding took.
  BNLAYER_INLINE void add_by_itself(const Doubles& d, Accumulators<double>& group) {
    const Doubles m1 = Doubles::load(group.m1), m2 = Doubles::load(group.m2), square = d * d;
    const Doubles s = d + m1, t = square + m2;
    odd_ = odd_ | (bits(t) ^ bits(m2));
    const Doubles rest = (square - (t - m2)) + square_error(d, square);
    plus(group.s, s);
    plus(group.t, t);
    plus(group.s_finer, d - (s - m1) + Doubles::load(group.m1_finer));
    plus(group.t_finer, rest + Doubles::load(group.m2_finer));
  }
  static BNLAYER_INLINE void plus(uint64_t* sums, const Doubles& rounded) {
    (Words::load(sums) + as<uint64_t>(rounded)).store(sums);
  }

  // Adds `kSteps` rows, of which the first `width` elements are there.
  template <int kSteps>
  BNLAYER_INLINE void add_rows_at_once(const S* const* given, const uint8_t* const* truths, int64_t width) {
    const int64_t full = width / kLanes;
    const S* from[kSteps];
    const uint8_t* true_from[kSteps];
    for (int j = 0; j < kSteps; ++j) {
      from[j] = given[j];
      true_from[j] = kMasked ? truths[j] : nullptr;
    }
    const Tail tail{width % kLanes, live_lanes(width % kLanes)};
    Accumulators<N>* const group = accumulators_;
    int64_t* const pending = pending_;
    for (int64_t i = 0; i < full; ++i) {
      if constexpr (kSteps == kRows) {
        constexpr int64_t kStep = kRows * kLanes * static_cast<int64_t>(sizeof(S));
        for (int64_t line = 0; line < kStep; line += kLine) prefetch(from[0], kAhead + i * kStep + line);
      }
      add<kSteps, false>(from, true_from, i * kLanes, group[i], pending + i * kLanes, tail);
    }
    if (tail.count != 0) add_rest(from, true_from, kSteps, full * kLanes, full, tail);
  }

  __attribute__((noinline)) void add_row(const S* const* from, const uint8_t* const* truths, int64_t width) {
    add_rows_at_once<1>(from, truths, width);
  }

  // The elements of some rows, or of a run, that are fewer than eight.
  __attribute__((noinline)) void add_rest(
      const S* const* from, const uint8_t* const* truths, int rows, int64_t at, int64_t i, const Tail& tail) {
    for (int j = 0; j < rows; ++j)
      add<1, true>(from + j, truths + j, at, accumulators_[i], pending_ + i * kLanes, tail);
  }

  // Adds rows that count, from `row` on, until there were as many as `longest`; the row after them.
  int64_t add_chain_of_rows(int64_t row, int64_t rows, int64_t longest, int64_t& terms) {
    const Mask& mask = given_.batch.mask;
    const S* base = x_ + part_.first * layout_.channels;
    const uint8_t* counts = mask.truths != nullptr && mask.rows ? mask.truths + part_.first : nullptr;
    // NOLINTNEXTLINE(clang-analyzer-core.NullPointerArithm): kMasked says that there is a mask
    const uint8_t* truths = kMasked ? mask.truths + part_.first * layout_.channels : nullptr;
    const S* from[kRows];
    const uint8_t* true_from[kRows];
    terms = 0;
    while (row < rows && terms < longest) {
      int taken = 0;
      for (; taken < kRows && row < rows && terms + taken < longest; ++row) {
        if (counts != nullptr && counts[row] == 0) continue;
        from[taken] = base + row * width_;
        if constexpr (kMasked) true_from[taken] = truths + row * width_;
        ++taken;
      }
      if (taken == kRows) {
        add_rows_at_once<kRows>(from, true_from, width_);
      } else {
        for (int j = 0; j < taken; ++j) add_row(from + j, true_from + j, width_);
      }
      terms += taken;
    }
    return row;
  }

  bool add_rows() {
    const int64_t elements = (part_.last - part_.first) * layout_.channels;
    const int64_t rows = elements / width_, rest = elements % width_;
    int64_t longest = kLongest, row = 0, terms = 0;
    live_rows_ = 0;
    while (row < rows) {
      const int64_t next = add_chain_of_rows(row, rows, longest, terms);
      if (folded(terms)) {
        row = next;
        live_rows_ += terms * repeats_;
      } else if (!shorter(longest)) {
        return false;
      }
    }
    if (rest == 0) return true;
    const S* from = x_ + part_.first * layout_.channels + rows * width_;
    const uint8_t* truths =
        kMasked ? given_.batch.mask.truths + part_.first * layout_.channels + rows * width_ : nullptr;
    add_row(&from, &truths, rest);
    live_rows_ += rest / layout_.channels;
    // float64: each group whose bits(M) came in, and only those.
    return settled_rest(rest);
  }

  // As `settled`, of one term in the first `rest` lanes, or in the groups that these are in.
  bool settled_rest(int64_t rest) {
    if constexpr (kFolds == 2) {
      const int64_t touched = ceiling(rest, kLanes);
      for (int64_t i = touched; i < groups_; ++i) add_by_itself(zeros<double, kLanes, kWide>(), accumulators_[i]);
    }
    return folded(1);
  }

  static bool shorter(int64_t& longest) {
    if (longest == 1 || kFolds == 2) return false;
    longest = longest / kShorter > 1 ? longest / kShorter : 1;
    return true;
  }

  // Adds the positions from `begin` to `end` of one run.
  void add_run(int64_t image, int64_t channel, int64_t begin, int64_t end) {
    const int64_t run = image * layout_.channels + channel, full = (end - begin) / kLanes;
    const S* from = x_ + run * layout_.length + begin;
    const uint8_t* truths =
        kMasked ? truths_of_run(given_.batch.mask, run, layout_.length, begin, end, truths_) : nullptr;
    const Tail tail{(end - begin) % kLanes, live_lanes((end - begin) % kLanes)};
    if constexpr (kFolds == 1) {
      add_four_chains(from, truths, full, channel);
    } else {
      for (int64_t k = 0; k < full; ++k) {
        const S* at = from + k * kLanes;
        const uint8_t* true_at = kMasked ? truths + k * kLanes : nullptr;
        add<1, false>(&at, &true_at, 0, accumulators_[channel], pending_ + channel * kLanes, tail);
      }
    }
    if (tail.count != 0) {
      from += full * kLanes;
      if constexpr (kMasked) truths += full * kLanes;
      add_rest(&from, &truths, 1, 0, channel, tail);
    }
  }

  // Each chain is four while it lasts, for one addition to begin before another has ended. They are put together exactly:
  // their sums are full units, and fit if the full does.
  BNLAYER_INLINE void add_four_chains(const S* from, const uint8_t* truths, int64_t steps, int64_t i) {
    Accumulators<N>& group = accumulators_[i];
    const Doubles m1 = Doubles::load(group.m1), m2 = Doubles::load(group.m2), shrink = Doubles::all(kShrink);
    const Doubles pivot = Doubles::load(group.pivot);
    Doubles s[4] = {Doubles::load(group.s), m1, m1, m1}, t[4] = {Doubles::load(group.t), m2, m2, m2};
    Longs count = kMasked ? Longs::load(pending_ + i * kLanes) : Longs{};
    int64_t k = 0;
    for (; k + 4 <= steps; k += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int64_t at = (k + j) * kLanes;
        const Doubles d = deviation<false>(from + at, kMasked ? truths + at : nullptr, pivot, Tail{}, count);
        s[j] = fused(d, shrink, s[j]);
        t[j] = fused(d, d, t[j]);
      }
    }
    for (; k < steps; ++k) {
      const int64_t at = k * kLanes;
      const Doubles d = deviation<false>(from + at, kMasked ? truths + at : nullptr, pivot, Tail{}, count);
      s[0] = fused(d, shrink, s[0]);
      t[0] = fused(d, d, t[0]);
    }
    (s[0] + (s[1] - m1) + (s[2] - m1) + (s[3] - m1)).store(group.s);
    (t[0] + (t[1] - m2) + (t[2] - m2) + (t[3] - m2)).store(group.t);
    if constexpr (kMasked) count.store(pending_ + i * kLanes);
  }

  bool add_runs() {
    int64_t longest = kLongest, image = part_.first, begun = part_.begin;
    while (image < part_.last) {
      const Stretch to = stretch(part_, begun, image, longest);
      for (int64_t i = image; i < to.last; ++i) {
        for (int64_t c = 0; c < layout_.channels; ++c) add_run(i, c, begun, to.end);
      }
      if (folded(ceiling(to.end - begun, kLanes) * (to.last - image))) {
        image = to.end == part_.end ? to.last : image;
        begun = to.end == part_.end ? part_.begin : to.end;
      } else if (!shorter(longest)) {
        return false;
      }
    }
    return true;
  }

  const MomentsPass& given_;
  const Layout layout_;
  const Part part_;
  const S *x_, *end_;
  bool runs_;
  int64_t repeats_, width_, groups_, live_rows_ = 0;
  Accumulators<N>* accumulators_;
  int64_t *totals_, *pending_, *counted_;
  uint8_t* truths_;
  Longs odd_;  // how squares' sums differ from their M2: in its exponent, if one has left its binade
};

// The same sums term by term, with what did not fit: for a batch that the fast pass has given up.
template <class S>
void classify(const MomentsPass& given, const Part& part, int64_t* limbs) {
  using N = Number<S>;
  constexpr int kFolds = Precision<N>::kFolds;
  const Layout& layout = given.batch.layout;
  const int64_t channels = layout.channels;
  const S* x = static_cast<const S*>(given.batch.x);
  for (int64_t i = 0; i < (4 * kFolds + 2) * channels; ++i) limbs[i] = 0;
  int64_t *count = limbs + 4 * kFolds * channels, *flags = count + channels;
  const auto limb = [&](int row, int64_t c) { return limbs + row * channels + c; };
  const auto pattern = [](double v) { return __builtin_bit_cast(int64_t, v); };
  for (int64_t image = part.first; image < part.last; ++image) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t w = given.exponent[c];
      const double window = power(w), m1 = 3.0 * power(w + Precision<N>::kSlack), m2 = power(2 * w);
      for (int64_t at = part.begin; at < part.end; ++at) {
        if (!truth_at(given.batch.mask, layout, image, c, at)) continue;
        count[c] += 1;
        const double value = number(x + (image * channels + c) * layout.length + at), d = value - given.pivot[c];
        if (!(__builtin_fabs(value) <= __DBL_MAX__)) {
          flags[c] |= 1;
        } else if (!(__builtin_fabs(d) < window)) {
          flags[c] |= int64_t{1} << 32;
        } else if constexpr (kFolds == 1) {
          const double s = __builtin_fma(d, kShrink, m1), t = __builtin_fma(d, d, m2);
          add_limbs_of_one(limb(0, c), limb(1, c), pattern(s) - pattern(m1));
          add_limbs_of_one(limb(2, c), limb(3, c), pattern(t) - pattern(m2));
        } else {
          const double m1_finer = 3.0 * power(w - 52), m2_finer = 1.5 * power(2 * w - 51);
          const Doubles square = Doubles::all(d) * Doubles::all(d);
          const double s = d + m1, t = square.reg[0][0] + m2;
          const double error = square_error(Doubles::all(d), square).reg[0][0];
          const double rest = (square.reg[0][0] - (t - m2)) + error;
          add_limbs_of_one(limb(0, c), limb(1, c), pattern(s) - pattern(m1));
          add_limbs_of_one(limb(2, c), limb(3, c), pattern(d - (s - m1) + m1_finer) - pattern(m1_finer));
          add_limbs_of_one(limb(4, c), limb(5, c), pattern(t) - pattern(m2));
          add_limbs_of_one(limb(6, c), limb(7, c), pattern(rest + m2_finer) - pattern(m2_finer));
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
void moments_of(const MomentsPass& given, const Part& part, void* workspace, int64_t* limbs) {
  // Values that are their own deviations need a subtraction less each. It is worth code of its own where it shows.
  bool centred = std::is_same_v<S, float>;
  for (int64_t c = 0; centred && c < given.batch.layout.channels; ++c) centred = given.pivot[c] == 0.0;
  bool fits;
  if (given.batch.mask.truths != nullptr && !given.batch.mask.rows) {
    fits = Pass<S, false, true>(given, part, workspace).run(limbs);
  } else if (centred) {
    fits = Pass<S, std::is_same_v<S, float>, false>(given, part, workspace).run(limbs);
  } else {
    fits = Pass<S, false, false>(given, part, workspace).run(limbs);
  }
  if (!fits) classify<S>(given, part, limbs);
}

}  // namespace

int64_t moments_workspace(const MomentsPass& given) {
  return by_storage(given.batch.storage, [&]<class S>(const S*) { return Pass<S, false, false>::workspace(given); });
}

void moments(const MomentsPass& given, const Part& part, void* workspace, int64_t* limbs) {
  by_storage(given.batch.storage, [&]<class S>(const S*) { moments_of<S>(given, part, workspace, limbs); });
}

}  // namespace bnlayer::BNLAYER_VARIANT
