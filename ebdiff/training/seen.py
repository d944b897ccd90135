"""Will a search see every region that it draws a ticket for?"""

from __future__ import annotations

from itertools import count

import torch

from ..config.schema import Search
from ..errors import EbdiffError
from ..tickets.attention import Attention
from ..timesteps.region import Partition
from ..timesteps.sampler import Sampler
from .batches import region_at

__all__ = ["check_seen"]


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
    look = None if search.attention is None else Attention(search.attention)
    seen = set[int]()
    for step in count():
        if look is None or look.is_due(step, search.window):
            number = region_at(step, masses, seed)
            seen.add(number)
        if len(seen) == len(partition):
            break
    if step >= search.steps:
        raise EbdiffError(
            f"the search is too short to see {partition[number]}",
            expected=f"steps in every region, which take {step + 1}",
            got=f"search.steps={search.steps}",
            remedy=f"search.steps={step + 1}, better many more",
        )
