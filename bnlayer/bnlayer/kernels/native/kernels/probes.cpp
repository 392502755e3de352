// The probes: how far the data of a channel reach. A layer makes one before its first step, and few later.

#include "kernels/arithmetic.hpp"
#include "kernels/variant.hpp"

namespace bnlayer::BNLAYER_VARIANT {
namespace {

// Walks a part eight elements at a time; what is kept of each channel is eight lanes wide.
//
// step(index, count, channel or group, lanes): `count` of the eight elements from `index` on are there.
struct Walk {
  Layout layout;
  Part part;
  bool runs;
  int64_t repeats, width, groups;

  Walk(const Batch& batch, const Part& of) : layout(batch.layout), part(of) {
    runs = layout.length > 1 || layout.channels == 1;
    repeats = runs || layout.channels >= kNarrowRow
                  ? 1
                  : bnlayer::BNLAYER_VARIANT::repeats(layout.channels, kLanes, kNarrowRow);
    width = layout.channels * (runs ? kLanes : repeats);
    groups = ceiling(width, kLanes);
  }
  explicit Walk(const Batch& batch) : Walk(batch, Part{}) {}

  int64_t channel_of(int64_t lane) const { return lane >= width ? 0 : runs ? lane / kLanes : lane % layout.channels; }

  template <class Step>
  void over(Step step) const {
    if (!runs) {
      const int64_t begin = part.first * layout.channels, end = part.last * layout.channels;
      for (int64_t row = begin; row < end; row += width) {
        const int64_t stop = row + width < end ? row + width : end;
        for (int64_t at = row; at < stop; at += kLanes)
          step(at, stop - at < kLanes ? stop - at : kLanes, (at - row) / kLanes);
      }
      return;
    }
    for (int64_t image = part.first; image < part.last; ++image) {
      for (int64_t c = 0; c < layout.channels; ++c) {
        const int64_t run = (image * layout.channels + c) * layout.length, stop = run + part.end;
        for (int64_t at = run + part.begin; at < stop; at += kLanes)
          step(at, stop - at < kLanes ? stop - at : kLanes, c);
      }
    }
  }
};

template <class N>
using Ints = Pack<Bits<N>, kLanes, kWide>;

// An integer in the order of the floats (−0 < +0): `Precision.key`, in the float's own width.
template <class N>
BNLAYER_INLINE Ints<N> key(const Ints<N>& pattern) {
  constexpr int kSign = sizeof(N) * 8 - 1;
  constexpr Bits<N> kMagnitude = ~(Bits<N>(1) << kSign);
  return pattern ^ (shifted_right<kSign>(pattern) & Ints<N>::all(kMagnitude));
}

template <class S>
void probe_of(const ProbePass& given, const Part& part, void* workspace, int64_t* best) {
  using N = Number<S>;
  using I = Bits<N>;
  const Walk walk(given.batch, part);
  const Layout& layout = walk.layout;
  const Mask& mask = given.batch.mask;
  const S *x = static_cast<const S*>(given.batch.x), *end = x + layout.images * layout.channels * layout.length;
  constexpr I kNone = static_cast<I>(Precision<N>::kNoKey), kSign = I(1) << (sizeof(N) * 8 - 1);
  Room room(workspace);
  I *up = room.take<I>(walk.groups * kLanes), *down = room.take<I>(walk.groups * kLanes);
  for (int64_t at = 0; at < walk.groups * kLanes; ++at) up[at] = down[at] = kNone;
  walk.over([&](int64_t at, int64_t count, int64_t group) {
    const auto value = load_some<kLanes, kWide>(x + at, count, end);
    Ints<N> live = finite(value);
    if (count < kLanes || mask.truths != nullptr) {
      uint8_t counts[kLanes] = {};
      for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t index = at + lane, run = index / layout.length;
        counts[lane] = truth_at(mask, layout, run / layout.channels, run % layout.channels, index % layout.length);
      }
      live = live & converted<I>(load_truths(counts));
    }
    const Ints<N> none = Ints<N>::all(kNone), pattern = bits(value);
    const Ints<N> above = either(live, key<N>(pattern), none);
    const Ints<N> below = either(live, key<N>(pattern ^ Ints<N>::all(kSign)), none);
    greater(Ints<N>::load(up + group * kLanes), above).store(up + group * kLanes);
    greater(Ints<N>::load(down + group * kLanes), below).store(down + group * kLanes);
  });
  for (int64_t c = 0; c < 2 * layout.channels; ++c) best[c] = kNone;
  for (int64_t lane = 0; lane < walk.width; ++lane) {
    int64_t *to_up = best + walk.channel_of(lane), *to_down = to_up + layout.channels;
    if (up[lane] > *to_up) *to_up = up[lane];
    if (down[lane] > *to_down) *to_down = down[lane];
  }
}

// The e with a < 2^e ≤ 2a; `none` where there is no such a, or e is below it.
template <class N>
int64_t exponent_above(Bits<N> size, int64_t none) {
  if (size == 0) return none;
  const double a = __builtin_bit_cast(N, size);
  int exponent;
  __builtin_frexp(a, &exponent);
  return exponent > none ? exponent : none;
}

template <class S>
void gradient_probe_of(const GradientProbePass& given, const Part& part, void* workspace, int64_t* best) {
  using N = Number<S>;
  using I = Bits<N>;
  const Walk walk(given.batch, part);
  const Layout& layout = walk.layout;
  const int64_t size = layout.images * layout.channels * layout.length;
  const S *x = static_cast<const S*>(given.batch.x), *dy = static_cast<const S*>(given.dy);
  const N* pivot = static_cast<const N*>(given.pivot);
  Room room(workspace);
  I *top_g = room.take<I>(walk.groups * kLanes), *top_h = room.take<I>(walk.groups * kLanes);
  N* pivots = room.take<N>(walk.groups * kLanes);
  for (int64_t at = 0; at < walk.groups * kLanes; ++at) {
    top_g[at] = top_h[at] = 0;
    pivots[at] = pivot[walk.channel_of(at)];
  }
  walk.over([&](int64_t at, int64_t count, int64_t group) {
    const Ints<N> live = converted<I>(live_lanes(count));
    const auto gradient = load_some<kLanes, kWide>(dy + at, count, dy + size);
    const auto deviation =
        load_some<kLanes, kWide>(x + at, count, x + size) - Pack<N, kLanes, kWide>::load(pivots + group * kLanes);
    const Ints<N> g = magnitude(where(finite(gradient) & live, gradient));
    const Ints<N> h = magnitude(where((g > zeros<I, kLanes, kWide>()) & finite(deviation), deviation));
    greater(Ints<N>::load(top_g + group * kLanes), g).store(top_g + group * kLanes);
    greater(Ints<N>::load(top_h + group * kLanes), h).store(top_h + group * kLanes);
  });
  for (int64_t c = 0; c < 2 * layout.channels; ++c) best[c] = Precision<N>::kLowest;
  for (int64_t lane = 0; lane < walk.width; ++lane) {
    int64_t *to_g = best + walk.channel_of(lane), *to_h = to_g + layout.channels;
    *to_g = exponent_above<N>(top_g[lane], *to_g);
    *to_h = exponent_above<N>(top_h[lane], *to_h);
  }
}

}  // namespace

int64_t probe_workspace(const ProbePass& given) { return 2 * Room::of<int64_t>(Walk(given.batch).groups * kLanes); }
void probe(const ProbePass& given, const Part& part, void* workspace, int64_t* best) {
  by_storage(given.batch.storage, [&]<class S>(const S*) { probe_of<S>(given, part, workspace, best); });
}

int64_t gradient_probe_workspace(const GradientProbePass& given) {
  return 3 * Room::of<int64_t>(Walk(given.batch).groups * kLanes);
}
void gradient_probe(const GradientProbePass& given, const Part& part, void* workspace, int64_t* best) {
  by_storage(given.batch.storage, [&]<class S>(const S*) { gradient_probe_of<S>(given, part, workspace, best); });
}

}  // namespace bnlayer::BNLAYER_VARIANT
