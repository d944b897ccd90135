#include <cmath>
#include <memory>

#include "norm_job.h"

namespace ebdiff {
namespace {

constexpr int64_t kScratch = 1 << 18;       // gradients that a thread keeps in float32 between two steps
constexpr int64_t kShared = 1 << 22;         // those of a sample that all threads work on
constexpr int64_t kChunk = 1 << 13;         // those that it computes again
constexpr double kFar = 4;                  // standard deviations: a mean this far from 0 has been rounded too much

template <class C>
struct Backward : Job<C> {
  using Job<C>::norm, Job<C>::rows, Job<C>::plan, Job<C>::dtype, Job<C>::bytes, Job<C>::width, Job<C>::groups;
  const char *dy, *x;
  const C *mean, *rstd;
  const NormGradients& out;
  Sums dz, dz_x, deviations, squares;  // sums of dz, dz * (x - centre), x - centre and its square
  std::unique_ptr<C[]> shared;
  std::vector<C> q, r;       // dx = dz * a - ((x - centre) * q + r)
  std::vector<double> rest;  // sums of what x - centre really is
  Backward(const GroupNorm& norm, const char* dy, const char* x, const C* mean, const C* rstd, const NormGradients& out,
           int threads)
      : Job<C>(norm, threads), dy(dy), x(x), mean(mean), rstd(rstd), out(out), dz(norm, plan), dz_x(norm, plan),
        deviations(norm, plan), squares(norm, plan), rest(norm.time_bias ? size_t(norm.samples * width) : 0) {
    if (plan.pieces > 1 && int(sizeof(C)) != bytes && width * norm.positions <= kShared)
      shared.reset(new C[size_t(width * norm.positions)]);
    for (auto* list : {&q, &r}) list->resize(size_t(norm.samples * width));
    for (int64_t n = 0; n < norm.samples; ++n)
      for (int64_t g = 0; g < groups; ++g)
        this->affine(n, this->group(n, g), double(mean[n * groups + g]), double(rstd[n * groups + g]));
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
  void spread(int64_t n, const Slab& slab, int64_t position, int64_t end, const void* from, int64_t pitch) {
    const int64_t at = this->start(n, slab.channel, position) * bytes, i = n * width + slab.channel;
    NormBlock block = this->block(n, slab.channel, slab.channels, end - position);
    block.b = q.data() + i, block.c = r.data() + i;
    rows.spread[norm.silu][norm.rows][dtype](block, x + at, from, pitch, static_cast<char*>(out.x) + at);
  }

  // The mean comes rounded to the compute type. Where that matters, find again what it has lost.
  bool is_rough(const Group& group) const {
    return norm.time_bias || std::abs(double(mean[group.at])) * double(rstd[group.at]) > kFar;
  }
  bool is_rough(int64_t n, const Slab& slab) const {
    bool found = false;
    this->each_group(n, slab, [&](const Group& group) { found |= is_rough(group); });
    return found;
  }
  void centre_again(int64_t n, const Group& group) {
    const double left = this->mean_left(n, group, deviations), *sum = deviations.row(n);
    if (norm.time_bias)
      this->each_kept(group, [&](int64_t k) {
        const int64_t i = n * width + k;
        rest[i] = sum[k] - (this->low[i] + left) * double(norm.positions);
      });
    this->affine(n, group, double(mean[group.at]) + left, double(rstd[group.at]));
  }

  // Of dz * (x - centre), the sums of dz * n are left. The means use a as it has been rounded, so that it cancels out where
  // a group is one element.
  void finish_group(int64_t n, const Group& group) {
    const double root = double(rstd[group.at]), *low = this->low.data() + n * width;
    const C* a = this->a.data() + n * width;
    double *sum = dz.row(n), *sum_n = dz_x.row(n), mean_dz = 0, mean_dz_n = 0;
    this->each_kept(group, [&](int64_t k) {
      sum_n[k] = (sum_n[k] - low[k] * sum[k]) * root;
      mean_dz += double(a[k]) * sum[k];
      mean_dz_n += double(a[k]) * sum_n[k];
    });
    mean_dz /= group.size;
    const double slope = root * (mean_dz_n / group.size);
    this->each_kept(group, [&](int64_t k) {
      const int64_t i = n * width + k;
      q[i] = C(slope);
      r[i] = C(mean_dz - low[k] * slope);
    });
    for (int64_t k = group.first; out.time_bias && k < group.end; ++k) {
      const int64_t i = n * width + k;
      const double sum_dx = double(a[k]) * sum[k] - slope * rest[i] - mean_dz * double(norm.positions);
      static_cast<C*>(out.time_bias)[i] = C(this->is_kept(k) ? sum_dx : 0);
    }
  }

  void steps() {
    const auto look = [&](int64_t n, const Slab& slab, auto... where) {
      if (is_rough(n, slab)) this->add_up(rows.deviations, x, n, slab, where..., deviations, squares);
    };
    const auto centre = [&](int64_t n, const Slab& slab) {
      deviations.join(n, slab);
      this->each_group(n, slab, [&](const Group& group) {
        if (is_rough(group)) centre_again(n, group);
      });
    };
    const auto sum_up = [&](int64_t n, const Slab& slab, int64_t position, int64_t end, int64_t piece) {
      gradient(n, slab, position, end, between(n, slab, position), dz.at(n, slab.channel, piece),
               dz_x.at(n, slab.channel, piece));
    };
    const auto settle = [&](int64_t n, const Slab& slab) {
      for (Sums* each : {&dz, &dz_x}) each->join(n, slab);
      this->each_group(n, slab, [&](const Group& group) { finish_group(n, group); });
    };
    const auto finish = [&](int64_t n, const Slab& slab, int64_t position, int64_t end, int64_t) {
      if (!out.x) return;
      const Place place = between(n, slab, position);
      if (place.at) return spread(n, slab, position, end, place.at, place.pitch);
      if (!norm.silu)
        return spread(n, slab, position, end, dy + this->start(n, slab.channel, position) * bytes,
                      norm.rows ? width : norm.positions);
      const int64_t step = std::max<int64_t>(kChunk / std::max<int64_t>(slab.channels, 1), 1);
      std::vector<double> unused(slab.channels);
      for (int64_t from = position; from < end; from += step) {
        const int64_t to = std::min(from + step, end);
        const Place again = scratch(slab, to - from);
        gradient(n, slab, from, to, again, unused.data(), unused.data());
        spread(n, slab, from, to, again.at, again.pitch);
      }
    };
    this->run(Step{look, centre}, Step{sum_up, settle}, Step{finish, kNothing});
  }

  // The gradients of what is small, samples in order.
  void small() {
    std::vector<double> weight(width), bias(width);
    for (int64_t n = 0; n < norm.samples; ++n) {
      const double *sum = dz.row(n), *sum_n = dz_x.row(n);
      for (int64_t k = 0; k < width; ++k) {  // sums of removed channels are 0, but what their scale holds is not known
        const double scale = this->is_kept(k) ? 1 + this->at(norm.scale, n * width + k, 0) : 0;
        weight[k] += scale * sum_n[k];
        bias[k] += scale * sum[k];
      }
      for (int64_t k = 0; out.scale && k < width; ++k) {
        const double by_scale = this->at(norm.weight, k, 1) * sum_n[k] + this->at(norm.bias, k, 0) * sum[k];
        static_cast<C*>(out.scale)[n * width + k] = C(this->is_kept(k) ? by_scale : 0);
      }
      for (int64_t k = 0; out.shift && k < width; ++k) static_cast<C*>(out.shift)[n * width + k] = C(sum[k]);
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

void group_norm_backward(const GroupNorm& norm, const void* dy, const void* x, const void* mean, const void* rstd,
                         const NormGradients& out, int threads) {
  const auto from = static_cast<const char*>(x), gradient = static_cast<const char*>(dy);
  if (norm.dtype == Dtype::f64)
    backward(norm, gradient, from, static_cast<const double*>(mean), static_cast<const double*>(rstd), out, threads);
  else
    backward(norm, gradient, from, static_cast<const float*>(mean), static_cast<const float*>(rstd), out, threads);
}

}  // namespace ebdiff
