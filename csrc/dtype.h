// Storage types and what is computed in: float for float32, bfloat16 and float16, double for float64. Host and device.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define EBDIFF_HD __host__ __device__ __forceinline__
#else
#define EBDIFF_HD inline __attribute__((always_inline))
#endif

namespace ebdiff {

enum class Dtype : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Everything below has internal linkage: this file is compiled for several instruction sets, and a linker that merged
// inline functions could pick one that the machine lacks.
namespace {

template <class To, class From>
EBDIFF_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

EBDIFF_HD float load(float x) { return x; }
EBDIFF_HD double load(double x) { return x; }
EBDIFF_HD float load(bfloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
EBDIFF_HD float load(float16 x) {
#ifdef __CUDACC__
  return __half2float(bits_as<__half>(x.bits));
#else
  return float(bits_as<_Float16>(x.bits));
#endif
}

// Rounded to nearest, ties to even.
template <class T>
EBDIFF_HD T store(compute_t<T> x);
template <>
EBDIFF_HD float store<float>(float x) {
  return x;
}
template <>
EBDIFF_HD double store<double>(double x) {
  return x;
}
template <>
EBDIFF_HD bfloat16 store<bfloat16>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t(x != x ? 0x7fc0u : rounded)};
}
template <>
EBDIFF_HD float16 store<float16>(float x) {
#ifdef __CUDACC__
  return {bits_as<uint16_t>(__float2half_rn(x))};
#else
  return {bits_as<uint16_t>(_Float16(x))};
#endif
}

}  // namespace
}  // namespace ebdiff
