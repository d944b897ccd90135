#include "timestep_loss.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "loss_rows.h"
#include "parallel.h"

namespace ebdiff {
namespace {

constexpr int64_t kPiece = 16 * kLossRun;   // elements of a sample that are added up together
constexpr int64_t kThread = 32 * kLossRun;  // elements that are worth a thread
constexpr int kBytes[] = {4, 8, 2, 2};      // by Dtype

// How the images are divided: from the shape alone, never from the threads.
struct Division {
  Shape shape;
  int64_t pieces, units;  // of a sample; of all

  explicit Division(Shape given)
      : shape(given), pieces((given.size + kPiece - 1) / kPiece), units(given.samples * pieces) {}

  // body(sample, piece, first element, end)
  template <class Body>
  void each(int threads, const Body& body) const {
    // Each thread has its part, the same in every call, which may still be in its cache.
    const int64_t parts = std::min<int64_t>(threads, 1 + shape.samples * shape.size / kThread);
    parallel_for(parts, int(parts), [&](int64_t part) {
      for (int64_t i = units * part / parts; i < units * (part + 1) / parts; ++i) {
        const int64_t start = i % pieces * kPiece;
        body(i / pieces, i % pieces, start, std::min(shape.size, start + kPiece));
      }
    });
  }
};

struct Scratch {
  alignas(64) float pred[kLossRun], target[kLossRun], x0[kLossRun], noise[kLossRun], grad[kLossRun];
};

struct Seed {
  uint32_t words[4];  // the key, and the last two words of the counter

  explicit Seed(const int64_t* seed) : words{} {
    for (int j = 0; seed && j < 4; ++j) words[j] = uint32_t(uint64_t(seed[j / 2]) >> (j % 2 * 32));
  }
};

// n elements from a place on, in float32: where they lie, or in `room`.
const float* seen(const LossRows& rows, Images images, int64_t place, int64_t n, float* room) {
  const char* from = static_cast<const char*>(images.at) + place * kBytes[int(images.dtype)];
  if (images.dtype == Dtype::f32) return reinterpret_cast<const float*>(from);
  rows.widen[int(images.dtype)](from, room, n);
  return room;
}

const float* seen_noise(const LossRows& rows, Images noise, const Seed& seed, Shape shape, int64_t sample, int64_t i,
                        int64_t n, float* room) {
  if (noise.at) return seen(rows, noise, sample * shape.size + i, n, room);
  rows.normals(uint32_t(i / 4), uint32_t(sample), seed.words, room);
  return room;
}

void check_places(const int64_t* places, int64_t count, int64_t size) {
  if (!std::all_of(places, places + count, [&](int64_t i) { return i >= 0 && i < size; }))
    throw std::out_of_range("a place outside of a table");
}

void check(const Coefficients& coefficients, int64_t samples) {
  if (coefficients.table) check_places(coefficients.row, samples, coefficients.columns);
}

// One loss: what is the same for all of its elements.
struct Job {
  const TimestepLoss& problem;
  const LossRows& rows = loss_rows();
  const Seed seed{problem.seed};
  const Shape shape = problem.shape;

  // What pred is compared with.
  const float* target(int64_t sample, int64_t i, int64_t n, Scratch& scratch) const {
    const TimestepLoss& p = problem;
    const int64_t place = sample * shape.size + i;
    if (p.target.at) return seen(rows, p.target, place, n, scratch.target);
    if (p.prediction == Prediction::sample) return seen(rows, p.x0, place, n, scratch.x0);
    const float* noise = seen_noise(rows, p.noise, seed, shape, sample, i, n, scratch.noise);
    if (p.prediction == Prediction::epsilon) return noise;
    float alpha = 1, sigma = 1;
    if (p.prediction == Prediction::v) {
      const int64_t row = p.coefficients.row[sample];
      alpha = p.coefficients.table[row], sigma = p.coefficients.table[p.coefficients.columns + row];
    }
    rows.mix(alpha, noise, -sigma, seen(rows, p.x0, place, n, scratch.x0), scratch.target, n);
    return scratch.target;
  }

  float weight(int64_t sample) const { return problem.weight[problem.cell ? problem.cell[sample] : sample]; }
  const float* c(int64_t sample) const { return problem.huber_c ? problem.huber_c + (problem.one_c ? 0 : sample) : nullptr; }

  // The errors' sum over elements [i, end) of a sample; writes their gradients, where `grad` is not null.
  double errors(int64_t sample, int64_t i, int64_t end, float factor, char* grad) const {
    Scratch scratch;
    double total = 0;
    const Dtype dtype = problem.pred.dtype;
    for (; i < end; i += kLossRun) {
      const int64_t n = std::min(end - i, kLossRun), place = sample * shape.size + i;
      char* const to = grad ? grad + place * kBytes[int(dtype)] : nullptr;
      const bool is_wide = dtype == Dtype::f32;
      const LossRun run = {seen(rows, problem.pred, place, n, scratch.pred), target(sample, i, n, scratch),
                           problem.mask ? problem.mask + place : nullptr, c(sample), factor,
                           !to ? nullptr : is_wide ? reinterpret_cast<float*>(to) : scratch.grad};
      total += rows.errors(run, n);
      if (to && !is_wide) rows.narrow[int(dtype)](scratch.grad, to, n);
    }
    return total;
  }
};

}  // namespace

void noised(Shape shape, Images x0, Images noise, const int64_t* seed_at, Coefficients coefficients, void* x_t,
            int threads) {
  check(coefficients, shape.samples);
  const LossRows& rows = loss_rows();
  const Seed seed(seed_at);
  Division(shape).each(threads, [&](int64_t sample, int64_t, int64_t i, int64_t end) {
    Scratch scratch;
    const float alpha = coefficients.table[coefficients.row[sample]];
    const float sigma = coefficients.table[coefficients.columns + coefficients.row[sample]];
    for (; i < end; i += kLossRun) {
      const int64_t n = std::min(end - i, kLossRun), place = sample * shape.size + i;
      char* const to = static_cast<char*>(x_t) + place * kBytes[int(x0.dtype)];
      const bool is_wide = x0.dtype == Dtype::f32;
      rows.mix(alpha, seen(rows, x0, place, n, scratch.x0), sigma,
               seen_noise(rows, noise, seed, shape, sample, i, n, scratch.noise),
               is_wide ? reinterpret_cast<float*>(to) : scratch.target, n);
      if (!is_wide) rows.narrow[int(x0.dtype)](scratch.target, to, n);
    }
  });
}

void timestep_loss(const TimestepLoss& problem, float dloss, const LossResults& out, int threads) {
  const auto [samples, size] = problem.shape;
  check(problem.coefficients, samples);
  if (problem.cell) check_places(problem.cell, samples, problem.weights);
  const Job job{problem};
  const Division division(problem.shape);
  std::vector<double> sums(size_t(division.units));
  const float count = float(samples * size);
  division.each(threads, [&](int64_t sample, int64_t piece, int64_t start, int64_t end) {
    const float factor = dloss * job.weight(sample) / count;
    sums[sample * division.pieces + piece] = job.errors(sample, start, end, factor, static_cast<char*>(out.grad));
  });
  if (!out.loss) return;
  double loss = 0;
  for (int64_t sample = 0; sample < samples; ++sample) {
    double total = 0;
    for (int64_t piece = 0; piece < division.pieces; ++piece) total += sums[sample * division.pieces + piece];
    out.per_sample[sample] = float(total / double(size));
    loss += double(job.weight(sample)) * (total / double(size));
  }
  *out.loss = float(loss / double(samples));
}

template <class T>
void add_losses(T* totals, int64_t buckets, const int64_t* bucket_of, int64_t cells, const int64_t* cell,
                const float* per_sample, int64_t samples) {
  check_places(cell, samples, cells);
  for (int64_t sample = 0; sample < samples; ++sample) {
    const int64_t bucket = bucket_of[cell[sample]];
    if (bucket < 0 || bucket >= buckets) continue;
    const T loss = T(per_sample[sample]);
    totals[bucket] += loss;
    totals[buckets + bucket] += loss * loss;
    totals[2 * buckets + bucket] += 1;
  }
}
template void add_losses(float*, int64_t, const int64_t*, int64_t, const int64_t*, const float*, int64_t);
template void add_losses(double*, int64_t, const int64_t*, int64_t, const int64_t*, const float*, int64_t);

}  // namespace ebdiff
