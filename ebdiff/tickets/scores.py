"""Scores that are taken while training runs: from the gradients at hand, and as running means."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from ..pruning.channel_sums import ChannelSums
from ..pruning.training_state import held_by

__all__ = ["RunningScores", "gradient_scores", "weights_of"]


class RunningScores:
    """A mean of scores in which a sample of n steps ago weighs exp(-n / horizon)."""

    def __init__(self, size: int, horizon: float, device: torch.device | str = "cpu") -> None:
        self.horizon = horizon
        self.total = torch.zeros(size, dtype=torch.float64, device=device)
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
        self.total = total.detach().to(self.total.device, torch.float64, copy=True)
        self.weight, self.newest = float(facts["weight"]), int(facts["newest"])


def weights_of(model: nn.Module, ema: Any = None) -> dict[str, Tensor]:
    """{name: tensor} of the model's parameters, or of an EMA of them.

    Args:
        model: whose parameters give the names.
        ema: None, a module with the same parameters, something that holds one as `.module` or `.ema_model` (torch's
            AveragedModel), or an object with ``shadow_params`` in the order of ``model.parameters()`` (diffusers'
            EMAModel).

    Raises:
        EbdiffError: an EMA of another model.
    """
    named = dict(model.named_parameters())
    if ema is None:
        return {name: weight.detach() for name, weight in named.items()}
    if isinstance(ema, nn.Module):
        alike = named.keys() == dict(ema.named_parameters()).keys()
        averages = ema if alike else held_by(ema)
        found = {name: weight.detach() for name, weight in averages.named_parameters()}
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

    gradients = {name: grad for name in sums.dims if (grad := weights[name].grad) is not None}
    scores = sums.of("product", weights, gradients)
    if not torch.isfinite(scores).all():
        return None
    if not scores.any():
        if not any(bool(gradient.any()) for gradient in gradients.values()):
            raise EbdiffError(
                "no gradients to score channels by",
                expected="gradients of the last backward()",
                got="zeros" if gradients else "none",
                remedy="call step() after backward() and optimizer.step(), before zero_grad()",
            )
        return None
    return scores
