// The inner loops of group normalisation, compiled once for each instruction set (group_norm_*.cpp) under the name
// EBDIFF_ISA. Nothing from the standard library, as in rows.h.
#include "group_norm_planes.h"

namespace ebdiff {
namespace {

constexpr int kStrip = 4;       // rows that are worked on together, a vector of channels at a time
constexpr int64_t kTile = 512;  // channels of a strip
constexpr int64_t kRows = 32;   // added up in float32 before they go to float64

template <class C, class Part>
EBDIFF_HD Bits<C> live_lanes(const NormBlock& block, int64_t i, Part part) {
  if (!block.live) return ~Bits<C>{};
  return bits_as<Bits<C>>(load(static_cast<const C*>(block.live) + i, part));
}

template <class V, class B>
EBDIFF_HD V masked(V v, B live) {
  return bits_as<V>(bits_as<B>(v) & live);
}

// The sums of the channels of a tile, in float32 for a while.
template <class C>
struct ChannelSums {
  alignas(64) C parts[kTile + 16] = {};

  template <class Part>
  EBDIFF_HD void add(int64_t c, Vector<C> v, Part) {  // lanes that are not there fall behind the last channel
    store(parts + c, load(parts + c, Whole()) + v, Whole());
  }
  void move_to(double* to, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) to[c] += double(parts[c]);
    for (C& part : parts) part = 0;
  }
};

// strip(first row, rows, channel, place in the tile, part): a few rows at a time, so that memory is read in few streams,
// and of these a vector of channels at a time. flush(channel, channels) where sums are to leave float32.
template <class C, class Strip, class Flush>
EBDIFF_HD void each_strip(const NormBlock& block, const Strip& strip, const Flush& flush) {
  for (int64_t first = 0; first < block.channels; first += kTile) {
    const int64_t channels = block.channels - first < kTile ? block.channels - first : kTile;
    for (int64_t row = 0; row < block.positions; row += kStrip) {
      if (block.positions - row >= kStrip)
        each_vector<C>(channels, [&](int64_t c, auto part) { strip(row, int64_t(kStrip), first + c, c, part); });
      else
        each_vector<C>(channels, [&](int64_t c, auto part) { strip(row, block.positions - row, first + c, c, part); });
      if ((row + kStrip) % kRows == 0 || row + kStrip >= block.positions) flush(first, channels);
    }
  }
}

// use(r, make(r)) for each row of a strip.
template <class Make, class Use>
EBDIFF_HD void each_row(int64_t rows, const Make& make, const Use& use) {
  if (rows == kStrip) return together<kStrip>(make, use);
  for (int64_t r = 0; r < rows; ++r) use(r, make(r));
}

template <class T, bool Squares>
void row_sums(const NormBlock& block, const void* x, double* sum, double* squares) {
  using C = compute_t<T>;
  ChannelSums<C> sums, sums_square;
  each_strip<C>(
      block,
      [&](int64_t row, int64_t rows, int64_t c, int64_t place, auto part) {
        const T* at = static_cast<const T*>(x) + row * block.pitch + c;
        const auto centre = Squares ? Coefficients<C>::template of<1>(block, c, part).centre : Vector<C>{};
        const auto live = live_lanes<C>(block, c, part);
        Vector<C> total = {}, square = {};
        for (int64_t r = 0; r < rows; ++r, at += block.pitch) {
          const Vector<C> value = load(at, part) - centre;
          total += value;
          if constexpr (Squares) square += value * value;
        }
        sums.add(place, masked(total, live), part);
        if constexpr (Squares) sums_square.add(place, masked(square, live), part);
      },
      [&](int64_t c, int64_t channels) {
        sums.move_to(sum + c, channels);
        if constexpr (Squares) sums_square.move_to(squares + c, channels);
      });
}

template <class T, bool Silu>
void row_apply(const NormBlock& block, const void* x, void* y) {
  using C = compute_t<T>;
  each_strip<C>(
      block,
      [&](int64_t row, int64_t rows, int64_t c, int64_t, auto part) {
        const T* at = static_cast<const T*>(x) + row * block.pitch + c;
        T* to = static_cast<T*>(y) + row * block.pitch + c;
        const auto k = Coefficients<C>::template of<3>(block, c, part);
        const auto live = live_lanes<C>(block, c, part);
        each_row(
            rows, [&](int64_t r) { return value<Silu, C>((load(at + r * block.pitch, part) - k.centre) * k.a + k.b); },
            [&](int64_t r, Vector<C> made) { store(to + r * block.pitch, masked(made, live), part); });
      },
      [](int64_t, int64_t) {});
}

template <class T, bool Silu>
void row_gradient(const NormBlock& block, const void* x, const void* dy, void* dz, int64_t dz_pitch, double* sum_dz,
                  double* sum_dz_x) {
  using C = compute_t<T>;
  ChannelSums<C> sums, sums_x;
  each_strip<C>(
      block,
      [&](int64_t row, int64_t rows, int64_t c, int64_t place, auto part) {
        const T* at = static_cast<const T*>(x) + row * block.pitch + c;
        const T* gradient = static_cast<const T*>(dy) + row * block.pitch + c;
        C* to = dz ? static_cast<C*>(dz) + row * dz_pitch + c : nullptr;
        const auto k = Coefficients<C>::template of<3>(block, c, part);
        const auto live = live_lanes<C>(block, c, part);
        Vector<C> total = {}, total_x = {};
        each_row(
            rows,
            [&](int64_t r) {
              const Vector<C> centred = load(at + r * block.pitch, part) - k.centre;
              return Slope<C>{centred, load(gradient + r * block.pitch, part) * slope<Silu, C>(centred * k.a + k.b)};
            },
            [&](int64_t r, const Slope<C>& made) {
              if (to) store(to + r * dz_pitch, made.dz, part);
              total += made.dz;
              total_x += made.dz * made.centred;
            });
        sums.add(place, masked(total, live), part);
        sums_x.add(place, masked(total_x, live), part);
      },
      [&](int64_t c, int64_t channels) {
        sums.move_to(sum_dz + c, channels);
        sums_x.move_to(sum_dz_x + c, channels);
      });
}

template <class T, bool Silu>
void row_spread(const NormBlock& block, const void* x, const void* dz, int64_t dz_pitch, void* dx) {
  using C = compute_t<T>;
  using Dz = typename Either<Silu, C, T>::type;
  each_strip<C>(
      block,
      [&](int64_t row, int64_t rows, int64_t c, int64_t, auto part) {
        const T* at = static_cast<const T*>(x) + row * block.pitch + c;
        const Dz* from = static_cast<const Dz*>(dz) + row * dz_pitch + c;
        T* to = static_cast<T*>(dx) + row * block.pitch + c;
        const auto k = Coefficients<C>::template of<4>(block, c, part);
        const auto live = live_lanes<C>(block, c, part);
        for (int64_t r = 0; r < rows; ++r, at += block.pitch, from += dz_pitch, to += block.pitch) {
          const Vector<C> centred = load(at, part) - k.centre;
          store(to, masked(load(from, part) * k.a - (centred * k.b + k.c), live), part);
        }
      },
      [](int64_t, int64_t) {});
}

#define EBDIFF_BY_DTYPE(f, flag) {f<float, flag>, f<double, flag>, f<bfloat16, flag>, f<float16, flag>}
#define EBDIFF_BY_LAYOUT(planes, rows, flag) {EBDIFF_BY_DTYPE(planes, flag), EBDIFF_BY_DTYPE(rows, flag)}
#define EBDIFF_BY_SILU(planes, rows) {EBDIFF_BY_LAYOUT(planes, rows, false), EBDIFF_BY_LAYOUT(planes, rows, true)}

constexpr NormRows kNormRows = {
    EBDIFF_BY_LAYOUT(plane_sums, row_sums, false),       EBDIFF_BY_LAYOUT(plane_sums, row_sums, true),
    EBDIFF_BY_SILU(plane_apply, row_apply),              EBDIFF_BY_SILU(plane_gradient, row_gradient),
    EBDIFF_BY_SILU(plane_spread, row_spread),
};

}  // namespace

const NormRows& EBDIFF_ISA() { return kNormRows; }

}  // namespace ebdiff
