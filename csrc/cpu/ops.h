// What bindings.cpp calls: one parallel pass over any number of tensors. Addresses are those of each tensor's first element.
#pragma once

#include <vector>

#include "../slab.h"
#include "kernels.h"

namespace ebdiff {

using Addresses = std::vector<uintptr_t>;

// Zero what is removed. log2: of the bytes of an element, by tensor.
void apply_mask(const Layout& layout, const Addresses& x, const std::vector<int>& log2, int threads);

// New memory that will be written from end to end: ask for large pages, so that the first touch costs a third. Best effort.
void use_huge_pages(uintptr_t start, int64_t bytes);

// small = the kept elements of dense, in dense's order in memory and without gaps; and back. The layout is indexed. Each
// small tensor has room up to the next multiple of 64 bytes, which compact fills with zeros.
void compact(const Layout& layout, const Addresses& dense, const Addresses& small, const std::vector<int>& log2, int threads);
void scatter_back(const Layout& layout, const Addresses& dense, const Addresses& small, const std::vector<int>& log2,
                  int threads);

// e is empty, or as long as the others. All five of a tensor are laid out alike.
void masked_adamw(const Layout& layout, Dtype dtype, const Addresses& p, const Addresses& g, const Addresses& m,
                  const Addresses& v, const Addresses& e, const AdamWArgs& args, int threads);

// out: for each axis of the layout, one after another, the sums of f(x, y) over all but that axis. y is laid out as x.
void channel_sums(const Layout& layout, const std::vector<int>& dtype, const Addresses& x, const Addresses& y, Sum kind,
                  double* out, int threads);

// out[i] = how many bits of row i differ from row `newest`; rows of `bytes` bytes.
void mask_distance(const uint8_t* bits, int64_t rows, int64_t bytes, int64_t newest, int64_t* out, int threads);

}  // namespace ebdiff
