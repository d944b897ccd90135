#include <bit>
#include <cstring>

#include "ops.h"
#include "parallel.h"
#include "zero.h"

namespace ebdiff {

constexpr int64_t kElements = 1 << 16;

void apply_mask(const Layout& layout, const Addresses& x, const std::vector<int>& log2, int threads) {
  const std::vector<Task> tasks = tasks_of(layout, kElements);
  const Zero zero(elements_of(layout) * 4);
  parallel_for(int64_t(tasks.size()), threads_for(layout, threads), [&](int64_t i) {
    const Task& task = tasks[i];
    const Slab& slab = layout.slabs[task.slab];
    const uint8_t* rows_kept = slab.row_keep < 0 ? nullptr : &layout.keep[slab.row_keep];
    const uint8_t* cols_kept = slab.col_keep < 0 ? nullptr : &layout.keep[slab.col_keep] + task.col;
    const int shift = log2[task.slab];
    for (int64_t r = task.row; r < task.row_end; ++r) {
      char* row = reinterpret_cast<char*>(x[task.slab]) + ((slab.offset(r) + task.col) << shift);
      if (rows_kept && !rows_kept[r])
        zero(row, size_t(task.col_end - task.col) << shift);
      else if (cols_kept)
        rows().zero_removed[shift](row, cols_kept, task.col_end - task.col);
    }
    zero.finish();
  });
}

void mask_distance(const uint8_t* bits, int64_t count, int64_t bytes, int64_t newest, int64_t* out, int threads) {
  parallel_for(count, count * bytes < kElements ? 1 : threads, [&](int64_t i) {
    const uint8_t *a = bits + i * bytes, *b = bits + newest * bytes;
    int64_t differ = 0, at = 0;
    for (; at + 8 <= bytes; at += 8) {
      uint64_t left, right;
      std::memcpy(&left, a + at, 8);
      std::memcpy(&right, b + at, 8);
      differ += std::popcount(left ^ right);
    }
    for (; at < bytes; ++at) differ += std::popcount(uint8_t(a[at] ^ b[at]));
    out[i] = differ;
  });
}

}  // namespace ebdiff
