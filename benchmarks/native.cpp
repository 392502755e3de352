// What the exact kernels are compared with, in plain loops: the memory's speed, and sums in floats.
//
// Compiled by benchmarks/native.py for the processor at hand; additions may be put in another order, and multiplications
// fused with them. What each is for says the Python beside it: limits.py, float_kernels.py.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

using Size = int64_t;
constexpr Size kFlush = 1024;     // rows, or values of a channel, per float32 partial sum
constexpr Size kLarge = 1 << 21;  // elements: beyond it a processor fetches two streams ahead better than eight

// One step of Σ(x − pivot) and Σ(x − pivot)² over kRows rows.
template <int kRows>
void add_rows(
    const float* __restrict x, const float* __restrict pivot, float* __restrict sums, float* __restrict squares,
    Size channels) {
  for (Size j = 0; j < channels; ++j) {
    float sum = 0, square = 0;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float d = x[r * channels + j] - pivot[j];
      sum += d;
      square += d * d;
    }
    sums[j] += sum;
    squares[j] += square;
  }
}

// One step of Σ dy and Σ dy·(x − mean) over kRows rows.
template <int kRows>
void add_gradients(
    const float* __restrict dy, const float* __restrict x, const float* __restrict mean, float* __restrict sums,
    float* __restrict products, Size channels) {
  for (Size j = 0; j < channels; ++j) {
    float sum = 0, product = 0;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const float g = dy[r * channels + j];
      sum += g;
      product += g * (x[r * channels + j] - mean[j]);
    }
    sums[j] += sum;
    products[j] += product;
  }
}

// Calls step(first row, its float sums) for as many rows at a time, and flushes the sums to float64.
template <class Step>
void in_floats(Size rows, Size channels, Size at_a_time, double* first, double* second, Step step) {
  std::vector<float> sums(channels), others(channels);
  Size row = 0;
  while (row < rows) {
    const Size stop = std::min(row + kFlush, rows);
    std::fill(sums.begin(), sums.end(), 0.0F);
    std::fill(others.begin(), others.end(), 0.0F);
    for (; row + at_a_time <= stop; row += at_a_time) step(row, at_a_time, sums.data(), others.data());
    for (; row < stop; ++row) step(row, Size{1}, sums.data(), others.data());
    for (Size j = 0; j < channels; ++j) {
      first[j] += sums[j];
      second[j] += others[j];
    }
  }
}

}  // namespace

extern "C" {

// ---- the memory's speed ----

int64_t read_bits(const int64_t* values, Size size) {
  int64_t seen = 0;
  for (Size i = 0; i < size; ++i) seen ^= values[i];
  return seen;
}

int64_t read_bits_streams(const int64_t* values, Size size) {
  const Size quarter = size / 4;
  const int64_t *a = values, *b = a + quarter, *c = b + quarter, *d = c + quarter;
  int64_t seen = 0;
  for (Size i = 0; i < quarter; ++i) seen ^= (a[i] ^ b[i]) ^ (c[i] ^ d[i]);
  return seen;
}

float read_floats(const float* x, Size size) {
  float total = 0;
  for (Size i = 0; i < size; ++i) total += x[i];
  return total;
}

void copy_scaled(const float* __restrict x, float* __restrict y, Size size) {
  for (Size i = 0; i < size; ++i) y[i] = x[i] * 1.5F;
}

int64_t read_two_bits(const int64_t* a, const int64_t* b, Size size) {
  int64_t seen = 0;
  for (Size i = 0; i < size; ++i) seen ^= a[i] + b[i];
  return seen;
}

float read_two_floats(const float* a, const float* b, Size size) {
  float total = 0;
  for (Size i = 0; i < size; ++i) total += a[i] * b[i];
  return total;
}

void triad(const float* __restrict a, const float* __restrict b, float* __restrict out, Size size) {
  for (Size i = 0; i < size; ++i) out[i] = a[i] - b[i] * 1.5F;
}

void triad_chunks(const float* __restrict a, const float* __restrict b, float* __restrict out, Size size) {
  for (Size stop = size; stop > 0; stop -= std::min<Size>(stop, 8192)) {
    const Size start = std::max<Size>(stop - 8192, 0);
    for (Size i = start; i < stop; ++i) out[i] = a[i] - b[i] * 1.5F;
  }
}

// ---- float kernels: (rows, channels), and (images, channels, length) ----

void moments_last(const float* x, const float* pivot, double* total, double* squares, Size rows, Size channels) {
  in_floats(rows, channels, channels <= 128 ? 2 : 8, total, squares, [&](Size row, Size count, float* s, float* q) {
    const float* from = x + row * channels;
    count == 8   ? add_rows<8>(from, pivot, s, q, channels)
    : count == 2 ? add_rows<2>(from, pivot, s, q, channels)
                 : add_rows<1>(from, pivot, s, q, channels);
  });
}

void moments_first(
    const float* x, const float* pivot, double* total, double* squares, Size images, Size channels, Size length) {
  for (Size run = 0; run < images * channels; ++run) {
    const float *values = x + run * length, p = pivot[run % channels];
    for (Size start = 0; start < length; start += kFlush) {
      float s = 0, q = 0;
      for (Size i = start; i < std::min(start + kFlush, length); ++i) {
        const float d = values[i] - p;
        s += d;
        q += d * d;
      }
      total[run % channels] += s;
      squares[run % channels] += q;
    }
  }
}

void normalize_last(
    const float* __restrict x, const float* __restrict mean, const float* __restrict scale,
    const float* __restrict shift, float* __restrict y, Size rows, Size channels, Size chunk) {
  for (Size stop = rows; stop > 0; stop -= std::min(stop, chunk)) {
    for (Size i = std::max<Size>(stop - chunk, 0); i < stop; ++i) {
      for (Size j = 0; j < channels; ++j) {
        y[i * channels + j] = (x[i * channels + j] - mean[j]) * scale[j] + shift[j];
      }
    }
  }
}

void normalize_first(
    const float* __restrict x, const float* __restrict mean, const float* __restrict scale,
    const float* __restrict shift, float* __restrict y, Size images, Size channels, Size length, bool from_the_end) {
  for (Size k = 0; k < images; ++k) {
    const Size image = from_the_end ? images - 1 - k : k;
    for (Size j = 0; j < channels; ++j) {
      const Size at = (image * channels + j) * length;
      const float m = mean[j], s = scale[j], t = shift[j];
      for (Size i = at; i < at + length; ++i) y[i] = (x[i] - m) * s + t;
    }
  }
}

void sums_last(
    const float* dy, const float* x, const float* mean, double* total, double* products, Size rows, Size channels) {
  const Size at_a_time = rows * channels > kLarge ? 1 : 4;
  in_floats(rows, channels, at_a_time, total, products, [&](Size row, Size count, float* s, float* q) {
    const Size at = row * channels;
    count == 4 ? add_gradients<4>(dy + at, x + at, mean, s, q, channels)
               : add_gradients<1>(dy + at, x + at, mean, s, q, channels);
  });
}

void sums_first(
    const float* dy, const float* x, const float* mean, double* total, double* products, Size images, Size channels,
    Size length) {
  for (Size run = 0; run < images * channels; ++run) {
    const float *values = x + run * length, *slopes = dy + run * length, m = mean[run % channels];
    for (Size start = 0; start < length; start += kFlush) {
      float s = 0, q = 0;
      for (Size i = start; i < std::min(start + kFlush, length); ++i) {
        s += slopes[i];
        q += slopes[i] * (values[i] - m);
      }
      total[run % channels] += s;
      products[run % channels] += q;
    }
  }
}

void input_gradient_last(
    const float* __restrict dy, const float* __restrict x, const float* __restrict mean, const float* __restrict offset,
    const float* __restrict slope, const float* __restrict scale, float* __restrict dx, Size rows, Size channels,
    Size chunk) {
  for (Size stop = rows; stop > 0; stop -= std::min(stop, chunk)) {
    for (Size i = std::max<Size>(stop - chunk, 0); i < stop; ++i) {
      for (Size j = 0; j < channels; ++j) {
        const Size at = i * channels + j;
        dx[at] = ((dy[at] - offset[j]) - (x[at] - mean[j]) * slope[j]) * scale[j];
      }
    }
  }
}

void input_gradient_first(
    const float* __restrict dy, const float* __restrict x, const float* __restrict mean, const float* __restrict offset,
    const float* __restrict slope, const float* __restrict scale, float* __restrict dx, Size images, Size channels,
    Size length, bool from_the_end) {
  for (Size k = 0; k < images; ++k) {
    const Size image = from_the_end ? images - 1 - k : k;
    for (Size j = 0; j < channels; ++j) {
      const Size at = (image * channels + j) * length;
      const float m = mean[j], c = offset[j], f = slope[j], s = scale[j];
      for (Size i = at; i < at + length; ++i) dx[i] = ((dy[i] - c) - (x[i] - m) * f) * s;
    }
  }
}

}  // extern "C"
