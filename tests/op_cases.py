"""Tensors laid out in memory in every way that the operators on channel masks have to manage, and masks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ebdiff.ops import channel_mask_reference, native
from ebdiff.ops.channel_mask import Axes

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OTHERS = [torch.int64, torch.bool, torch.complex64, torch.complex128]
STYLES = ["some", "all", "one", "none"]
OPS = ["apply_mask_", "compact", "scatter_back_", "masked_adamw_", "channel_sums", "mask_distance"]

needs_native = pytest.mark.skipif(native.module() is None, reason="no compiled part")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random numbers of any dtype, contiguous."""
    g = generator(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, tuple(shape), generator=g).bool()
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max, tuple(shape), dtype=dtype, generator=g)
    return torch.randn(tuple(shape), dtype=torch.promote_types(dtype, torch.float32), generator=g).to(dtype)


def strided(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, offset: int = 0) -> Tensor:
    reach = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    return values([max(reach, offset, 1) + 3], dtype).as_strided(tuple(shape), tuple(strides), offset)


# name -> (shape, strides, offset); no two elements share memory
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "contiguous": ((5, 7, 3, 3), (63, 9, 3, 1), 0),
    "channels_last": ((4, 7, 3, 5), (105, 1, 35, 7), 0),
    "channels_last_3d": ((3, 4, 2, 3, 2), (48, 1, 24, 8, 4), 0),
    "transposed": ((9, 6), (1, 9), 0),
    "linear": ((17, 130), (130, 1), 0),
    "row pitch": ((7, 33), (40, 1), 3),
    "outer pitch": ((3, 4, 5), (64, 5, 1), 0),
    "inner stride 2": ((5, 19), (40, 2), 0),
    "offset 1": ((11, 37), (37, 1), 1),
    "wide inside": ((6, 5, 9, 9), (405, 81, 9, 1), 0),
    "just wide": ((6, 5, 64), (320, 64, 1), 0),
    "just not wide": ((6, 5, 63), (315, 63, 1), 0),
    "permuted": ((2, 3, 4, 5, 6), (4, 48, 1, 144, 8), 0),
    "size 1 inside": ((4, 1, 6), (6, 6, 1), 0),
    "size 1 at the ends": ((1, 5, 1), (99, 3, 77), 2),
    "8-D": ((2, 1, 3, 2, 1, 2, 2, 2), (48, 48, 16, 8, 8, 4, 2, 1), 0),
    "vector": ((67,), (1,), 0),
    "vector, stride 3": ((21,), (3,), 0),
    "one element": ((1,), (1,), 0),
    "one element of four dimensions": ((1, 1, 1, 1), (1, 1, 1, 1), 0),
    "0-D": ((), (), 0),
    "empty outside": ((0, 3), (3, 1), 0),
    "empty inside": ((3, 0), (1, 1), 0),
    "empty between": ((2, 0, 4), (4, 4, 1), 0),
}


def tensor_of(layout: str, dtype: torch.dtype) -> Tensor:
    shape, strides, offset = LAYOUTS[layout]
    return strided(shape, strides, dtype, offset)


def keep_of(size: int, style: str, seed: int) -> Tensor:
    """bool [size]; "one" and "some" keep at least one channel, "some" removes one where it can."""
    kept = torch.zeros(size, dtype=torch.bool) if style in ("one", "none") else torch.ones(size, dtype=torch.bool)
    if style == "some":
        kept = torch.rand(size, generator=generator(seed)) < 0.6
    if size and style in ("some", "one"):
        kept[seed % size] = style == "one" or size == 1
        kept[(seed + 1) % size] = kept[(seed + 1) % size] if style == "one" else True
    return kept


def masked_ways(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The sets of one to three dimensions of a shape; for many dimensions a selection."""
    sets = [c for n in (1, 2, 3) for c in combinations(range(len(shape)), n)]
    return sets if len(shape) < 5 else sets[::4]


def cases(dtype: torch.dtype, style: str) -> tuple[list[str], list[Tensor], Axes]:
    """Every layout with every set of masked dimensions, and once without a mask: names, tensors, masks."""
    names, tensors, masks = [], [], []
    for layout, (shape, *_) in LAYOUTS.items():
        for dims in [(), *masked_ways(shape)]:
            names.append(f"{layout}, dimensions {dims} masked, keep {style}")
            tensors.append(tensor_of(layout, dtype))
            masks.append({d: keep_of(shape[d], style, seed=7 * len(names) + d) for d in dims})
    return names, tensors, Axes.of(masks)


def twin(tensor: Tensor) -> Tensor:
    """The same values at the same places of another storage, what lies between and around them included."""
    storage = tensor.detach().untyped_storage().clone()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def twins(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [twin(tensor) for tensor in tensors]


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, over the whole storages."""
    whole = [torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*whole)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for what a NaN holds."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    known = ~a.isnan()
    left, right = a[known], b[known]
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(left, right) and same_signs(left, right)


def same_signs(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.signbit(), b.signbit())


@contextmanager
def only(server: str) -> Iterator[None]:
    """Only the "reference" serves, or only the compiled part ("native"): the other one raises."""
    if server == "reference":
        with patch.object(native, "module", return_value=None):
            yield
        return
    with patch.multiple(channel_mask_reference, **dict.fromkeys(OPS, _not_here)):
        yield


def _not_here(*arguments: object) -> None:
    raise AssertionError("the reference was called")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_threads(function: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """What the function returns with 1, 2 and 7 threads."""
    results = []
    for count in (1, 2, 7):
        with threads(count):
            results.append(function())
    return results
