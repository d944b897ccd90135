"""Per-channel sums of all weights in one pass, cheap enough to be taken while training runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .plan import ChannelPlan

__all__ = ["ChannelSums"]


class ChannelSums:
    """Adds up per-element contributions of weights to per-channel scores, with all index arithmetic done beforehand.

    A channel's score is |sum over the channel| in each slice of its space, averaged over the slices that belong to
    weights with at least two dimensions. One transfer from the device for all spaces.
    """

    def __init__(self, plan: ChannelPlan) -> None:
        self.plan = plan
        self.dims = {
            name: tuple(sorted(dims))
            for name, dims in plan.by_parameter.items()
            if len(plan.shapes[name]) > 1 and name not in plan.buffers
        }
        start, at = {}, 0
        for name, dims in self.dims.items():
            for dim in dims:
                start[name, dim] = at
                at += plan.shapes[name][dim]
        self.length = at
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

    @torch.no_grad()
    def of(self, elements: Callable[[str], Tensor | None]) -> Tensor:
        """float64 [all channels], on the CPU: the scores, spaces one after another in the plan's order.

        Args:
            elements: parameter name -> float tensor of its shape (dimensions past the second may be summed over
                already), or None where it contributes nothing. Called one by one, so that only one is alive at a time.
        """
        parts = []
        for name, dims in self.dims.items():
            values = elements(name)
            if values is None:
                parts += [torch.zeros(self.plan.shapes[name][dim]) for dim in dims]
                continue
            if values.dim() > 2 and dims[-1] < 2:
                values = values.sum(tuple(range(2, values.dim())))
            parts += [values.sum([d for d in range(values.dim()) if d != dim]) for dim in dims]
        if not parts:
            return torch.zeros(self.size, dtype=torch.float64)
        device = max((part.device for part in parts), key=lambda d: d.type != "cpu")
        flat = torch.cat([part.to(device) for part in parts]).double().cpu()
        sums = torch.zeros(self._slots, dtype=torch.float64).index_add_(0, self._slot, flat[self._source])
        scores = torch.zeros(self.size, dtype=torch.float64)
        return scores.index_add_(0, self._channel, sums.abs_().mul_(self._share))

    def of_magnitudes(self, weights: Mapping[str, Tensor], power: int) -> Tensor:
        """As `of`, for |w|^power of each weight."""

        def element(name: str) -> Tensor:
            weight = weights[name].detach()
            if weight.dim() == 2 or max(self.dims[name]) > 1:
                return weight.float().abs().pow_(power)
            # The sum over a kernel's positions, without a temporary of the weight's size.
            positions = tuple(range(2, weight.dim()))
            norm: Tensor = torch.linalg.vector_norm(weight, power, positions, dtype=torch.float32)
            return norm.pow_(power)

        return self.of(element)

    def split(self, scores: Tensor, raw: bool = False) -> dict[str, Tensor]:
        """{space name: float32 [size]}: divided by the mean of their space, so that spaces compare, unless `raw`."""
        parts = torch.split(scores, [space.size for space in self.plan])
        named = zip((space.name for space in self.plan), parts, strict=True)
        return {name: (part if raw else part / part.mean().clamp_min(1e-30)).float() for name, part in named}
