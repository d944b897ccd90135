// Two passes: every tile leaves the sums of its rows and of its columns, then every channel adds up what belongs to it, in
// an order that does not depend on which block came first. Inside a tile in the compute type, across tiles in double.
#include "tile.cuh"

namespace ebdiff::cuda {
namespace {

struct Kind {
  bool squares, magnitude;
};

template <class T>
struct Operands {
  const T *x, *y;  // y: null without a product
  bool in_pieces;
};

// kSumCols elements that begin at column `first`, those behind `cols` as zeros. Lanes take neighbouring elements in turn
// where the memory does not allow larger pieces.
template <class T>
__device__ __forceinline__ void read_row(const T* row, int64_t first, int64_t cols, int stride, bool in_pieces,
                                         compute_t<T> (&to)[kSumCols]) {
  if (in_pieces && first + kSumCols <= cols) {
    struct alignas(sizeof(T) * kSumCols > 16 ? 16 : sizeof(T) * kSumCols) Piece {
      T at[kSumCols];
    };
    const Piece piece = *reinterpret_cast<const Piece*>(row + first);
#pragma unroll
    for (int k = 0; k < kSumCols; ++k) to[k] = load(piece.at[k]);
    return;
  }
#pragma unroll
  for (int k = 0; k < kSumCols; ++k) {
    const int64_t c = first + int64_t(k) * stride;
    to[k] = c < cols ? load(row[c]) : compute_t<T>(0);
  }
}

template <class T>
__device__ __forceinline__ void read_terms(const Operands<T>& from, Kind kind, int64_t at, int64_t first, int64_t cols,
                                           int stride, compute_t<T> (&term)[kSumCols]) {
  using C = compute_t<T>;
  C y[kSumCols];
  read_row(from.x + at, first, cols, stride, from.in_pieces, term);
  if (from.y) read_row(from.y + at, first, cols, stride, from.in_pieces, y);
#pragma unroll
  for (int k = 0; k < kSumCols; ++k) {
    const C value = from.y ? term[k] * y[k] : kind.squares ? term[k] * term[k] : term[k];
    term[k] = kind.magnitude && value < 0 ? -value : value;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    tile_sums_kernel(const __grid_constant__ Tensors<2> tensors, const View view, const Chunk chunk, const int dtype,
                     const Kind kind, double* workspace) {
  using C = compute_t<T>;
  constexpr int kBatch = 2;  // rows that are on their way at a time
  const int64_t number = chunk.tile + blockIdx.x;
  const int slab = slab_of(view.sum_tiles + chunk.slab, chunk.slabs, number);
  if (tensors.kind[slab] != dtype) return;
  const Entry& entry = view.entries[chunk.slab + slab];
  const SumEntry& sums = view.sums[chunk.slab + slab];
  const int64_t tile = number - view.sum_tiles[chunk.slab + slab], row_block = tile / sums.col_blocks;
  const int64_t col_block = tile - row_block * sums.col_blocks;
  const int lanes = int(sums.lanes), groups = kThreads / lanes;
  const int lane = int(threadIdx.x) & (lanes - 1), group = int(threadIdx.x) / lanes;
  Operands<T> from{reinterpret_cast<const T*>(tensors.at[slab][0]), reinterpret_cast<const T*>(tensors.at[slab][1]), false};
  from.in_pieces = entry.step >= kSumCols && are_aligned(from.x, from.y);
  const int stride = from.in_pieces ? 1 : lanes;
  const int64_t tile_col = col_block * kSumCols * lanes, first_col = tile_col + lane * (from.in_pieces ? kSumCols : 1);
  const int64_t first_row = row_block * kSumSteps * groups + group;

  C column[kSumCols] = {};
#pragma unroll 1
  for (int step = 0; step < kSumSteps; step += kBatch) {
    C term[kBatch][kSumCols];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t row = first_row + int64_t(step + k) * groups;
      if (row < entry.rows) {
        const int64_t at = entry.contiguous ? row * entry.cols : row_offset(entry, row);
        read_terms<T>(from, kind, at, first_col, entry.cols, stride, term[k]);
      } else {
#pragma unroll
        for (int c = 0; c < kSumCols; ++c) term[k][c] = 0;
      }
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t row = first_row + int64_t(step + k) * groups;
      C sum = (term[k][0] + term[k][1]) + (term[k][2] + term[k][3]);
#pragma unroll
      for (int c = 0; c < kSumCols; ++c) column[c] += term[k][c];
      if (sums.rows_at < 0) continue;
      for (int d = lanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (lane == 0 && row < entry.rows) workspace[sums.rows_at + col_block * entry.rows + row] = double(sum);
    }
  }
  if (sums.cols_at < 0) return;
  __shared__ double partial[kThreads * kSumCols];  // [group][column]
  const int width = kSumCols * lanes;
#pragma unroll
  for (int k = 0; k < kSumCols; ++k)
    partial[group * width + int(first_col - tile_col) + k * stride] = double(column[k]);
  for (int half = groups / 2; half > 0; half /= 2) {
    __syncthreads();
    for (int i = int(threadIdx.x); i < half * width; i += kThreads) partial[i] += partial[i + half * width];
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < width; i += kThreads)
    if (tile_col + i < entry.cols) workspace[sums.cols_at + row_block * entry.cols + tile_col + i] = partial[i];
}

// A warp for each channel of each axis.
__global__ void __launch_bounds__(kThreads)
    channel_sums_kernel(const View view, const int32_t axes, const int64_t channels, const double* workspace, double* out) {
  const int64_t number = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = int(threadIdx.x) % kWarp;
  double sum = 0;
  if (number < channels) {
    int low = 0, high = axes;  // the last axis whose first channel is not behind this one
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (view.axes[middle].first <= number ? low : high) = middle;
    }
    const AxisEntry& axis = view.axes[low];
    const Entry& entry = view.entries[axis.slab];
    const SumEntry& sums = view.sums[axis.slab];
    const int64_t length = axis.is_column ? entry.cols : entry.rows;
    const int64_t blocks = axis.is_column ? sums.row_blocks : sums.col_blocks;
    const double* from = workspace + (axis.is_column ? sums.cols_at : sums.rows_at);
    const int64_t channel = number - axis.first, own = length / axis.size;  // positions of this channel
    for (int64_t i = lane; i < own * blocks; i += kWarp) {
      const int64_t block = i / own, place = i - block * own, outer = place / axis.inner;
      sum += from[block * length + (outer * axis.size + channel) * axis.inner + place - outer * axis.inner];
    }
  }
  for (int d = kWarp / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (lane == 0 && number < channels) out[number] = sum;
}

template <class T>
void run(const Place& place, const std::vector<int>& dtype, Dtype own, const Addresses& x, const Addresses& y, Kind kind,
         double* workspace) {
  bool present = false;
  for (const int one : dtype) present |= one == int(own);
  if (!present) return;
  in_chunks<2>(place.table.sum_tiles, {&x, &y}, dtype, [&](const Tensors<2>& tensors, const Chunk& chunk, int blocks) {
    EBDIFF_LAUNCH(tile_sums_kernel<T>, blocks, kThreads, place.stream, tensors, place.table.at(place.at), chunk, int(own),
                  kind, workspace);
  });
}

}  // namespace

void channel_sums(const Place& place, const std::vector<int>& dtype, const Addresses& x, const Addresses& y, Sum sum,
                  double* workspace, double* out) {
  const Table& table = place.table;
  if (table.channels == 0) return;
  const int64_t blocks = (table.channels + kThreads / kWarp - 1) / (kThreads / kWarp);
  if (blocks > INT32_MAX) throw std::length_error("more blocks than a launch can have");
  const OnDevice on(place.device);
  const Kind kind{sum == Sum::square, sum == Sum::absolute || sum == Sum::absolute_product};
  run<float>(place, dtype, Dtype::f32, x, y, kind, workspace);
  run<double>(place, dtype, Dtype::f64, x, y, kind, workspace);
  run<bfloat16>(place, dtype, Dtype::bf16, x, y, kind, workspace);
  run<float16>(place, dtype, Dtype::f16, x, y, kind, workspace);
  EBDIFF_LAUNCH(channel_sums_kernel, int(blocks), kThreads, place.stream, table.at(place.at), int32_t(table.axes),
                table.channels, workspace, out);
}

}  // namespace ebdiff::cuda
