#include "tile.cuh"

namespace ebdiff::cuda {
namespace {

// Where kept element number i of a tile lies in the large tensor, in elements.
struct Source {
  const Tile& tile;
  const int32_t *rows, *cols;
  Walk walk;

  __device__ __forceinline__ Source(const View& view, const Tile& tile)
      : tile(tile),
        rows(tile.entry.row_index < 0 ? nullptr : view.index + tile.entry.row_index),
        cols(tile.entry.col_index < 0 ? nullptr : view.index + tile.entry.col_index),
        walk(tile.start, tile.entry.kept_cols, tile.entry.kept_cols_inverse) {}

  __device__ __forceinline__ bool is_flat() const { return !rows && !cols && tile.contiguous; }

  __device__ __forceinline__ int64_t operator()(int i) const {
    if (is_flat()) return tile.start + i;
    const Spot spot = walk(i);
    const int64_t row = rows ? __ldg(rows + spot.row) : spot.row, col = cols ? __ldg(cols + spot.col) : spot.col;
    return (tile.contiguous ? row * tile.entry.cols : row_offset(tile.entry, row)) + col;
  }
};

// Positions from begin on, as pieces of the size of W, `each` elements in one.
template <bool Back, class W>
__device__ __forceinline__ void move(char* dense, char* small, const Source& source, int begin, int end, int each,
                                     int log2) {
  constexpr int kBatch = sizeof(W) == 16 ? 2 : 4;  // pieces that a thread has on their way at a time
  char* const packed = small + (source.tile.start << log2);
  for (int first = begin + int(threadIdx.x) * each; first < end; first += kBatch * kThreads * each) {
    W values[kBatch];
    char* large[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * kThreads * each;
      if (i >= end) continue;
      large[k] = dense + (source(i) << log2);
      values[k] = *reinterpret_cast<const W*>(Back ? packed + (i << log2) : large[k]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * kThreads * each;
      if (i < end) *reinterpret_cast<W*>(Back ? large[k] : packed + (i << log2)) = values[k];
    }
  }
}

template <bool Back>
__global__ void __launch_bounds__(kThreads, 3)  // blocks on a multiprocessor; left to itself, ptxas spills for more
    move_kernel(const __grid_constant__ Tensors<2> tensors, const View view, const Chunk chunk) {
  const Tile tile(view, chunk, view.kept_tiles, true);
  char *const dense = tensors.at[tile.slab][0], *const small = tensors.at[tile.slab][1];
  const int log2 = tensors.kind[tile.slab], piece = 16 >> log2;
  const Source source(view, tile);
  int begin = 0;
  const bool in_pieces = are_aligned(dense, small) && (source.is_flat() || (!source.cols && tile.entry.step >= piece));
  if (in_pieces || piece == 1) {
    begin = tile.count & -piece;
    move<Back, uint4>(dense, small, source, 0, begin, piece, log2);
  }
  switch (log2) {
    case 0: move<Back, uint8_t>(dense, small, source, begin, tile.count, 1, log2); break;
    case 1: move<Back, uint16_t>(dense, small, source, begin, tile.count, 1, log2); break;
    case 2: move<Back, uint32_t>(dense, small, source, begin, tile.count, 1, log2); break;
    case 3: move<Back, uint64_t>(dense, small, source, begin, tile.count, 1, log2); break;
  }
  const int64_t end = tile.start + tile.count;
  if (Back || end < tile.entry.kept_rows * tile.entry.kept_cols) return;
  // Zeros up to the next multiple of 64 bytes, so that an arena holds no bytes by chance.
  const int64_t gap_end = ((end << log2) + 63) & ~int64_t(63);
  for (int64_t at = (end << log2) + threadIdx.x; at < gap_end; at += kThreads) small[at] = 0;
}

template <bool Back>
void run(const Place& place, const Addresses& dense, const Addresses& small, const std::vector<int>& log2) {
  if (!place.table.indexed) throw std::invalid_argument("the layout lists no kept positions");
  const OnDevice on(place.device);
  in_chunks<2>(place.table.kept_tiles, {&dense, &small}, log2, [&](const Tensors<2>& tensors, const Chunk& chunk, int blocks) {
    EBDIFF_LAUNCH(move_kernel<Back>, blocks, kThreads, place.stream, tensors, place.table.at(place.at), chunk);
  });
}

}  // namespace

void compact(const Place& place, const Addresses& dense, const Addresses& small, const std::vector<int>& log2) {
  run<false>(place, dense, small, log2);
}

void scatter_back(const Place& place, const Addresses& dense, const Addresses& small, const std::vector<int>& log2) {
  run<true>(place, dense, small, log2);
}

}  // namespace ebdiff::cuda
