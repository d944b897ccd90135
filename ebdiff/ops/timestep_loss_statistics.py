"""Losses by timestep, added up on the device: what adaptive samplers and reports read."""

from __future__ import annotations

import torch
from torch import Tensor

from .family import is_direct
from .serve import written
from .timestep_loss_ops import add_losses, add_losses_op

__all__ = ["LossStatistics"]


class LossStatistics:
    """Sum, sum of squares and number of the samples' losses in each bucket of timesteps.

    Args:
        buckets: int64 [T], the bucket of each cell, on the device of the losses.
        count: how many buckets there are, K; by default as many as `buckets` names.
        dtype: of the totals, float64 or float32.

    Attributes:
        totals: [3, K], updated in place; deterministic.
    """

    def __init__(self, buckets: Tensor, count: int | None = None, *, dtype: torch.dtype = torch.float64) -> None:
        self.buckets = buckets
        count = int(buckets.max()) + 1 if count is None else count
        self.totals = torch.zeros(3, count, dtype=dtype, device=buckets.device)

    def add(self, cell: Tensor, per_sample: Tensor) -> None:
        """Add the losses of samples at these cells: int64 [B] and [B]. Nothing waits for the device."""
        arguments = (self.totals, self.buckets, cell, per_sample.detach())
        if is_direct(*arguments):
            with torch.no_grad():
                add_losses(*arguments)
            written([self.totals])
        else:
            add_losses_op(*arguments)

    def reset_(self) -> None:
        """Forget everything."""
        self.totals.zero_()

    @property
    def sum(self) -> Tensor:
        """[K]."""
        return self.totals[0]

    @property
    def square(self) -> Tensor:
        """Sums of squares, [K]."""
        return self.totals[1]

    @property
    def count(self) -> Tensor:
        """How many samples, [K]."""
        return self.totals[2]
