#include <cmath>

#include "norm_job.h"

namespace ebdiff {
namespace {

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

}  // namespace

void group_norm_forward(const GroupNorm& norm, const void* x, void* y, void* mean, void* rstd, int threads) {
  const auto from = static_cast<const char*>(x);
  const auto to = static_cast<char*>(y);
  if (norm.dtype == Dtype::f64)
    forward(norm, from, to, static_cast<double*>(mean), static_cast<double*>(rstd), threads);
  else
    forward(norm, from, to, static_cast<float*>(mean), static_cast<float*>(rstd), threads);
}

}  // namespace ebdiff
