"""How the kernels of block-sparse attention divide their work: laws of every plan, and who is divided how."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", minversion="3.6")

from ebdiff.kernels.block_sparse_attention_plan import Plan, plan_of
from ebdiff.ops.block_mask import BLOCKS
from ebdiff.ops.sparse_attention_checks import WIDEST


def plans() -> dict[tuple[int, int, int], Plan]:
    sizes = [(width, block, size) for width in range(1, WIDEST + 1) for block in BLOCKS for size in (2, 4)]
    return {case: plan_of(*case) for case in sizes}


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def test_every_head_dim_fits_with_little_to_spare() -> None:
    for (width, *_), plan in plans().items():
        assert is_power_of_two(plan.d1)
        assert plan.d2 == 0 or (is_power_of_two(plan.d2) and plan.d2 < plan.d1)
        assert min(size for size in (plan.d1, plan.d2) if size) >= 16  # the least that tensor cores add up over
        assert plan.d1 + plan.d2 == (-(-width // 16) * 16 if width <= 96 else 128 if width <= 128 else 256)


@pytest.mark.parametrize(
    ("width", "halves"),
    [(8, (16, 0)), (32, (32, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (88, (64, 32)),
     (97, (128, 0)), (128, (128, 0)), (160, (256, 0)), (256, (256, 0))],
)  # fmt: skip
def test_halves_of_a_head_dim(width: int, halves: tuple[int, int]) -> None:
    assert plan_of(width, 64, 2)[:2] == halves


def test_tiles_divide_their_blocks() -> None:
    for (_, block, _), plan in plans().items():
        for tile in plan[2:]:
            assert block % tile.queries == 0
            assert block % tile.keys == 0
            assert min(tile.queries, tile.keys) >= 16
            assert tile.warps in (1, 2, 4, 8)


def test_64_rows_have_a_whole_group_of_warps() -> None:
    """Four warps multiply 64 rows on Hopper and after; with fewer rows the older instructions serve."""
    for (_, _, size), plan in plans().items():
        rows = (plan.forward.queries, plan.dq.queries, plan.dkdv.keys)
        for tile, count in zip(plan[2:], rows, strict=True):
            assert size == 4 or count < 64 or tile.warps >= 4
