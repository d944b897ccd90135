"""Which axes of a list of tensors are masked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .dispatch import is_listened_to

__all__ = ["Axes"]


@dataclass(frozen=True)
class Axes:
    """The masked axes of a list of tensors, as triples; True = KEPT.

    The masks are copied, so what has been found out about them holds for the next call with the same `Axes` too; but
    not under torch.compile and the like.

    Args:
        keep: bool [size of the dimension], on the CPU.
        owner: the number of the tensor in the list.
        dims: its dimension.
    """

    keep: tuple[Tensor, ...] = ()
    owner: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    _kept: list[int] | None = field(default=None, init=False, repr=False, compare=False)
    _is_own: bool = field(default=False, init=False, repr=False, compare=False)
    _found: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not is_listened_to() and all(type(keep) is Tensor for keep in self.keep):
            copies = {id(keep): keep.detach().clone(memory_format=torch.contiguous_format) for keep in self.keep}
            object.__setattr__(self, "keep", tuple(copies[id(keep)] for keep in self.keep))
            object.__setattr__(self, "_is_own", True)

    @classmethod
    def of(cls, kept: Iterable[Mapping[int, Tensor]]) -> Axes:
        """From {dim: keep} of each tensor, in their order."""
        triples = [(keep, i, dim) for i, axes in enumerate(kept) for dim, keep in axes.items()]
        return cls(*map(tuple, zip(*triples, strict=True))) if triples else cls()

    def __reduce__(self) -> tuple[type[Axes], tuple[Any, ...]]:
        return Axes, self.triples

    @property
    def kept(self) -> list[int]:
        """How many positions of each axis are kept, counted once. A plain attribute, which torch.compile can guard."""
        if self._kept is None:
            counts = {id(keep): int(keep.sum()) for keep in self.keep}
            object.__setattr__(self, "_kept", [counts[id(keep)] for keep in self.keep])
        return self._kept or []

    @property
    def triples(self) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[int, ...]]:
        """As the operators take them: keep, owner, dims."""
        return self.keep, self.owner, self.dims

    def known(self, what: str, of: Any) -> Any:
        """What `remember` was told of `what` last, if that was for tensors like these; else None."""
        found = self._found.get(what)
        return found[1] if found is not None and found[0] == of else None

    def remember(self, what: str, of: Any, value: Any) -> None:
        """Keep a value for `known`, in the place of the last one."""
        if self._is_own:
            self._found[what] = (of, value)
