"""Group normalisation after pruning: groups of unequal size, or whole groups with channels masked out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import EbdiffError
from ..ops.group_norm_silu import group_norm, membership

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
        self._members: Tensor | None = None  # derived from the sizes; made where it is first needed

    def forward(self, x: Tensor) -> Tensor:
        if len(set(self.group_sizes)) == 1:
            return F.group_norm(x, len(self.group_sizes), self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        if self._members is None or self._members.device != x.device:
            groups = torch.repeat_interleave(torch.arange(len(self.group_sizes)), torch.tensor(self.group_sizes))
            self._members = membership(groups).to(x.device)
        return group_norm(x, self._members, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.group_sizes)} groups over {self.num_channels} channels, eps={self.eps}"


class MaskedGroupNorm(nn.Module):
    """Group normalisation with statistics over the kept channels, zero elsewhere: what RaggedGroupNorm gives, unshrunk.

    Args:
        norm: the nn.GroupNorm or RaggedGroupNorm it stands in for; its weight and bias are taken over.
        groups: int64 [channels], the group of each channel, -1 where it is removed.
    """

    members: Tensor

    def __init__(self, norm: Any, groups: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("members", membership(groups).to(norm.weight.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.members, self.weight, self.bias, self.eps)
