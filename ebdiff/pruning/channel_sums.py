"""Per-channel sums of all weights in one pass, cheap enough to be taken while training runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ops.channel_mask import channel_sums
from ..ops.channel_mask_reference import Kind
from .plan import ChannelPlan

__all__ = ["ChannelSums", "Kind"]


class ChannelSums:
    """Adds up per-element contributions of weights to per-channel scores, with all index arithmetic done beforehand.

    A channel's score is |sum over the channel| in each slice of its space, averaged over the slices that belong to
    weights with at least two dimensions. One pass over the weights, and one transfer from each device.
    """

    def __init__(self, plan: ChannelPlan) -> None:
        self.plan = plan
        self.dims = {
            name: tuple(sorted(dims))
            for name, dims in plan.by_parameter.items()
            if len(plan.shapes[name]) > 1 and name not in plan.buffers
        }
        start: dict[tuple[str, int], int] = {}
        at = 0
        for name, dims in self.dims.items():
            for dim in dims:
                start[name, dim] = at
                at += plan.shapes[name][dim]
        self.length, self._start = at, start
        source, slot, channel, share, first, slots = [], [], [], [], 0, 0
        for space in plan:
            slices = [member for member in space.members if (member.parameter, member.dim) in start]
            for member in slices:
                positions = start[member.parameter, member.dim] + member.positions(space.size)
                source.append(positions.flatten())
                slot.append((slots + torch.arange(space.size)[:, None]).expand_as(positions).flatten())
                channel.append(first + torch.arange(space.size))
                share.append(torch.full((space.size,), 1 / len(slices), dtype=torch.float64))
                slots += space.size
            first += space.size
        empty = torch.empty(0, dtype=torch.int64)
        self.size, self._slots = first, slots
        self._source, self._slot, self._channel = (torch.cat([empty, *parts]) for parts in (source, slot, channel))
        self._share = torch.cat([empty.double(), *share])

    def of(self, kind: Kind, x: Mapping[str, Tensor], y: Mapping[str, Tensor] | None = None) -> Tensor:
        """float64 [all channels], on the CPU: the scores, spaces one after another in the plan's order.

        Args:
            kind: what is added up: "square" or "absolute" of x, "product" or "absolute product" of x and y.
            x, y: parameter name -> floating tensor of its shape. A parameter that one of them lacks adds nothing.
        """
        names = [name for name in self.dims if name in x and (y is None or name in y)]
        flat = torch.zeros(self.length, dtype=torch.float64)
        for device in {x[name].device for name in names}:
            here = [name for name in names if x[name].device == device]
            pairs = [(i, name, dim) for i, name in enumerate(here) for dim in self.dims[name]]
            others = [] if y is None else [y[name].detach() for name in here]
            owner, dims = [i for i, _, _ in pairs], [dim for *_, dim in pairs]
            sums = channel_sums([x[name].detach() for name in here], others, owner, dims, kind)
            lengths = [self.plan.shapes[name][dim] for _, name, dim in pairs]
            for (_, name, dim), part in zip(pairs, torch.split(sums, lengths), strict=True):
                flat[self._start[name, dim] :][: len(part)] = part
        slots = torch.zeros(self._slots, dtype=torch.float64).index_add_(0, self._slot, flat[self._source])
        scores = torch.zeros(self.size, dtype=torch.float64)
        return scores.index_add_(0, self._channel, slots.abs_().mul_(self._share))

    def split(self, scores: Tensor, raw: bool = False) -> dict[str, Tensor]:
        """{space name: float32 [size]}: divided by the mean of their space, so that spaces compare, unless `raw`."""
        parts = torch.split(scores, [space.size for space in self.plan])
        named = zip((space.name for space in self.plan), parts, strict=True)
        return {name: (part if raw else part / part.mean().clamp_min(1e-30)).float() for name, part in named}
