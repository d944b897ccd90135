"""A batch of drawn timesteps with their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import EbdiffError

__all__ = ["Timesteps"]


@dataclass(frozen=True, eq=False)
class Timesteps:
    """A batch of timesteps, which unpacks as `t, weight`.

    Args:
        t: int64[B], or float32[B] in continuous time.
        weight: float32[B], what each sample's loss is multiplied with; finite and >= 0 (checked on the CPU only, since
            a check elsewhere would wait for the device).

    Raises:
        EbdiffError: for other dtypes or shapes, or such a weight.
    """

    t: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        t, weight = self.t, self.weight
        dtypes = (t.dtype, weight.dtype)
        known = dtypes in ((torch.int64, torch.float32), (torch.float32, torch.float32))
        if t.dim() != 1 or weight.shape != t.shape or not known:
            raise EbdiffError(
                "no batch of timesteps",
                expected="t int64[B] or float32[B] and weight float32[B]",
                got=f"{t.dtype}{list(t.shape)} and {weight.dtype}{list(weight.shape)}",
                remedy="convert them first",
            )
        if weight.device.type == "cpu" and not bool((weight.isfinite() & (weight >= 0)).all()):
            raise EbdiffError(
                "bad loss weight", expected="finite and >= 0", got=str(weight), remedy="check the sampler"
            )

    @classmethod
    def read(cls, t: Tensor, weight: Tensor) -> Timesteps:
        """From tables that were checked when they were made: checking each batch would take half as long as drawing."""
        batch = object.__new__(cls)
        batch.__dict__.update(t=t, weight=weight)
        return batch

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.t, self.weight))

    def __len__(self) -> int:
        return len(self.t)

    def to(self, device: torch.device | str) -> Timesteps:
        """The same batch on another device."""
        return Timesteps.read(self.t.to(device), self.weight.to(device))
