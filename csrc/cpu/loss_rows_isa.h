// The inner loops of noising and of the timestep loss, compiled once for each instruction set (loss_rows_*.cpp) under the
// name EBDIFF_ISA. Nothing from the standard library, as in rows.h.
#include "loss_rows.h"
#include "philox.h"
#include "totals.h"

namespace ebdiff {
namespace {

template <class T>
void widen(const void* from, float* to, int64_t n) {
  each_vector<float>(n, [&](int64_t i, auto part) { store(to + i, load(static_cast<const T*>(from) + i, part), part); });
}

template <class T>
void narrow(const float* from, void* to, int64_t n) {
  each_vector<float>(n, [&](int64_t i, auto part) { store(static_cast<T*>(to) + i, load(from + i, part), part); });
}

void mix(float a, const float* x, float b, const float* y, float* to, int64_t n) {
  each_vector<float>(n, [&](int64_t i, auto part) { store(to + i, load(x + i, part) * a + load(y + i, part) * b, part); });
}

template <bool Huber, bool Mask, bool Grad>
double errors(const LossRun& run, int64_t n) {
  constexpr int kCount = 64;
  Total<float, kCount> total;
  each_of<float, kCount>(n, [&](int64_t i, int k, auto part) {
    Vector<float> d = load(run.pred + i, part) - load(run.target + i, part), m = all(1.0f);
    if constexpr (Mask) {
      m = load(run.mask + i, part);
      d = m != 0 ? d : Vector<float>{};
    }
    Vector<float> error = d * d, slope = d * 2.0f;
    if constexpr (Huber) {
      const Vector<float> ratio = d / *run.c, size = ratio < 0 ? -ratio : ratio;
      const Vector<float> steep = size < 1e6f ? root(ratio * ratio + 1.0f) : size;  // no square is too large
      error = d / (steep + 1.0f) * d * 2.0f;
      slope = d / steep * 2.0f;
    }
    total.parts[k] += Mask ? error * m : error;
    if constexpr (Grad) store(run.grad + i, (Mask ? slope * m : slope) * run.factor, part);
  });
  return total.value();
}

template <bool Huber, bool Mask>
double errors_of(const LossRun& run, int64_t n) {
  return run.grad ? errors<Huber, Mask, true>(run, n) : errors<Huber, Mask, false>(run, n);
}

double any_errors(const LossRun& run, int64_t n) {
  if (run.c) return run.mask ? errors_of<true, true>(run, n) : errors_of<true, false>(run, n);
  return run.mask ? errors_of<false, true>(run, n) : errors_of<false, false>(run, n);
}

constexpr LossRows kLossRows = {
    {widen<float>, nullptr, widen<bfloat16>, widen<float16>},
    {narrow<float>, nullptr, narrow<bfloat16>, narrow<float16>},
    mix,
    normals,
    any_errors,
};

}  // namespace

const LossRows& EBDIFF_ISA() { return kLossRows; }

}  // namespace ebdiff
