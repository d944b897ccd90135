"""How many training steps each region gets, from what its timesteps teach and what its network costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import EbdiffError
from .region import Partition
from .sampler import Sampler

__all__ = ["region_budget"]


def region_budget(
    partition: Partition, sampler: Sampler, total_steps: int, costs: Sequence[float] | None = None
) -> list[int]:
    """Steps of each region, in proportion to the mass that `sampler` gives it.

    One network on all timesteps would see each region that often. Inside three of EB-Diff-Train's regions SpeeD is
    uniform, so that this is where it takes effect.

    Args:
        partition: the regions, ascending in t.
        sampler: of the whole schedule.
        total_steps: of all regions together, were they shared out equally.
        costs: of one step in each region, in any unit (MACs, say). Then not the number of steps is kept but what
            `total_steps` shared out equally would cost: the steps that cost less are more.

    Returns:
        A number of steps for each region, at least 1. They add up to `total_steps`; with costs they cost what equal
        steps would, less than one more step's worth.

    Raises:
        EbdiffError: for a partition of another schedule, fewer steps than regions, or costs that are not one positive
            number for each region.
    """
    _check(partition, sampler, total_steps, costs)
    masses = [sampler.mass(region) for region in partition]
    each = [1.0] * len(masses) if costs is None else [float(cost) for cost in costs]
    total = total_steps * math.fsum(each) / len(each)
    shares = [mass * total / math.fsum(m * c for m, c in zip(masses, each, strict=True)) for mass in masses]
    steps = [max(1, math.floor(share)) for share in shares]
    spare = total - math.fsum(n * cost for n, cost in zip(steps, each, strict=True))
    by_remainder = sorted(range(len(steps)), key=lambda i: steps[i] - shares[i])
    for i in by_remainder:
        if each[i] <= spare * (1 + 1e-9):
            steps[i] += 1
            spare -= each[i]
    while spare < -1e-9 * total:  # a region was lifted to its one step: the longest pays for it
        longest = max(range(len(steps)), key=lambda i: steps[i])
        steps[longest] -= 1
        spare += each[longest]
    return steps


def _check(partition: Partition, sampler: Sampler, total_steps: int, costs: Sequence[float] | None) -> None:
    if partition.T != sampler.T:
        raise EbdiffError(
            "regions of another schedule", expected=f"[0, {sampler.T})", got=f"[0, {partition.T})", remedy="match them"
        )
    if total_steps < len(partition):
        raise EbdiffError(
            "too few steps", expected=f"one for each of {len(partition)} regions", got=str(total_steps), remedy="add"
        )
    if costs is not None and (len(costs) != len(partition) or not all(0 < cost < math.inf for cost in costs)):
        raise EbdiffError(
            "no such costs",
            expected=f"{len(partition)} positive numbers",
            got=str(list(costs)),
            remedy="the cost of one step in each region",
        )
