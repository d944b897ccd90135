"""Regions of timesteps: [lo, hi) half-open, whole numbers, and partitions that tile [0, T) with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import EbdiffError
from ..numbers import as_real, as_whole

__all__ = ["Partition", "Region"]


def _whole(value: Any, what: str) -> int:
    """`value` as an int. A float, a bool or a string is refused, a numpy or 0-d torch integer is not."""
    found = as_whole(value)
    if found is None:
        raise EbdiffError(f"{what} is no timestep", expected="a whole number", got=repr(value), remedy="pass an int")
    return found


@dataclass(frozen=True)
class Region:
    """The timesteps t with lo <= t < hi, where t = 0 is the least noisy.

    Raises:
        EbdiffError: unless lo and hi are whole numbers with 0 <= lo < hi.
    """

    lo: int
    hi: int

    def __post_init__(self) -> None:
        for name in ("lo", "hi"):
            object.__setattr__(self, name, _whole(getattr(self, name), f"Region's {name}"))
        if not 0 <= self.lo < self.hi:
            raise EbdiffError("no such region", expected="0 <= lo < hi", got=str(self), remedy="hi is exclusive")

    def __len__(self) -> int:
        return self.hi - self.lo

    def __contains__(self, t: object) -> bool:
        real = as_real(t)
        return real is not None and self.lo <= real < self.hi

    def __str__(self) -> str:
        return f"[{self.lo}, {self.hi})"

    def widened(self, overlap: int, limit: int) -> Region:
        """The region to train on: `overlap` more timesteps upward, never past `limit` (usually T).

        EB-Diff-Train widens the lower regions by 20, so that the networks agree where they hand over.

        Raises:
            EbdiffError: for a negative overlap, or a region that already ends past the limit.
        """
        if overlap < 0 or self.hi > limit:
            raise EbdiffError(
                f"cannot widen {self}",
                expected=f"overlap >= 0 and a limit >= {self.hi}",
                got=f"overlap {overlap}, limit {limit}",
                remedy="the limit is the schedule's number of timesteps",
            )
        return Region(self.lo, min(self.hi + overlap, limit))

    def to_json(self) -> list[int]:
        """[lo, hi], what `from_json` reads."""
        return [self.lo, self.hi]

    @classmethod
    def from_json(cls, value: Sequence[int]) -> Region:
        """The region of a pair [lo, hi]."""
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
            raise EbdiffError("no region", expected="a pair [lo, hi]", got=repr(value), remedy="for example [240, 440]")
        return cls(*value)


@dataclass(frozen=True, init=False)
class Partition:
    """Regions that tile [0, T) exactly, in ascending t: `Partition(0, 240, 440, 1000)` has three.

    Raises:
        EbdiffError: unless the bounds are at least two whole numbers that start at 0 and rise.
    """

    bounds: tuple[int, ...]

    def __init__(self, *bounds: int) -> None:
        bounds = tuple(_whole(bound, "Partition's bound") for bound in bounds)
        if len(bounds) < 2 or bounds[0] != 0 or any(lo >= hi for lo, hi in pairwise(bounds)):
            raise EbdiffError(
                "no partition",
                expected="at least two bounds that start at 0 and rise",
                got=", ".join(map(str, bounds)) or "none",
                remedy="for example Partition(0, 240, 440, 1000)",
            )
        object.__setattr__(self, "bounds", bounds)

    @classmethod
    def paper(cls) -> Partition:
        """EB-Diff-Train's three regions of 1000 timesteps: [0, 240), [240, 440), [440, 1000)."""
        return cls(0, 240, 440, 1000)

    @classmethod
    def of(cls, regions: Iterable[Region | Sequence[int]], T: int | None = None) -> Partition:
        """The partition that consists of these regions or [lo, hi] pairs, in this order.

        They are not sorted: networks are listed in the same order, and sorting only one of the two would swap them.

        Raises:
            EbdiffError: where the regions overlap, leave a gap, or do not end at `T` when it is given.
        """
        tiles = [tile if isinstance(tile, Region) else Region.from_json(tile) for tile in regions]
        end = 0
        for number, tile in enumerate(tiles):
            if tile.lo != end:
                raise EbdiffError(
                    f"the regions overlap at {tile}"
                    if tile.lo < end
                    else f"the regions leave a gap [{end}, {tile.lo})",
                    expected=f"region {number} to start at {end}",
                    got=str(tile),
                    remedy="list them in ascending order, without overlap (training overlap is Region.widened's)",
                )
            end = tile.hi
        if T is not None and end != T:
            raise EbdiffError(
                "the regions do not tile the schedule",
                expected=f"[0, {T})",
                got=f"[0, {end})",
                remedy="end the last region where the schedule ends",
            )
        return cls(0, *(tile.hi for tile in tiles))

    @property
    def T(self) -> int:
        """The number of timesteps: the regions tile [0, T)."""
        return self.bounds[-1]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[Region]:
        return (Region(lo, hi) for lo, hi in pairwise(self.bounds))

    def __getitem__(self, index: int) -> Region:
        return list(self)[index]

    def __str__(self) -> str:
        return " ".join(map(str, self))

    def index(self, t: float) -> int:
        """The number of the region that holds `t`.

        Raises:
            EbdiffError: for t outside [0, T).
        """
        if not 0 <= t < self.T:
            raise EbdiffError(
                "timestep outside the partition", expected=f"0 <= t < {self.T}", got=str(t), remedy="check the schedule"
            )
        return sum(bool(t >= bound) for bound in self.bounds[1:])

    def of_t(self, t: Tensor) -> Tensor:
        """The number of the region that holds each timestep: any shape and dtype -> int64 of the same shape.

        Timesteps outside [0, T) count to the nearest region: checking them would wait for the device.
        """
        dtype = torch.float64 if t.is_floating_point() else torch.int64
        inner = torch.tensor(self.bounds[1:-1], dtype=dtype, device=t.device)
        return torch.bucketize(t.to(dtype), inner, right=True)

    def to_json(self) -> list[int]:
        """The bounds, what `from_json` reads."""
        return list(self.bounds)

    @classmethod
    def from_json(cls, value: Sequence[int]) -> Partition:
        """The partition of a list of bounds."""
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise EbdiffError("no partition", expected="a list of bounds", got=repr(value), remedy="as [0, 240, 1000]")
        return cls(*value)
