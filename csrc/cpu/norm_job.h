// What both directions of group normalisation share: how the work is divided, and sums by channel.
#pragma once

#include <algorithm>
#include <cstring>

#include "group_norm.h"
#include "norm_rows.h"
#include "parallel.h"

namespace ebdiff {
namespace {

constexpr int64_t kEnough = 8;              // tasks, to keep every core busy
constexpr int64_t kLeast = 1 << 12;         // elements that are worth a task
constexpr int64_t kPiece = 1 << 15;        // elements that are worth a task of one step
constexpr int kBytes[] = {4, 8, 2, 2};      // by Dtype

struct Slab {
  int64_t first_group, end_group, channel, channels;
};

// Which groups go together, in how many pieces (ranges of positions): from the shape alone, never from the threads.
struct Plan {
  std::vector<Slab> slabs;
  int64_t pieces = 1;

  explicit Plan(const GroupNorm& norm) {
    const int64_t size = norm.samples * norm.channels * norm.positions, groups = int64_t(norm.offsets.size()) - 1;
    // Rows are read whole: in parts of rows, caches would wait for memory.
    const int64_t width = norm.rows ? norm.channels : std::max<int64_t>(kLeast / norm.positions, 1);
    const int64_t count = (norm.channels + width - 1) / width;
    for (int64_t g = 0; g < groups;) {
      Slab slab = {g, g, norm.offsets[g], 0};
      const int64_t end = norm.channels * (int64_t(slabs.size()) + 1) / count;
      while (g < groups && (slab.channels == 0 || norm.offsets[g + 1] <= end)) {
        slab.end_group = ++g;
        slab.channels = norm.offsets[g] - slab.channel;
      }
      slabs.push_back(slab);
    }
    const int64_t tasks = norm.samples * int64_t(slabs.size());
    if (tasks < kEnough) pieces = std::clamp<int64_t>(size / tasks / kPiece, 1, std::min(norm.positions, 2 * kEnough));
  }
};

// Sums of each channel of each sample, by piece: [pieces, N, C].
struct Sums {
  const int64_t width, samples, pieces;
  std::vector<double> values;

  Sums(const GroupNorm& norm, const Plan& plan)
      : width(norm.channels), samples(norm.samples), pieces(plan.pieces), values(size_t(width * samples * pieces)) {}
  double* at(int64_t n, int64_t channel, int64_t piece) { return values.data() + (piece * samples + n) * width + channel; }
  void clear(int64_t n, const Slab& slab) {
    for (int64_t p = 0; p < pieces; ++p) std::fill_n(at(n, slab.channel, p), slab.channels, 0.0);
  }
  // All pieces, in order, to the first of them: what row() gives.
  void join(int64_t n, const Slab& slab) {
    double* to = at(n, slab.channel, 0);
    for (int64_t p = 1; p < pieces; ++p) {
      const double* piece = at(n, slab.channel, p);
      for (int64_t k = 0; k < slab.channels; ++k) to[k] += piece[k];
    }
  }
  double* row(int64_t n) { return at(n, 0, 0); }
};

// A group of a sample: its place in [N, G], its channels, the first of them that is kept (or `end`), how many elements
// count in its means.
struct Group {
  int64_t at, first, end, lead;
  double size;
};

template <class C>
struct Job {
  const GroupNorm& norm;
  const int threads;
  const Plan plan;
  const int64_t width = norm.channels, groups = int64_t(norm.offsets.size()) - 1;
  const int dtype = int(norm.dtype), bytes = kBytes[dtype];
  const NormRows& rows = norm_rows();
  const bool gathered = !norm.rows && !norm.time_bias;  // are a group's sums all at its first kept channel?
  std::vector<C> live, centre, a, b;  // [C]; [N, C]
  std::vector<double> low;
  std::vector<int64_t> kept, lead;  // [G]: how many channels, the first one

  Job(const GroupNorm& norm, int most) : norm(norm), threads(worth(norm, most)), plan(norm), kept(groups), lead(groups) {
    const size_t count = size_t(norm.samples * width);
    for (auto* list : {&centre, &a, &b}) list->resize(count);
    low.resize(count);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t end = lead[g] = norm.offsets[g + 1];
      for (int64_t k = end; --k >= norm.offsets[g];)
        if (is_kept(k)) ++kept[g], lead[g] = k;
    }
    if (!norm.keep) return;
    live.resize(width);
    for (int64_t k = 0; k < width; ++k) std::memset(&live[k], norm.keep[k] ? 255 : 0, sizeof(C));
  }

  // So many threads that each has some 32,000 elements to work on.
  static int worth(const GroupNorm& norm, int most) {
    return int(std::min<int64_t>(most, 1 + norm.samples * norm.channels * norm.positions / 32768));
  }

  double at(const void* list, int64_t i, double absent) const {
    return list ? double(static_cast<const C*>(list)[i]) : absent;
  }
  bool is_kept(int64_t k) const { return !norm.keep || norm.keep[k]; }
  template <class Body>
  void each_kept(const Group& group, const Body& body) const {
    for (int64_t k = group.lead; k < group.end; ++k)
      if (is_kept(k)) body(k);
  }
  // What x is centred with. `low` is what the centre's rounding leaves over. Both stay 0 for removed channels, and so do
  // those of affine(), whatever their parameters hold.
  void centre_on(int64_t n, const Group& group, double mean) {
    each_kept(group, [&](int64_t k) {
      const int64_t i = n * width + k;
      const double exact = mean - at(norm.time_bias, i, 0);
      centre[i] = C(exact);
      low[i] = exact - double(centre[i]);
    });
  }
  // And what it is multiplied with and raised by before SiLU.
  void affine(int64_t n, const Group& group, double mean, double rstd) {
    centre_on(n, group, mean);
    each_kept(group, [&](int64_t k) {
      const int64_t i = n * width + k;
      const double scale = 1 + at(norm.scale, i, 0), total = rstd * (at(norm.weight, k, 1) * scale);
      a[i] = C(total);
      b[i] = C(at(norm.bias, k, 0) * scale + at(norm.shift, i, 0) - low[i] * total);
    });
  }

  template <class Body>
  void each_group(int64_t n, const Slab& slab, const Body& body) const {
    for (int64_t g = slab.first_group; g < slab.end_group; ++g)
      body(group(n, g));
  }
  Group group(int64_t n, int64_t g) const {
    return {n * groups + g, norm.offsets[g], norm.offsets[g + 1], lead[g],
            double(std::max<int64_t>(kept[g], 1)) * double(norm.positions)};
  }
  // body(k, elements) for each place where the sums of a group lie, and of how many elements.
  template <class Body>
  void each_sum(const Group& group, const Body& body) const {
    if (!gathered) return each_kept(group, [&](int64_t k) { body(k, double(norm.positions)); });
    if (group.lead < group.end) body(group.lead, group.size);
  }
  // What x - (mean - time_bias) is on average, where centre_on() has been given `mean`: what to add to it.
  double mean_left(int64_t n, const Group& group, Sums& deviations) const {
    const double *sum = deviations.row(n), *low = this->low.data() + n * width;
    double total = 0;
    each_sum(group, [&](int64_t k, double elements) { total += sum[k] - low[k] * elements; });
    return total / group.size;
  }
  // One of the first two functions of NormRows, on a piece of a slab.
  template <class Function>
  void add_up(const Function& function, const char* x, int64_t n, const Slab& slab, int64_t position, int64_t end,
              int64_t piece, Sums& sum, Sums& squares) const {
    const auto add = [&](int64_t channel, int64_t channels) {
      function[norm.rows][dtype](block(n, channel, channels, end - position), x + start(n, channel, position) * bytes,
                                 sum.at(n, channel, piece), squares.at(n, channel, piece));
    };
    if (norm.rows) return add(slab.channel, slab.channels);
    each_group(n, slab, [&](const Group& group) {
      const int64_t step = gathered ? group.end - group.lead : 1;
      for (int64_t k = group.lead; k < group.end; k += step) add(k, step);
    });
  }

  // Elements before the first of a channel and position.
  int64_t start(int64_t n, int64_t channel, int64_t position) const {
    return norm.rows ? (n * norm.positions + position) * width + channel : (n * width + channel) * norm.positions + position;
  }
  NormBlock block(int64_t n, int64_t channel, int64_t channels, int64_t positions) const {
    const int64_t i = n * width + channel;
    return {channels, positions, norm.rows ? width : norm.positions, live.empty() ? nullptr : live.data() + channel,
            centre.data() + i, a.data() + i, b.data() + i, nullptr};
  }

  // Each step is body(sample, slab, first position, end, piece), then settle(sample, slab). Where there are slabs enough,
  // one task does all steps of a slab, which is in its cache meanwhile; else one sample after another is divided, step by
  // step, each beginning where the last one ended.
  template <class... Steps>
  void run(const Steps&... steps) {
    const int64_t slabs = int64_t(plan.slabs.size()), pieces = plan.pieces;
    if (pieces == 1) {
      parallel_for(norm.samples * slabs, threads, [&](int64_t i) {
        const int64_t n = i / slabs;
        const Slab& slab = plan.slabs[i % slabs];
        ((steps.body(n, slab, 0, norm.positions, 0), steps.settle(n, slab)), ...);
      });
      return;
    }
    bool backwards = false;
    const auto divided = [&](int64_t n, const auto& step) {
      parallel_for(slabs * pieces, threads, [&](int64_t i) {
        const int64_t at = backwards ? slabs * pieces - 1 - i : i, piece = at % pieces;
        step.body(n, plan.slabs[at / pieces], norm.positions * piece / pieces, norm.positions * (piece + 1) / pieces,
                  piece);
      });
      for (const Slab& slab : plan.slabs) step.settle(n, slab);
      backwards = !backwards;
    };
    for (int64_t n = 0; n < norm.samples; ++n) (divided(n, steps), ...);
  }
};

template <class Body, class Settle>
struct Step {
  const Body body;
  const Settle settle;
};
template <class Body, class Settle>
Step(Body, Settle) -> Step<Body, Settle>;

constexpr auto kNothing = [](int64_t, const Slab&) {};

}  // namespace
}  // namespace ebdiff
