#include "tile.cuh"

namespace ebdiff::cuda {
namespace {

__device__ __forceinline__ void zero(char* at, int log2) {
  switch (log2) {
    case 0: *reinterpret_cast<uint8_t*>(at) = 0; break;
    case 1: *reinterpret_cast<uint16_t*>(at) = 0; break;
    case 2: *reinterpret_cast<uint32_t*>(at) = 0; break;
    case 3: *reinterpret_cast<uint64_t*>(at) = 0; break;
    default: *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
  }
}

// Removed elements are written, a piece of 16 bytes at a time where all of it is removed; nothing is read.
__global__ void __launch_bounds__(kThreads, 3)  // blocks on a multiprocessor; left to itself, ptxas spills for more
    apply_mask_kernel(const __grid_constant__ Tensors<1> tensors, const View view, const Chunk chunk) {
  const Tile tile(view, chunk, view.tiles, false);
  if (!tile.entry.masked) return;
  char* const x = tensors.at[tile.slab][0];
  const int log2 = tensors.kind[tile.slab], piece = 16 >> log2;
  const Walk walk(tile.start, tile.entry.cols, tile.entry.cols_inverse);
  const Kept kept(view, tile.entry);
  int begin = 0;
  if (are_aligned(x) && in_pieces(tile.entry, piece)) {
    begin = tile.count & -piece;
    for (int i = int(threadIdx.x) * piece; i < begin; i += kThreads * piece) {
      const Spot spot = walk(i);
      uint32_t removed = ~kept(spot, piece) & ((1u << piece) - 1);
      if (!removed) continue;
      char* const at = x + (tile.offset(i, spot) << log2);
      if (removed == (1u << piece) - 1)
        *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
      else
        for (; removed; removed &= removed - 1) zero(at + ((__ffs(int(removed)) - 1) << log2), log2);
    }
  }
  for (int i = begin + int(threadIdx.x); i < tile.count; i += kThreads) {
    const Spot spot = walk(i);
    if (!kept(spot, 1)) zero(x + (tile.offset(i, spot) << log2), log2);
  }
}

// One block for each row. Whole numbers: their order does not matter.
__global__ void __launch_bounds__(kThreads)
    mask_distance_kernel(const uint8_t* bits, int64_t bytes, int64_t newest, int64_t* out) {
  const uint8_t *a = bits + int64_t(blockIdx.x) * bytes, *b = bits + newest * bytes;
  const bool in_words = (reinterpret_cast<uintptr_t>(bits) | uintptr_t(bytes)) % 4 == 0;
  const int64_t words = in_words ? bytes / 4 : 0;
  int64_t differ = 0;
  for (int64_t i = threadIdx.x; i < words; i += kThreads)
    differ += __popc(reinterpret_cast<const uint32_t*>(a)[i] ^ reinterpret_cast<const uint32_t*>(b)[i]);
  for (int64_t i = 4 * words + threadIdx.x; i < bytes; i += kThreads) differ += __popc(uint32_t(a[i] ^ b[i]));
  __shared__ int64_t sums[kThreads];
  sums[threadIdx.x] = differ;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = sums[0];
}

}  // namespace

void apply_mask(const Place& place, const Addresses& x, const std::vector<int>& log2) {
  const OnDevice on(place.device);
  in_chunks<1>(place.table.tiles, {&x}, log2, [&](const Tensors<1>& tensors, const Chunk& chunk, int blocks) {
    EBDIFF_LAUNCH(apply_mask_kernel, blocks, kThreads, place.stream, tensors, place.table.at(place.at), chunk);
  });
}

void mask_distance(int device, uintptr_t stream, const uint8_t* bits, int64_t rows, int64_t bytes, int64_t newest,
                   int64_t* out) {
  if (rows == 0) return;
  if (rows > INT32_MAX) throw std::length_error("more rows than a launch can have");
  const OnDevice on(device);
  EBDIFF_LAUNCH(mask_distance_kernel, int(rows), kThreads, stream, bits, bytes, newest, out);
}

}  // namespace ebdiff::cuda
