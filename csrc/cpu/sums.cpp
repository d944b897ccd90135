#include "ops.h"
#include "parallel.h"

namespace ebdiff {

constexpr int64_t kElements = 1 << 17;
constexpr int64_t kRows = 256;  // added up in float32 before they go to float64

// Each task leaves the sums of its rows, and those of the channels that its columns belong to; they are added up in the
// order of the tasks, so that the result does not depend on the number of threads.
struct Partial {
  std::vector<double> rows, channels;
  int64_t first_channel = 0;
};

// sums[channel of position start + i - first] += values[i]
template <class C>
static void add_by_channel(const Axis& axis, int64_t start, const std::vector<C>& values, double* sums,
                           int64_t first = 0) {
  int64_t channel = start / axis.inner % axis.size, inside = start % axis.inner;
  for (const C value : values) {
    sums[channel - first] += double(value);
    if (++inside == axis.inner) {
      inside = 0;
      if (++channel == axis.size) channel = 0;
    }
  }
}

template <class C>
static Partial sum_task(const Slab& slab, const Axis* column_axis, const Task& task, int dtype, uintptr_t x, uintptr_t y,
                        Sum kind) {
  constexpr int kBytes[] = {4, 8, 2, 2};  // by Dtype
  const int64_t n = task.col_end - task.col;
  std::vector<C> columns(column_axis ? n : 0);
  Partial partial;
  if (column_axis && n > 0) {  // the columns are the axis and what lies inside it: they do not wrap around
    partial.first_channel = task.col / column_axis->inner;
    partial.channels.resize((task.col_end - 1) / column_axis->inner - partial.first_channel + 1);
  }
  for (int64_t r = task.row; r < task.row_end; ++r) {
    const int64_t at = (slab.offset(r) + task.col) * kBytes[dtype];
    const auto in = [at](uintptr_t address) { return address ? reinterpret_cast<const char*>(address) + at : nullptr; };
    partial.rows.push_back(rows().sum[dtype][int(kind)](in(x), in(y), column_axis ? columns.data() : nullptr, n));
    if (column_axis && (r + 1 == task.row_end || (r + 1 - task.row) % kRows == 0)) {
      add_by_channel(*column_axis, task.col, columns, partial.channels.data(), partial.first_channel);
      columns.assign(columns.size(), C(0));
    }
  }
  return partial;
}

void channel_sums(const Layout& layout, const std::vector<int>& dtype, const Addresses& x, const Addresses& y, Sum kind,
                  double* out, int threads) {
  const std::vector<Task> tasks = tasks_of(layout, kElements);
  const size_t count = layout.slabs.size();
  std::vector<const Axis*> column_axis(count);
  for (const Axis& axis : layout.axes)
    if (axis.is_column) column_axis[axis.slab] = &axis;
  std::vector<Partial> partials(tasks.size());
  parallel_for(int64_t(tasks.size()), threads_for(layout, threads), [&](int64_t i) {
    const int s = tasks[i].slab;
    const auto run = dtype[s] == int(Dtype::f64) ? sum_task<double> : sum_task<float>;
    partials[i] = run(layout.slabs[s], column_axis[s], tasks[i], dtype[s], x[s], y.empty() ? 0 : y[s], kind);
  });

  std::vector<size_t> first(count + 1, 0);  // tasks of slab s: [first[s], first[s + 1])
  for (const Task& task : tasks) ++first[task.slab + 1];
  for (size_t s = 0; s < count; ++s) first[s + 1] += first[s];
  for (const Axis& axis : layout.axes) {
    for (int64_t c = 0; c < axis.size; ++c) out[c] = 0;
    for (size_t t = first[axis.slab]; t < first[axis.slab + 1]; ++t) {
      if (axis.is_column)
        for (size_t c = 0; c < partials[t].channels.size(); ++c) out[partials[t].first_channel + c] += partials[t].channels[c];
      else
        add_by_channel(axis, tasks[t].row, partials[t].rows, out);
    }
    out += axis.size;
  }
}

}  // namespace ebdiff
