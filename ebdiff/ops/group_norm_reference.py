"""What `group_norm_silu` computes, in plain torch: the specification, and what serves where no kernel does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .dispatch import is_listened_to

__all__ = ["Gradients", "Norm", "backward", "forward", "group_norm_silu"]

Gradients: TypeAlias = tuple[Tensor | None, ...]  # of x, weight, bias, scale, shift, time_bias


class Norm(NamedTuple):
    """All arguments of `group_norm_silu` but x. Arguments have been checked.

    Args:
        weight, bias: [C], or None for 1 and 0.
        scale, shift: [N, C], or None for 0.
        time_bias: [N, C], added to x, or None.
        keep: bool [C], True = KEPT, or None for all.
        offsets: where the groups begin, and C: [G + 1], from 0, not falling.
        eps: added to the variance.
        silu: apply SiLU at the end.
    """

    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    time_bias: Tensor | None
    keep: Tensor | None
    offsets: tuple[int, ...]
    eps: float
    silu: bool

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those that gradients flow to: weight, bias, scale, shift, time_bias."""
        return self[:5]


def forward(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """y, laid out as x; mean and 1 / sqrt(variance + eps) of each group: [N, G], float32 at least.

    0 and 1 / sqrt(eps) for a group without a kept channel.
    """
    wide, spatial = _wide(x, norm)
    mean, rstd = _statistics(wide, norm, spatial)
    y = _parts(wide, norm, mean, rstd, spatial)[2]
    return torch.empty_like(x).copy_(y.view(x.shape)), mean, rstd


def group_norm_silu(x: Tensor, norm: Norm) -> Tensor:
    """`forward`'s y, differentiable to any order."""
    wide, spatial = _wide(x, norm)
    return _parts(wide, norm, *_statistics(wide, norm, spatial), spatial)[2].view(x.shape).to(x.dtype)


def backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, needs: Sequence[bool]) -> Gradients:
    """Gradients of x, weight, bias, scale, shift and time_bias, laid out as these; None where none is needed.

    With dz = dy * silu'(z), p = weight * (1 + scale) * rstd, n = (x - mean) * rstd and means over the kept of the
    group: dx = p * dz - mean(p * dz) - n * mean(p * dz * n). The means use p as it is rounded, so that dx is 0 where a
    group is one element.
    """
    wide, spatial = _wide(x, norm)
    normalised, z, _ = _parts(wide, norm, mean, rstd, spatial)
    dz = dy.to(wide.dtype).reshape(wide.shape)
    if norm.silu:
        sigmoid = z.sigmoid()
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    dz = _kept(dz, norm, spatial)
    sum_dz, sum_dz_n = dz.sum(spatial), (dz * normalised).sum(spatial)
    weight, bias, one_plus = _affine(norm, wide)
    p = weight * one_plus * rstd[:, _group_of(norm, rstd.device)]
    means = (_spread(_over_groups(p * sums, norm, wide), norm, spatial) for sums in (sum_dz, sum_dz_n))
    dx = _kept(_per_channel(p, spatial) * dz - next(means) - normalised * next(means), norm, spatial)
    found = (
        dx,
        (one_plus * sum_dz_n).sum(0),
        (one_plus * sum_dz).sum(0),
        weight * sum_dz_n + bias * sum_dz,
        sum_dz,
        dx.sum(spatial),
    )
    return tuple(
        torch.empty_like(tensor).copy_(gradient.view(tensor.shape)) if need and tensor is not None else None
        for gradient, tensor, need in zip(found, (x, *norm.tensors), needs, strict=True)
    )


# In float32 at least; `spatial`: the dimensions behind C --------------------------------------------------------------


def _wide(x: Tensor, norm: Norm) -> tuple[Tensor, list[int]]:
    """x, with its time_bias and with zeros in removed channels, whatever they held; [N, C] gets a position."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide[..., None] if wide.dim() == 2 else wide
    spatial = list(range(2, wide.dim()))
    if norm.time_bias is not None:
        wide = wide + _per_channel(norm.time_bias.to(wide.dtype), spatial)
    return _kept(wide, norm, spatial), spatial


def _kept(value: Tensor, norm: Norm, spatial: list[int]) -> Tensor:
    return value if norm.keep is None else torch.where(_per_channel(norm.keep, spatial), value, 0)


def _statistics(wide: Tensor, norm: Norm, spatial: list[int]) -> tuple[Tensor, Tensor]:
    """In two steps, centred."""
    mean = _over_groups(wide.sum(spatial), norm, wide)
    centred = _centred(wide, norm, mean, spatial)
    return mean, (_over_groups(centred.square().sum(spatial), norm, wide) + norm.eps).rsqrt()


def _centred(wide: Tensor, norm: Norm, mean: Tensor, spatial: list[int]) -> Tensor:
    """x - mean, and less what the mean has lost to rounding, which is large where x is far from 0."""
    near = _kept(wide - _spread(mean, norm, spatial), norm, spatial)
    left = _over_groups(near.sum(spatial), norm, wide)
    return _kept(near - _spread(left, norm, spatial), norm, spatial)


def _parts(wide: Tensor, norm: Norm, mean: Tensor, rstd: Tensor, spatial: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) * rstd; z, what SiLU is applied to; and y."""
    weight, bias, one_plus = _affine(norm, wide)
    normalised = _centred(wide, norm, mean, spatial) * _spread(rstd, norm, spatial)
    offset = bias * one_plus if norm.shift is None else bias * one_plus + norm.shift.to(wide.dtype)
    z = normalised * _per_channel(weight * one_plus, spatial) + _per_channel(offset, spatial)
    return normalised, z, _kept(torch.nn.functional.silu(z) if norm.silu else z, norm, spatial)


def _affine(norm: Norm, wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight and bias, [C]; 1 + scale, [N, C] or [1, C]."""
    weight = wide.new_ones(wide.shape[1]) if norm.weight is None else norm.weight.to(wide.dtype)
    bias = wide.new_zeros(wide.shape[1]) if norm.bias is None else norm.bias.to(wide.dtype)
    one_plus = wide.new_ones(1, wide.shape[1]) if norm.scale is None else 1 + norm.scale.to(wide.dtype)
    if norm.keep is not None:  # whatever removed ones hold
        weight, bias, one_plus = (torch.where(norm.keep, value, 0) for value in (weight, bias, one_plus))
    return weight, bias, one_plus


def _group_of(norm: Norm, device: torch.device) -> Tensor:
    """int64 [C]: the group of each channel."""
    if is_listened_to():
        return _made_group_of.__wrapped__(norm.offsets, device)  # may not be real, so it is not to be kept
    return _made_group_of(norm.offsets, device)


@lru_cache(maxsize=256)
def _made_group_of(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    sizes = torch.tensor(offsets, device=device).diff()
    return torch.repeat_interleave(sizes, output_size=offsets[-1])


def _over_groups(sums: Tensor, norm: Norm, wide: Tensor) -> Tensor:
    """[N, C] sums over positions -> [N, G] means over the kept channels of each group, 0 where there are none.

    Without index_add, whose order of additions is left to chance on a GPU.
    """
    member = _group_of(norm, sums.device) == torch.arange(len(norm.offsets) - 1, device=sums.device)[:, None]
    if norm.keep is not None:
        member = member & norm.keep
    size = member.sum(1) * wide.shape[2:].numel()
    return torch.where(member, sums[:, None], 0).sum(2) / size.clamp(min=1)


def _spread(per_group: Tensor, norm: Norm, spatial: list[int]) -> Tensor:
    """[N, G] -> [N, C, 1...]."""
    return _per_channel(per_group[:, _group_of(norm, per_group.device)], spatial)


def _per_channel(value: Tensor, spatial: list[int]) -> Tensor:
    """[N, C] or [C] -> [N or 1, C, 1...]."""
    value = value if value.dim() == 2 else value[None]
    return value[(..., *[None] * len(spatial))]
