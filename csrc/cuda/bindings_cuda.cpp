// The CUDA half of ebdiff._C: as private and as trusting as the other.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "ops.h"

namespace py = pybind11;

namespace ebdiff {

using cuda::Addresses;
using cuda::Place;
using cuda::Table;

// The contents of masks as one string: those at the same address are written once. With the shapes, a key for a cache.
static py::bytes mask_bytes(const Addresses& keep, const std::vector<int64_t>& sizes) {
  if (keep.size() != sizes.size()) throw std::invalid_argument("as many sizes as masks are needed");
  std::string text;
  std::map<std::pair<uintptr_t, int64_t>, int32_t> seen;
  for (size_t i = 0; i < keep.size(); ++i) {
    const auto [found, is_new] = seen.try_emplace({keep[i], sizes[i]}, int32_t(seen.size()));
    text.append(reinterpret_cast<const char*>(&found->second), sizeof found->second);
    if (is_new && sizes[i]) text.append(reinterpret_cast<const char*>(keep[i]), size_t(sizes[i]));
  }
  return py::bytes(text);
}

static void need(const Table& table, std::initializer_list<size_t> lengths) {
  for (const size_t length : lengths)
    if (length + 1 != table.tiles.size()) throw std::invalid_argument("a list is not as long as the table");
}

static void bind_table(py::module_& m) {
  py::class_<Table>(m, "CudaTable", py::buffer_protocol())
      .def_buffer([](Table& t) { return py::buffer_info(t.bytes.data(), py::ssize_t(t.bytes.size()), true); })
      .def_property_readonly("channels", [](const Table& t) { return t.channels; })
      .def_property_readonly("workspace", [](const Table& t) { return t.workspace; });
  m.def("cuda_table", [](const Layout& layout) { return Table(layout); });
  m.def("cuda_mask_bytes", &mask_bytes);
}

void bind_cuda(py::module_& m) {
  bind_table(m);
  const auto free = py::call_guard<py::gil_scoped_release>();
  m.def("apply_mask_cuda",
        [](const Table& table, uintptr_t at, int device, uintptr_t stream, const Addresses& x, const std::vector<int>& log2) {
          need(table, {x.size(), log2.size()});
          cuda::apply_mask({table, at, device, stream}, x, log2);
        },
        free);
  m.def("compact_cuda",
        [](const Table& table, uintptr_t at, int device, uintptr_t stream, const Addresses& dense, const Addresses& small,
           const std::vector<int>& log2) {
          need(table, {dense.size(), small.size(), log2.size()});
          cuda::compact({table, at, device, stream}, dense, small, log2);
        },
        free);
  m.def("scatter_back_cuda",
        [](const Table& table, uintptr_t at, int device, uintptr_t stream, const Addresses& dense, const Addresses& small,
           const std::vector<int>& log2) {
          need(table, {dense.size(), small.size(), log2.size()});
          cuda::scatter_back({table, at, device, stream}, dense, small, log2);
        },
        free);
  m.def("masked_adamw_cuda",
        [](const Table& table, uintptr_t at, int device, uintptr_t stream, int dtype, const Addresses& p, const Addresses& g,
           const Addresses& mean, const Addresses& square, const Addresses& ema, const std::vector<double>& n, bool maximize,
           uintptr_t numbers) {
          need(table, {p.size(), g.size(), mean.size(), square.size(), ema.empty() ? p.size() : ema.size()});
          if (n.size() != 8) throw std::invalid_argument("eight numbers are needed");
          const AdamWArgs args{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], maximize};
          cuda::masked_adamw({table, at, device, stream}, Dtype(dtype), p, g, mean, square, ema, args,
                             reinterpret_cast<const double*>(numbers));
        },
        free);
  m.def("channel_sums_cuda",
        [](const Table& table, uintptr_t at, int device, uintptr_t stream, const std::vector<int>& dtype, const Addresses& x,
           const Addresses& y, int kind, uintptr_t workspace, uintptr_t out) {
          need(table, {dtype.size(), x.size(), y.empty() ? x.size() : y.size()});
          cuda::channel_sums({table, at, device, stream}, dtype, x, y, Sum(kind), reinterpret_cast<double*>(workspace),
                             reinterpret_cast<double*>(out));
        },
        free);
  m.def("mask_distance_cuda",
        [](int device, uintptr_t stream, uintptr_t bits, int64_t rows, int64_t bytes, int64_t newest, uintptr_t out) {
          cuda::mask_distance(device, stream, reinterpret_cast<const uint8_t*>(bits), rows, bytes, newest,
                              reinterpret_cast<int64_t*>(out));
        },
        free);
}

}  // namespace ebdiff
