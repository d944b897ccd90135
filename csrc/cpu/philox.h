// Philox4x32-10 and Box-Muller, as many counters at a time as a vector has lanes of 64 bits. What they are: see
// ebdiff/ops/philox.py. The words are the same everywhere; logarithm, sine and cosine are made of operations that are
// rounded alike by every instruction set. Nothing from the standard library.
#pragma once

#include "vectors.h"

#if defined(__SSE2__) && !defined(__AVX2__)
#include <emmintrin.h>
#endif

namespace ebdiff {
namespace {

typedef uint64_t Counters __attribute__((vector_size(kVectorBytes)));  // a word in the lower half of each lane
constexpr int kCounters = kVectorBytes / 8;

// The products of the lower halves.
EBDIFF_HD Counters product(Counters x, uint32_t factor) {
  const Counters y = Counters{} + uint64_t(factor);
#if defined(__AVX512F__)
  return bits_as<Counters>(_mm512_mul_epu32(bits_as<__m512i>(x), bits_as<__m512i>(y)));
#elif defined(__AVX2__)
  return bits_as<Counters>(_mm256_mul_epu32(bits_as<__m256i>(x), bits_as<__m256i>(y)));
#elif defined(__SSE2__)
  return bits_as<Counters>(_mm_mul_epu32(bits_as<__m128i>(x), bits_as<__m128i>(y)));
#else
  return (x & 0xffffffffu) * y;
#endif
}

struct Philox {
  Counters words[4];  // upper halves hold anything
  uint32_t key[2];

  EBDIFF_HD void run() {
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Counters first = product(words[0], 0xD2511F53u), second = product(words[2], 0xCD9E8D57u);
      words[0] = (second >> 32) ^ words[1] ^ uint64_t(key[0]);
      words[1] = second;
      words[2] = (first >> 32) ^ words[3] ^ uint64_t(key[1]);
      words[3] = first;
      key[0] += 0x9E3779B9u;
      key[1] += 0xBB67AE85u;
    }
  }
};

// Two words of each lane, one after the other, as numbers in [0, 1).
EBDIFF_HD Vector<float> uniform(Counters first, Counters second) {
  const auto word = bits_as<Bits<float>>((first & 0xffffffffu) | (second << 32));
  return __builtin_convertvector(word ^ (word >> 31), Vector<float>) * 4.6566127342e-10f;
}

// ln x for normal, positive x: x = 2^k m with m in [sqrt(1/2), sqrt(2)), and ln m = 2 artanh((m - 1) / (m + 1)).
EBDIFF_HD Vector<float> logarithm(Vector<float> x) {
  const auto bits = bits_as<Bits<float>>(x);
  const Bits<float> k = (bits - 0x3f3504f3) >> 23;  // the bits of sqrt(1/2)
  const auto m = bits_as<Vector<float>>(bits - (k << 23));
  const Vector<float> s = (m - 1.0f) / (m + 1.0f), square = s * s;
  const Vector<float> series = (((square * (2.0f / 9) + 2.0f / 7) * square + 2.0f / 5) * square + 2.0f / 3) * square;
  const auto exponent = __builtin_convertvector(k, Vector<float>);
  return exponent * 0x1.62e4p-1f + ((exponent * 0x1.7f7d1cp-20f + s * series) + 2.0f * s);
}

EBDIFF_HD Vector<float> root(Vector<float> x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(x);
#else
  for (int j = 0; j < kLanes<float>; ++j) x[j] = __builtin_sqrtf(x[j]);
  return x;
#endif
}

// Sine and cosine of so many turns, in [0, 1): the quarters are taken off exactly, then Taylor within [-pi / 4, pi / 4].
struct Turn {
  Vector<float> sine, cosine;

  explicit EBDIFF_HD Turn(Vector<float> turns) {
    const Vector<float> quarters = turns * 4.0f, shifted = quarters + 0x1.8p23f;
    const auto quarter = bits_as<Bits<float>>(shifted);
    const Vector<float> x = (quarters - (shifted - 0x1.8p23f)) * 1.57079632679f, square = x * x;
    const Vector<float> odd = (((square * (1.0f / 362880) - 1.0f / 5040) * square + 1.0f / 120) * square - 1.0f / 6) * square;
    const Vector<float> even = (((square * (1.0f / 40320) - 1.0f / 720) * square + 1.0f / 24) * square - 0.5f) * square;
    const Vector<float> s = x + x * odd, c = even + 1.0f;
    const Bits<float> swap = -(quarter & 1);
    sine = chosen(swap, c, s, (quarter & 2) << 30);
    cosine = chosen(swap, s, c, ((quarter + 1) & 2) << 30);
  }

  static EBDIFF_HD Vector<float> chosen(Bits<float> swap, Vector<float> a, Vector<float> b, Bits<float> sign) {
    return bits_as<Vector<float>>(((bits_as<Bits<float>>(a) & swap) | (bits_as<Bits<float>>(b) & ~swap)) ^ sign);
  }
};

// From each 128 bits of a and b: the lower two elements of both in turn, or the upper two.
template <int kUpper>
EBDIFF_HD Vector<float> interleaved(Vector<float> a, Vector<float> b) {
  Bits<float> from;
  for (int j = 0; j < kLanes<float>; ++j) from[j] = j / 4 * 4 + kUpper * 2 + (j & 3) / 2 + (j & 1) * kLanes<float>;
  return __builtin_shuffle(a, b, from);
}

// 4 * kCounters normal numbers. Lanes 2j hold the counters first + j, lanes 2j + 1 those that follow, so that what is
// interleaved lies in order.
EBDIFF_HD void box_muller(const Philox& made, float* to) {
  const Vector<float> first = uniform(made.words[0], made.words[2]), least = all(1e-7f);
  const Vector<float> radius = root(logarithm(first > least ? first : least) * -2.0f);
  const Turn turn(uniform(made.words[1], made.words[3]));
  const Vector<float> a = radius * turn.cosine, b = radius * turn.sine;
  store(to, interleaved<0>(a, b), Whole());
  store(to + kLanes<float>, interleaved<1>(a, b), Whole());
}

void normals(uint32_t first, uint32_t sample, const uint32_t seed[4], float* to) {
  Counters lanes;
  for (int j = 0; j < kCounters; ++j) lanes[j] = uint64_t(j / 2 + j % 2 * (kCounters / 2));
  for (int64_t i = 0; i < kLossRun / 4; i += kCounters) {
    const Counters counter = lanes + (uint64_t(first) + uint64_t(i));
    Philox philox = {{counter, Counters{} + uint64_t(sample), Counters{} + uint64_t(seed[2]),
                      Counters{} + uint64_t(seed[3])}, {seed[0], seed[1]}};
    philox.run();
    box_muller(philox, to + 4 * i);
  }
}

}  // namespace
}  // namespace ebdiff
