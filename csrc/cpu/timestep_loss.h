// Noising and the weighted timestep loss, as bindings.cpp calls them.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace ebdiff {

// [B, N] in memory; null where absent. float64 is not taken.
struct Images {
  const void* at;
  Dtype dtype;
};

// alpha and sigma of each sample: table is [2, columns]. Null where not needed.
struct Coefficients {
  const float* table;
  int64_t columns;
  const int64_t* row;  // [B]
};

struct Shape {
  int64_t samples, size;
};

enum class Prediction : int { epsilon = 0, v = 1, sample = 2, flow = 3 };

// All arguments of ebdiff.ops.weighted_timestep_loss.
struct TimestepLoss {
  Shape shape;
  Images pred, target, x0, noise;
  const int64_t* seed;  // [2]
  Coefficients coefficients;
  const float* weight;  // [weights]
  int64_t weights;
  const int64_t* cell;   // [B]; null: there are B weights
  const float* huber_c;  // [B] or [1]
  bool one_c;
  const float* mask;  // [B, N]
  Prediction prediction;
};

struct LossResults {
  float *loss, *per_sample;  // [], [B]; may be null
  void* grad;                // [B, N] in pred's dtype; may be null
};

// Both throw std::out_of_range for a row or a cell outside of its table, before anything is written.
// x_t = alpha x0 + sigma noise, in x0's dtype. Either noise or seed is there.
void noised(Shape shape, Images x0, Images noise, const int64_t* seed, Coefficients coefficients, void* x_t, int threads);

// The gradient is that of dloss * loss.
void timestep_loss(const TimestepLoss& problem, float dloss, const LossResults& out, int threads);

// Add losses, their squares and their number to their buckets' places: totals is [3, buckets], T float or double; bucket_of
// is [cells].
template <class T>
void add_losses(T* totals, int64_t buckets, const int64_t* bucket_of, int64_t cells, const int64_t* cell,
                const float* per_sample, int64_t samples);

}  // namespace ebdiff
