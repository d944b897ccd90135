"""Samplers that draw as another does, and weight otherwise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..errors import EbdiffError
from .profile import NoiseProfile
from .region import Region
from .sampler import Sampler, Wrapped
from .tables import conditional, normalised

__all__ = ["Corrected", "Weighted", "linear"]

_Weights = Tensor | Sequence[float]


class _Reweighted(Wrapped):
    """The weights of `sampler` times a factor, normalised to mean 1 under its density; in regions too."""

    @abstractmethod
    def factor(self) -> Tensor:
        """float64[T] on the CPU: what each cell's weight is multiplied with; any scale, finite and >= 0."""

    def weights(self) -> Tensor:
        return normalised(self.sampler.weights() * self.factor(), self.pmf())

    def weights_in(self, region: Region) -> Tensor:
        pmf = conditional(self.pmf(), region.lo, region.hi)
        return normalised(self.sampler.weights_in(region) * self.factor(), pmf)


class Weighted(_Reweighted):
    """`sampler` with another objective: its weights times these, normalised to mean 1 under its density.

    `Weighted(Uniform(profile), min_snr(profile))` is Min-SNR; `Weighted(SpeeD(profile), ...)` uses SpeeD to draw.

    Args:
        sampler: what draws, or the number of timesteps.
        weights: float[T], of any scale, also as a list or an array; or a function from the step of training to that.

    Raises:
        EbdiffError: unless there is a weight for each cell, all finite and >= 0.
    """

    def __init__(self, sampler: Sampler | NoiseProfile | int, weights: _Weights | Callable[[int], _Weights]) -> None:
        super().__init__(sampler)
        self.plan, self.step = weights if callable(weights) else None, 0
        self.table = self._checked(weights(0) if callable(weights) else weights)

    def factor(self) -> Tensor:
        return self.table if self.plan is None or self.step == 0 else self._checked(self.plan(self.step))

    def at(self, step: int) -> Sampler:
        inner = super().at(step)
        if self.plan is None or step == self.step:
            return inner
        assert isinstance(inner, Weighted)
        return inner._with(step=step)

    def _checked(self, weights: _Weights) -> Tensor:
        table = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
        if table.shape != (self.T,) or not bool((table.isfinite() & (table >= 0)).all()):
            raise EbdiffError(
                "bad loss weights",
                expected=f"{self.T} of them, finite and >= 0",
                got=f"{list(table.shape)}" + (f", from {table.min():.4g} to {table.max():.4g}" if len(table) else ""),
                remedy="one for each timestep of the sampler's schedule",
            )
        return table


class Corrected(_Reweighted):
    """`sampler` with importance weights (1 / (T P))^gamma, which undo part of its density in the objective.

    gamma = 0 leaves the objective as it is, p * w; gamma = 1 makes it that of uniform timesteps, without bias. Annealed
    from 0 to 1 it takes out late the bias that helped early: `Corrected(SpeeD(profile), linear(0, 1, 8000, 10000))`.

    Args:
        sampler: what draws, or the number of timesteps.
        gamma: in [0, 1], or a function from the step of training to that.

    Raises:
        EbdiffError: for a gamma outside [0, 1].
    """

    def __init__(self, sampler: Sampler | NoiseProfile | int, gamma: float | Callable[[int], float]) -> None:
        super().__init__(sampler)
        self.plan = gamma if callable(gamma) else None
        self.gamma = _gamma(gamma(0) if callable(gamma) else gamma)

    def factor(self) -> Tensor:
        pmf = self.pmf()
        return torch.where(pmf > 0, (self.T * pmf) ** -self.gamma, 0.0)

    def at(self, step: int) -> Sampler:
        inner = super().at(step)
        gamma = self.gamma if self.plan is None else _gamma(self.plan(step))
        if gamma == self.gamma:
            return inner
        assert isinstance(inner, Corrected)
        return inner._with(gamma=gamma)


def linear(first: float, last: float, start: int, stop: int) -> Callable[[int], float]:
    """A plan: `first` up to step `start`, `last` from step `stop`, a straight line between.

    Raises:
        EbdiffError: unless 0 <= start < stop.
    """
    if not 0 <= start < stop:
        raise EbdiffError("no plan", expected="0 <= start < stop", got=f"{start} and {stop}", remedy="steps rise")
    return partial(_line, first, last, start, stop)


def _line(first: float, last: float, start: int, stop: int, step: int) -> float:
    done = min(max((step - start) / (stop - start), 0.0), 1.0)
    return first + (last - first) * done


def _gamma(value: float) -> float:
    if not 0 <= value <= 1:
        raise EbdiffError("no such gamma", expected="0 to 1", got=str(value), remedy="1 removes all bias")
    return float(value)
