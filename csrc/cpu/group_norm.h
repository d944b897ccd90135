// Group normalisation with SiLU, as bindings.cpp calls it.
#pragma once

#include <cstdint>
#include <vector>

#include "../dtype.h"

namespace ebdiff {

// All arguments of ebdiff.ops.group_norm_silu but x. Numbers are of the compute type, contiguous; null where absent.
struct GroupNorm {
  Dtype dtype;
  bool rows, silu;  // rows: [N, positions, C] in memory, else [N, C, positions]
  int64_t samples, channels, positions;
  std::vector<int64_t> offsets;
  double eps;
  const void *weight, *bias, *scale, *shift, *time_bias;
  const uint8_t* keep;  // 0 where removed
};

struct NormGradients {
  void *x, *weight, *bias, *scale, *shift, *time_bias;  // null where not needed; all but x in the compute type
};

// mean, rstd: [N, G], in the compute type.
void group_norm_forward(const GroupNorm& norm, const void* x, void* y, void* mean, void* rstd, int threads);
void group_norm_backward(const GroupNorm& norm, const void* dy, const void* x, const void* mean, const void* rstd,
                         const NormGradients& out, int threads);

}  // namespace ebdiff
