"""Group normalisation as layers: with SiLU, with groups of unequal size, with channels masked out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from ..ops.dispatch import is_listened_to
from ..ops.group_norm import group_norm_silu

__all__ = ["GroupNormSiLU", "MaskedGroupNorm", "RaggedGroupNorm", "Settings", "settings_of"]


class GroupNormSiLU(nn.GroupNorm):
    """nn.GroupNorm followed by SiLU, in one pass. Same parameters, same state dict keys.

    Shape: [N, C, *] -> [N, C, *] in x's dtype and memory format; statistics in float32 at least. The other arguments of
    its forward are those of `ebdiff.ops.group_norm_silu`: [N, C] each.
    """

    silu = True

    def forward(self, x: Tensor, **modulation: Tensor | None) -> Tensor:  # type: ignore[override]
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, eps=self.eps, silu=True, **modulation)


class RaggedGroupNorm(nn.Module):
    """Group normalisation over consecutive groups of any size. State dict keys as nn.GroupNorm: weight, bias.

    Args:
        group_sizes: channels of each group, in order; zeros are dropped.
        eps: added to the variance.
        silu: apply SiLU at the end.

    Shape: as `GroupNormSiLU`, with C the sum of the sizes.

    Raises:
        EbdiffError: a negative size, or no channel at all.
    """

    silu = False  # of files that were written before there was a choice

    def __init__(
        self,
        group_sizes: Sequence[int],
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        silu: bool = False,
    ) -> None:
        super().__init__()
        if not sum(group_sizes) or min(group_sizes) < 0:
            raise EbdiffError(
                "RaggedGroupNorm", expected="sizes >= 0, not all 0", got=str(group_sizes), remedy="check them"
            )
        self.group_sizes = tuple(int(size) for size in group_sizes if size)
        self.num_channels = sum(self.group_sizes)
        self.eps = eps
        self.silu = silu
        self.weight = nn.Parameter(torch.ones(self.num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(self.num_channels, device=device, dtype=dtype))

    def forward(self, x: Tensor, **modulation: Tensor | None) -> Tensor:
        offsets = [0, *accumulate(self.group_sizes)]
        return group_norm_silu(x, self.weight, self.bias, offsets, eps=self.eps, silu=self.silu, **modulation)

    def extra_repr(self) -> str:
        return f"{len(self.group_sizes)} groups over {self.num_channels} channels, eps={self.eps}"


class MaskedGroupNorm(nn.Module):
    """Group normalisation with statistics over the kept channels, zero elsewhere: what RaggedGroupNorm gives, unshrunk.

    Args:
        norm: the nn.GroupNorm, GroupNormSiLU or RaggedGroupNorm it stands in for; its weight and bias are taken over.
        groups: int64 [channels], the group of each channel, -1 where it is removed; those of kept channels do not fall.

    Raises:
        EbdiffError: groups of kept channels that fall.
    """

    def __init__(self, norm: Any, groups: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.silu: bool = getattr(norm, "silu", False)
        self.num_channels = len(groups)  # a forward may cut at the width of its norm
        kept = groups[groups >= 0]
        if (kept.diff() < 0).any():
            raise EbdiffError("groups", expected="rising ones", got=str(kept.tolist()), remedy="sort the channels")
        belongs = groups.cummax(0).values.clamp(min=0)  # a removed channel goes with those before it
        self.offsets = [0, *accumulate(torch.bincount(belongs).tolist())]
        self.keep = groups >= 0  # no buffer: it is neither state, nor to be cast with the rest

    def forward(self, x: Tensor, **modulation: Tensor | None) -> Tensor:
        if self.keep.device != x.device and not is_listened_to():
            self.keep = self.keep.to(x.device)  # for the next call too
        keep = self.keep.to(x.device)
        settings: dict[str, Any] = {"keep": keep, "eps": self.eps, "silu": self.silu, **modulation}
        return group_norm_silu(x, self.weight, self.bias, self.offsets, **settings)


class Settings(NamedTuple):
    """What the operator needs to know of a layer."""

    weight: Tensor | None
    bias: Tensor | None
    groups: int | Sequence[int]
    keep: Tensor | None
    eps: float


def settings_of(norm: nn.Module) -> Settings | None:
    """Those of an nn.GroupNorm or of a layer of this module that applies no SiLU; None of anything else."""
    if type(norm) is nn.GroupNorm:
        return Settings(norm.weight, norm.bias, norm.num_groups, None, norm.eps)
    if getattr(norm, "silu", False):
        return None
    if type(norm) is RaggedGroupNorm:
        return Settings(norm.weight, norm.bias, [0, *accumulate(norm.group_sizes)], None, norm.eps)
    if type(norm) is MaskedGroupNorm:
        return Settings(norm.weight, norm.bias, norm.offsets, norm.keep.to(norm.weight.device), norm.eps)
    return None
