"""Which axes of a list of tensors are masked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

__all__ = ["Axes"]


@dataclass(frozen=True)
class Axes:
    """The masked axes of a list of tensors, as triples; True = KEPT.

    Args:
        keep: bool [size of the dimension], on the CPU.
        owner: the number of the tensor in the list.
        dims: its dimension.
    """

    keep: tuple[Tensor, ...] = ()
    owner: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()

    @classmethod
    def of(cls, kept: Iterable[Mapping[int, Tensor]]) -> Axes:
        """From {dim: keep} of each tensor, in their order."""
        triples = [(keep, i, dim) for i, axes in enumerate(kept) for dim, keep in axes.items()]
        return cls(*map(tuple, zip(*triples, strict=True))) if triples else cls()

    @cached_property
    def kept(self) -> list[int]:
        """How many positions of each axis are kept."""
        counts = {id(keep): int(keep.sum()) for keep in self.keep}
        return [counts[id(keep)] for keep in self.keep]
