// The inner loops, a row at a time: chosen at run time among those compiled for this processor's instruction sets.
#pragma once

#include "../dtype.h"

namespace ebdiff {

// One step of AdamW, every number rounded once to the compute type (Loshchilov & Hutter 2019, algorithm 2).
struct AdamWArgs {
  double one_minus_beta1, beta2, one_minus_beta2, decay, inverse_bias2, eps, step_size, one_minus_ema;
  bool maximize;
};

enum class Sum : int { square = 0, absolute = 1, product = 2, absolute_product = 3 };

struct Rows {
  const char* isa;
  // x[c] = 0 where keep[c] is 0, for elements of 1 << log2 bytes.
  void (*zero_removed[5])(void* x, const uint8_t* keep, int64_t n);
  // Kept elements x[index[0]], ..., x[index[n - 1]] to the n packed ones, or (second row) back from them; keep says the
  // same of each element of x.
  void (*move_kept[2][5])(void* x, void* packed, const uint8_t* keep, const int32_t* index, int64_t n);
  // By Dtype. e and keep may be null.
  void (*adamw[4])(void* p, const void* g, void* m, void* v, void* e, const uint8_t* keep, int64_t n, const AdamWArgs&);
  // By Dtype and Sum: the sum of f(x, y), which is also added to column[c] (double for float64, else float; may be null).
  double (*sum[4][4])(const void* x, const void* y, void* column, int64_t n);
};

const Rows& rows_base();
const Rows& rows_avx2();
const Rows& rows_avx512();
const Rows& rows();  // the widest that this processor has

}  // namespace ebdiff
