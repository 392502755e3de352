// What the passes over a batch take and give: the same for every variant.
//
// A batch is (A, C, B) in one piece of memory: the axes before the channels, the channels, the axes after them. A pass
// goes over a part of it, allocates nothing, throws nothing, and knows no Python.

#pragma once

#include <cstdint>

namespace bnlayer {

enum class Storage : int32_t { kFloat32, kFloat64, kFloat16, kBfloat16 };

// The batch, as rows of channels (`length` 1) or as runs of one channel after the other, each `length` long.
struct Layout {
  int64_t images;
  int64_t channels;
  int64_t length;
};

// Which values count. A truth is a byte, 0 or 1.
struct Mask {
  const uint8_t* truths;  // null: all count
  bool rows;              // a truth for each row
  int64_t repeat;         // otherwise each truth is that of so many values side by side
};

// A part of a batch: some images, or some positions of a batch that is one image.
struct Part {
  int64_t first, last;  // images
  int64_t begin, end;   // positions of each run
};

struct Batch {
  Storage storage;
  Layout layout;
  const void* x;
  Mask mask;
};

// Exact sums are limbs, int64 (W, C): hi and lo of each fold of the first sum, of the second, then two more.
struct MomentsPass {
  Batch batch;
  const double* pivot;
  const int64_t* exponent;
};

struct GradientSumsPass {
  Batch batch;
  const void* dy;
  const void* pivot;  // as the batch is computed with
  const int64_t* gradient;
  const int64_t* deviation;
  bool fits;  // the forward pass has shown that every x is finite, and x − pivot within its window
};

struct ProbePass {
  Batch batch;
};

struct GradientProbePass {
  Batch batch;
  const void* dy;
  const void* pivot;
};

struct NormalizePass {
  Batch batch;
  const void *mean, *scale, *shift;  // as the batch is computed with
  const uint8_t* nonfinite;
  void* y;
};

struct InputGradientPass {
  Batch batch;
  const void* dy;
  const void *mean, *offset, *slope, *scale;
  const uint8_t* nonfinite;
  void* dx;
};

// What follows from the limbs of a float32 batch, a channel at a time; see `formulas.py` for the formulas.
struct StatisticsPass {
  int64_t channels;
  const int64_t* limbs;
  const double* pivot;
  const int64_t* exponent;
  double epsilon, e;
  double* rows;  // (8, C): count, divisor, mean, variance, inverse_std, residual, mean_share, pivot_residual
  float *rounded, *about;
  int64_t* reach;
  uint8_t *nonfinite, *refused;
};

struct MovedPass {
  int64_t channels;
  const double *mean, *variance, *count;
  const uint8_t* nonfinite;
  const float *old_mean, *old_variance;
  double momentum;
  bool synchronized, masked, unbiased;
  float *new_mean, *new_variance;
};

struct CoefficientsPass {
  int64_t channels;
  const float *gamma, *beta;  // null: there is none
  const double *inverse_std, *residual;
  float *scale, *shift;
};

struct GradientsPass {
  int64_t channels;
  const int64_t* limbs;
  const int64_t *gradient, *deviation;
  const double *divisor, *inverse_std, *residual, *mean_share, *pivot_residual;
  const uint8_t* forward_nonfinite;
  double* rows;  // (4, C): beta, gamma, offset, slope
  float *offset, *slope;
  uint8_t *nonfinite, *refused;

  // Takes the statistics of the training call, (8, C), as `statistics` writes them.
  void follows(const double* forward) {
    divisor = forward + channels;
    inverse_std = forward + 4 * channels;
    residual = forward + 5 * channels;
    mean_share = forward + 6 * channels;
    pivot_residual = forward + 7 * channels;
  }
};

// One variant's passes. `workspace` says how many bytes a part's pass needs beside it; they begin with a cache line.
struct Table {
  const char* name;
  int64_t (*moments_workspace)(const MomentsPass&);
  void (*moments)(const MomentsPass&, const Part&, void* workspace, int64_t* limbs);
  int64_t (*gradient_sums_workspace)(const GradientSumsPass&);
  void (*gradient_sums)(const GradientSumsPass&, const Part&, void* workspace, int64_t* limbs);
  int64_t (*probe_workspace)(const ProbePass&);
  void (*probe)(const ProbePass&, const Part&, void* workspace, int64_t* best);
  int64_t (*gradient_probe_workspace)(const GradientProbePass&);
  void (*gradient_probe)(const GradientProbePass&, const Part&, void* workspace, int64_t* best);
  int64_t (*normalize_workspace)(const NormalizePass&);
  void (*normalize)(const NormalizePass&, const Part&, void* workspace);
  int64_t (*input_gradient_workspace)(const InputGradientPass&);
  void (*input_gradient)(const InputGradientPass&, const Part&, void* workspace);
  bool (*statistics)(const StatisticsPass&);
  void (*moved)(const MovedPass&);
  void (*coefficients)(const CoefficientsPass&);
  bool (*gradients)(const GradientsPass&);
};

}  // namespace bnlayer
