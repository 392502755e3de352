// The constants of `precision.py`, and the packs that the passes that sum go by.

#pragma once

#include "kernels/storage.hpp"

namespace bnlayer::BNLAYER_VARIANT {

template <class N>
struct Precision;
template <>
struct Precision<float> {
  static constexpr int kFolds = 1, kSlack = 5, kGradientSlack = 9, kGradientSpan = 20;
  static constexpr int64_t kLowest = -160;
  static constexpr int64_t kNoKey = -0x7F80'0001;  // of −Inf
};
template <>
struct Precision<double> {
  static constexpr int kFolds = 2, kSlack = 0, kGradientSlack = 0, kGradientSpan = 20;
  static constexpr int64_t kLowest = -480;
  static constexpr int64_t kNoKey = -0x7FF0'0000'0000'0001;
};

// Terms between two folds: as many as the units of gradients leave room for, and fewer than 4^slack, for which those of
// deviations do while their squares hold. Integers, each below 2^52, have room for 2^11.
constexpr int64_t kLongest = int64_t{1} << Precision<float>::kGradientSlack;
constexpr int64_t kShorter = 4;    // by how much fewer they become where a chain of squares did not hold
constexpr int64_t kAhead = 32768;  // bytes ahead of which cache lines are asked for
constexpr int64_t kLine = 64;
constexpr int kRows = 4;  // rows of a step: the sums of a group are loaded and stored once for all of them
constexpr double kShrink = 1.0 - 0x1p-53;  // what ties are broken by: see `limbs.py`
constexpr double kSplitter = 134217729.0;  // 2^27 + 1: halves a float64's digits
constexpr int64_t kLow = 0xFFFF'FFFF;
constexpr int64_t kNarrowRow = 64;  // channels: rows of fewer are taken together, so that one is worth a loop
constexpr int64_t kWideRow = 256, kManyElements = int64_t{1} << 17;

using Doubles = Pack<double, kLanes, kWide>;
using Longs = Pack<int64_t, kLanes, kWide>;
using Words = Pack<uint64_t, kLanes, kWide>;  // bit patterns and their sums, which may wrap

constexpr int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t divisor(int64_t a, int64_t b) { return b == 0 ? a : divisor(b, a % b); }

// How many rows of channels are taken for one, so that `lanes` divide its width.
inline int64_t repeats(int64_t channels, int64_t lanes, int64_t width) {
  const int64_t least = lanes / divisor(channels, lanes), most = width / (channels * least);
  return most > 1 ? least * most : least;
}

// Of eight lanes, those below `count`.
inline Longs live_lanes(int64_t count) {
  alignas(64) static constexpr int64_t kIndex[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7};
  return Longs::load(kIndex) < Longs::all(count);
}

// Eight truths as all ones or all zeros.
BNLAYER_INLINE Longs load_truths(const uint8_t* from) {
  Longs made;
  for (int i = 0; i < made.kCount; ++i) {
    Register<uint8_t, kWide> narrow;
    __builtin_memcpy(&narrow, from + i * kWide, sizeof(narrow));
    made.reg[i] = converted_register<int64_t, uint8_t, kWide>(narrow);
  }
  return made > zeros<int64_t, kLanes, kWide>();
}
BNLAYER_INLINE Longs load_some_truths(const uint8_t* from, int64_t count) {
  uint8_t held[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) held[i] = from[i];
  return load_truths(held);
}

// The truths of the positions from `begin` to `end` of one run; written to `room` where each is that of several.
inline const uint8_t* truths_of_run(
    const Mask& mask, int64_t run, int64_t length, int64_t begin, int64_t end, uint8_t* room) {
  const uint8_t* from = mask.truths + run * (length / mask.repeat);
  if (mask.repeat == 1) return from + begin;
  int64_t truth = begin / mask.repeat;
  for (int64_t at = begin; at < end; ++truth) {
    const int64_t stop = (truth + 1) * mask.repeat < end ? (truth + 1) * mask.repeat : end;
    std::memset(room + (at - begin), from[truth], static_cast<size_t>(stop - at));
    at = stop;
  }
  return room;
}
inline bool truth_at(const Mask& mask, const Layout& layout, int64_t image, int64_t channel, int64_t position) {
  if (mask.truths == nullptr) return true;
  if (mask.rows) return mask.truths[image] != 0;
  return mask.truths[(image * layout.channels + channel) * (layout.length / mask.repeat) + position / mask.repeat] != 0;
}

// d·d − float64(d·d), operation by operation that of `limbs.product_error`.
BNLAYER_INLINE Doubles square_error(const Doubles& d, const Doubles& square) {
  const Doubles big = Doubles::all(kSplitter) * d, hi = big - (big - d), lo = d - hi;
  return lo * lo - (((square - hi * hi) - lo * hi) - hi * lo);
}

// Sums of integers as they leave a pass: (limbs, 8) per group.
BNLAYER_INLINE void add_limbs(int64_t* hi, const Longs& q) {
  (Longs::load(hi) + shifted_right<32>(q)).store(hi);
  int64_t* lo = hi + kLanes;
  (Longs::load(lo) + (q & Longs::all(kLow))).store(lo);
}
inline void add_limbs_of_one(int64_t* hi, int64_t* lo, int64_t q) {
  *hi += q >> 32;
  *lo += q & kLow;
}

// Adds up the groups of each channel, carries, and writes the canonical limbs.
//
// groups: of `width` lanes side by side, each `4·folds` limbs; lanes: of a channel, 1 or 8.
inline void gather(const int64_t* totals, int rows, int64_t width, int64_t lanes, int64_t channels, int64_t* limbs) {
  for (int row = 0; row < rows; ++row) {
    int64_t* to = limbs + row * channels;
    for (int64_t c = 0; c < channels; ++c) to[c] = 0;
    int64_t c = 0, lane = 0, at = 0;
    // Whole groups of different channels are added as they are.
    for (; lanes == 1 && channels % kLanes == 0 && at + kLanes <= width; at += kLanes) {
      (Longs::load(to + c) + Longs::load(totals + (at / kLanes * rows + row) * kLanes)).store(to + c);
      c = c + kLanes == channels ? 0 : c + kLanes;
    }
    for (; at < width; ++at) {
      to[c] += totals[(at / kLanes * rows + row) * kLanes + at % kLanes];
      if (++lane == lanes) {
        lane = 0;
        if (++c == channels) c = 0;
      }
    }
  }
  for (int row = 0; row < rows; row += 2) {
    int64_t *hi = limbs + row * channels, *lo = hi + channels;
    for (int64_t c = 0; c < channels; ++c) {
      hi[c] += lo[c] >> 32;
      lo[c] &= kLow;
    }
  }
}

// How far to go through runs before a fold.
struct Stretch {
  int64_t end, last;  // to which position of them, and to which image
};
inline Stretch stretch(const Part& part, int64_t begun, int64_t image, int64_t longest) {
  const int64_t left = ceiling(part.end - begun, kLanes);
  if (left > longest) return {begun + longest * kLanes, image + 1};
  if (begun > part.begin) return {part.end, image + 1};
  const int64_t last = image + longest / left;
  return {part.end, last < part.last ? last : part.last};
}

// Cuts a workspace into arrays, each of which begins with a cache line.
class Room {
 public:
  explicit Room(void* from) : at_(static_cast<char*>(from)) {}
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at_);
    at_ += ceiling(count * static_cast<int64_t>(sizeof(T)), kLine) * kLine;
    return taken;
  }
  template <class T>
  static int64_t of(int64_t count) {
    return ceiling(count * static_cast<int64_t>(sizeof(T)), kLine) * kLine;
  }

 private:
  char* at_;
};

}  // namespace bnlayer::BNLAYER_VARIANT
