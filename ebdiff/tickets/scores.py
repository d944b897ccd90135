"""Scores of all channels in one pass over the weights, cheap enough to be taken while training runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import exp
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from ..pruning.plan import ChannelPlan

__all__ = ["ChannelSums", "RunningScores", "gradient_scores", "weights_of"]


class ChannelSums:
    """Adds up per-element contributions of weights to per-channel scores, with all index arithmetic done beforehand.

    What `pruning.importance.channel_scores` computes: |sum over a channel| in each slice of a space, mean over the
    slices that belong to weights with at least two dimensions. One transfer from the device for all spaces.
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
            elements: parameter name -> float tensor of its shape, or None where it contributes nothing. Called one by
                one, so that only one such tensor is alive at a time.
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

    def split(self, scores: Tensor, raw: bool = False) -> dict[str, Tensor]:
        """{space name: float32 [size]}: divided by the mean of their space, so that spaces compare, unless `raw`."""
        parts = torch.split(scores, [space.size for space in self.plan])
        named = zip((space.name for space in self.plan), parts, strict=True)
        return {name: (part if raw else part / part.mean().clamp_min(1e-30)).float() for name, part in named}


class RunningScores:
    """A mean of scores in which a sample of n steps ago weighs exp(-n / horizon)."""

    def __init__(self, size: int, horizon: float) -> None:
        self.horizon = horizon
        self.total = torch.zeros(size, dtype=torch.float64)
        self.weight = 0.0
        self.newest = 0

    def add(self, step: int, scores: Tensor) -> None:
        """Take the scores found at `step`."""
        faded = exp(-(step - self.newest) / self.horizon)
        self.total = self.total * faded + scores
        self.weight = self.weight * faded + 1
        self.newest = step

    @property
    def mean(self) -> Tensor | None:
        """float64 [channels], None before the first sample."""
        return self.total / self.weight if self.weight else None

    def facts(self) -> dict[str, Any]:
        """What `load` needs besides the tensor `total`."""
        return {"weight": self.weight, "newest": self.newest}

    def load(self, total: Tensor, facts: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        if total.shape != self.total.shape:
            raise EbdiffError(
                "state of running scores",
                expected=str(list(self.total.shape)),
                got=str(list(total.shape)),
                remedy="resume with the model it was saved with",
            )
        self.total = total.detach().cpu().double().clone()
        self.weight, self.newest = float(facts["weight"]), int(facts["newest"])


def weights_of(model: nn.Module, ema: Any = None) -> dict[str, Tensor]:
    """{name: tensor} of the model's parameters, or of an EMA of them.

    Args:
        model: whose parameters give the names.
        ema: None, a module with the same parameters, or an object with ``shadow_params`` in the order of
            ``model.parameters()`` (diffusers' EMAModel).

    Raises:
        EbdiffError: an EMA of another model.
    """
    named = dict(model.named_parameters())
    if ema is None:
        return {name: weight.detach() for name, weight in named.items()}
    if isinstance(ema, nn.Module):
        found = {name: weight.detach() for name, weight in ema.named_parameters()}
    else:
        found = dict(zip(named, getattr(ema, "shadow_params", ()), strict=False))
    shapes = {name: tuple(weight.shape) for name, weight in named.items()}
    if {name: tuple(weight.shape) for name, weight in found.items()} != shapes:
        raise EbdiffError(
            "this EMA is not of this model",
            expected="a module like the model, or shadow_params in the order of model.parameters()",
            got=type(ema).__name__,
            remedy="pass the EMA of the model that is watched",
        )
    return found


def gradient_scores(sums: ChannelSums, weights: Mapping[str, nn.Parameter]) -> Tensor | None:
    """float64 [all channels]: |sum of w * dL/dw| from the gradients held now (first-order Taylor).

    Gradients scaled for fp16 are taken as they are; None where they hold inf or NaN, or no weight times gradient is
    non-zero (both happen in healthy runs: a skipped fp16 step, a zero-initialised last layer).

    Raises:
        EbdiffError: there are no gradients.
    """

    def element(name: str) -> Tensor | None:
        gradient = weights[name].grad
        return None if gradient is None else weights[name].detach().float() * gradient.float()

    scores = sums.of(element)
    if not torch.isfinite(scores).all():
        return None
    if not scores.any():
        gradients = [weights[name].grad for name in sums.dims]
        if not any(bool(gradient.any()) for gradient in gradients if gradient is not None):
            raise EbdiffError(
                "no gradients to score channels by",
                expected="gradients of the last backward()",
                got="none" if all(gradient is None for gradient in gradients) else "zeros",
                remedy="call step() after backward() and optimizer.step(), before zero_grad()",
            )
        return None
    return scores
