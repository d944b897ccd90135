// The CUDA counterpart of cpu/ops.h: one launch for any number of tensors, on a stream, without waiting for it. Addresses
// are on the device; what goes wrong is thrown as std::runtime_error.
#pragma once

#include <vector>

#include "../cpu/kernels.h"
#include "table.h"

namespace ebdiff {

#ifdef PYBIND11_MODULE
void bind_cuda(pybind11::module_& m);
#endif

namespace cuda {

using Addresses = std::vector<uintptr_t>;

// Where to work: the table and the address of its copy, the number of the device, and a cudaStream_t (0: the default one).
struct Place {
  const Table& table;
  uintptr_t at;
  int device;
  uintptr_t stream;
};

// Arguments are those of cpu/ops.h.
void apply_mask(const Place& place, const Addresses& x, const std::vector<int>& log2);
void compact(const Place& place, const Addresses& dense, const Addresses& small, const std::vector<int>& log2);
void scatter_back(const Place& place, const Addresses& dense, const Addresses& small, const std::vector<int>& log2);

// numbers: null, or 8 doubles on the device that stand for those of args, so that a CUDA graph can take steps of its own.
void masked_adamw(const Place& place, Dtype dtype, const Addresses& p, const Addresses& g, const Addresses& m,
                  const Addresses& v, const Addresses& e, const AdamWArgs& args, const double* numbers);

// workspace: table.workspace doubles. out is on the device too. Deterministic, but not the same order as on the CPU.
void channel_sums(const Place& place, const std::vector<int>& dtype, const Addresses& x, const Addresses& y, Sum kind,
                  double* workspace, double* out);

void mask_distance(int device, uintptr_t stream, const uint8_t* bits, int64_t rows, int64_t bytes, int64_t newest,
                   int64_t* out);

}  // namespace cuda
}  // namespace ebdiff
