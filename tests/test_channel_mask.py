"""The operators on channel masks: answers by hand, the compiled part against the reference, laws, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from op_cases import (
    FLOATS,
    OTHERS,
    STYLES,
    cases,
    needs_native,
    only,
    same_bytes,
    twin,
    twins,
    values,
)
from torch import Tensor

from ebdiff.ops import native_cpu
from ebdiff.ops.channel_mask import Axes, apply_mask_, channel_sums, compact, mask_distance, scatter_back

ROOT = Path(__file__).parent.parent
DTYPES = [*FLOATS, *OTHERS]
NAN, INF = float("nan"), float("inf")


def bits(*flags: int) -> Tensor:
    return torch.tensor(flags, dtype=torch.bool)


def both_axes() -> Axes:
    """Of one 2 x 3 tensor: row 1 and column 1 are removed."""
    return Axes((bits(1, 0), bits(1, 0, 1)), (0, 0), (0, 1))


def test_hand_apply_mask() -> None:
    x, vector = torch.tensor([[1.0, NAN, 3.0], [INF, -INF, NAN]]), torch.tensor([1, 2, 3])
    axes = Axes((bits(1, 0), bits(1, 0, 1), bits(0, 0, 1)), (0, 0, 1), (0, 1, 0))
    apply_mask_([x, vector], axes)
    assert x.tolist() == [[1, 0, 3], [0, 0, 0]]
    assert vector.tolist() == [0, 0, 3]
    assert not x.signbit().any()


def test_hand_compact_and_back() -> None:
    x, half, y = torch.arange(6.0).view(2, 3), torch.tensor([5.0, 6.0]).half(), torch.arange(6.0).view(2, 3).t()
    axes = Axes((bits(1, 0), bits(1, 0, 1), bits(0, 1)), (0, 0, 2), (0, 1, 1))
    small = compact([x, half, y], axes)
    assert [part.tolist() for part in small] == [[[0, 2]], [5, 6], [[3], [4], [5]]]
    assert [part.stride() for part in small] == [(2, 1), (1,), (1, 3)]
    assert [part.storage_offset() for part in small] == [0, 0, 16]
    assert small[0].untyped_storage().nbytes() == 128
    back = scatter_back(small, axes, [x, half, y])
    assert [part.tolist() for part in back] == [[[0, 0, 2], [0, 0, 0]], [5, 6], [[0, 3], [0, 4], [0, 5]]]
    assert [part.stride() for part in back] == [(3, 1), (1,), (1, 3)]
    into = [torch.full_like(part, -1) for part in (x, half, y)]
    written = scatter_back(small, axes, [x, half, y], into=into)
    assert written[0] is into[0]
    assert [part.tolist() for part in into] == [[[0, -1, 2], [-1, -1, -1]], [5, 6], [[-1, 3], [-1, 4], [-1, 5]]]


# f(x, y) of x = [[1, -2, 3], [-4, 5, -6]], y = [[1, 1, -1], [2, -1, 0]]: sums of the rows, then of the columns
@pytest.mark.parametrize(
    ("kind", "rows", "columns"),
    [
        ("square", [14, 77], [17, 29, 45]),
        ("absolute", [6, 15], [5, 7, 9]),
        ("product", [-4, -13], [-7, -7, -3]),
        ("absolute product", [6, 13], [9, 7, 3]),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_hand_channel_sums(kind: Any, rows: list[float], columns: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor([[1, -2, 3], [-4, 5, -6]], dtype=dtype)
    y = torch.tensor([[1, 1, -1], [2, -1, 0]], dtype=dtype)
    others = [y] if "product" in kind else []
    sums = channel_sums([x], others, [0, 0], [1, 0], kind)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [*columns, *rows]
    flipped = [part.t() for part in others]
    assert channel_sums([x.t()], flipped, [0], [1], kind).tolist() == rows
    assert channel_sums([x], [], [], [], kind).tolist() == []


def test_hand_mask_distance() -> None:
    packed = torch.tensor([[0, 0], [255, 1], [1, 3]], dtype=torch.uint8)
    assert mask_distance(packed).tolist() == [3, 8, 0]
    assert mask_distance(packed, 0).tolist() == [0, 9, 3]
    assert mask_distance(packed, -2).tolist() == [9, 0, 8]
    assert mask_distance(torch.zeros(4, 0, dtype=torch.uint8)).tolist() == [0, 0, 0, 0]
    long = torch.full((2, 29), 255, dtype=torch.uint8)
    long[0] = 0
    assert mask_distance(long).tolist() == [29 * 8, 0]


# The compiled part against the reference


@needs_native
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_is_the_reference_bit_for_bit(dtype: torch.dtype, style: str) -> None:
    names, tensors, axes = cases(dtype, style)
    with only("reference"):
        masked = twins(tensors)
        apply_mask_(masked, axes)
        small = compact(tensors, axes)
        grown = scatter_back(small, axes, tensors, into=twins(tensors))
        fresh = scatter_back(small, axes, tensors)
    with only("native"):
        ours = twins(tensors)
        apply_mask_(ours, axes)
        ours_small = compact(tensors, axes)
        ours_grown = scatter_back(small, axes, tensors, into=twins(tensors))
        ours_fresh = scatter_back(small, axes, tensors)
    for i, name in enumerate(names):
        assert same_bytes(ours[i], masked[i]), f"apply_mask_: {name}"
        assert same_bytes(ours_grown[i], grown[i]), f"scatter_back into: {name}"
        assert same_bytes(ours_grown[i], tensors[i]), f"what was cut out, put back: {name}"
        assert same_bytes(ours_fresh[i], fresh[i]), f"scatter_back: {name}"
        assert ours_small[i].stride() == small[i].stride(), f"compact: {name}"
    assert same_bytes(ours_small[0], small[0])  # the whole arena


@needs_native
@pytest.mark.parametrize("kind", ["square", "absolute", "product", "absolute product"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_native_sums_are_as_good_as_those_of_torch(dtype: torch.dtype, kind: Any) -> None:
    _, tensors, _ = cases(dtype, "all")
    wide = torch.promote_types(dtype, torch.float32)
    tensors = [tensor for tensor in tensors if tensor.numel()]
    tensors += [values(shape, dtype, seed=3) for shape in ((300, 40, 3, 3), (9000, 16), (5, 131072))]
    y = [twin(tensor).mul_(-1.5) for tensor in tensors] if "product" in kind else []
    places = [(i, dim) for i, tensor in enumerate(tensors) for dim in range(tensor.dim())]
    owner, dims = [i for i, _ in places], [dim for _, dim in places]
    with only("native"):
        sums = channel_sums(tensors, y, owner, dims, kind)
    parts = torch.split(sums, [tensors[i].shape[dim] for i, dim in places])
    errors, errors_of_torch = [], []
    for (i, dim), ours in zip(places, parts, strict=True):
        x, other = tensors[i], y[i] if y else tensors[i]
        rest = tuple(d for d in range(x.dim()) if d != dim)
        terms = terms_of(longer(x), longer(other), kind)
        truth, size = terms.sum(rest), abs(terms).sum(rest) + 1e-300
        theirs = terms_of(x.to(wide), other.to(wide), kind)
        theirs = theirs.sum(rest) if rest else theirs
        errors.append((abs(longer(ours) - truth) / size).max())
        errors_of_torch.append((abs(longer(theirs) - truth) / size).max())
    assert max(errors) <= max(max(errors_of_torch), 4 * torch.finfo(wide).eps)


def longer(x: Tensor) -> np.ndarray[Any, Any]:
    return x.double().numpy().astype(np.longdouble)


def terms_of(x: Any, y: Any, kind: str) -> Any:
    value = x if kind == "absolute" else x * y
    return abs(value) if "absolute" in kind else value


FIRST = Axes((bits(1, 0),), (0,), (0,))
NINE = [2, *[1] * 8]
LEFT_TO_THE_REFERENCE = {
    "apply_mask_ of nine dimensions": lambda: apply_mask_([torch.ones(NINE)], FIRST),
    "apply_mask_ of overlapping elements": lambda: apply_mask_([overlapping()], FIRST),
    "apply_mask_ of tensors that share memory": lambda: apply_mask_([(x := torch.ones(2, 2)), x[1:]], FIRST),
    "compact of nine dimensions": lambda: compact([torch.ones(NINE)], FIRST),
    "scatter_back into overlapping elements": lambda: scatter_back(
        [torch.ones(1, 2)], FIRST, [torch.ones(2, 2)], into=[overlapping()]
    ),
    "channel_sums of nine dimensions": lambda: channel_sums([torch.ones(NINE)], [], [0], [0], "square"),
    "channel_sums of two dtypes": lambda: channel_sums(
        [torch.ones(2, 2)], [torch.ones(2, 2).double()], [0], [0], "product"
    ),
}


def overlapping() -> Tensor:
    return torch.ones(4).as_strided((2, 2), (1, 1))


@needs_native
@pytest.mark.parametrize("name", LEFT_TO_THE_REFERENCE)
def test_what_is_left_to_the_reference(name: str) -> None:
    with only("native"), pytest.raises(AssertionError, match="the reference was called"):
        LEFT_TO_THE_REFERENCE[name]()
    LEFT_TO_THE_REFERENCE[name]()


def test_nine_dimensions() -> None:
    x = values([3, 1, 2, 1, 2, 1, 2, 1, 2])
    axes = Axes((bits(1, 0, 1), bits(0, 1)), (0, 0), (0, 8))
    expected = x[[0, 2]][..., [1]]
    (small,) = compact([x], axes)
    assert torch.equal(small, expected)
    apply_mask_([x], axes)
    assert torch.equal(scatter_back([small], axes, [x])[0], x)
    sums = channel_sums([x], [], [0], [8], "absolute")
    assert torch.allclose(sums, x.double().abs().sum(list(range(8))))


@needs_native
def test_lazily_negated_and_conjugated_memory_is_not_read_raw() -> None:
    x = values([4, 3])
    axes = Axes((bits(1, 0, 1, 1),), (0,), (0,))
    assert torch.equal(compact([torch._neg_view(x)], axes)[0], -x[[0, 2, 3]])
    z = values([4, 3], torch.complex64)
    assert torch.equal(compact([z.conj()], axes)[0], z[[0, 2, 3]].conj())
    assert torch.equal(
        channel_sums([x], [torch._neg_view(x)], [0], [0], "product"), -channel_sums([x], [], [0], [0], "square")
    )
    for lazy in (torch._neg_view(x), z.conj()):
        with pytest.raises(native_cpu.NotTaken):
            native_cpu.layout_of([lazy], axes)
