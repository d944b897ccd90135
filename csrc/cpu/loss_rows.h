// The inner loops of noising and of the timestep loss: chosen at run time among those compiled for this processor's
// instruction sets.
#pragma once

#include "../dtype.h"

namespace ebdiff {

constexpr int64_t kLossRun = 1024;  // elements that are worked on at a time; normals are made in runs of so many

struct LossRun {
  const float *pred, *target, *mask;  // mask may be null
  const float* c;                     // Huber's; null for squares
  float factor;                       // what a gradient is multiplied with
  float* grad;                        // may be null
};

struct LossRows {
  void (*widen[4])(const void* from, float* to, int64_t n);   // by Dtype; none for float64
  void (*narrow[4])(const float* from, void* to, int64_t n);  // rounded to nearest
  void (*mix)(float a, const float* x, float b, const float* y, float* to, int64_t n);  // a x + b y
  // The kLossRun normal numbers of the counters (first, ...), (first + 1, ...), ...; see ebdiff/ops/philox.py.
  void (*normals)(uint32_t first, uint32_t sample, const uint32_t seed[4], float* to);
  double (*errors)(const LossRun& run, int64_t n);  // their sum; writes gradients
};

const LossRows& loss_rows_base();
const LossRows& loss_rows_avx2();
const LossRows& loss_rows_avx512();
const LossRows& loss_rows();  // the widest that this processor has

}  // namespace ebdiff
