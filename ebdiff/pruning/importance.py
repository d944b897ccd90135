"""How much each channel matters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from .channel_sums import ChannelSums
from .plan import ChannelPlan

__all__ = ["Method", "importance"]

Method = Literal["magnitude", "magnitude-l1", "taylor", "diff-pruning", "random"]
_FROM_LOSSES = ("taylor", "diff-pruning")


def importance(
    model: nn.Module,
    plan: ChannelPlan,
    method: Method = "magnitude",
    losses: Iterable[Tensor] | None = None,
    *,
    threshold: float = 0.05,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Score every channel of every space; higher is kept longer.

    - "magnitude": sum of squared weights of a channel (L2), "magnitude-l1": sum of absolute weights;
    - "taylor": |sum of w * dL/dw| over a channel's weights (first order, Molchanov et al. 2019), gradients summed over
      `losses`;
    - "diff-pruning": sum of |w * dL/dw|, over `losses` in ascending timestep until one falls below `threshold` times
      the largest so far (Fang et al. 2023, eq. 7);
    - "random": uniform, from `generator`.

    Weights with at least two dimensions count (no biases, no norms); scores are averaged over the slices of a space and
    divided by their mean, so that spaces of different size compare.

    Args:
        model: the traced model.
        plan: its plan.
        method: see above.
        losses: an iterable of scalar losses computed with this model; each is differentiated as it comes, `.grad` is
            left alone. Needed by the two methods that use gradients.

    Returns:
        {space name: float32 [size]}, on the CPU.

    Raises:
        EbdiffError: unknown method, missing or superfluous losses, or a model the plan does not fit.
    """
    plan.check(model)
    if method not in ("magnitude", "magnitude-l1", "random", *_FROM_LOSSES):
        raise EbdiffError("importance", expected=str(Method.__args__), got=repr(method), remedy="choose one")  # type: ignore[attr-defined]
    if (method in _FROM_LOSSES) != (losses is not None):
        expected = "an iterable of scalar losses" if losses is None else "no losses"
        raise EbdiffError(
            f"importance by {method}", expected=expected, got=str(type(losses)), remedy="see its docstring"
        )
    if method == "random":
        return {space.name: torch.rand(space.size, generator=generator) for space in plan}
    sums = ChannelSums(plan)
    weights = {name: p for name, p in model.named_parameters() if name in sums.dims}
    if losses is None:
        return sums.split(sums.of("square" if method == "magnitude" else "absolute", weights))
    gradients = _gradients(weights, losses, threshold if method == "diff-pruning" else 0.0)
    return sums.split(sums.of("product" if method == "taylor" else "absolute product", weights, gradients))


def _gradients(weights: Mapping[str, Tensor], losses: Iterable[Tensor], threshold: float) -> dict[str, Tensor]:
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    largest, count = 0.0, 0
    for loss in losses:
        largest = max(largest, float(loss.detach()))
        if threshold and float(loss.detach()) < threshold * largest:
            break
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, found, strict=True):
            if gradient is not None:
                total[name] += gradient
        count += 1
    if not count:
        raise EbdiffError("importance", expected="at least one loss", got="none", remedy="pass an iterable of losses")
    return total
