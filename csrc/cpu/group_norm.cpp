#include <cmath>

#include "norm_job.h"

namespace ebdiff {
namespace {

constexpr int64_t kLooked = 128;  // positions, to find a centre near the mean

// Some positions give a centre; with it, all of them give the mean and the variance in one step, as long as it lies within
// one standard deviation of the mean. Of the other groups that step is done again, with the mean it has found.
template <class C>
struct Forward : Job<C> {
  using Job<C>::norm, Job<C>::rows, Job<C>::dtype, Job<C>::bytes, Job<C>::width, Job<C>::groups;
  const char* x;
  char* y;
  C *mean, *rstd;
  const int64_t looked;
  Sums sums, deviations, squares;  // of x at the first positions, of x - centre at all of them, and of its square
  std::vector<double> means;       // [N, G]
  std::vector<char> far;           // [N, G]: is the centre to be found again?

  Forward(const GroupNorm& norm, const char* x, char* y, C* mean, C* rstd, int threads)
      : Job<C>(norm, threads), x(x), y(y), mean(mean), rstd(rstd), looked(std::min(norm.positions, kLooked)),
        sums(norm, this->plan), deviations(norm, this->plan), squares(norm, this->plan),
        means(size_t(norm.samples * groups)), far(means.size(), looked < norm.positions) {}

  void find_centre(int64_t n, const Group& group) {
    const double* sum = sums.row(n);
    double total = 0, bias = 0;
    this->each_sum(group, [&](int64_t k, double) { total += sum[k]; });
    if (norm.time_bias) this->each_kept(group, [&](int64_t k) { bias += this->at(norm.time_bias, n * width + k, 0); });
    means[group.at] = (total / double(looked) + bias) * double(norm.positions) / group.size;
    this->centre_on(n, group, means[group.at]);
  }

  // What the deviations say; `far` is set where the centre turns out to be.
  void conclude(int64_t n, const Group& group) {
    const double *sum = deviations.row(n), *square = squares.row(n), *low = this->low.data() + n * width;
    double total = 0;
    this->each_sum(group, [&](int64_t k, double elements) {
      total += square[k] - 2 * low[k] * sum[k];
      total += low[k] * low[k] * elements;
    });
    const double left = this->mean_left(n, group, deviations), variance = total / group.size - left * left;
    const double exact = means[group.at] += left, root = 1 / std::sqrt(std::max(variance, 0.0) + norm.eps);
    far[group.at] = far[group.at] && !(left * left <= variance && std::isfinite(variance));
    mean[group.at] = C(exact);
    rstd[group.at] = C(root);
    this->affine(n, group, exact, root);
  }
  bool any_far(int64_t n, const Slab& slab) const {
    const char* first = far.data() + n * groups;
    return std::count(first + slab.first_group, first + slab.end_group, 0) < slab.end_group - slab.first_group;
  }

  void steps() {
    const auto look = [&](int64_t n, const Slab& slab, int64_t position, int64_t end, int64_t piece) {
      end = std::min(end, looked);
      if (position < end) this->add_up(rows.sum, x, n, slab, position, end, piece, sums, squares);
    };
    const auto centre = [&](int64_t n, const Slab& slab) {
      sums.join(n, slab);
      this->each_group(n, slab, [&](const Group& group) { find_centre(n, group); });
    };
    const auto measure = [&](int64_t n, const Slab& slab, auto... where) {
      this->add_up(rows.deviations, x, n, slab, where..., deviations, squares);
    };
    const auto join = [&](int64_t n, const Slab& slab) {
      for (Sums* each : {&deviations, &squares}) each->join(n, slab);
    };
    const auto settle = [&](int64_t n, const Slab& slab) {
      join(n, slab);
      this->each_group(n, slab, [&](const Group& group) { conclude(n, group); });
      if (!any_far(n, slab)) return;
      for (Sums* each : {&deviations, &squares}) each->clear(n, slab);
    };
    const auto again = [&](int64_t n, const Slab& slab, auto... where) {
      if (any_far(n, slab)) measure(n, slab, where...);
    };
    const auto settle_again = [&](int64_t n, const Slab& slab) {
      if (!any_far(n, slab)) return;
      join(n, slab);
      this->each_group(n, slab, [&](const Group& group) {
        if (far[group.at]) conclude(n, group);
      });
    };
    const auto apply = [&](int64_t n, const Slab& slab, int64_t position, int64_t end, int64_t) {
      const int64_t at = this->start(n, slab.channel, position) * bytes;
      rows.apply[norm.silu][norm.rows][dtype](this->block(n, slab.channel, slab.channels, end - position), x + at, y + at);
    };
    this->run(Step{look, centre}, Step{measure, settle}, Step{again, settle_again}, Step{apply, kNothing});
  }
};

template <class C>
void forward(const GroupNorm& norm, const void* x, void* y, void* mean, void* rstd, int threads) {
  Forward<C>(norm, static_cast<const char*>(x), static_cast<char*>(y), static_cast<C*>(mean), static_cast<C*>(rstd),
             threads)
      .steps();
}

}  // namespace

void group_norm_forward(const GroupNorm& norm, const void* x, void* y, void* mean, void* rstd, int threads) {
  (norm.dtype == Dtype::f64 ? forward<double> : forward<float>)(norm, x, y, mean, rstd, threads);
}

}  // namespace ebdiff
