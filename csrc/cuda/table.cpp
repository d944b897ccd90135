#include "table.h"

#include <cstring>
#include <map>
#include <numeric>

namespace ebdiff::cuda {

// Bytes to bits. Masks that several tensors share become one.
class Packer {
 public:
  explicit Packer(const Layout& layout) : keep_(layout.keep) {}

  int64_t operator()(int64_t first, int64_t length) {
    if (first < 0) return -1;
    const auto [found, is_new] = seen_.try_emplace(first, int64_t(bits.size()));
    if (is_new) {
      bits.resize(bits.size() + length / 32 + 2, 0);
      for (int64_t i = 0; i < length; ++i)
        if (keep_[first + i]) bits[found->second + i / 32] |= 1u << (i % 32);
    }
    return found->second;
  }

  std::vector<uint32_t> bits;

 private:
  const std::vector<uint8_t>& keep_;
  std::map<int64_t, int64_t> seen_;
};

static uint32_t inverse_of(int64_t cols) { return cols > 1 && cols < kTile ? uint32_t((int64_t(1) << 32) / cols + 1) : 0; }

static Entry entry_of(const Slab& slab, Packer& pack) {
  Entry entry{};
  entry.rows = slab.rows, entry.cols = slab.cols;
  entry.kept_rows = slab.kept_rows, entry.kept_cols = slab.kept_cols;
  entry.row_bits = pack(slab.row_keep, slab.rows), entry.col_bits = pack(slab.col_keep, slab.cols);
  entry.row_index = slab.row_index, entry.col_index = slab.col_index;
  entry.cols_inverse = inverse_of(slab.cols), entry.kept_cols_inverse = inverse_of(slab.kept_cols);
  entry.dims = slab.dims;
  entry.contiguous = slab.dims == 0 || (slab.dims == 1 && slab.stride[0] == slab.cols);
  entry.masked = slab.row_keep >= 0 || slab.col_keep >= 0;
  int64_t common = slab.cols;
  for (int d = 0; d < slab.dims; ++d) {
    entry.size[d] = slab.size[d], entry.stride[d] = slab.stride[d];
    common = std::gcd(common, slab.stride[d]);
  }
  entry.step = int32_t(std::gcd(common, int64_t(16)));
  return entry;
}

static int64_t up(int64_t count, int64_t part) { return (count + part - 1) / part; }

static SumEntry sums_of(const Slab& slab) {
  SumEntry sums{0, 0, -1, -1, 1};
  while (sums.lanes < kWarp && sums.lanes * kSumCols < slab.cols) sums.lanes *= 2;
  sums.row_blocks = up(slab.rows, kSumSteps * kThreads / sums.lanes);
  sums.col_blocks = up(slab.cols, kSumCols * sums.lanes);
  return sums;
}

Table::Table(const Layout& layout) {
  Packer pack(layout);
  std::vector<Entry> entries;
  std::vector<SumEntry> sums;
  std::vector<AxisEntry> axis_entries;
  for (const Slab& slab : layout.slabs) {
    entries.push_back(entry_of(slab, pack));
    sums.push_back(sums_of(slab));
    indexed = indexed && (slab.row_keep < 0 || slab.row_index >= 0) && (slab.col_keep < 0 || slab.col_index >= 0);
  }
  for (const Axis& axis : layout.axes) {
    axis_entries.push_back({channels, axis.inner, axis.size, axis.slab, axis.is_column});
    channels += axis.size;
    SumEntry& own = sums[axis.slab];
    const Slab& slab = layout.slabs[axis.slab];
    int64_t& at = axis.is_column ? own.cols_at : own.rows_at;
    if (at >= 0) continue;
    at = workspace;
    workspace += axis.is_column ? slab.cols * own.row_blocks : slab.rows * own.col_blocks;
  }
  axes = int64_t(axis_entries.size());
  tiles = kept_tiles = sum_tiles = {0};
  for (size_t i = 0; i < entries.size(); ++i) {
    const Entry& entry = entries[i];
    const bool is_summed = sums[i].rows_at >= 0 || sums[i].cols_at >= 0;
    tiles.push_back(tiles.back() + up(entry.rows * entry.cols, kTile));
    kept_tiles.push_back(kept_tiles.back() + up(entry.kept_rows * entry.kept_cols, kTile));
    sum_tiles.push_back(sum_tiles.back() + (is_summed ? sums[i].row_blocks * sums[i].col_blocks : 0));
  }
  append(kEntries, entries);
  append(kSums, sums);
  append(kAxes, axis_entries);
  append(kTiles, tiles);
  append(kKeptTiles, kept_tiles);
  append(kSumTiles, sum_tiles);
  append(kBits, pack.bits);
  append(kIndex, layout.index);
}

template <class T>
void Table::append(Part part, const std::vector<T>& values) {
  const size_t start = (bytes.size() + 15) & ~size_t(15), length = values.size() * sizeof(T);
  part_at_[part] = int64_t(start);
  bytes.resize(start + length);
  if (length) std::memcpy(bytes.data() + start, values.data(), length);
}

View Table::at(uintptr_t device) const {
  const auto part = [&](Part p) { return device + uintptr_t(part_at_[p]); };
  return {reinterpret_cast<const Entry*>(part(kEntries)),     reinterpret_cast<const SumEntry*>(part(kSums)),
          reinterpret_cast<const AxisEntry*>(part(kAxes)),    reinterpret_cast<const int64_t*>(part(kTiles)),
          reinterpret_cast<const int64_t*>(part(kKeptTiles)), reinterpret_cast<const int64_t*>(part(kSumTiles)),
          reinterpret_cast<const uint32_t*>(part(kBits)),     reinterpret_cast<const int32_t*>(part(kIndex))};
}

}  // namespace ebdiff::cuda
