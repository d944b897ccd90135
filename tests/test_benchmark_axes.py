"""What the benchmarks count by: the committed lists of axes, and the bytes that an operation has to move."""

from __future__ import annotations

import pytest
import torch

from benchmarks.axes import NAMES, axes_of, full_size, listed, packed, random_mask, traced
from benchmarks.floors import Elements
from ebdiff.ops.channel_mask import Axes


@pytest.mark.parametrize("name", NAMES)
def test_the_list_is_the_trace(name: str) -> None:
    assert packed(listed(name)) == packed(traced(name)), "python -m benchmarks.axes writes it anew"


def test_bytes_by_hand() -> None:
    weight, bias, other = torch.empty(4, 6, 2), torch.empty(4), torch.empty(5)
    rows, columns = torch.tensor([True, False, True, True]), torch.tensor([True] * 2 + [False] * 4)
    found = Elements.of([weight, bias, other], Axes.of([{0: rows, 1: columns}, {0: rows}, {}]))
    assert found == Elements(removed_rows=12 + 1, mixed=36, whole=3 + 5, kept=12 + 3 + 5)
    assert found.apply_mask(4) == 4 * (13 + 2 * 36)
    assert found.masked_adamw(2) == 2 * (9 * 44 + 4 * 13)
    assert found.masked_adamw(4, ema=False) == 4 * (7 * 44 + 3 * 13)
    assert found.compact(4) == 4 * (36 + 8 + 20)
    assert found.scatter_back(4) == 4 * (20 + 57)
    assert found.scatter_into(4) == 4 * (20 + 2 * 36 + 8)


def test_full_size_masks_hold_what_is_counted_as_kept() -> None:
    plan = listed("cifar_unet")
    mask = random_mask(plan, 0.5)
    like = [torch.empty(shape) for shape in plan.shapes.values()]
    kept = sum(int(full.sum()) for full in full_size(plan, mask, like, torch.bool))
    assert kept == Elements.of(like, axes_of(plan, mask)).kept == plan.parameters(mask)
