#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "ops.h"
#include "parallel.h"

namespace ebdiff {

constexpr int64_t kElements = 1 << 16;

void use_huge_pages(uintptr_t start, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 4096;
  const uintptr_t first = (start + kPage - 1) & ~(kPage - 1), last = (start + uintptr_t(bytes)) & ~(kPage - 1);
  if (bytes >= (int64_t(4) << 20)) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

// Walk the kept rows of dense and small together, and copy from the first to the second, or back.
template <bool Back>
static void move(const Layout& layout, const Addresses& dense, const Addresses& small, const std::vector<int>& log2,
                 int threads) {
  const std::vector<Task> tasks = tasks_of(layout, kElements, true);
  parallel_for(int64_t(tasks.size()), threads_for(layout, threads), [&](int64_t i) {
    const Task& task = tasks[i];
    const Slab& slab = layout.slabs[task.slab];
    const int shift = log2[task.slab];
    const int64_t n = task.col_end - task.col;
    const int32_t* columns = slab.col_index < 0 ? nullptr : &layout.index[slab.col_index] + task.col;
    const uint8_t* keep = slab.col_keep < 0 ? nullptr : &layout.keep[slab.col_keep];
    for (int64_t r = task.row; r < task.row_end; ++r) {
      const int64_t row = slab.row_index < 0 ? r : layout.index[slab.row_index + r];
      char* x = reinterpret_cast<char*>(dense[task.slab]) + (slab.offset(row) << shift);
      char* packed = reinterpret_cast<char*>(small[task.slab]) + ((r * slab.kept_cols + task.col) << shift);
      if (columns) {
        rows().move_kept[Back][shift](x, packed, keep, columns, n);
      } else {
        x += task.col << shift;
        std::memcpy(Back ? x : packed, Back ? packed : x, size_t(n) << shift);
      }
    }
  });
}

// Zeros from the end of a small tensor to the next multiple of 64 bytes, so that an arena holds no bytes by chance.
static void fill_gaps(const Layout& layout, const Addresses& small, const std::vector<int>& log2) {
  for (size_t i = 0; i < small.size(); ++i) {
    const Slab& slab = layout.slabs[i];
    const size_t bytes = size_t(slab.kept_rows * slab.kept_cols) << log2[i];
    if (bytes & 63) std::memset(reinterpret_cast<char*>(small[i]) + bytes, 0, -bytes & 63);
  }
}

void compact(const Layout& layout, const Addresses& dense, const Addresses& small, const std::vector<int>& log2,
             int threads) {
  move<false>(layout, dense, small, log2, threads);
  fill_gaps(layout, small, log2);
}

void scatter_back(const Layout& layout, const Addresses& dense, const Addresses& small, const std::vector<int>& log2,
                  int threads) {
  move<true>(layout, dense, small, log2, threads);
}

}  // namespace ebdiff
