"""The order of the data: from (seed, epoch), so that nothing has to be stored to go on where a run stopped."""

from __future__ import annotations

import torch
from torch import Tensor

from ..seeds import generator

__all__ = ["DataOrder"]


class DataOrder:
    """Every image once per epoch, in an order of its own for each epoch.

    Args:
        length: number of images.
        seed: of all epochs.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, start: int, count: int) -> Tensor:
        """int64 [count]: the images at places start, start + 1, ... of the endless sequence."""
        places = torch.arange(start, start + count)
        epochs = places // self.length
        parts = [self._of_epoch(int(e))[places[epochs == e] % self.length] for e in epochs.unique()]
        return torch.cat([places[:0], *parts])

    def _of_epoch(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self.length, generator=generator(self.seed, "order", epoch))
        return self._order
