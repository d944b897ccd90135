// Vectors as wide as the instruction set that this is compiled for: of float, to and from all storage types, and of double.
// The same elements go through the same operations at every width, so that every instruction set gives the same bits.
#pragma once

#include "../dtype.h"

#ifdef __AVX2__
#include <immintrin.h>  // intrinsics are always inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 finds some in its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace ebdiff {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class C>
constexpr int kLanes = kVectorBytes / int(sizeof(C));

template <class C>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <class C>
using Vector = typename VectorOf<C>::type;
template <class C>
using Bits = typename VectorOf<C>::bits;

// How many of a vector's lanes are there: all, or the first few, where a row ends.
struct Whole {};
struct First {
  int count;
};

template <class C, class F>
EBDIFF_HD void each_vector(int64_t n, const F& body) {
  int64_t i = 0;
  for (; i + kLanes<C> <= n; i += kLanes<C>) body(i, Whole());
  if (i < n) body(i, First{int(n - i)});
}

// use(k, make(k)) for each k below kCount, all made before any is used: a long chain of operations waits for itself, and no
// compiler moves what is read past what is written, to do something else meanwhile.
template <int kCount, class Make, class Use>
EBDIFF_HD void together(const Make& make, const Use& use) {
  decltype(make(0)) made[kCount];
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) made[k] = make(k);
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) use(k, made[k]);
}

// use(i, k, make(i, part), part) for each vector of n elements, some together, k counting up to as many as hold kCount
// elements, and again.
template <class C, int kCount, class Make, class Use>
EBDIFF_HD void each_made(int64_t n, const Make& make, const Use& use) {
  constexpr int lanes = kLanes<C>, kVectors = kCount / lanes, kTogether = kVectors > 4 ? kVectors : 4;
  int64_t i = 0;
  for (; i + kTogether * lanes <= n; i += kTogether * lanes)
    together<kTogether>([&](int k) { return make(i + k * lanes, Whole()); },
                        [&](int k, const auto& made) { use(i + k * lanes, k % kVectors, made, Whole()); });
  if (i == n) return;
#pragma GCC unroll 8
  for (int k = 0; k < kTogether; ++k) {
    const int64_t at = i + k * lanes, left = n - at;
    if (left >= lanes)
      use(at, k % kVectors, make(at, Whole()), Whole());
    else if (left > 0)
      use(at, k % kVectors, make(at, First{int(left)}), First{int(left)});
  }
}

// body(i, k, part) for each vector of n elements, k counting up to as many as hold kCount elements, and again.
template <class C, int kCount, class F>
EBDIFF_HD void each_of(int64_t n, const F& body) {
  constexpr int kVectors = kCount / kLanes<C>;
  int64_t i = 0;
  for (; i + kCount <= n; i += kCount) {
#pragma GCC unroll 32
    for (int k = 0; k < kVectors; ++k) body(i + k * kLanes<C>, k, Whole());
  }
  if (i == n) return;
#pragma GCC unroll 32
  for (int k = 0; k < kVectors; ++k) {  // unrolled too, so that what k counts can stay in registers
    const int64_t left = n - i - k * kLanes<C>;
    if (left >= kLanes<C>)
      body(i + k * kLanes<C>, k, Whole());
    else if (left > 0)
      body(i + k * kLanes<C>, k, First{int(left)});
  }
}

template <class C>
EBDIFF_HD Vector<C> all(C value) {
  return value - Vector<C>{};
}

template <class C>
EBDIFF_HD Vector<C> only_first(Vector<C> v, int count) {
  Bits<C> lane;
#pragma GCC unroll 16
  for (int j = 0; j < kLanes<C>; ++j) lane[j] = j;
  return bits_as<Vector<C>>(bits_as<Bits<C>>(v) & (lane < Bits<C>{} + count));
}

// Zero in the lanes that are not there.
template <class V>
EBDIFF_HD V only(V v, Whole) {
  return v;
}
EBDIFF_HD Vector<float> only(Vector<float> v, First first) { return only_first<float>(v, first.count); }
EBDIFF_HD Vector<double> only(Vector<double> v, First first) { return only_first<double>(v, first.count); }

template <class V, class From>
EBDIFF_HD V read(const From* from) {
  static_assert(sizeof(V) >= sizeof(From));
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

EBDIFF_HD Vector<float> load(const float* x, Whole) { return read<Vector<float>>(x); }
EBDIFF_HD Vector<double> load(const double* x, Whole) { return read<Vector<double>>(x); }

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

// gcc 12 converts in halves and joins them again where it is not told.
EBDIFF_HD Words words(Halves x) {
#if defined(__AVX512F__)
  return bits_as<Words>(_mm512_cvtepu16_epi32(bits_as<__m256i>(x)));
#elif defined(__AVX2__)
  return bits_as<Words>(_mm256_cvtepu16_epi32(bits_as<__m128i>(x)));
#else
  return __builtin_convertvector(x, Words);
#endif
}
EBDIFF_HD Halves halves(Words x) {
#if defined(__AVX512F__)
  return bits_as<Halves>(_mm512_cvtepi32_epi16(bits_as<__m512i>(x)));
#else
  return __builtin_convertvector(x, Halves);
#endif
}

EBDIFF_HD Vector<float> widened(Halves x, bfloat16) { return bits_as<Vector<float>>(words(x) << 16); }
EBDIFF_HD Halves narrowed(Vector<float> x, bfloat16) {
  const Words bits = bits_as<Words>(x);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return halves(x != x ? Words{} + 0x7fc0u : rounded);
}

EBDIFF_HD Vector<float> widened(Halves x, float16) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(bits_as<__m256i>(x));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(bits_as<__m128i>(x));
#else
  Vector<float> wide;
  for (int j = 0; j < kLanes<float>; ++j) wide[j] = load(float16{x[j]});
  return wide;
#endif
}
EBDIFF_HD Halves narrowed(Vector<float> x, float16) {
#if defined(__AVX512F__)
  return bits_as<Halves>(_mm512_cvtps_ph(x, 0));  // to nearest
#elif defined(__AVX2__)
  return bits_as<Halves>(_mm256_cvtps_ph(x, 0));
#else
  Halves narrow;
  for (int j = 0; j < kLanes<float>; ++j) narrow[j] = store<float16>(x[j]).bits;
  return narrow;
#endif
}

template <class T>
EBDIFF_HD Vector<float> load(const T* x, Whole) {
  return widened(read<Halves>(x), T());
}

EBDIFF_HD void store(float* to, Vector<float> v, Whole) { __builtin_memcpy(to, &v, sizeof v); }
EBDIFF_HD void store(double* to, Vector<double> v, Whole) { __builtin_memcpy(to, &v, sizeof v); }
template <class T>
EBDIFF_HD void store(T* to, Vector<float> v, Whole) {
  const Halves narrow = narrowed(v, T());
  __builtin_memcpy(to, &narrow, sizeof narrow);
}

// Where a row ends: lanes that are not there are zero and touch no memory.
template <class T>
EBDIFF_HD Vector<compute_t<T>> load(const T* x, First first) {
#ifdef __AVX512F__
  const uint32_t lanes = (1u << first.count) - 1;
  if constexpr (sizeof(T) == 4)
    return _mm512_maskz_loadu_ps(__mmask16(lanes), x);
  else if constexpr (sizeof(T) == 8)
    return _mm512_maskz_loadu_pd(__mmask8(lanes), x);
  else
    return widened(bits_as<Halves>(_mm256_maskz_loadu_epi16(__mmask16(lanes), x)), T());
#else
  T copy[kLanes<compute_t<T>>] = {};
  __builtin_memcpy(copy, x, first.count * sizeof(T));
  return load(copy, Whole());
#endif
}

template <class T>
EBDIFF_HD void store(T* to, Vector<compute_t<T>> v, First first) {
#ifdef __AVX512F__
  const uint32_t lanes = (1u << first.count) - 1;
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(to, __mmask16(lanes), v);
  else if constexpr (sizeof(T) == 8)
    _mm512_mask_storeu_pd(to, __mmask8(lanes), v);
  else
    _mm256_mask_storeu_epi16(to, __mmask16(lanes), bits_as<__m256i>(narrowed(v, T())));
#else
  T copy[kLanes<compute_t<T>>];
  store(copy, v, Whole());
  __builtin_memcpy(to, copy, first.count * sizeof(T));
#endif
}

// The larger, the smaller of two; the second one where one is NaN. A comparison and a blend would take twice as long.
template <class V>
EBDIFF_HD V larger(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4)
    return _mm512_max_ps(a, b);
  else
    return _mm512_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}
template <class V>
EBDIFF_HD V smaller(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4)
    return _mm512_min_ps(a, b);
  else
    return _mm512_min_pd(a, b);
#else
  return a < b ? a : b;
#endif
}

// What a number is split with, into k ln(2) - u.
template <class C>
struct Reduction;
template <>
struct Reduction<float> {
  static constexpr int degree = 3, mantissa = 23;
  static constexpr float shift = 0x1.8p23f, ln2_high = 0x1.62ep-1f, ln2_low = 0x1.0bfbe8p-15f;
};
template <>
struct Reduction<double> {
  static constexpr int degree = 6, mantissa = 52;
  static constexpr double shift = 0x1.8p52, ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
};

// (2m - j)! / (j! (m - j)!): the coefficients of Pade's approximation to the exponential, which are whole numbers.
constexpr double pade(int m, int j) {
  double value = 1;
  for (int i = 2; i <= 2 * m - j; ++i) value *= i;
  for (int i = 2; i <= j; ++i) value /= i;
  for (int i = 2; i <= m - j; ++i) value /= i;
  return value;
}

// The terms j, j + 2, ... of a degree in u^2.
template <class C, int kTerm>
EBDIFF_HD Vector<C> terms(Vector<C> square) {
  constexpr int degree = Reduction<C>::degree;
  constexpr C coefficient = C(pade(degree, kTerm));
  if constexpr (kTerm + 2 > degree)
    return all(coefficient);
  else if constexpr (kTerm + 2 == degree)
    return square + coefficient;  // the last coefficient is 1
  else
    return terms<C, kTerm + 2>(square) * square + coefficient;
}

// e^-z as a quotient, below / above, to less than a unit in the last place: e^-z = 2^k e^-u with |u| <= ln(2) / 2, and
// e^-u = (even - odd) / (even + odd). z is held within [-80, 80].
template <class C>
struct ExpMinus {
  Vector<C> above, below;

  explicit EBDIFF_HD ExpMinus(Vector<C> z) {
    using R = Reduction<C>;
    const Vector<C> shifted = z * C(-1.4426950408889634) + R::shift;  // k in the lowest bits
    const Vector<C> k = shifted - R::shift;
    const Vector<C> u = (z + k * R::ln2_high) + k * R::ln2_low;
    const Vector<C> square = u * u, even = terms<C, 0>(square), odd = terms<C, 1>(square) * u;
    above = even + odd;
    below = bits_as<Vector<C>>(bits_as<Bits<C>>(even - odd) + (bits_as<Bits<C>>(shifted) << R::mantissa));
  }
};

}  // namespace
}  // namespace ebdiff
