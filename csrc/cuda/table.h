// What is static about a Layout, as one flat piece of memory that is copied to a device once: how each tensor lies, where
// its tiles begin, its masks as bits, its kept positions. What changes with every call are kernel parameters.
#pragma once

#include <cstdint>
#include <vector>

#include "../slab.h"

#ifndef EBDIFF_CUDA_THREADS
#define EBDIFF_CUDA_THREADS 256  // tests without a GPU make it smaller
#endif

namespace ebdiff::cuda {

constexpr int kThreads = EBDIFF_CUDA_THREADS;
constexpr int kTile = 16 * kThreads;  // elements that one block works on, flat over rows x columns
constexpr int kWarp = 32;
constexpr int kSumCols = 4;   // columns of a tensor, next to each other, that one thread adds up
constexpr int kSumSteps = 8;  // rows that it visits

struct Entry {
  int64_t rows, cols, kept_rows, kept_cols;
  int64_t size[kMaxDims], stride[kMaxDims];  // of the dimensions that make up the rows
  int64_t row_bits, col_bits;    // first word in View::bits; -1: all are kept
  int64_t row_index, col_index;  // first kept position in View::index; -1: all are kept
  uint32_t cols_inverse, kept_cols_inverse;  // see Walk
  int32_t dims;
  int32_t step;        // the largest power of two, at most 16, that divides the columns and all strides
  int32_t contiguous;  // element (r, c) lies at r * cols + c
  int32_t masked;
};

// A tile of sums is kSumSteps * kThreads / lanes rows by kSumCols * lanes columns.
struct SumEntry {
  int64_t row_blocks, col_blocks;
  int64_t rows_at, cols_at;  // first number of its partial sums in the workspace; -1: no axis asks for them
  int64_t lanes;             // threads that share a row: a power of two, at most a warp
};

struct AxisEntry {
  int64_t first, inner, size;  // first: its place in the result
  int32_t slab, is_column;
};

// The table's parts, as addresses on the device.
struct View {
  const Entry* entries;
  const SumEntry* sums;
  const AxisEntry* axes;
  const int64_t *tiles, *kept_tiles, *sum_tiles;  // first tile of each tensor, then their number
  const uint32_t* bits;                           // 1 = kept; a word more than needed behind each mask
  const int32_t* index;
};

class Table {
 public:
  explicit Table(const Layout& layout);

  View at(uintptr_t device) const;  // device: where `bytes` were copied to, a multiple of 16

  std::vector<uint8_t> bytes;
  std::vector<int64_t> tiles, kept_tiles, sum_tiles;
  int64_t axes = 0, channels = 0;
  int64_t workspace = 0;  // numbers of float64 that channel_sums needs
  bool indexed = true;    // all kept positions are listed

 private:
  enum Part { kEntries, kSums, kAxes, kTiles, kKeptTiles, kSumTiles, kBits, kIndex, kParts };

  template <class T>
  void append(Part part, const std::vector<T>& values);

  int64_t part_at_[kParts] = {};
};

}  // namespace ebdiff::cuda
