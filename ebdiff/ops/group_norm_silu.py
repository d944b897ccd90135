"""Group normalisation for groups of any size, with removed channels left out: the reference in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["group_norm", "membership"]


def membership(groups: Tensor) -> Tensor:
    """float64 [channels, groups]: 1 / (size of the group) where a channel belongs to it, 0 elsewhere.

    Args:
        groups: int64 [channels], the group of each channel, -1 where the channel is removed. Empty groups are dropped.
    """
    present = groups.unique()
    table: Tensor = (groups[:, None] == present[present >= 0]).double()
    return table / table.sum(0)


def group_norm(x: Tensor, members: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group normalisation with statistics over the kept channels of each group; removed channels become zero.

    Statistics are computed in two steps, centred, in float32 at least. Equal to torch.nn.functional.group_norm where
    all groups are whole and of equal size.

    Args:
        x: [N, C, *], floating.
        members: float64 [C, G] as `membership` gives; a channel without a group is removed.
        weight, bias: [C].
        eps: added to the variance.

    Returns:
        [N, C, *] in x's dtype and memory format.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    members = members.to(wide.dtype)
    alive = (members > 0).to(wide.dtype)
    spatial = list(range(2, x.dim()))
    shape = (*x.shape[:2], *[1] * len(spatial))

    def per_channel(statistic: Tensor) -> Tensor:
        """[N, C] channel means -> [N, C, 1...] means over each channel's group."""
        return (statistic @ members @ alive.T).reshape(shape)

    centred = wide - per_channel(wide.mean(spatial) if spatial else wide)
    variance = per_channel(centred.square().mean(spatial) if spatial else centred.square())
    affine = (1, -1, *[1] * len(spatial))
    kept = alive.sum(1).reshape(affine)
    scale = (variance + eps).rsqrt() * (weight.to(wide.dtype).reshape(affine) * kept)
    return torch.addcmul(bias.to(wide.dtype).reshape(affine) * kept, centred, scale).to(x.dtype)
