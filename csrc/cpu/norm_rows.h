// The inner loops of group normalisation: chosen at run time among those compiled for this processor's instruction sets.
#pragma once

#include "../dtype.h"

namespace ebdiff {

// Some channels of one sample at some positions. Lists hold a number of the compute type for each channel.
struct NormBlock {
  int64_t channels, positions;
  int64_t pitch;  // elements from a channel to the next (planes), or from a position to the next (rows)
  const void* live;  // all bits set where kept, 0 where removed, as wide as the compute type; may be null
  const void *centre, *a, *b, *c;
};

// By layout: 0 for planes (a channel's positions lie together), 1 for rows (a position's channels do); then by Dtype.
// Removed channels count as 0 in sums and become 0. Of planes, the first two add everything to one number; all other sums
// are of each channel. Those over SiLU come in two: without it and with it.
struct NormRows {
  void (*sum[2][4])(const NormBlock&, const void* x, double* sum, double* unused);
  void (*deviations[2][4])(const NormBlock&, const void* x, double* sum, double* squares);  // of x - centre
  // y = f((x - centre) * a + b)
  void (*apply[2][2][4])(const NormBlock&, const void* x, void* y);
  // dz = dy * f'((x - centre) * a + b), in the compute type; may be null. Adds up dz and dz * (x - centre).
  void (*gradient[2][2][4])(const NormBlock&, const void* x, const void* dy, void* dz, int64_t dz_pitch, double* sum_dz,
                            double* sum_dz_x);
  // dx = dz * a - ((x - centre) * b + c); without SiLU, dz is dy, in its dtype.
  void (*spread[2][2][4])(const NormBlock&, const void* x, const void* dz, int64_t dz_pitch, void* dx);
};

const NormRows& norm_rows_base();
const NormRows& norm_rows_avx2();
const NormRows& norm_rows_avx512();
const NormRows& norm_rows();  // the widest that this processor has

}  // namespace ebdiff
