"""The compiled part's group normalisation on the CPU. Arguments have been checked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .group_norm_reference import Gradients, Norm
from .native_cpu import NotTaken

__all__ = ["backward", "forward"]


def forward(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """As `group_norm_reference.forward`."""
    raise NotTaken("not written yet")


def backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, needs: Sequence[bool]) -> Gradients:
    """As `group_norm_reference.backward`."""
    raise NotTaken("not written yet")
