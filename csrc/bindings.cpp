// ebdiff._C. Private: it takes raw addresses and trusts them; ebdiff.ops checks every tensor first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "cpu/group_norm.h"
#include "cpu/ops.h"
#include "cpu/timestep_loss.h"
#ifdef EBDIFF_CUDA
#include "cuda/ops.h"
#endif
#if __has_include("ebdiff_build_info.h")
#include "ebdiff_build_info.h"
#endif
#ifndef EBDIFF_BUILD_INFO
#define EBDIFF_BUILD_INFO "{}"
#endif

namespace py = pybind11;
using namespace ebdiff;

using Sizes = Layout::Sizes;

static Layout make_layout(const std::vector<Sizes>& shapes, const std::vector<Sizes>& strides,
                          const std::vector<int>& owner, const std::vector<int>& dims, const Addresses& keep,
                          bool indexed) {
  if (dims.size() != owner.size() || (!keep.empty() && keep.size() != owner.size()))
    throw std::invalid_argument("owner, dims and keep differ in length");
  std::vector<Mask> masks(owner.size());
  for (size_t i = 0; i < owner.size(); ++i)
    masks[i] = {owner[i], dims[i], keep.empty() ? nullptr : reinterpret_cast<const uint8_t*>(keep[i])};
  return Layout(shapes, strides, masks, indexed);
}

static void need(const Layout& layout, std::initializer_list<size_t> lengths) {
  for (const size_t length : lengths)
    if (length != layout.slabs.size()) throw std::invalid_argument("a list is not as long as the layout");
}

// Does memory that is written to lie within the reach of another tensor? Addresses by list and tensor of the layout; log2
// of the bytes of an element by tensor.
static bool shares_memory(const Layout& layout, const std::vector<int>& log2, const std::vector<Addresses>& written,
                          const Addresses& read) {
  if (log2.size() != layout.slabs.size()) throw std::invalid_argument("a list is not as long as the layout");
  struct Span {
    uintptr_t start, end;
    bool is_written;
    bool operator<(const Span& other) const { return start < other.start; }
  };
  std::vector<Span> spans;
  const auto add = [&](const Addresses& list, bool is_written) {
    for (size_t i = 0; i < list.size() && i < layout.slabs.size(); ++i)
      if (const auto length = uintptr_t(layout.slabs[i].extent) << log2[i])
        spans.push_back({list[i], list[i] + length, is_written});
  };
  for (const Addresses& list : written) add(list, true);
  add(read, false);
  std::sort(spans.begin(), spans.end());
  uintptr_t written_to = 0, read_to = 0;
  for (const Span& span : spans) {
    if (span.start < written_to || (span.is_written && span.start < read_to)) return true;
    (span.is_written ? written_to : read_to) = std::max(span.is_written ? written_to : read_to, span.end);
  }
  return false;
}

static AdamWArgs adamw_args(const std::vector<double>& a, bool maximize) {
  if (a.size() != 8) throw std::invalid_argument("eight numbers are needed");
  return {a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], maximize};
}

// small: weight, bias, scale, shift, time_bias, keep; 0 where absent.
static GroupNorm group_norm(int dtype, bool rows, const std::vector<int64_t>& sizes, const std::vector<int64_t>& offsets,
                            double eps, bool silu, const Addresses& small) {
  if (sizes.size() != 3 || small.size() != 6 || offsets.size() < 2 || offsets.back() != sizes[1])
    throw std::invalid_argument("three sizes, six addresses and the offsets of all channels are needed");
  const auto at = [&](int i) { return reinterpret_cast<const void*>(small[i]); };
  return {Dtype(dtype), rows,  silu,  sizes[0], sizes[1], sizes[2], offsets,
          eps,          at(0), at(1), at(2),    at(3),    at(4),    static_cast<const uint8_t*>(at(5))};
}

template <class T>
static T* at(const Addresses& list, size_t i) {
  return reinterpret_cast<T*>(list[i]);
}

static void need(bool complete) {
  if (!complete) throw std::invalid_argument("a list is too short or too long");
}

static Images images(const Addresses& list, size_t i, int dtype) { return {at<void>(list, i), Dtype(dtype)}; }

static Coefficients coefficients(const Addresses& list, size_t i, int64_t columns) {
  return {at<float>(list, i), columns, at<int64_t>(list, i + 1)};
}

// sizes: samples, elements of each, columns of the table, weights. tensors: pred, target, x0, noise (with a dtype each), seed,
// table, row, weight, cell, huber_c, mask; 0 where absent.
static TimestepLoss loss_problem(const std::vector<int64_t>& sizes, const std::vector<int>& dtypes, const Addresses& tensors,
                                 int prediction, bool one_c) {
  need(sizes.size() == 4 && dtypes.size() == 4 && tensors.size() == 11);
  return {{sizes[0], sizes[1]},
          images(tensors, 0, dtypes[0]),
          images(tensors, 1, dtypes[1]),
          images(tensors, 2, dtypes[2]),
          images(tensors, 3, dtypes[3]),
          at<int64_t>(tensors, 4),
          coefficients(tensors, 5, sizes[2]),
          at<float>(tensors, 7),
          sizes[3],
          at<int64_t>(tensors, 8),
          at<float>(tensors, 9),
          one_c,
          at<float>(tensors, 10),
          Prediction(prediction)};
}

PYBIND11_MODULE(_C, m) {
  m.attr("ABI") = 3;
  m.def("build_info", [] { return py::module_::import("json").attr("loads")(EBDIFF_BUILD_INFO); });
  m.def("isa", [] { return rows().isa; });
  m.def("use_huge_pages", &use_huge_pages);
  m.def("shares_memory", &shares_memory);

  py::class_<Layout>(m, "Layout")
      .def(py::init(&make_layout), py::arg("shapes"), py::arg("strides"), py::arg("owner"), py::arg("dims"),
           py::arg("keep"), py::arg("indexed") = false)
      .def("__len__", [](const Layout& l) { return l.slabs.size(); })
      .def("overlaps", [](const Layout& l, int i) { return l.slabs.at(i).overlaps; })
      .def("any_overlaps",
           [](const Layout& l) {
             return std::any_of(l.slabs.begin(), l.slabs.end(), [](const Slab& s) { return s.overlaps; });
           })
      .def("extents",
           [](const Layout& l) {
             std::vector<int64_t> extents;
             for (const Slab& s : l.slabs) extents.push_back(s.extent);
             return extents;
           })
      .def("shape", [](const Layout& l, int i) { return std::pair(l.slabs.at(i).rows, l.slabs.at(i).cols); })
      .def("kept", [](const Layout& l, int i) { return std::pair(l.slabs.at(i).kept_rows, l.slabs.at(i).kept_cols); })
      .def("kept_elements",
           [](const Layout& l) {
             std::vector<int64_t> counts;
             for (const Slab& s : l.slabs) counts.push_back(s.kept_rows * s.kept_cols);
             return counts;
           })
      .def("offset", [](const Layout& l, int i, int64_t row, int64_t col) { return l.slabs.at(i).offset(row) + col; });

  const auto free = py::call_guard<py::gil_scoped_release>();
  m.def("apply_mask",
        [](const Layout& layout, const Addresses& x, const std::vector<int>& log2, int threads) {
          need(layout, {x.size(), log2.size()});
          apply_mask(layout, x, log2, threads);
        },
        free);
  m.def("compact",
        [](const Layout& layout, const Addresses& dense, const Addresses& small, const std::vector<int>& log2, int threads) {
          need(layout, {dense.size(), small.size(), log2.size()});
          compact(layout, dense, small, log2, threads);
        },
        free);
  m.def("scatter_back",
        [](const Layout& layout, const Addresses& dense, const Addresses& small, const std::vector<int>& log2, int threads) {
          need(layout, {dense.size(), small.size(), log2.size()});
          scatter_back(layout, dense, small, log2, threads);
        },
        free);
  m.def("masked_adamw",
        [](const Layout& layout, int dtype, const Addresses& p, const Addresses& g, const Addresses& mean,
           const Addresses& square, const Addresses& ema, const std::vector<double>& numbers, bool maximize, int threads) {
          need(layout, {p.size(), g.size(), mean.size(), square.size(), ema.empty() ? p.size() : ema.size()});
          masked_adamw(layout, Dtype(dtype), p, g, mean, square, ema, adamw_args(numbers, maximize), threads);
        },
        free);
  m.def("channel_sums",
        [](const Layout& layout, const std::vector<int>& dtype, const Addresses& x, const Addresses& y, int kind,
           uintptr_t out, int threads) {
          need(layout, {dtype.size(), x.size(), y.empty() ? x.size() : y.size()});
          channel_sums(layout, dtype, x, y, Sum(kind), reinterpret_cast<double*>(out), threads);
        },
        free);
  m.def("mask_distance",
        [](uintptr_t bits, int64_t rows, int64_t bytes, int64_t newest, uintptr_t out, int threads) {
          mask_distance(reinterpret_cast<const uint8_t*>(bits), rows, bytes, newest, reinterpret_cast<int64_t*>(out), threads);
        },
        free);
  m.def("group_norm_forward",
        [](int dtype, bool rows, const std::vector<int64_t>& sizes, const std::vector<int64_t>& offsets, double eps,
           bool silu, const Addresses& small, const Addresses& tensors, int threads) {
          if (tensors.size() != 4) throw std::invalid_argument("x, y, mean and rstd are needed");
          const auto at = [&](int i) { return reinterpret_cast<void*>(tensors[i]); };
          const GroupNorm norm = group_norm(dtype, rows, sizes, offsets, eps, silu, small);
          group_norm_forward(norm, at(0), at(1), at(2), at(3), threads);
        },
        free);
  m.def("group_norm_backward",
        [](int dtype, bool rows, const std::vector<int64_t>& sizes, const std::vector<int64_t>& offsets, double eps,
           bool silu, const Addresses& small, const Addresses& tensors, const Addresses& gradients, int threads) {
          if (tensors.size() != 4 || gradients.size() != 6)
            throw std::invalid_argument("dy, x, mean, rstd and six gradients are needed");
          const auto at = [](const Addresses& list, int i) { return reinterpret_cast<void*>(list[i]); };
          const NormGradients out = {at(gradients, 0), at(gradients, 1), at(gradients, 2),
                                     at(gradients, 3), at(gradients, 4), at(gradients, 5)};
          const GroupNorm norm = group_norm(dtype, rows, sizes, offsets, eps, silu, small);
          group_norm_backward(norm, at(tensors, 0), at(tensors, 1), at(tensors, 2), at(tensors, 3), out, threads);
        },
        free);
  m.def("noised",
        [](const std::vector<int64_t>& sizes, const std::vector<int>& dtypes, const Addresses& tensors, int threads) {
          need(sizes.size() == 3 && dtypes.size() == 2 && tensors.size() == 6);
          noised({sizes[0], sizes[1]}, images(tensors, 0, dtypes[0]), images(tensors, 1, dtypes[1]), at<int64_t>(tensors, 2),
                 coefficients(tensors, 3, sizes[2]), at<void>(tensors, 5), threads);
        },
        free);
  m.def("timestep_loss",
        [](const std::vector<int64_t>& sizes, const std::vector<int>& dtypes, const Addresses& tensors, int prediction,
           bool one_c, float dloss, const Addresses& results, int threads) {
          need(results.size() == 3);
          timestep_loss(loss_problem(sizes, dtypes, tensors, prediction, one_c), dloss,
                        {at<float>(results, 0), at<float>(results, 1), at<void>(results, 2)}, threads);
        },
        free);
  m.def("add_losses",
        [](bool is_double, const std::vector<int64_t>& sizes, const Addresses& tensors) {
          need(sizes.size() == 3 && tensors.size() == 4);
          const auto add = [&](auto* totals) {
            add_losses(totals, sizes[0], at<int64_t>(tensors, 1), sizes[1], at<int64_t>(tensors, 2), at<float>(tensors, 3),
                       sizes[2]);
          };
          is_double ? add(at<double>(tensors, 0)) : add(at<float>(tensors, 0));
        },
        free);

#ifdef EBDIFF_CUDA
  bind_cuda(m);
#endif
}
