#include <cmath>

#include "norm_job.h"

namespace ebdiff {
namespace {

template <class C>
void forward(const GroupNorm& norm, const char* x, char* y, C* mean, C* rstd, int threads) {
  Job<C> job(norm, threads);
  Sums sums(norm, job.plan), deviations(norm, job.plan), squares(norm, job.plan);
  std::vector<double> means(size_t(norm.samples * job.groups));
  const double positions = double(norm.positions);
  job.run(
      Step{[&](int64_t n, const Slab& slab, auto... where) {
             job.add_up(job.rows.sum, x, n, slab, where..., sums, squares);
           },
           [&](int64_t n, const Slab& slab) {
             job.each_group(n, slab, [&](const Group& group) {
               double total = 0;
               for (int64_t k = group.first; k < group.end; ++k) {
                 total += sums.of(n, k);
                 if (job.is_kept(k)) total += positions * job.at(norm.time_bias, n * job.width + k, 0);
               }
               means[group.at] = total / group.size;
               for (int64_t k = group.first; k < group.end; ++k) job.affine(n, k, means[group.at], 0);
             });
           }},
      Step{[&](int64_t n, const Slab& slab, auto... where) {
             job.add_up(job.rows.deviations, x, n, slab, where..., deviations, squares);
           },
           [&](int64_t n, const Slab& slab) {
             job.each_group(n, slab, [&](const Group& group) {
               double total = 0;
               for (int64_t k = group.first; k < group.end; ++k) {
                 const double low = job.low[n * job.width + k];
                 total += squares.of(n, k) - 2 * low * deviations.of(n, k);
                 total += low * low * positions;
               }
               const double left = job.mean_left(n, group, deviations), exact = means[group.at] + left;
               const double root = 1 / std::sqrt(std::max(total / group.size - left * left, 0.0) + norm.eps);
               mean[group.at] = C(exact);
               rstd[group.at] = C(root);
               for (int64_t k = group.first; k < group.end; ++k) job.affine(n, k, exact, root);
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
