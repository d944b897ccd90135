"""Group normalisation after pruning: groups of unequal size, or whole groups with channels masked out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import EbdiffError
from ..ops.group_norm_silu import Groups, group_norm, groups_from, ragged_group_norm

__all__ = ["MaskedGroupNorm", "RaggedGroupNorm"]


class RaggedGroupNorm(nn.Module):
    """Group normalisation over consecutive groups of any size. State dict keys as nn.GroupNorm: weight, bias.

    Args:
        group_sizes: channels of each group, in order; zeros are dropped.
        eps: added to the variance.

    Shape: [N, C, *] -> [N, C, *], with C the sum of the sizes; statistics in float32 at least.

    Raises:
        EbdiffError: a negative size, or no channel at all.
    """

    def __init__(
        self,
        group_sizes: Sequence[int],
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not sum(group_sizes) or min(group_sizes) < 0:
            raise EbdiffError(
                "RaggedGroupNorm", expected="sizes >= 0, not all 0", got=str(group_sizes), remedy="check them"
            )
        self.group_sizes = tuple(int(size) for size in group_sizes if size)
        self.num_channels = sum(self.group_sizes)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(self.num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(self.num_channels, device=device, dtype=dtype))
        self._groups: Groups | None = None  # derived from the sizes; made where it is first needed

    def forward(self, x: Tensor) -> Tensor:
        if len(set(self.group_sizes)) == 1:
            return F.group_norm(x, len(self.group_sizes), self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        groups = self._groups
        if groups is None or groups.mean.device != x.device or groups.mean.dtype != _statistics_dtype(x):
            groups = self._groups = _groups_like(x, self._group_of_each_channel())
        return ragged_group_norm(x, groups, self.weight, self.bias, self.eps)

    def _group_of_each_channel(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.group_sizes)), torch.tensor(self.group_sizes))

    def extra_repr(self) -> str:
        return f"{len(self.group_sizes)} groups over {self.num_channels} channels, eps={self.eps}"


class MaskedGroupNorm(nn.Module):
    """Group normalisation with statistics over the kept channels, zero elsewhere: what RaggedGroupNorm gives, unshrunk.

    Args:
        norm: the nn.GroupNorm or RaggedGroupNorm it stands in for; its weight and bias are taken over.
        groups: int64 [channels], the group of each channel, -1 where it is removed.
    """

    def __init__(self, norm: Any, groups: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, _groups_like(x, self.groups), self.weight, self.bias, self.eps)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _groups_like(x: Tensor, groups: Tensor) -> Groups:
    made = groups_from(groups, _statistics_dtype(x))
    return Groups(made.mean.to(x.device), made.spread.to(x.device))
