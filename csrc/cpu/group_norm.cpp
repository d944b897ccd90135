#include "group_norm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "norm_rows.h"
#include "parallel.h"

namespace ebdiff {
namespace {

constexpr int64_t kEnough = 8;              // tasks, to keep every core busy
constexpr int64_t kLeast = 1 << 12;         // elements that are worth a task
constexpr int64_t kPiece = 1 << 15;        // elements that are worth a task of one step
constexpr int64_t kScratch = 1 << 18;       // gradients that a thread keeps in float32 between two steps
constexpr int64_t kShared = 1 << 22;         // those of a sample that all threads work on
constexpr int64_t kChunk = 1 << 13;         // those that it computes again
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

template <class C>
struct Job {
  const GroupNorm& norm;
  const int threads;
  const Plan plan;
  const int64_t width = norm.channels, groups = int64_t(norm.offsets.size()) - 1;
  const int dtype = int(norm.dtype), bytes = kBytes[dtype];
  const NormRows& rows = norm_rows();
  std::vector<C> live, centre, a, b;  // [C]; [N, C]
  std::vector<double> low;
  std::vector<int64_t> kept;     // [G], channels

  Job(const GroupNorm& norm, int threads) : norm(norm), threads(threads), plan(norm), kept(groups) {
    const size_t count = size_t(norm.samples * width);
    for (auto* list : {&centre, &a, &b}) list->resize(count);
    low.resize(count);
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t k = norm.offsets[g]; k < norm.offsets[g + 1]; ++k) kept[g] += is_kept(k);
    if (!norm.keep) return;
    live.resize(width);
    for (int64_t k = 0; k < width; ++k) std::memset(&live[k], norm.keep[k] ? 255 : 0, sizeof(C));
  }

  double at(const void* list, int64_t i, double absent) const {
    return list ? double(static_cast<const C*>(list)[i]) : absent;
  }
  bool is_kept(int64_t k) const { return !norm.keep || norm.keep[k]; }
  double factor(int64_t n, int64_t k) const {
    return is_kept(k) ? at(norm.weight, k, 1) * (1 + at(norm.scale, n * width + k, 0)) : 0;
  }
  // What x is centred with, multiplied with and raised by before SiLU. `low` is what the centre's rounding leaves over.
  // All stay 0 for removed channels, whatever their parameters hold.
  void affine(int64_t n, int64_t k, double mean, double rstd) {
    if (!is_kept(k)) return;
    const int64_t i = n * width + k;
    const double exact = mean - at(norm.time_bias, i, 0), total = rstd * factor(n, k);
    centre[i] = C(exact);
    low[i] = exact - double(centre[i]);
    a[i] = C(total);
    b[i] = C(at(norm.bias, k, 0) * (1 + at(norm.scale, i, 0)) + at(norm.shift, i, 0) - low[i] * total);
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

// Sums of each channel of each sample, by piece: [pieces, N, C].
struct Sums {
  const int64_t width, samples, pieces;
  std::vector<double> values;

  Sums(const GroupNorm& norm, const Plan& plan)
      : width(norm.channels), samples(norm.samples), pieces(plan.pieces), values(size_t(width * samples * pieces)) {}
  double* at(int64_t n, int64_t channel, int64_t piece) { return values.data() + (piece * samples + n) * width + channel; }
  double of(int64_t n, int64_t channel) const {
    double total = 0;
    for (int64_t p = 0; p < pieces; ++p) total += values[(p * samples + n) * width + channel];
    return total;
  }
};

template <class C>
void forward(const GroupNorm& norm, const char* x, char* y, C* mean, C* rstd, int threads) {
  Job<C> job(norm, threads);
  Sums sums(norm, job.plan), squares(norm, job.plan);
  std::vector<double> means(size_t(norm.samples * job.groups));
  const auto add_up = [&](const auto& function, Sums& out) {
    return [&](int64_t n, const Slab& slab, int64_t position, int64_t end, int64_t piece) {
      if (norm.rows)
        return function(job.block(n, slab.channel, slab.channels, end - position),
                        x + job.start(n, slab.channel, position) * job.bytes, out.at(n, slab.channel, piece));
      for (int64_t g = slab.first_group; g < slab.end_group; ++g) {
        const int64_t channel = norm.offsets[g], channels = norm.offsets[g + 1] - channel;
        if (channels)
          function(job.block(n, channel, channels, end - position), x + job.start(n, channel, position) * job.bytes,
                   out.at(n, channel, piece));
      }
    };
  };
  const auto each_group = [&](int64_t n, const Slab& slab, const auto& body) {
    for (int64_t g = slab.first_group; g < slab.end_group; ++g)
      body(n * job.groups + g, norm.offsets[g], norm.offsets[g + 1], double(std::max<int64_t>(job.kept[g], 1)));
  };
  job.run(
      Step{add_up(job.rows.sum[norm.rows][job.dtype], sums),
           [&](int64_t n, const Slab& slab) {
             each_group(n, slab, [&](int64_t i, int64_t first, int64_t end, double channels) {
               double total = 0;
               for (int64_t k = first; k < end; ++k) {
                 total += sums.of(n, k) / double(norm.positions);
                 if (job.is_kept(k)) total += job.at(norm.time_bias, n * job.width + k, 0);
               }
               means[i] = total / channels;
               for (int64_t k = first; k < end; ++k) job.affine(n, k, means[i], 0);
             });
           }},
      Step{add_up(job.rows.squares[norm.rows][job.dtype], squares),
           [&](int64_t n, const Slab& slab) {
             each_group(n, slab, [&](int64_t i, int64_t first, int64_t end, double channels) {
               double total = 0;
               for (int64_t k = first; k < end; ++k) total += squares.of(n, k);
               const double root = 1 / std::sqrt(total / (channels * double(norm.positions)) + norm.eps);
               mean[i] = C(means[i]);
               rstd[i] = C(root);
               for (int64_t k = first; k < end; ++k) job.affine(n, k, means[i], root);
             });
           }},
      Step{[&](int64_t n, const Slab& slab, int64_t position, int64_t end, int64_t) {
             const int64_t at = job.start(n, slab.channel, position) * job.bytes;
             job.rows.apply[norm.silu][norm.rows][job.dtype](job.block(n, slab.channel, slab.channels, end - position), x + at,
                                                         y + at);
           },
           kNothing});
}

template <class C>
struct Backward : Job<C> {
  using Job<C>::norm, Job<C>::rows, Job<C>::plan, Job<C>::dtype, Job<C>::bytes, Job<C>::width, Job<C>::groups;
  const char *dy, *x;
  const C *mean, *rstd;
  const NormGradients& out;
  Sums dz, dz_x, dx;  // sums of dz, dz * (x - mean), dx
  std::unique_ptr<C[]> shared;
  std::vector<C> p, q, r;  // dx = dz * p - ((x - centre) * q + r)
  Backward(const GroupNorm& norm, const char* dy, const char* x, const C* mean, const C* rstd, const NormGradients& out,
           int threads)
      : Job<C>(norm, threads), dy(dy), x(x), mean(mean), rstd(rstd), out(out), dz(norm, plan), dz_x(norm, plan),
        dx(norm, plan) {
    if (plan.pieces > 1 && int(sizeof(C)) != bytes && width * norm.positions <= kShared)
      shared.reset(new C[size_t(width * norm.positions)]);
    for (auto* list : {&p, &q, &r}) list->resize(size_t(norm.samples * width));
    for (int64_t n = 0; n < norm.samples; ++n)
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t k = norm.offsets[g]; k < norm.offsets[g + 1]; ++k)
          this->affine(n, k, double(mean[n * groups + g]), double(rstd[n * groups + g]));
  }

  // Gradients by SiLU's input, between the two steps: in dx where that has the compute type, else in a thread's scratch.
  struct Place {
    C* at;
    int64_t pitch;
  };
  Place between(int64_t n, const Slab& slab, int64_t position) const {
    if (!out.x || !norm.silu) return {nullptr, 0};
    const int64_t pitch = norm.rows ? width : norm.positions;
    if (int(sizeof(C)) == bytes) return {static_cast<C*>(out.x) + this->start(n, slab.channel, position), pitch};
    if (shared) return {shared.get() + this->start(0, slab.channel, position), pitch};
    if (plan.pieces > 1 || slab.channels * norm.positions > kScratch) return {nullptr, 0};
    return scratch(slab, norm.positions);
  }
  Place scratch(const Slab& slab, int64_t positions) const {
    static thread_local std::vector<C> memory;
    memory.resize(std::max(memory.size(), size_t(slab.channels * positions)));
    return {memory.data(), norm.rows ? slab.channels : positions};
  }

  void gradient(int64_t n, const Slab& slab, int64_t position, int64_t end, Place to, double* sum, double* sum_x) const {
    const int64_t at = this->start(n, slab.channel, position) * bytes;
    rows.gradient[norm.silu][norm.rows][dtype](this->block(n, slab.channel, slab.channels, end - position), x + at,
                                               dy + at, to.at, to.pitch, sum, sum_x);
  }
  void spread(int64_t n, const Slab& slab, int64_t position, int64_t end, const void* from, int64_t pitch, double* sum) {
    const int64_t at = this->start(n, slab.channel, position) * bytes, i = n * width + slab.channel;
    NormBlock block = this->block(n, slab.channel, slab.channels, end - position);
    block.a = p.data() + i, block.b = q.data() + i, block.c = r.data() + i;
    rows.spread[norm.silu][norm.rows][dtype](block, x + at, from, pitch, static_cast<char*>(out.x) + at, sum);
  }

  double sum_dz_n(int64_t n, int64_t g, int64_t k) const {
    return (dz_x.of(n, k) - this->low[n * width + k] * dz.of(n, k)) * double(rstd[n * groups + g]);
  }

  void finish_group(int64_t n, int64_t g) {
    const double root = double(rstd[n * groups + g]);
    double mean_dz = 0, mean_dz_n = 0;
    const double size = double(std::max<int64_t>(this->kept[g], 1)) * double(norm.positions);
    for (int64_t k = norm.offsets[g]; k < norm.offsets[g + 1]; ++k) {
      mean_dz += this->factor(n, k) * dz.of(n, k) / size;
      mean_dz_n += this->factor(n, k) * sum_dz_n(n, g, k) / size;
    }
    for (int64_t k = norm.offsets[g]; k < norm.offsets[g + 1]; ++k) {
      const int64_t i = n * width + k;
      p[i] = C(root * this->factor(n, k));
      q[i] = C(root * root * mean_dz_n);
      r[i] = C(root * mean_dz - this->low[i] * root * root * mean_dz_n);
    }
  }

  void steps() {
    const auto sum_up = [&](int64_t n, const Slab& slab, int64_t position, int64_t end, int64_t piece) {
      gradient(n, slab, position, end, between(n, slab, position), dz.at(n, slab.channel, piece),
               dz_x.at(n, slab.channel, piece));
    };
    const auto settle = [&](int64_t n, const Slab& slab) {
      for (int64_t g = slab.first_group; g < slab.end_group; ++g) finish_group(n, g);
    };
    const auto finish = [&](int64_t n, const Slab& slab, int64_t position, int64_t end, int64_t piece) {
      if (!out.x) return;
      double* sum = out.time_bias ? dx.at(n, slab.channel, piece) : nullptr;
      const Place place = between(n, slab, position);
      if (place.at) return spread(n, slab, position, end, place.at, place.pitch, sum);
      if (!norm.silu)
        return spread(n, slab, position, end, dy + this->start(n, slab.channel, position) * bytes,
                      norm.rows ? width : norm.positions, sum);
      const int64_t step = std::max<int64_t>(kChunk / std::max<int64_t>(slab.channels, 1), 1);
      std::vector<double> unused(slab.channels);
      for (int64_t from = position; from < end; from += step) {
        const int64_t to = std::min(from + step, end);
        const Place again = scratch(slab, to - from);
        gradient(n, slab, from, to, again, unused.data(), unused.data());
        spread(n, slab, from, to, again.at, again.pitch, sum);
      }
    };
    this->run(Step{sum_up, settle}, Step{finish, kNothing});
  }

  // The gradients of what is small, samples in order.
  void small() {
    std::vector<double> weight(width), bias(width);
    for (int64_t n = 0; n < norm.samples; ++n)
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t k = norm.offsets[g]; k < norm.offsets[g + 1]; ++k) {
          const int64_t i = n * width + k;
          const double sum = dz.of(n, k), sum_n = sum_dz_n(n, g, k);
          const double by_scale = this->at(norm.weight, k, 1) * sum_n + this->at(norm.bias, k, 0) * sum;
          if (this->is_kept(k)) {
            weight[k] += (1 + this->at(norm.scale, i, 0)) * sum_n;
            bias[k] += (1 + this->at(norm.scale, i, 0)) * sum;
          }
          if (out.scale) static_cast<C*>(out.scale)[i] = C(this->is_kept(k) ? by_scale : 0);
          if (out.shift) static_cast<C*>(out.shift)[i] = C(sum);
          if (out.time_bias) static_cast<C*>(out.time_bias)[i] = C(dx.of(n, k));
        }
    for (int64_t k = 0; k < width; ++k) {
      if (out.weight) static_cast<C*>(out.weight)[k] = C(weight[k]);
      if (out.bias) static_cast<C*>(out.bias)[k] = C(bias[k]);
    }
  }
};

template <class C>
void backward(const GroupNorm& norm, const char* dy, const char* x, const C* mean, const C* rstd,
              const NormGradients& out, int threads) {
  Backward<C> job(norm, dy, x, mean, rstd, out, threads);
  job.steps();
  job.small();
}

}  // namespace

void group_norm_forward(const GroupNorm& norm, const void* x, void* y, void* mean, void* rstd, int threads) {
  const auto from = static_cast<const char*>(x);
  const auto to = static_cast<char*>(y);
  if (norm.dtype == Dtype::f64)
    forward(norm, from, to, static_cast<double*>(mean), static_cast<double*>(rstd), threads);
  else
    forward(norm, from, to, static_cast<float*>(mean), static_cast<float*>(rstd), threads);
}

void group_norm_backward(const GroupNorm& norm, const void* dy, const void* x, const void* mean, const void* rstd,
                         const NormGradients& out, int threads) {
  const auto from = static_cast<const char*>(x), gradient = static_cast<const char*>(dy);
  if (norm.dtype == Dtype::f64)
    backward(norm, gradient, from, static_cast<const double*>(mean), static_cast<const double*>(rstd), out, threads);
  else
    backward(norm, gradient, from, static_cast<const float*>(mean), static_cast<const float*>(rstd), out, threads);
}

}  // namespace ebdiff
