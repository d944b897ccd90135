"""How the Triton kernels of group_norm_silu divide their work."""

from __future__ import annotations

import random

import pytest

from ebdiff.kernels import group_norm_plan as plans


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels last"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_slabs_hold_every_group_once_and_fit(last: bool, itemsize: int) -> None:
    for c, hw in [(128, 1024), (87, 1024), (320, 4096), (640, 1024), (512, 1), (96, 33 * 33), (128, 65536)]:
        for offsets in (tuple(range(0, c + 1, c // 32 or 1)), (0, 0, 5, 5, c), (0, c), tuple(range(c + 1))):
            offsets = offsets if offsets[-1] == c else (*offsets, c)
            plan = plans.plan_of(plans.Shape(8, c, hw, itemsize, last), offsets)
            if isinstance(plan, plans.TwoPass):
                assert plan.cb * plan.rb <= 8192
                assert plan.chunks * plan.rb >= hw
                assert plan.blocks * plan.cb >= c
                continue
            assert [slab[2] for slab in plan.slabs] == [0, *(slab[3] for slab in plan.slabs[:-1])]
            assert plan.slabs[-1][3] == len(offsets) - 1
            for first, end, group, groups in plan.slabs:
                assert (first * plan.unit, end * plan.unit) == (offsets[group], offsets[groups])
                assert end * plan.unit - first * plan.unit <= plan.cb
                assert 0 < groups - group <= plan.gb
            for rows, _, held in (plan.forward, plan.backward):
                assert rows > 0
                assert not held or (rows >= hw and plan.cb * rows * itemsize <= 1 << 16)


def test_which_shapes_are_read_once() -> None:
    """Every norm of a CIFAR or latent U-Net, in NCHW; not those of 256 x 256 pixels."""
    once = {}
    for n, c, groups, hw in [(128, 128, 32, 1024), (128, 87, 29, 1024), (8, 320, 32, 4096), (8, 640, 32, 1024)]:
        offsets = tuple(range(0, c + 1, c // groups))
        once[c] = plans.plan_of(plans.Shape(n, c, hw, 2, False), offsets)
    assert all(isinstance(plan, plans.OnePass) for plan in once.values())
    offsets = tuple(range(0, 129, 4))
    for last in (False, True):
        assert isinstance(plans.plan_of(plans.Shape(8, 128, 65536, 2, last), offsets), plans.TwoPass)


def ragged(c: int, widest: int, chance: random.Random) -> tuple[int, ...]:
    """Where groups begin that share c channels, of 0 to `widest` each."""
    offsets = [0]
    while offsets[-1] < c:
        offsets.append(min(offsets[-1] + chance.randint(0, widest), c))
    return tuple(offsets)


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels last"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("hw", [1, 2, 3, 4])
def test_groups_of_a_few_elements_are_held_in_small_tiles(hw: int, itemsize: int, last: bool) -> None:
    """Only there does the backward pass weigh what rounding has left of the mean, up to 4096 elements.

    Whatever is removed: a group of up to 4 elements has up to 4 positions. Groups of more than 1024 channels, which no
    program holds, take two passes, and so do those beside them.
    """
    chance = random.Random(0)
    for c in [1, 8, 24, 87, 1000, 1024, 2056]:
        tables = [ragged(c, widest, chance) for widest in (1, 2, 8, 9, 100, 1024)]
        tables += [(0, c) if c <= 1024 else (*range(0, c, 1024), c), (0, 1, *range(9, c, 8), c) if c > 1 else (0, 1)]
        for n, offsets in [(n, table) for n in (1, 100_000) for table in tables]:
            plan = plans.plan_of(plans.Shape(n, c, hw, itemsize, last), offsets)
            assert isinstance(plan, plans.OnePass), offsets
            assert plan.forward[2]
            assert plan.backward[2]
            assert plan.cb * plan.backward[0] <= 4096
