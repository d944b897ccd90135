// Sums in lanes of vectors, and these into one number.
#pragma once

#include "vectors.h"

namespace ebdiff {
namespace {

// In registers throughout: gcc 12 keeps what a loop halves in memory, and waits for it there at every turn.
EBDIFF_HD void widen(Vector<double> v, Vector<double>* to) { *to = v; }
EBDIFF_HD void widen(Vector<float> v, Vector<double>* to) {
#if defined(__AVX512F__)
  to[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
  to[1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
#else
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Half half[2];
  __builtin_memcpy(half, &v, sizeof v);
  for (int k = 0; k < 2; ++k) to[k] = __builtin_convertvector(half[k], Vector<double>);
#endif
}

// The sum of all lanes: its two halves are added, then theirs.
template <class Half, class V>
EBDIFF_HD Half folded(V v) {
  Half half[2];
  __builtin_memcpy(half, &v, sizeof v);
  return half[0] + half[1];
}
typedef double Two __attribute__((vector_size(16)));
EBDIFF_HD double across(Two v) { return v[0] + v[1]; }
#ifdef __AVX2__
typedef double Four __attribute__((vector_size(32)));
EBDIFF_HD double across(Four v) { return across(folded<Two>(v)); }
#endif
#ifdef __AVX512F__
EBDIFF_HD double across(Vector<double> v) { return across(folded<Four>(v)); }
#endif

// A sum in a fixed number of lanes, whatever the width of a vector.
template <class C, int kCount>
struct Total {
  static constexpr int kVectors = kCount / kLanes<C>;
  Vector<C> parts[kVectors] = {};

  EBDIFF_HD double value() const {
    constexpr int kWide = kCount / kLanes<double>;
    Vector<double> sums[kWide];  // wide, so that no sum of theirs is too large
#pragma GCC unroll 32
    for (int k = 0; k < kVectors; ++k) widen(parts[k], sums + k * (kWide / kVectors));
#pragma GCC unroll 8
    for (int width = kWide / 2; width > 0; width /= 2)
#pragma GCC unroll 32
      for (int k = 0; k < width; ++k) sums[k] += sums[k + width];
    return across(sums[0]);
  }
};

}  // namespace
}  // namespace ebdiff
