// Compiled once for each instruction set (rows_*.cpp) under the name EBDIFF_ISA. Plain loops for the vectoriser, nothing
// from the standard library: its inline functions would be compiled for this instruction set too, and then be shared.
// Built without contraction to fused multiply-add, so that every instruction set gives the same bits.
#include "kernels.h"

#ifdef __AVX2__
#include <immintrin.h>  // intrinsics are always inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 finds one in its own header
#endif

namespace ebdiff {
namespace {

template <int Bytes>
struct Word;
template <>
struct Word<1> {
  using type = uint8_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint64_t;
};
template <>
struct Word<16> {
  using type = unsigned __int128;
};

// All bits set where kept, none where removed; a keep byte is 255 or 0.
template <class W>
W bits_kept(uint8_t keep) {
  return W(keep) ? W(~W(0)) : W(0);
}

template <class W>
void zero_removed(void* x, const uint8_t* __restrict keep, int64_t n) {
  W* __restrict to = static_cast<W*>(x);
  for (int64_t i = 0; i < n; ++i) to[i] &= bits_kept<W>(keep[i]);
}

#ifdef __AVX512F__
// A register's worth of elements with the instructions that close and open gaps. Memory is touched under masks only: what
// lies behind the packed elements may belong to another thread.
template <class W>
struct Lanes {
  static constexpr int64_t count = 0;  // no such instructions
};
template <>
struct Lanes<uint32_t> {
  static constexpr int64_t count = 16;
  static uint32_t kept(const uint8_t* keep, uint32_t in_range) {
    return _mm_mask_test_epi8_mask(in_range, _mm_maskz_loadu_epi8(in_range, keep), _mm_set1_epi8(-1));
  }
  static void close(uint32_t* packed, const uint32_t* x, uint32_t kept, uint32_t dense) {
    _mm512_mask_storeu_epi32(packed, dense, _mm512_maskz_compress_epi32(kept, _mm512_maskz_loadu_epi32(kept, x)));
  }
  static void open(uint32_t* x, const uint32_t* packed, uint32_t kept, uint32_t dense) {
    _mm512_mask_storeu_epi32(x, kept, _mm512_maskz_expand_epi32(kept, _mm512_maskz_loadu_epi32(dense, packed)));
  }
};
template <>
struct Lanes<uint16_t> : Lanes<uint32_t> {  // widened to 32 bits
  static void close(uint16_t* packed, const uint16_t* x, uint32_t kept, uint32_t dense) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept, x));
    _mm256_mask_storeu_epi16(packed, dense, _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(kept, wide)));
  }
  static void open(uint16_t* x, const uint16_t* packed, uint32_t kept, uint32_t dense) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(dense, packed));
    _mm256_mask_storeu_epi16(x, kept, _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(kept, wide)));
  }
};

#endif

// Gather the kept elements of x into packed, or scatter them back.
template <bool Back, class W>
void move_kept(void* dense, void* packed, const uint8_t* __restrict keep, const int32_t* __restrict index, int64_t n) {
  W* __restrict x = static_cast<W*>(dense);
  W* __restrict y = static_cast<W*>(packed);
#ifdef __AVX512F__
  if constexpr (Lanes<W>::count > 0) {
    const int64_t end = n ? index[n - 1] + 1 : 0;
    for (int64_t i = n ? index[0] : 0, done = 0; i < end; i += Lanes<W>::count) {
      const uint32_t in_range = end - i >= Lanes<W>::count ? 0xffff : (1u << (end - i)) - 1;
      const uint32_t kept = Lanes<W>::kept(keep + i, in_range), count = __builtin_popcount(kept);
      if constexpr (Back)
        Lanes<W>::open(x + i, y + done, kept, (1u << count) - 1);
      else
        Lanes<W>::close(y + done, x + i, kept, (1u << count) - 1);
      done += count;
    }
    return;
  }
#endif
  (void)keep;
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (Back)
      x[index[i]] = y[i];
    else
      y[i] = x[index[i]];
  }
}

float root(float x) { return __builtin_sqrtf(x); }
double root(double x) { return __builtin_sqrt(x); }

template <class C>
C kept_or_zero(C x, uint8_t keep) {
  using W = typename Word<sizeof(C)>::type;
  return bits_as<C>(W(bits_as<W>(x) & bits_kept<W>(keep)));
}

// AdamW's numbers in the compute type, and one step of it.
template <class C>
struct Step {
  const C one_minus_beta1, beta2, one_minus_beta2, decay, inverse_bias2, eps, step_size, one_minus_ema, sign;

  explicit Step(const AdamWArgs& a)
      : one_minus_beta1(C(a.one_minus_beta1)), beta2(C(a.beta2)), one_minus_beta2(C(a.one_minus_beta2)),
        decay(C(a.decay)), inverse_bias2(C(a.inverse_bias2)), eps(C(a.eps)), step_size(C(a.step_size)),
        one_minus_ema(C(a.one_minus_ema)), sign(a.maximize ? C(-1) : C(1)) {}

  template <bool HasEma, bool HasKeep>
  void operator()(C* __restrict p, const C* __restrict g, C* __restrict m, C* __restrict v, C* __restrict e,
                  const uint8_t* __restrict keep, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      const uint8_t alive = HasKeep ? keep[i] : 255;
      const C gradient = g[i] * sign;
      const C mean = m[i] + (gradient - m[i]) * one_minus_beta1;
      const C square = v[i] * beta2 + gradient * gradient * one_minus_beta2;
      const C change = mean / (root(square) * inverse_bias2 + eps) * step_size;
      const C next = kept_or_zero(p[i] * decay - change, alive);
      p[i] = next;
      m[i] = kept_or_zero(mean, alive);
      v[i] = kept_or_zero(square, alive);
      if (HasEma) e[i] = kept_or_zero(e[i] - (e[i] - next) * one_minus_ema, alive);
    }
  }
};

template <class T>
void widen(const T* __restrict x, float* __restrict to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__  // gcc 12 has no vectors of float16
  if constexpr (__is_same(T, float16))
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
  for (; i < n; ++i) to[i] = load(x[i]);
}

template <class T>
void narrow(const float* __restrict x, T* __restrict to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (__is_same(T, float16))
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), 0));  // to nearest
#endif
  for (; i < n; ++i) to[i].bits = store<T>(x[i]).bits;
}

template <class T, bool HasEma, bool HasKeep>
void adamw_loop(T* p, const T* g, T* m, T* v, T* e, const uint8_t* keep, int64_t n, const AdamWArgs& args) {
  const Step<compute_t<T>> step(args);
  if constexpr (sizeof(T) >= 4) {
    step.template operator()<HasEma, HasKeep>(p, g, m, v, e, keep, n);
  } else {  // a block at a time in float, in the nearest cache; the average follows the rounded parameters
    constexpr int64_t kBlock = 256;
    float wide_p[kBlock], wide_g[kBlock], wide_m[kBlock], wide_v[kBlock];
    for (int64_t i = 0; i < n; i += kBlock) {
      const int64_t count = n - i < kBlock ? n - i : kBlock;
      widen(p + i, wide_p, count);
      widen(g + i, wide_g, count);
      widen(m + i, wide_m, count);
      widen(v + i, wide_v, count);
      step.template operator()<false, HasKeep>(wide_p, wide_g, wide_m, wide_v, nullptr, keep + (HasKeep ? i : 0), count);
      narrow(wide_p, p + i, count);
      narrow(wide_m, m + i, count);
      narrow(wide_v, v + i, count);
      if (!HasEma) continue;
      widen(p + i, wide_p, count);
      widen(e + i, wide_m, count);
      for (int64_t k = 0; k < count; ++k)
        wide_m[k] = kept_or_zero(wide_m[k] - (wide_m[k] - wide_p[k]) * step.one_minus_ema, HasKeep ? keep[i + k] : 255);
      narrow(wide_m, e + i, count);
    }
  }
}

template <class T>
void adamw(void* p, const void* g, void* m, void* v, void* e, const uint8_t* keep, int64_t n, const AdamWArgs& args) {
  const auto run = e ? (keep ? adamw_loop<T, true, true> : adamw_loop<T, true, false>)
                     : (keep ? adamw_loop<T, false, true> : adamw_loop<T, false, false>);
  run(static_cast<T*>(p), static_cast<const T*>(g), static_cast<T*>(m), static_cast<T*>(v), static_cast<T*>(e), keep, n,
      args);
}

template <Sum Kind, class C>
C term(C x, C y) {
  const C value = Kind == Sum::square ? x * x : Kind == Sum::absolute ? x : x * y;
  return Kind == Sum::absolute || Kind == Sum::absolute_product ? (value < 0 ? -value : value) : value;
}

// The order of the additions is that of 64 lanes, whatever the width of the vectors.
template <class T, Sum Kind, bool HasColumn>
double sum_loop(const T* __restrict x, const T* __restrict y, compute_t<T>* __restrict column, int64_t n) {
  using C = compute_t<T>;
  constexpr int kLanes = 64;
  constexpr bool kTwo = Kind == Sum::product || Kind == Sum::absolute_product;
  double total = 0;
  if (n < kLanes) {  // an element for each lane: the same sum
    for (int64_t i = 0; i < n; ++i) {
      const C value = term<Kind, C>(load(x[i]), kTwo ? load(y[i]) : C(0));
      total += double(value);
      if (HasColumn) column[i] += value;
    }
    return total;
  }
  C lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const C value = term<Kind, C>(load(x[i + j]), kTwo ? load(y[i + j]) : C(0));
      lanes[j] += value;
      if (HasColumn) column[i + j] += value;
    }
  for (int j = 0; i + j < n; ++j) {
    const C value = term<Kind, C>(load(x[i + j]), kTwo ? load(y[i + j]) : C(0));
    lanes[j] += value;
    if (HasColumn) column[i + j] += value;
  }
  for (int j = 0; j < kLanes; ++j) total += double(lanes[j]);
  return total;
}

template <class T, Sum Kind>
double sum(const void* x, const void* y, void* column, int64_t n) {
  const auto run = column ? sum_loop<T, Kind, true> : sum_loop<T, Kind, false>;
  return run(static_cast<const T*>(x), static_cast<const T*>(y), static_cast<compute_t<T>*>(column), n);
}

#define EBDIFF_BY_SIZE(f) {f(uint8_t), f(uint16_t), f(uint32_t), f(uint64_t), f(unsigned __int128)}
#define EBDIFF_ZERO(W) zero_removed<W>
#define EBDIFF_GATHER(W) move_kept<false, W>
#define EBDIFF_SCATTER(W) move_kept<true, W>
#define EBDIFF_BY_SUM(T) {sum<T, Sum::square>, sum<T, Sum::absolute>, sum<T, Sum::product>, sum<T, Sum::absolute_product>}

constexpr Rows kRows = {
    EBDIFF_ISA_NAME,
    EBDIFF_BY_SIZE(EBDIFF_ZERO),
    {EBDIFF_BY_SIZE(EBDIFF_GATHER), EBDIFF_BY_SIZE(EBDIFF_SCATTER)},
    {adamw<float>, adamw<double>, adamw<bfloat16>, adamw<float16>},
    {EBDIFF_BY_SUM(float), EBDIFF_BY_SUM(double), EBDIFF_BY_SUM(bfloat16), EBDIFF_BY_SUM(float16)},
};

}  // namespace

const Rows& EBDIFF_ISA() { return kRows; }

}  // namespace ebdiff
