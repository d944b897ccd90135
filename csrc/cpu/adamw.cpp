#include "ops.h"
#include "parallel.h"
#include "zero.h"

namespace ebdiff {

constexpr int64_t kElements = 1 << 15;

void masked_adamw(const Layout& layout, Dtype dtype, const Addresses& p, const Addresses& g, const Addresses& m,
                  const Addresses& v, const Addresses& e, const AdamWArgs& args, int threads) {
  const std::vector<Task> tasks = tasks_of(layout, kElements);
  const int shift = dtype == Dtype::f64 ? 3 : dtype == Dtype::f32 ? 2 : 1;
  const Zero zero(elements_of(layout) << shift);
  const auto step = rows().adamw[int(dtype)];
  parallel_for(int64_t(tasks.size()), threads_for(layout, threads), [&](int64_t i) {
    const Task& task = tasks[i];
    const Slab& slab = layout.slabs[task.slab];
    const uint8_t* rows_kept = slab.row_keep < 0 ? nullptr : &layout.keep[slab.row_keep];
    const uint8_t* cols_kept = slab.col_keep < 0 ? nullptr : &layout.keep[slab.col_keep] + task.col;
    const int64_t n = task.col_end - task.col;
    for (int64_t r = task.row; r < task.row_end; ++r) {
      const int64_t at = (slab.offset(r) + task.col) << shift;
      const auto in = [at](uintptr_t address) { return reinterpret_cast<char*>(address) + at; };
      char* average = e.empty() ? nullptr : in(e[task.slab]);
      if (rows_kept && !rows_kept[r]) {
        for (char* x : {in(p[task.slab]), in(m[task.slab]), in(v[task.slab]), average})
          if (x) zero(x, size_t(n) << shift);
      } else {
        step(in(p[task.slab]), in(g[task.slab]), in(m[task.slab]), in(v[task.slab]), average, cols_kept, n, args);
      }
    }
    zero.finish();
  });
}

}  // namespace ebdiff
