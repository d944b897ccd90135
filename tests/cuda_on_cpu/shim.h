// Enough of CUDA for g++ to compile csrc/cuda/*.cu as ordinary C++ and to run it: no GPU, no nvcc. Every CUDA thread is a
// fiber; emulator.cpp runs them one after another, up to the next barrier. See there what that finds and what it does not.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

#define EBDIFF_LAUNCH(kernel, grid, block, stream, ...) \
  (void)(stream), ::ebdiff::cuda::check(cuda_on_cpu::launch(grid, block, [&] { kernel(__VA_ARGS__); }), "launch of " #kernel)

struct Index {
  unsigned x;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace cuda_on_cpu {
extern Index thread, block;
int launch(int blocks, int threads, const std::function<void()>& kernel);  // a cudaError_t
void barrier();
uint64_t exchange(uint64_t mine, unsigned other);
}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::thread
#define blockIdx cuda_on_cpu::block

inline void __syncthreads() { cuda_on_cpu::barrier(); }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return uint32_t((uint64_t(high) << 32 | low) >> (shift & 31));
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = cuda_on_cpu::exchange(bits, cuda_on_cpu::thread.x ^ unsigned(distance));
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
const char* cudaGetErrorString(cudaError_t error);
