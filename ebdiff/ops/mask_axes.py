"""Which axes of a list of tensors are masked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

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
    _kept: list[int] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, kept: Iterable[Mapping[int, Tensor]]) -> Axes:
        """From {dim: keep} of each tensor, in their order."""
        triples = [(keep, i, dim) for i, axes in enumerate(kept) for dim, keep in axes.items()]
        return cls(*map(tuple, zip(*triples, strict=True))) if triples else cls()

    @property
    def kept(self) -> list[int]:
        """How many positions of each axis are kept, counted once. A plain attribute, which torch.compile can guard."""
        if self._kept is None:
            counts = {id(keep): int(keep.sum()) for keep in self.keep}
            object.__setattr__(self, "_kept", [counts[id(keep)] for keep in self.keep])
        return self._kept or []
