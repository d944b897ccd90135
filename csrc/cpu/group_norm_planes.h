// The inner loops of group normalisation on planes, and what group_norm_rows.h, of which this is a part, needs too.
#pragma once

#include "norm_rows.h"
#include "silu.h"
#include "totals.h"

namespace ebdiff {
namespace {

constexpr int kAtOnce = 4;          // vectors of short planes that are worked on together
constexpr int64_t kTerms = 128;     // of a lane, added up in float32 before they go to float64
constexpr int64_t kShortRun = 256;  // elements that are, in 16 lanes

template <bool First, class A, class B>
struct Either {
  using type = A;
};
template <class A, class B>
struct Either<false, A, B> {
  using type = B;
};

template <class C>
C number(const void* list, int64_t i) {
  return static_cast<const C*>(list)[i];
}

template <class C>
bool is_live(const NormBlock& block, int64_t c) {
  return !block.live || number<C>(block.live, c) != 0;  // all bits set are a NaN
}

// The numbers of a vector of channels; all lanes the same for planes.
template <class C>
struct Coefficients {
  Vector<C> centre, a, b, c;

  template <int kUsed, class Part>
  static EBDIFF_HD Coefficients of(const NormBlock& block, int64_t i, Part part) {
    const auto in = [&](const void* list) { return load(static_cast<const C*>(list) + i, part); };
    Coefficients found = {in(block.centre), {}, {}, {}};
    if constexpr (kUsed > 1) found.a = in(block.a), found.b = in(block.b);
    if constexpr (kUsed > 3) found.c = in(block.c);
    return found;
  }
  template <int kUsed>
  static EBDIFF_HD Coefficients of(const NormBlock& block, int64_t i) {
    const auto in = [&](const void* list) { return all(number<C>(list, i)); };
    Coefficients found = {in(block.centre), {}, {}, {}};
    if constexpr (kUsed > 1) found.a = in(block.a), found.b = in(block.b);
    if constexpr (kUsed > 3) found.c = in(block.c);
    return found;
  }
};

// What dz is made from, and dz.
template <class C>
struct Slope {
  Vector<C> centred, dz;
};

template <class T, bool Squares, int kCount>
void plane_sums_in(const NormBlock& block, const void* x, double* sum, double* squares) {
  using C = compute_t<T>;
  constexpr int64_t kRun = kCount * kTerms;
  Total<C, kCount> total, square;
  const auto flush = [&] {
    sum[0] += total.value();
    if constexpr (Squares) squares[0] += square.value();
    total = square = {};
  };
  int64_t filled = 0;
  for (int64_t c = 0; c < block.channels; ++c) {
    if (!is_live<C>(block, c)) continue;
    const T* row = static_cast<const T*>(x) + c * block.pitch;
    const Vector<C> centre = Squares ? all(number<C>(block.centre, c)) : Vector<C>{};
    for (int64_t start = 0; start < block.positions; start += kRun) {
      const int64_t n = block.positions - start < kRun ? block.positions - start : kRun;
      each_of<C, kCount>(n, [&](int64_t i, int k, auto part) {
        const Vector<C> value = only(load(row + start + i, part) - centre, part);
        total.parts[k] += value;
        if constexpr (Squares) square.parts[k] += value * value;
      });
      filled += (n + kCount - 1) / kCount * kCount;
      if (filled >= kRun) flush(), filled = 0;
    }
  }
  flush();
}

// Short planes leave most of many lanes empty, and these have to be added up too.
template <class T, bool Squares>
void plane_sums(const NormBlock& block, const void* x, double* sum, double* squares) {
  (block.positions < 64 ? plane_sums_in<T, Squares, 16> : plane_sums_in<T, Squares, 64>)(block, x, sum, squares);
}

// An argument that the compiler sees.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// one(c) for each plane; but planes of a vector or two, where none of them is removed, go to few(c, vectors of a plane) as
// many at once as fill `together`: alone, each would wait for its own long chain of operations.
template <class C, class One, class Few>
EBDIFF_HD void each_plane(const NormBlock& block, const One& one, const Few& few) {
  const int64_t vectors = block.positions / kLanes<C>;
  const bool is_short = vectors * kLanes<C> == block.positions && 0 < vectors && vectors <= 2;
  const int64_t planes = is_short ? kAtOnce / vectors : block.channels + 1;  // at once; more than there are: never
  const auto are_live = [&](int64_t first) {
    for (int64_t c = first; c < first + planes; ++c)
      if (!is_live<C>(block, c)) return false;
    return true;
  };
  for (int64_t c = 0; c < block.channels;) {
    if (c + planes > block.channels || !are_live(c)) {
      one(c++);
      continue;
    }
    vectors == 1 ? few(c, Constant<1>()) : few(c, Constant<2>());
    c += planes;
  }
}

template <class T, bool Silu>
void plane_apply(const NormBlock& block, const void* x, void* y) {
  using C = compute_t<T>;
  const auto made = [](const T* x, const Coefficients<C>& k, auto part) {
    return value<Silu, C>((load(x, part) - k.centre) * k.a + k.b);
  };
  const auto one = [&](int64_t c) {
    const T* row = static_cast<const T*>(x) + c * block.pitch;
    T* to = static_cast<T*>(y) + c * block.pitch;
    if (!is_live<C>(block, c)) {
      __builtin_memset(to, 0, block.positions * sizeof(T));
      return;
    }
    const auto k = Coefficients<C>::template of<3>(block, c);
    each_made<C, kLanes<C>>(
        block.positions, [&](int64_t i, auto part) { return made(row + i, k, part); },
        [&](int64_t i, int, Vector<C> y, auto part) { store(to + i, y, part); });
  };
  const auto few = [&](int64_t first, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    const auto place = [&](int j) { return (first + j / kVectors) * block.pitch + j % kVectors * kLanes<C>; };
    together<kAtOnce>(
        [&](int j) {
          const auto k = Coefficients<C>::template of<3>(block, first + j / kVectors);
          return made(static_cast<const T*>(x) + place(j), k, Whole());
        },
        [&](int j, Vector<C> made) { store(static_cast<T*>(y) + place(j), made, Whole()); });
  };
  each_plane<C>(block, one, few);
}

template <class T, bool Silu>
void plane_gradient(const NormBlock& block, const void* x, const void* dy, void* dz, int64_t dz_pitch, double* sum_dz,
                    double* sum_dz_x) {
  using C = compute_t<T>;
  constexpr int kCount = 16;
  const auto made = [](const T* x, const T* dy, const Coefficients<C>& k, auto part) {
    const Vector<C> centred = load(x, part) - k.centre;
    return Slope<C>{centred, load(dy, part) * slope<Silu, C>(centred * k.a + k.b)};
  };
  const auto add = [&](int64_t c, const Total<C, kCount>& total, const Total<C, kCount>& total_x) {
    sum_dz[c] += total.value();
    sum_dz_x[c] += total_x.value();
  };
  const auto one = [&](int64_t c) {
    if (!is_live<C>(block, c)) return;
    const T* row = static_cast<const T*>(x) + c * block.pitch;
    const T* gradient = static_cast<const T*>(dy) + c * block.pitch;
    C* to = dz ? static_cast<C*>(dz) + c * dz_pitch : nullptr;
    const auto at = Coefficients<C>::template of<3>(block, c);
    for (int64_t start = 0; start < block.positions; start += kShortRun) {
      const int64_t n = block.positions - start < kShortRun ? block.positions - start : kShortRun;
      Total<C, kCount> total, total_x;
      each_made<C, kCount>(
          n, [&](int64_t i, auto part) { return made(row + start + i, gradient + start + i, at, part); },
          [&](int64_t i, int k, const Slope<C>& made, auto part) {
            if (to) store(to + start + i, made.dz, part);
            const Vector<C> counted = only(made.dz, part);
            total.parts[k] += counted;
            total_x.parts[k] += counted * made.centred;
          });
      add(c, total, total_x);
    }
  };
  const auto few = [&](int64_t first, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value, kParts = kCount / kLanes<C>;
    Total<C, kCount> total[kAtOnce / kVectors], total_x[kAtOnce / kVectors];
    together<kAtOnce>(
        [&](int j) {
          const int64_t c = first + j / kVectors, at = c * block.pitch + j % kVectors * kLanes<C>;
          const auto k = Coefficients<C>::template of<3>(block, c);
          return made(static_cast<const T*>(x) + at, static_cast<const T*>(dy) + at, k, Whole());
        },
        [&](int j, const Slope<C>& made) {
          const int plane = j / kVectors, k = j % kVectors;
          if (dz) store(static_cast<C*>(dz) + (first + plane) * dz_pitch + k * kLanes<C>, made.dz, Whole());
          total[plane].parts[k % kParts] += made.dz;
          total_x[plane].parts[k % kParts] += made.dz * made.centred;
        });
#pragma GCC unroll 8
    for (int plane = 0; plane < kAtOnce / kVectors; ++plane) add(first + plane, total[plane], total_x[plane]);
  };
  each_plane<C>(block, one, few);
}

template <class T, bool Silu>
void plane_spread(const NormBlock& block, const void* x, const void* dz, int64_t dz_pitch, void* dx) {
  using C = compute_t<T>;
  using Dz = typename Either<Silu, C, T>::type;
  for (int64_t c = 0; c < block.channels; ++c) {
    T* to = static_cast<T*>(dx) + c * block.pitch;
    if (!is_live<C>(block, c)) {
      __builtin_memset(to, 0, block.positions * sizeof(T));
      continue;
    }
    const T* row = static_cast<const T*>(x) + c * block.pitch;
    const Dz* from = static_cast<const Dz*>(dz) + c * dz_pitch;
    const auto at = Coefficients<C>::template of<4>(block, c);
    each_vector<C>(block.positions, [&](int64_t i, auto part) {
      const Vector<C> centred = load(row + i, part) - at.centre;
      store(to + i, load(from + i, part) * at.a - (centred * at.b + at.c), part);
    });
  }
}

}  // namespace
}  // namespace ebdiff
