// Launching: tensors as kernel parameters, in as many launches as their number needs, and every error as an exception.
#pragma once

#include <array>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace ebdiff::cuda {

inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}
#define EBDIFF_CHECK(call) ::ebdiff::cuda::check(call, #call)

#ifndef EBDIFF_LAUNCH  // tests without a GPU have their own
#define EBDIFF_LAUNCH(kernel, grid, block, stream, ...)                                  \
  do {                                                                                   \
    kernel<<<grid, block, 0, reinterpret_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);     \
    ::ebdiff::cuda::check(cudaGetLastError(), "launch of " #kernel);                     \
  } while (false)
#endif

// Works on a device, then goes back to the one before.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    EBDIFF_CHECK(cudaGetDevice(&before_));
    moved_ = before_ != device;
    if (moved_) EBDIFF_CHECK(cudaSetDevice(device));
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

#if defined(__CUDACC_VER_MAJOR__) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1201
constexpr int kParameterBytes = 3800;  // of 4096
#else
constexpr int kParameterBytes = 32000;  // of 32764, from CUDA 12.1 and sm_70 on
#endif

// K addresses of each tensor, and the logarithm of its element's bytes, or its dtype.
template <int K>
struct Tensors {
  static constexpr int capacity = kParameterBytes / (8 * K + 1) & ~7;
  char* at[capacity][K];  // as pointers from here on: the compiler then knows that they are to global memory
  uint8_t kind[capacity];
};

// Tensors slab, slab + 1, ... slab + slabs - 1 of a table; the first block of the launch works on tile `tile`.
struct Chunk {
  int32_t slab, slabs;
  int64_t tile;
};

// launch(tensors, chunk, blocks) for so many tensors at a time as fit. An empty list stands for null addresses.
template <size_t K, class Launch>
void in_chunks(const std::vector<int64_t>& first, const std::array<const Addresses*, K>& lists,
               const std::vector<int>& kinds, const Launch& launch) {
  const int count = int(first.size()) - 1;
  Tensors<int(K)> tensors{};
  for (int start = 0; start < count; start += tensors.capacity) {
    const int end = start + tensors.capacity < count ? start + tensors.capacity : count;
    const int64_t blocks = first[end] - first[start];
    if (blocks == 0) continue;
    if (blocks > INT32_MAX) throw std::length_error("more blocks than a launch can have");
    for (int i = start; i < end; ++i) {
      for (size_t k = 0; k < K; ++k) tensors.at[i - start][k] = lists[k]->empty() ? nullptr : reinterpret_cast<char*>((*lists[k])[i]);
      tensors.kind[i - start] = uint8_t(kinds[i]);
    }
    launch(tensors, Chunk{start, end - start, first[start]}, int(blocks));
  }
}

}  // namespace ebdiff::cuda
