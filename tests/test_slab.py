"""How the compiled part sees a strided tensor: rows, columns, and 64-bit addresses far past 2^31 elements."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from op_cases import LAYOUTS, keep_of, masked_ways
from torch import Tensor

from ebdiff.ops import native, native_cpu
from ebdiff.ops.mask_axes import Axes

pytestmark = pytest.mark.skipif(native.module() is None, reason="no compiled part")

G = 1 << 30


def layout(shape: Sequence[int], strides: Sequence[int], masks: dict[int, Tensor], **options: bool) -> Any:
    """Of one tensor, which is never there: only the masks are read."""
    keep = [kept.data_ptr() for kept in masks.values()]
    return native.module().Layout(  # type: ignore[union-attr]
        [list(shape)], [list(strides)], [0] * len(masks), list(masks), keep, **options
    )


def contiguous(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return strides


def address(index: Sequence[int], strides: Sequence[int]) -> int:
    return sum(i * stride for i, stride in zip(index, strides, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_and_columns_are_the_elements_in_memory_order(name: str) -> None:
    shape, strides, _ = LAYOUTS[name]
    expected = sorted(address(index, strides) for index in product(*map(range, shape)))
    for dims in [(), *masked_ways(shape)]:
        masks = {d: keep_of(shape[d], "some", d) for d in dims}
        seen = layout(shape, strides, masks)
        rows, cols = seen.shape(0)
        assert [seen.offset(0, r, c) for r in range(rows) for c in range(cols)] == expected, dims
        count = 1
        for d, size in enumerate(shape):
            count *= int(masks[d].sum()) if d in masks else size
        kept_rows, kept_cols = seen.kept(0)
        assert kept_rows * kept_cols == count, dims
        assert seen.kept_elements() == [count]
        assert seen.extents() == [expected[-1] + 1 if expected else 0]
        assert not seen.any_overlaps()


# What a mask of 1000 of 1024 channels leaves, by hand: rows and columns, then kept ones
@pytest.mark.parametrize(
    ("shape", "strides", "dims", "sizes", "kept"),
    [
        ([1024, 8 * G], [8 * G, 1], [0], (1024, 8 * G), (1000, 8 * G)),
        ([8 * G, 1024], [1024, 1], [1], (8 * G, 1024), (8 * G, 1000)),
        ([1024, 1024, 300, 300], [1024 * 90000, 90000, 300, 1], [0, 1], (1 << 20, 90000), (1000 * 1000, 90000)),
        ([1024, 1024, 300, 300], [1024 * 90000, 1, 1024 * 300, 1024], [0, 1], (1024 * 90000, 1024), (90000000, 1000)),
        ([1024, 8 * G], [1, 1024], [0], (8 * G, 1024), (8 * G, 1000)),
        (
            [1024, G],
            [2 * G, 2],
            [0],
            (1024 * G, 1),
            None,
        ),  # every element is a row: too long for a table of 32-bit places
    ],
)
def test_addresses_past_32_bits(
    shape: list[int], strides: list[int], dims: list[int], sizes: tuple[int, int], kept: tuple[int, int] | None
) -> None:
    alive = torch.ones(1024, dtype=torch.bool)
    alive[5:29] = False
    if kept is None:
        with pytest.raises(ValueError, match="2\\^31 - 1 positions"):
            layout(shape, strides, dict.fromkeys(dims, alive))
        seen = layout(shape, strides, {})
    else:
        seen = layout(shape, strides, dict.fromkeys(dims, alive))
        assert seen.kept(0) == kept
    assert seen.shape(0) == sizes
    rows, cols = sizes
    order = sorted(range(len(shape)), key=lambda d: -strides[d])
    chance = random.Random(0)
    for row, col in [
        (0, 0),
        (rows - 1, cols - 1),
        *((chance.randrange(rows), chance.randrange(cols)) for _ in range(300)),
    ]:
        place, index = row * cols + col, [0] * len(shape)
        for d in reversed(order):
            place, index[d] = divmod(place, shape[d])
        assert seen.offset(0, row, col) == address(index, strides)


def test_as_many_masked_positions_as_fit_and_one_more() -> None:
    alive = torch.tensor([True, False])
    assert layout([1 << 40], [1], {}).shape(0) == (1, 1 << 40)
    with pytest.raises(ValueError, match="2\\^31 - 1 positions"):
        layout([1 << 31], [1], {0: alive})  # refused before the mask is read
    with pytest.raises(ValueError, match="2\\^31 - 1 positions"):
        layout([2, 1 << 30, 3, 5], [15 << 30, 15, 5, 1], {0: alive, 1: alive, 2: alive})
    wide = torch.empty(1 << 31, device="meta", dtype=torch.bool)
    with pytest.raises(native_cpu.NotTaken):
        native_cpu.layout_of([wide], Axes((alive,), (0,), (0,)))


@pytest.mark.parametrize(
    ("shape", "strides", "overlaps"),
    [
        ((3, 4), (4, 1), False),
        ((3, 4), (3, 1), True),
        ((3, 4), (0, 1), True),
        ((1, 4), (0, 1), False),
        ((0, 4), (0, 1), False),
        ((2, 2), (1, 1), True),
        ((2, 3, 2), (1, 4, 2), False),
        ((2, 3, 2), (1, 3, 2), True),
        ((), (), False),
    ],
)
def test_overlapping_elements_are_seen(shape: tuple[int, ...], strides: tuple[int, ...], overlaps: bool) -> None:
    seen = layout(shape, strides, {})
    assert seen.overlaps(0) is overlaps
    assert seen.any_overlaps() is overlaps


@pytest.mark.parametrize(
    "arguments",
    [
        ([[2]], [[1]], [1], [0], [0]),
        ([[2]], [[1]], [-1], [0], [0]),
        ([[2]], [[1]], [0], [1], [0]),
        ([[2]], [[1]], [0], [-1], [0]),
        ([[2]], [[1]], [0, 0], [0, 0], [0, 0]),
        ([[2]], [[1]], [0], [0, 1], [0]),
        ([[2]], [[1]], [0], [0], [0, 0]),
        ([[2]], [[1, 1]], [], [], []),
        ([[2]], [], [], [], []),
        ([[-2]], [[1]], [], [], []),
        ([[2]], [[-1]], [], [], []),
        ([[1] * 9], [[1] * 9], [], [], []),
    ],
)
def test_arguments_that_fit_nothing_are_refused(arguments: Any) -> None:
    with pytest.raises(ValueError):
        native.module().Layout(*arguments)  # type: ignore[union-attr]


def test_lists_of_other_lengths_are_refused() -> None:
    c = native.module()
    seen = layout([2], [1], {})
    x = torch.ones(2)
    calls = [
        lambda at: c.apply_mask(seen, at, [2], 1),  # type: ignore[union-attr]
        lambda at: c.compact(seen, at, at, [2], 1),  # type: ignore[union-attr]
        lambda at: c.scatter_back(seen, at, at, [2], 1),  # type: ignore[union-attr]
        lambda at: c.masked_adamw(seen, 0, at, at, at, at, [], [0.0] * 8, False, 1),  # type: ignore[union-attr]
        lambda at: c.channel_sums(seen, [0], at, [], 0, 0, 1),  # type: ignore[union-attr]
    ]
    for call in calls:
        with pytest.raises(ValueError, match="not as long"):
            call([x.data_ptr()] * 2)
    at = [x.data_ptr()]
    with pytest.raises(ValueError, match="eight numbers"):
        c.masked_adamw(seen, 0, at, at, at, at, [], [0.0] * 7, False, 1)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="not as long"):
        c.shares_memory(seen, [2, 2], [], [])  # type: ignore[union-attr]
