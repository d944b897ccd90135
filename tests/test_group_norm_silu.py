"""The operator group_norm_silu: as exact as torch's own, the same bits from any threads, the smaller network's."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from norm_cases import LAYOUTS, SMALL, Case, check
from op_cases import FLOATS, by_threads, needs_native, same_bytes, twin

from ebdiff.ops import group_norm as module
from ebdiff.ops import native


@pytest.fixture(autouse=True)
def taken() -> Iterator[None]:
    """With a compiled part, nothing in this file falls back to the reference unnoticed."""
    module.fallbacks.clear()
    yield
    unexpected = {why: n for why, n in module.fallbacks.items() if why not in ("torch.func", "no compiled part")}
    assert not unexpected
    assert native.module() is None or "no compiled part" not in module.fallbacks


HARD = {
    "normal": {"shape": (3, 12, 6, 5), "groups": 4},
    "mean 1000, std 1": {"shape": (16, 12, 9, 9), "groups": 4, "mean": 1000.0},
    "tiny": {"shape": (2, 12, 9, 9), "groups": 4, "std": 1e-4},
    "87 channels": {"shape": (2, 87, 5, 3), "groups": 29},
    "ragged": {"shape": (2, 87, 7), "groups": [0, 1, 1, 18, 50, 87]},
    "removed": {"shape": (2, 40, 13), "groups": [0, 8, 9, 25, 40], "keep": [0, 8, 9, 24, 30, 39]},
    "an emptied group": {"shape": (2, 9, 5, 5), "groups": 3, "keep": [3, 4, 5]},
    "first positions unlike the others": {"shape": (1, 4, 100, 400), "groups": 2, "first": 1000.0, "only": ()},
    "long sums, mostly of their first terms": {
        "shape": (1, 4, 100, 400),
        "groups": 2,
        "first": 1000.0,
        "only": SMALL[:4],
        "draw": 4,
    },
    "planes of a few vectors": {"shape": (3, 24, 4, 4), "groups": [0, 9, 10, 24], "keep": [5]},
    "planes of a few vectors, mean 1000": {"shape": (5, 24, 4, 8), "groups": 3, "mean": 1000.0},
    "one pixel": {"shape": (4, 24, 1, 1), "groups": 3},
    "vectors": {"shape": (5, 24), "groups": 3},
    "one channel per group": {"shape": (2, 8, 11, 3), "groups": 8},
    "volumes": {"shape": (2, 6, 3, 5, 7), "groups": 2},
    "one sample": {"shape": (1, 24, 64, 60), "groups": 2},
    "large values": {"shape": (2, 8, 20), "groups": 2, "only": ("weight", "bias"), "std": 30.0},
    "one element per group": {"shape": (4, 12, 1, 1), "groups": 12},
    "one element per group is left": {"shape": (6, 9, 1), "groups": 3, "keep": [0, 1, 3, 4, 6, 7]},
    "two elements per group": {"shape": (4, 24, 2), "groups": 24},
    "one element, mean 1000": {"shape": (4, 24, 1), "groups": 6, "mean": 1000.0},
    "two positions, mean 1000": {"shape": (4, 24, 2), "groups": 6, "mean": 1000.0},
    "mean 60000, std 1": {"shape": (4, 12, 9, 9), "groups": 4, "mean": 60000.0},
    "mean -60000, no time embedding": {
        "shape": (4, 12, 2),
        "groups": 4,
        "mean": -60000.0,
        "only": ("weight", "bias"),
    },
}


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", HARD)
def test_errors_are_no_larger_than_torchs_own(name: str, dtype: torch.dtype, layout: str, silu: bool) -> None:
    """In float64, which nothing wider measures: as torch's to 1e-9."""
    case = Case(**HARD[name], dtype=dtype, silu=silu)  # type: ignore[arg-type]
    case.x = LAYOUTS[layout](case.x)
    if dtype != torch.float64:
        return check(case)
    for mine, torchs in zip(case.results(case.ours), case.results(case.torchs), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_of_narrow_inputs(dtype: torch.dtype, silu: bool) -> None:
    check(Case((2, 12, 6, 5), 4, dtype=dtype, small=torch.float32, only=("weight", "bias"), silu=silu))


@pytest.mark.parametrize("dtype", FLOATS)
def test_constant_channels(dtype: torch.dtype) -> None:
    """Of a constant group the bias is left, and its gradients are finite: eps is all the variance there is."""
    case = Case((2, 12, 5, 5), 4, dtype=dtype, std=0.0, mean=3.0, only=("weight", "bias"), silu=False)
    y, *gradients = case.results(case.ours)
    assert torch.equal(y, case.small["bias"][:, None, None].expand_as(y))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1].any()


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("place", [0, 500])
def test_a_value_whose_square_is_infinite_leaves_its_group_the_bias(place: int, layout: str) -> None:
    """The mean is still finite, though it is far from all values: no sum of deviations may be lost to infinity."""
    case = Case((2, 6, 30, 31), 3, only=("weight", "bias"), silu=False)
    case.x.view(2, 6, -1)[0, 0, place] = 3e38
    case.x = LAYOUTS[layout](case.x)
    y = case.ours(case.x, case.small)
    assert torch.equal(y[0, :2], case.small["bias"][:2, None, None].expand(2, 30, 31))
    assert y.isfinite().all()


# Every layout, every combination of arguments, every number of threads ------------------------------------------------


def variants() -> Iterator[Case]:
    for i, shape in enumerate([(2, 87, 5, 3), (3, 40, 13), (5, 24), (1, 6, 3, 5, 7), (2, 1, 4, 4), (1, 3, 1, 1)]):
        c = shape[1]
        groups = [0, c // 3, c // 3, max(c - 2, c // 3), c]
        keep = None if i % 2 else range(0, c, 3)
        for only in (SMALL, ("weight",), ("scale", "time_bias"), ()):
            yield Case(shape, groups, keep=keep, only=only, silu=i % 3 != 0 or bool(only))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_layout_is_kept_and_is_the_reference(dtype: torch.dtype, layout: str) -> None:
    """To rounding: the order of sums and of roundings differs."""
    for case in variants():
        case.x, case.dy = LAYOUTS[layout](case.x.to(dtype)), case.dy.to(dtype)
        case.small = {name: tensor.to(dtype) for name, tensor in case.small.items()}
        before = twin(case.x)
        ours = case.results(case.ours)
        assert same_bytes(before, case.x)
        with patch.object(native, "module", return_value=None):
            expected = case.results(case.ours)
        assert ours[0].stride() == ours[1].stride() == torch.empty_like(case.x).stride()
        for mine, other in zip(ours, expected, strict=True):
            assert (mine.dtype, mine.stride()) == (other.dtype, other.stride())
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(mine, other, rtol=4 * eps, atol=64 * eps * max(1.0, float(other.abs().max())))
    module.fallbacks.clear()


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype, layout: str) -> None:
    """Many small groups, also of short planes, and few large ones, whose steps are divided between threads."""
    small = [((12, 64, 9, 9), 16, 0), ((64, 64, 4, 4), 16, 0), ((16, 64, 8, 8), 16, 0)]
    for shape, groups, first in [*small, ((1, 24, 150, 60), 2, 0), ((1, 24, 150, 60), 2, 1000)]:
        case = Case(shape, groups, dtype=dtype, keep=[3, 17], first=first)
        case.x = LAYOUTS[layout](case.x)
        first, *others = by_threads(lambda case=case: case.results(case.ours))  # type: ignore[misc]
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", ["x", *SMALL])
def test_what_is_not_needed_is_not_there_and_changes_nothing(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = Case((2, 12, 6, 5), 4, dtype=dtype)
        place = ["x", *SMALL].index(name)
        _, alone = case.results(case.ours, needs=[name])
        assert torch.equal(alone, case.results(case.ours)[1 + place])


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_all_memory_is_written_and_none_is_read_before(dtype: torch.dtype, layout: str) -> None:
    case = Case((2, 20, 7, 3), [0, 7, 7, 20], dtype=dtype, keep=[0, 5])
    case.x = LAYOUTS[layout](case.x)
    expected = case.results(case.ours)
    empty_like, empty = torch.empty_like, torch.Tensor.new_empty
    with (
        patch.object(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan"))),
        patch.object(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(float("nan"))),
    ):
        assert all(map(torch.equal, case.results(case.ours), expected))


# Masks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("plane", [(23, 21), (8, 8), (4, 8), (4, 4)])
def test_a_mask_is_the_smaller_network(plane: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    """Bit for bit on planes; of rows, other channels of a vector come together, which changes nothing either."""
    case = Case((2, 22, *plane), [0, 6, 9, 13, 22], dtype=dtype, keep=[0, 3, 6, 7, 8, 21])
    case.x[:, 9:15, :9] += 1000  # for the statistics of one group, and of a part of another, it takes a second try
    case.x = LAYOUTS[layout](case.x)
    kept, small = case.keep.nonzero()[:, 0], Case((2, 22, *plane), [0, 4, 4, 8, 16], dtype=dtype)  # type: ignore[union-attr]
    small.x, small.dy = LAYOUTS[layout](case.x[:, kept]), case.dy[:, kept]
    small.small = {name: tensor[..., kept] for name, tensor in case.small.items()}
    for masked, shrunk in zip(case.results(case.ours), small.results(small.ours), strict=True):
        at = 1 if masked.dim() > 1 else 0
        assert torch.equal(masked.index_select(at, kept), shrunk)
        assert not masked.index_fill(at, kept, 0).any()


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_removed_channels_hold_has_no_part(bad: float, layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = Case((2, 9, 20), [0, 2, 6, 6, 9], dtype=dtype, keep=[0, 1, 4])
        case.x = LAYOUTS[layout](case.x)
        expected = case.results(case.ours)
        gone = ~case.keep  # type: ignore[operator]
        for tensor in (case.x, case.dy):
            tensor[:, gone] = bad
        for tensor in case.small.values():
            tensor[..., gone] = bad
        assert all(map(torch.equal, case.results(case.ours), expected))


# Degenerate and odd inputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 3), (2, 0, 4), (0, 6)])
def test_empty_inputs(shape: tuple[int, ...]) -> None:
    case = Case(shape, [0, shape[1]])
    y, dx, *small = case.results(case.ours)
    assert y.shape == dx.shape == shape
    assert not any(gradient.any() for gradient in small)


def test_gradients_without_strides() -> None:
    case = Case((2, 12, 6, 5), 4)
    expected = case.results(case.ours)
    for dy in (torch.ones(()).expand(2, 12, 6, 5), torch.full((2, 12, 1, 1), 0.5).expand(2, 12, 6, 5)):
        case.dy = dy
        found = case.results(case.ours)
        case.dy = dy.contiguous()
        assert all(map(torch.equal, found, case.results(case.ours)))
    assert not torch.equal(found[1], expected[1])


def test_negated_views_and_slices_of_parameters() -> None:
    case = Case((2, 12, 6, 5), 4)
    wide = torch.cat([case.small["scale"], case.small["shift"]], 1)
    case.small["scale"], case.small["shift"] = wide.chunk(2, 1)
    expected = case.results(case.ours)
    case.x = torch._neg_view(-case.x)
    case.small["weight"] = torch._neg_view(-case.small["weight"])
    assert all(map(torch.equal, case.results(case.ours), expected))
