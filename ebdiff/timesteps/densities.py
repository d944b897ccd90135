"""Published densities over the timesteps, as samplers: every cell has exactly its distribution's mass.

Most are stated over time x in [0, 1], where 0 is the least noisy: cell i of T is [i / T, (i + 1) / T). For flow
matching that is sigma before the shift, as in diffusers' scripts. `LogNormalSigma` is stated over ln(sigma / alpha) and
is the same noise on every schedule. Where the schedule ends a density is cut off and scaled to sum to 1, never clamped:
that would pile mass up on the last timestep.

Weights are 1: wrap in `Weighted` for another objective, in `Stratified` or `Within` as any sampler.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod

import torch
from torch import Tensor

from ..errors import EbdiffError
from .profile import NoiseProfile, checked
from .sampler import Sampler
from .tables import Tables
from .weighting import positive

__all__ = ["CLTS", "Beta", "CosMap", "LogNormalSigma", "LogitNormal", "Mode"]


class Density(Sampler):
    """A sampler that is given by a cumulative distribution function along the schedule.

    Raises:
        EbdiffError: where the density has no mass on the schedule.
    """

    def __init__(self, profile: NoiseProfile) -> None:
        self.profile, self.T, self.edges = checked(profile), profile.T, profile.edges
        self._pmf = _scaled(self.cdf(self.bounds()), type(self).__name__)

    @abstractmethod
    def cdf(self, x: Tensor) -> Tensor:
        """float64: the probability of less than `x`, of any shape."""

    def bounds(self) -> Tensor:
        """float64[T + 1]: where the cells begin and end, on the axis of `cdf`. By default time in [0, 1]."""
        return torch.arange(self.T + 1, dtype=torch.float64) / self.T

    def pmf(self) -> Tensor:
        return self._pmf


def _finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise EbdiffError(f"no such {name}", expected="a finite number", got=str(value), remedy="see its paper")


class LogitNormal(Density):
    """SD3's rf/lognorm(mean, std): x = sigmoid(z) with z ~ N(mean, std²).

    Esser et al. (arXiv 2403.03206), section 3.1. mean > 0 favours noise. diffusers' scripts use the number drawn as an
    index into timesteps that fall, so there mean > 0 favours data; with mean 0 both are the same.

    Raises:
        EbdiffError: unless mean is finite and 0 < std < infinity.
    """

    def __init__(self, profile: NoiseProfile, mean: float = 0.0, std: float = 1.0) -> None:
        _finite("mean", mean)
        positive(std=std)
        self.mean, self.std = mean, std
        super().__init__(profile)

    def cdf(self, x: Tensor) -> Tensor:
        return _normal(torch.logit(x), self.mean, self.std)


class Mode(Density):
    """SD3's rf/mode(scale): x = 1 - u - scale (cos²(pi u / 2) - 1 + u) with u uniform.

    Esser et al. (arXiv 2403.03206), section 3.1; scale 1.29 is theirs. Above 0 it favours the middle, below the ends.

    Raises:
        EbdiffError: unless -1 <= scale <= 2 / (pi - 2) = 1.75: outside, x does not fall with u.
    """

    def __init__(self, profile: NoiseProfile, scale: float = 1.29) -> None:
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise EbdiffError(
                "no such scale", expected="-1 <= scale <= 1.7519", got=str(scale), remedy="the paper's are -0.5 to 1.75"
            )
        self.scale = scale
        super().__init__(profile)

    def cdf(self, x: Tensor) -> Tensor:
        """1 - u, where u is found by bisection: 60 halvings leave less than float64 can tell apart."""
        low, high = torch.zeros_like(x), torch.ones_like(x)
        for _ in range(60):
            u = (low + high) / 2
            above = 1 - u - self.scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u) > x
            low, high = torch.where(above, u, low), torch.where(above, high, u)
        return 1 - (low + high) / 2


class CosMap(Density):
    """SD3's rf/cosmap: density 2 / (pi - 2 pi x + 2 pi x²), whose log-SNR is that of the cosine schedule.

    Esser et al. (arXiv 2403.03206), section 3.1. diffusers multiplies the loss with this density and draws uniformly.
    """

    def cdf(self, x: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(2 * x - 1) + 0.5


class Beta(Density):
    """x ~ Beta(a, b): B-TTDM (ECCV 2024) has a < 1 and b = 1, which favours data; OneTrainer's is (0.8, 1).

    (arXiv 2407.12173, "Beta sampling is all you need", chooses the steps of inference this way, not of training.)

    Raises:
        EbdiffError: unless 0 < a, b < infinity.
    """

    def __init__(self, profile: NoiseProfile, a: float, b: float) -> None:
        positive(a=a, b=b)
        self.a, self.b = a, b
        super().__init__(profile)

    def cdf(self, x: Tensor) -> Tensor:
        low = x < (self.a + 1) / (self.a + self.b + 2)  # on this side the one fraction is short, on that the other
        return torch.where(low, _incomplete_beta(x, self.a, self.b), 1 - _incomplete_beta(1 - x, self.b, self.a))


def _incomplete_beta(x: Tensor, a: float, b: float) -> Tensor:
    """float64: the regularised incomplete beta function I_x(a, b), for x not far above the mean a / (a + b).

    x^a (1 - x)^b / (a B(a, b)) over the continued fraction 1 + d1 / (1 + d2 / (1 + ...)) of NIST DLMF 8.17.22, from its
    end; it needs about sqrt(max(a, b)) terms.
    """
    fraction = torch.ones_like(x)
    for m in range(64 + 4 * math.ceil(math.sqrt(max(a, b))), 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        fraction = 1 + even / (1 + odd / fraction)
    fraction = 1 - (a + b) * x / (a + 1) / fraction
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return torch.exp(a * torch.log(x) + b * torch.log1p(-x) - log_beta) / (a * fraction)


class LogNormalSigma(Density):
    """EDM's noise levels: ln(sigma / alpha) ~ N(mean, std²); the noise is the same on every schedule.

    Karras et al. (arXiv 2206.00364), table 1: (-1.2, 1.2); EDM2 (arXiv 2312.02696): (-0.4, 1.0), both for data_std 0.5.
    A discrete timestep has the levels that are nearer to it, in ln, than to its neighbours; the outermost two reach as
    far out as in. One of zero SNR is never drawn. SpeeD's port of this baseline is a logit-normal density at
    sqrt(1 - alpha-bar) instead, which leaves the noisiest third of the timesteps untrained.

    Raises:
        EbdiffError: unless mean is finite and 0 < std < infinity, or where no timestep is near the mean.
    """

    def __init__(self, profile: NoiseProfile, mean: float = -1.2, std: float = 1.2) -> None:
        _finite("mean", mean)
        positive(std=std)
        self.mean, self.std = mean, std
        super().__init__(profile)

    def bounds(self) -> Tensor:
        """float64[T + 1]: ln(sigma / alpha) where the cells meet. Those of zero SNR are empty."""
        if self.profile.curves is not None and self.edges is not None:
            alpha, sigma = (torch.as_tensor(curve(self.edges)).clamp(min=0).log() for curve in self.profile.curves)
            return sigma - alpha
        live = self.profile.alpha > 0
        level = torch.log(self.profile.sigma[live] / self.profile.alpha[live])
        if len(level) < 2:
            everything = torch.full((self.T + 1,), math.inf, dtype=torch.float64)
            everything[: len(level)] = -math.inf
            return everything
        between = (level[1:] + level[:-1]) / 2
        first, last = 2 * level[:1] - between[:1], 2 * level[-1:] - between[-1:]
        return torch.cat([first, between, last.expand(1 + self.T - len(level))])

    def cdf(self, x: Tensor) -> Tensor:
        return _normal(x, self.mean, self.std)


class CLTS(Sampler):
    """A curriculum from uniform to a Gaussian: p = (1 - a) U + a N(mu, std²) with a = min(step / steps, 1).

    Xu et al. (arXiv 2404.07946), without their decay of momentum. The form is that of SpeeD's port, but there the
    exponent multiplies by T² where it should divide by std², so that all mass is on mu, and the share a passes 1.

    `sample(..., step=)` draws at that step's share; without a step it is that of `step`.

    Args:
        mu, std: of the Gaussian, in timesteps, that is in cells.
        steps: optimizer steps until the Gaussian is all there is.

    Raises:
        EbdiffError: unless mu is finite, std and steps are > 0 and step >= 0, or where the Gaussian misses.
    """

    def __init__(self, profile: NoiseProfile, mu: float, std: float, steps: int, *, step: int = 0) -> None:
        _finite("mu", mu)
        positive(std=std, steps=steps)
        if step < 0:
            raise EbdiffError("no such step", expected="at least 0", got=str(step), remedy="count from 0")
        self.steps, self.step = steps, min(step, steps)
        self._last: CLTS | None = None
        self.T, self.edges = checked(profile).T, profile.edges
        ends = torch.arange(self.T + 1, dtype=torch.float64) - (0.5 if self.edges is None else 0)
        self.focus = _scaled(_normal(ends, mu, std), "CLTS")

    def pmf(self) -> Tensor:
        share = self.step / self.steps
        return (1 - share) / self.T + share * self.focus

    def at(self, step: int) -> CLTS:
        """The sampler of that step; the same object for the next call with that step."""
        step = min(step, self.steps)
        if step == self.step:
            return self
        if self._last is None or self._last.step != step:
            self._last = copy.copy(self)
            self._last.__dict__.update(step=step, _last=None, _tables={})
        return self._last

    def _read(self, device: torch.device) -> Tables:
        return Tables.of(self.pmf(), self.weights(), self.edges, device, lasting=self.step == self.steps)


def _normal(x: Tensor, mean: float, std: float) -> Tensor:
    """The cumulative distribution function of N(mean, std²)."""
    below: Tensor = torch.special.ndtr((x - mean) / std)
    return below


def _scaled(cumulative: Tensor, name: str) -> Tensor:
    """float64[T]: the probabilities of the cells between T + 1 values of a cumulative distribution function."""
    mass = cumulative.diff()
    total = mass.sum()
    if not total > 1e-12:  # of less than this, rounding is too large a part
        raise EbdiffError(
            f"{name} has no mass on this schedule",
            expected="some",
            got=f"{float(total):.1e}",
            remedy="move its mean into the schedule's range",
        )
    return mass / total
