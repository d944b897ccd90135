"""Group normalisation for groups of any size, with removed channels left out.

`group_norm` is the specification, differentiable to any order. `ragged_group_norm` computes the same in fewer passes
over memory and saves nothing but its input and per-channel statistics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Groups", "group_norm", "groups_from", "ragged_group_norm"]


class Groups(NamedTuple):
    """Which channels share statistics, as two matrices.

    Args:
        mean: [C, G], 1 / (size of the group) where a channel belongs to it, 0 elsewhere.
        spread: [G, C], 1 where a channel belongs to the group, 0 elsewhere; removed channels belong to none.
    """

    mean: Tensor
    spread: Tensor

    def over(self, per_channel: Tensor) -> Tensor:
        """[N, C] -> [N, C]: each channel's value averaged over its group."""
        return per_channel @ self.mean @ self.spread

    @property
    def kept(self) -> Tensor:
        """[C]: 1 for kept channels, 0 for removed ones."""
        return self.spread.sum(0)


def groups_from(groups: Tensor, dtype: torch.dtype = torch.float32) -> Groups:
    """From int64 [C], the group of each channel, -1 where it is removed. Empty groups are dropped."""
    present = groups.unique()
    table = (groups[:, None] == present[present >= 0]).double()
    return Groups((table / table.sum(0)).to(dtype), table.T.to(dtype).contiguous())


def group_norm(x: Tensor, groups: Groups, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group normalisation with statistics over the kept channels of each group; removed channels become zero.

    Statistics are computed in two steps, centred, in float32 at least. Equal to torch.nn.functional.group_norm where
    all groups are whole and of equal size.

    Args:
        x: [N, C, *], floating.
        groups: of the C channels, in float32 (float64 for float64 x).
        weight, bias: [C].
        eps: added to the variance.

    Returns:
        [N, C, *] in x's dtype and memory format.
    """
    wide, weight, bias, shape, spatial = _wide(x, weight, bias)
    centred = wide - groups.over(wide.mean(spatial) if spatial else wide).view(shape)
    squared = centred.square()
    variance = groups.over(squared.mean(spatial) if spatial else squared)
    scale = (variance + eps).rsqrt() * (weight * groups.kept)
    return torch.addcmul((bias * groups.kept).view(1, *shape[1:]), centred, scale.view(shape)).to(x.dtype)


def ragged_group_norm(x: Tensor, groups: Groups, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`group_norm` where every channel belongs to a group, in fewer passes."""
    result: Tensor = _RaggedGroupNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, groups.mean, groups.spread, eps
    )
    return result


def _wide(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...], list[int]]:
    """Everything in float32 at least; [N, C, 1...], and the dimensions that statistics run over."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = (*x.shape[:2], *[1] * (x.dim() - 2))
    return x.to(dtype), weight.to(dtype), bias.to(dtype), shape, list(range(2, x.dim()))


def _is_channels_last(x: Tensor) -> bool:
    """Is it channels_last beyond doubt? With a size of 1, strides may say so to torch and not to ATen's kernel."""
    if x.dim() != 4 or min(x.shape[1:]) < 2 or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    return x.stride(0) == x.shape[1:].numel()


_TINY = 1e-30  # keeps a constant channel's own normalisation finite; far below the variance of any other


class _RaggedGroupNorm(torch.autograd.Function):
    """Channel moments by torch's own instance norm, combined into group moments (Chan et al. 1979)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean_of: Tensor, spread: Tensor, eps: float
    ) -> Tensor:
        groups = Groups(mean_of, spread)
        wide, weight_, bias_, shape, _ = _wide(x, weight, bias)
        batch, channels = x.shape[:2]
        positions = x.shape[2:].numel()
        rows = wide if _is_channels_last(wide) else wide.contiguous().view(batch, channels, positions)
        own, mean, own_rstd = torch.native_group_norm(rows, None, None, batch, channels, positions, channels, _TINY)
        own = own.view(x.shape)
        mean, deviation = mean.view(batch, channels), own_rstd.view(batch, channels).reciprocal()
        centre = groups.over(mean)
        rstd = (groups.over(deviation.square() + (mean - centre).square()) + eps).rsqrt()
        scale = rstd * weight_
        ctx.save_for_backward(x, weight, bias, mean_of, spread, centre, rstd)
        ctx.eps = eps
        # x - centre = own * deviation + (mean - centre): centred without another pass over x
        shift = torch.addcmul(bias_, mean - centre, scale)
        return own.mul_((deviation * scale).view(shape)).add_(shift.view(shape)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients
        x, weight, bias, mean_of, spread, centre, rstd = ctx.saved_tensors
        groups = Groups(mean_of, spread)
        if torch.is_grad_enabled():  # a second derivative is asked for: differentiate the specification
            y = group_norm(x, groups, weight, bias, ctx.eps)
            return *torch.autograd.grad(y, (x, weight, bias), dy, create_graph=True), None, None, None
        wide, weight_, _, shape, spatial = _wide(x, weight, bias)
        dy = dy.to(wide.dtype)
        centred = wide - centre.view(shape)
        sum_dy = dy.sum(spatial) if spatial else dy
        sum_dy_x = (dy * centred).sum(spatial) if spatial else dy * centred
        positions = x.shape[2:].numel()
        from_mean = groups.over(weight_ * sum_dy) / positions * rstd
        from_variance = groups.over(weight_ * sum_dy_x) / positions * rstd.pow(3)
        dx = torch.addcmul(-from_mean.view(shape), centred, -from_variance.view(shape))
        dx.addcmul_(dy, (weight_ * rstd).view(shape))
        dweight, dbias = (sum_dy_x * rstd).sum(0).to(weight.dtype), sum_dy.sum(0).to(bias.dtype)
        return dx.to(x.dtype), dweight, dbias, None, None, None
