// On the device: which tile of which tensor a block works on, where its elements lie, which of them are kept.
#pragma once

#include "launch.cuh"

namespace ebdiff::cuda {
namespace {

struct Spot {
  int64_t row, col;
};

// Positions of a tile as rows and columns. The one 64-bit division is that of the tile's start. Inside, columns wrap around
// once where there are many; where there are fewer than kTile, u / cols is the upper half of u * (2^32 / cols + 1), exact
// for u < 2 * kTile since u * cols < 2^32.
struct Walk {
  int64_t row, col, cols;
  uint32_t inverse;

  __device__ __forceinline__ Walk(int64_t start, int64_t cols, uint32_t inverse)
      : row(start / cols), col(start - row * cols), cols(cols), inverse(inverse) {}

  __device__ __forceinline__ Spot operator()(int i) const {
    if (cols >= kTile) {
      const int64_t c = col + i;
      return c < cols ? Spot{row, c} : Spot{row + 1, c - cols};
    }
    const uint32_t u = uint32_t(col) + uint32_t(i), rows = inverse ? __umulhi(u, inverse) : u;
    return {row + rows, int64_t(u - rows * uint32_t(cols))};
  }
};

// The last tensor whose first tile is not behind this one; empty tensors have none, and are passed over.
__device__ __forceinline__ int slab_of(const int64_t* first, int slabs, int64_t tile) {
  int low = 0, high = slabs;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (__ldg(first + middle) <= tile ? low : high) = middle;
  }
  return low;
}

__device__ __forceinline__ int64_t row_offset(const Entry& entry, int64_t row) {
  int64_t at = 0;
  for (int d = entry.dims - 1; d > 0; --d) {
    const int64_t size = entry.size[d];
    // 32 bits where they do: a division of 64 is a hundred instructions
    const int64_t quotient = (row | size) >> 32 ? row / size : int64_t(uint32_t(row) / uint32_t(size));
    at += (row - quotient * size) * entry.stride[d];
    row = quotient;
  }
  return at + row * entry.stride[0];
}

// Which elements are kept, as bits: 1 = kept.
struct Kept {
  const uint32_t *rows, *cols;  // null: all
  int64_t width;

  __device__ __forceinline__ Kept(const View& view, const Entry& entry)
      : rows(entry.row_bits < 0 ? nullptr : view.bits + entry.row_bits),
        cols(entry.col_bits < 0 ? nullptr : view.bits + entry.col_bits),
        width(entry.cols) {}

  // Of `count` (at most 16) elements from a spot on; they may run on into the next rows.
  __device__ __forceinline__ uint32_t operator()(Spot spot, int count) const {
    const uint32_t all = (1u << count) - 1;
    if (!rows && !cols) return all;
    if (spot.col + count <= width) return in_row(spot) & all;
    uint32_t bits = 0;
    for (int i = 0; i < count; ++i) {
      bits |= (in_row(spot) & 1) << i;
      if (++spot.col == width) spot = {spot.row + 1, 0};
    }
    return bits;
  }

 private:
  __device__ __forceinline__ uint32_t in_row(Spot spot) const {
    if (rows && !(__ldg(rows + (spot.row >> 5)) >> (spot.row & 31) & 1)) return 0;
    if (!cols) return ~0u;
    const uint32_t* word = cols + (spot.col >> 5);
    return __funnelshift_r(__ldg(word), __ldg(word + 1), uint32_t(spot.col & 31));
  }
};

// `count` positions, from `start` on, of a tensor's rows * cols.
struct Tile {
  int slab;  // within the chunk
  const Entry& entry;
  int64_t start;
  int count;
  bool contiguous;  // in a register: a reference would be read again after every store

  __device__ __forceinline__ Tile(const View& view, const Chunk& chunk, const int64_t* tiles, bool kept)
      : slab(slab_of(tiles + chunk.slab, chunk.slabs, chunk.tile + blockIdx.x)),
        entry(view.entries[chunk.slab + slab]),
        start((chunk.tile + blockIdx.x - tiles[chunk.slab + slab]) * kTile),
        contiguous(entry.contiguous) {
    const int64_t left = (kept ? entry.kept_rows * entry.kept_cols : entry.rows * entry.cols) - start;
    count = left < kTile ? int(left) : kTile;
  }

  // Elements from the tensor's first to position i, which lies at this spot.
  __device__ __forceinline__ int64_t offset(int i, Spot spot) const {
    return contiguous ? start + i : row_offset(entry, spot.row) + spot.col;
  }
};

// May `count` elements that start at a multiple of `count` be moved as one piece of 16 bytes, as far as the layout goes?
__device__ __forceinline__ bool in_pieces(const Entry& entry, int count) {
  return entry.contiguous || entry.step >= count;
}

template <class... T>
__device__ __forceinline__ bool are_aligned(const T*... addresses) {
  return ((reinterpret_cast<uintptr_t>(addresses) | ...) & 15) == 0;
}

template <class T, int N>
__device__ __forceinline__ void read(const T* from, T (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = *from;
  } else {
    static_assert(sizeof(to) == 16);
    const uint4 piece = *reinterpret_cast<const uint4*>(from);
    __builtin_memcpy(to, &piece, 16);
  }
}

template <class T, int N>
__device__ __forceinline__ void write(T* to, const T (&from)[N]) {
  if constexpr (N == 1) {
    *to = from[0];
  } else {
    static_assert(sizeof(from) == 16);
    uint4 piece;
    __builtin_memcpy(&piece, from, 16);
    *reinterpret_cast<uint4*>(to) = piece;
  }
}

}  // namespace
}  // namespace ebdiff::cuda
