// A strided tensor seen as rows x columns, with a keep byte for every row and every column.
//
// Dimensions are put in memory order. The columns are the innermost dimensions, up to the first one that a mask covers
// (included while few elements lie inside it); all others are rows. Element (r, c) is kept where both bytes are set, so
// both axes of a weight are masked in one pass by two short tables. Host code, for the CPU and for CUDA launches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <vector>

namespace ebdiff {

constexpr int kMaxDims = 8;
constexpr int64_t kWideInside = 64;  // from so many elements inside a masked dimension on, it is a row axis

struct Slab {
  int64_t rows = 1, cols = 1;
  int64_t size[kMaxDims] = {}, stride[kMaxDims] = {};  // of the dimensions that make up the rows, slowest first
  int32_t dims = 0;
  int64_t row_keep = -1, col_keep = -1;    // first keep byte in Layout::keep; -1: all are kept
  int64_t row_index = -1, col_index = -1;  // first kept position in Layout::index; -1: all are kept
  int64_t kept_rows = 1, kept_cols = 1;
  int64_t extent = 0;  // elements from the first to the last of the tensor's memory
  bool overlaps = false;  // two elements may share memory

  int64_t offset(int64_t row) const {
    int64_t at = 0;
    for (int d = dims - 1; d > 0; --d) {
      at += row % size[d] * stride[d];
      row /= size[d];
    }
    return dims ? at + row * stride[0] : 0;
  }
};

// Where an axis (a masked dimension, or one to be summed along) lies: position p of its side belongs to channel
// p / inner % size.
struct Axis {
  int32_t slab = 0;
  bool is_column = false;
  int64_t inner = 1, size = 1;
};

struct Mask {
  int32_t owner = 0, dim = 0;
  const uint8_t* keep = nullptr;  // [size of dim], nonzero = kept; null where only the axis matters
};

struct Layout {
  std::vector<Slab> slabs;
  std::vector<Axis> axes;      // one for each mask
  std::vector<uint8_t> keep;   // 0 or 255
  std::vector<int32_t> index;  // kept positions, rising

  using Sizes = std::vector<int64_t>;

  // indexed: also list the kept positions, which compaction reads.
  Layout(const std::vector<Sizes>& shapes, const std::vector<Sizes>& strides, const std::vector<Mask>& masks,
         bool indexed) {
    if (shapes.size() != strides.size()) throw std::invalid_argument("as many strides as shapes are needed");
    std::vector<std::vector<const Mask*>> of(shapes.size());
    for (const Mask& mask : masks) {
      if (mask.owner < 0 || size_t(mask.owner) >= shapes.size()) throw std::invalid_argument("a mask of no tensor");
      of[mask.owner].push_back(&mask);
    }
    slabs.reserve(shapes.size());
    axes.resize(masks.size());
    for (size_t i = 0; i < shapes.size(); ++i) add(shapes[i], strides[i], of[i], masks.data(), indexed);
  }

 private:
  std::map<std::vector<int64_t>, std::pair<int64_t, int64_t>> seen_;  // tables that several tensors share

  void add(const Sizes& shape, const Sizes& strides, const std::vector<const Mask*>& masks, const Mask* first,
           bool indexed) {
    if (shape.size() != strides.size() || shape.size() > kMaxDims) throw std::invalid_argument("at most 8 dimensions");
    const Mask* mask_of[kMaxDims] = {};
    for (const Mask* mask : masks) {
      if (mask->dim < 0 || size_t(mask->dim) >= shape.size()) throw std::invalid_argument("a mask of no dimension");
      if (mask_of[mask->dim]) throw std::invalid_argument("two masks of one dimension");
      mask_of[mask->dim] = mask;
    }
    int order[kMaxDims], count = 0;
    bool empty = false;
    for (size_t d = 0; d < shape.size(); ++d) {
      if (shape[d] < 0 || strides[d] < 0) throw std::invalid_argument("sizes and strides are not negative");
      empty |= shape[d] == 0;
      if (shape[d] == 1 && !mask_of[d]) continue;
      int at = count++;  // insertion sort, slowest first; of equal strides the earlier dimension
      for (; at > 0 && place(shape, strides, order[at - 1]) < place(shape, strides, int(d)); --at) order[at] = order[at - 1];
      order[at] = int(d);
    }
    Slab slab;
    int64_t reach = 0;
    for (int i = count - 1; i >= 0; --i) {
      if (shape[order[i]] == 1) continue;
      slab.overlaps |= strides[order[i]] <= reach;
      reach += (shape[order[i]] - 1) * strides[order[i]];
    }
    slab.overlaps &= !empty;
    slab.extent = empty ? 0 : reach + 1;

    int split = count;  // order[split:] are the columns
    int column_axis = -1;
    while (split > 0 && column_axis < 0) {
      const int d = order[split - 1];
      if (shape[d] != 1 && strides[d] != slab.cols) break;
      if (mask_of[d] && slab.cols >= kWideInside) break;
      if (mask_of[d]) {
        column_axis = d;
        axes[mask_of[d] - first] = {int32_t(slabs.size()), true, slab.cols, shape[d]};
      }
      slab.cols *= shape[d];
      --split;
    }
    for (int i = split - 1; i >= 0; --i) {
      const int d = order[i];
      if (mask_of[d]) axes[mask_of[d] - first] = {int32_t(slabs.size()), false, slab.rows, shape[d]};
      slab.rows *= shape[d];
    }
    for (int i = 0; i < split; ++i) {
      const int d = order[i], last = slab.dims - 1;
      if (shape[d] == 1) continue;
      if (last >= 0 && slab.stride[last] == strides[d] * shape[d]) {
        slab.size[last] *= shape[d];
        slab.stride[last] = strides[d];
      } else {
        slab.size[slab.dims] = shape[d];
        slab.stride[slab.dims++] = strides[d];
      }
    }
    slab.kept_rows = slab.rows;
    slab.kept_cols = slab.cols;
    std::vector<const Mask*> row_masks, col_masks;
    for (const Mask* mask : masks)
      if (mask->keep) (mask->dim == column_axis ? col_masks : row_masks).push_back(mask);
    table(row_masks, slab.rows, first, indexed, slab.row_keep, slab.row_index, slab.kept_rows);
    table(col_masks, slab.cols, first, indexed, slab.col_keep, slab.col_index, slab.kept_cols);
    slabs.push_back(slab);
  }

  static int64_t place(const Sizes& shape, const Sizes& strides, int d) {  // dimensions of one element come first
    return shape[d] == 1 ? INT64_MAX : strides[d];
  }

  void table(const std::vector<const Mask*>& masks, int64_t length, const Mask* first, bool indexed, int64_t& keep_at,
             int64_t& index_at, int64_t& kept) {
    if (masks.empty()) return;
    if (length > INT32_MAX) throw std::length_error("a masked axis has at most 2^31 - 1 positions");
    std::vector<int64_t> key{length};
    for (const Mask* mask : masks) {
      const Axis& axis = axes[mask - first];
      key.insert(key.end(), {int64_t(reinterpret_cast<uintptr_t>(mask->keep)), axis.inner, axis.size});
    }
    auto [found, is_new] = seen_.try_emplace(key, int64_t(keep.size()), int64_t(index.size()));
    keep_at = found->second.first;
    if (indexed) index_at = found->second.second;
    if (is_new) {
      keep.resize(keep.size() + length, 255);
      for (const Mask* mask : masks) exclude(*mask, axes[mask - first], keep.data() + keep_at, length);
      if (indexed)
        for (int64_t p = 0; p < length; ++p)
          if (keep[keep_at + p]) index.push_back(int32_t(p));
    }
    kept = length;  // masked axes are independent of each other
    for (const Mask* mask : masks) {
      const int64_t size = axes[mask - first].size;
      kept = size ? kept / size * (size - std::count(mask->keep, mask->keep + size, uint8_t(0))) : 0;
    }
  }

  static void exclude(const Mask& mask, const Axis& axis, uint8_t* keep, int64_t length) {
    for (int64_t start = 0; start < length; start += axis.inner * axis.size)
      for (int64_t c = 0; c < axis.size; ++c)
        if (!mask.keep[c])
          for (int64_t i = 0; i < axis.inner; ++i) keep[start + c * axis.inner + i] = 0;
  }
};

inline int64_t elements_of(const Layout& layout) {
  int64_t elements = 0;
  for (const Slab& slab : layout.slabs) elements += slab.rows * slab.cols;
  return elements;
}

// So many threads that each has some 32,000 elements to work on, at most `threads`.
inline int threads_for(const Layout& layout, int threads) {
  return int(std::min<int64_t>(threads, 1 + elements_of(layout) / 32768));
}

// A part of a slab that one thread works on.
struct Task {
  int32_t slab;
  int64_t row, row_end, col, col_end;
};

// Cut slabs into tasks of about `elements` elements, the same for any number of threads. `kept`: of what is kept of them.
inline std::vector<Task> tasks_of(const Layout& layout, int64_t elements, bool kept = false) {
  std::vector<Task> tasks;
  for (size_t i = 0; i < layout.slabs.size(); ++i) {
    const Slab& slab = layout.slabs[i];
    const int64_t rows = kept ? slab.kept_rows : slab.rows, cols = kept ? slab.kept_cols : slab.cols;
    if (rows == 0 || cols == 0) continue;
    const int64_t width = cols < elements ? cols : elements, height = elements / width;
    for (int64_t r = 0; r < rows; r += height)
      for (int64_t c = 0; c < cols; c += width)
        tasks.push_back({int32_t(i), r, r + height < rows ? r + height : rows, c, c + width < cols ? c + width : cols});
  }
  return tasks;
}

}  // namespace ebdiff
