"""How much each channel matters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from .channel_sums import ChannelSums, Kind
from .plan import ChannelPlan

__all__ = ["THRESHOLD", "Gradients", "Method", "importance"]

Method = Literal["magnitude", "magnitude-l1", "taylor", "diff-pruning", "random"]
_FROM_LOSSES = ("taylor", "diff-pruning")
THRESHOLD = 0.05  # of Diff-Pruning


def importance(
    model: nn.Module,
    plan: ChannelPlan,
    method: Method = "magnitude",
    losses: Iterable[Tensor] | None = None,
    *,
    threshold: float = THRESHOLD,
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
        EbdiffError: unknown method, missing or superfluous losses, losses that are no scalars or that no weight of this
            model has a gradient of, or a model the plan does not fit.
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
    if losses is None:
        sums = ChannelSums(plan)
        return sums.split(sums.of("square" if method == "magnitude" else "absolute", dict(model.named_parameters())))
    gradients = Gradients(model, plan, threshold if method == "diff-pruning" else 0.0)
    for loss in [losses] if isinstance(losses, Tensor) and not losses.dim() else losses:
        if not gradients.add(loss):
            break
    return gradients.scores(method)


class Gradients:
    """The gradients of losses that come one by one, added up, and the scores they make; see `importance`.

    Args:
        model: the traced model.
        plan: its plan.
        threshold: a loss below so much of the largest so far is the end: it is not added.

    Attributes:
        total: {parameter: the sum of its gradients}.
        largest: of all losses.
        count: how many were added.
    """

    def __init__(self, model: nn.Module, plan: ChannelPlan, threshold: float = 0.0) -> None:
        self._sums, self.threshold = ChannelSums(plan), threshold
        self._weights = {name: p for name, p in model.named_parameters() if name in self._sums.dims}
        self.total = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}
        self.largest, self.count = 0.0, 0

    def add(self, loss: Tensor) -> bool:
        """Differentiate a loss, `.grad` is left alone; False where it is the end.

        Raises:
            EbdiffError: it is no scalar with a graph that leads to this model.
        """
        trained = {name: weight for name, weight in self._weights.items() if weight.requires_grad}
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad or not trained:
            shown = (
                f"{list(loss.shape)}, requires_grad: {loss.requires_grad}" if isinstance(loss, Tensor) else repr(loss)
            )
            raise EbdiffError(
                "importance by gradients",
                expected="scalar losses with a graph, of a model that requires gradients",
                got=shown,
                remedy="compute them from model(...), without no_grad",
            )
        value = float(loss.detach())
        self.largest = max(self.largest, value)
        if self.threshold and value < self.threshold * self.largest:
            return False
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        if all(gradient is None for gradient in found):
            raise EbdiffError(
                "importance by gradients",
                expected="losses of this model",
                got="one that none of its weights has a gradient of",
                remedy="compute them with the model that was passed",
            )
        for name, gradient in zip(trained, found, strict=True):
            if gradient is not None:
                self.total[name] += gradient
        self.count += 1
        return True

    def scores(self, method: Method) -> dict[str, Tensor]:
        """By "taylor" or "diff-pruning": {space name: float32 [size]}, on the CPU.

        Raises:
            EbdiffError: no loss was added.
        """
        if not self.count:
            raise EbdiffError("importance", expected="at least one loss", got="none", remedy="give it losses")
        kind: Kind = "product" if method == "taylor" else "absolute product"
        return self._sums.split(self._sums.of(kind, self._weights, self.total))
