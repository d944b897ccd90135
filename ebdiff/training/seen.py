"""Will a search see every region that it draws a ticket for?"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.schema import Search
from ..errors import EbdiffError
from ..tickets.attention import Attention
from ..timesteps.region import Partition, Region
from ..timesteps.sampler import Sampler
from .batches import region_at

__all__ = ["check_seen"]

_FURTHER = 10_000  # steps, drawn in less than a second


def check_seen(search: Search, partition: Partition, sampler: Sampler, seed: int) -> None:
    """Refuse a search that would fail at its end, since a region had no step whose gradients or attention it reads.

    Args:
        search: its settings.
        partition: the regions, each of which `sampler` draws.
        sampler: of the search.
        seed: of the search.

    Raises:
        EbdiffError: names the region, and how many steps it takes.
    """
    if search.criterion != "taylor" and search.attention is None:
        return
    masses = torch.tensor([sampler.mass(region) for region in partition], dtype=torch.float64)
    first = _first_steps(search, masses, seed)
    unseen = [number for number in range(len(partition)) if number not in first]
    if unseen:
        pace = 1 if search.attention is None else Attention(search.attention).pace(search.window)
        steps = f"about {pace / float(masses[unseen[0]]):.2g}"
        raise _too_short(search, partition[unseen[0]], steps, "make the region larger (regions.bounds)")
    last = max(first, key=lambda number: first[number])
    enough = first[last] + 1
    if search.steps < enough:
        raise _too_short(search, partition[last], f"{enough}", f"search.steps={enough}, better many more")


def _too_short(search: Search, region: Region, steps: str, remedy: str) -> EbdiffError:
    return EbdiffError(
        f"the search is too short to see {region}",
        expected=f"steps in every region, which take {steps}",
        got=f"search.steps={search.steps}",
        remedy=remedy,
    )


def _first_steps(search: Search, masses: Tensor, seed: int) -> dict[int, int]:
    """{number of a region: the first step that sees it}, of those that the search or some steps more would see."""
    look = None if search.attention is None else Attention(search.attention)
    first: dict[int, int] = {}
    for step in range(search.steps + _FURTHER):
        if look is None or look.is_due(step, search.window):
            first.setdefault(region_at(step, masses, seed), step)
        if len(first) == len(masses):
            break
    return first
