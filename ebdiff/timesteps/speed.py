"""SpeeD: draw timesteps where they teach something, and weight those where the process changes (arXiv 2405.17403).

Everything is read off the profile's alpha-bar, that of the variance-preserving process with the same signal-to-noise
ratio, so that it means the same for every schedule; on the linear schedule it is the paper's.
"""

from __future__ import annotations

import io
import math
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import EbdiffError
from ..files import write_bytes
from .profile import NoiseProfile, checked
from .region import Region
from .sampler import Sampler
from .tables import Tables, conditional, normalised

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Areas", "SpeeD"]


class Areas(NamedTuple):
    """The three areas of a process, ascending in t; None where there is none."""

    acceleration: Region | None  # the noise's variance grows faster and faster
    deceleration: Region | None  # slower and slower
    convergence: Region | None  # hardly any more: from tau on


class SpeeD(Sampler):
    """The asymmetric density P and the change-aware weight w of SpeeD, for any schedule.

    tau is the first timestep with alpha-bar <= 1 / r. Before it timesteps are drawn k times as often as from it on:

        P(t) = k / (T + tau (k - 1)) for t < tau, else 1 / (T + tau (k - 1))                        (section 3.2)
        w(t) = 1 - lam + (2 lam - 1) (g - min g) / (max g - min g), g the slope of 1 - alpha-bar    (section 3.3)

    and w is scaled to mean 1 under P, so that the learning rate and the clipping of gradients keep their meaning.
    It multiplies the squared error of whatever the network predicts, as in the authors' code: unlike published weights
    (`ebdiff.timesteps.weighting`) it is not converted between predictions.
    Inside a region (`Within`) min g and max g are those of the region, or hardly any contrast would be left.

    Args:
        profile: the schedule.
        k: how strongly the convergence area is suppressed, >= 1; 1 draws uniformly.
        lam: the largest weight before scaling, in [0.5, 1]; 0.5 weights all alike.
        r: how small alpha-bar is at tau, > 1. 140.5 (the default) is the paper's tau = 700 on the linear schedule.
        tau: the first cell of the convergence area, instead of `r`.
        variant: "paper", where the convergence area has the least weight; or "released", which follows the authors'
            code: weight 1 (the largest) in the convergence area, and the second half of each batch are the duals
            |t - m| of the first, m where the slope of sqrt(1 - alpha-bar) falls below 1e-4. `pmf` then is that of both
            halves together. A dual leaves every region, so inside one only this density is kept.

    Raises:
        EbdiffError: for settings out of range, `tau` and `r` together, or a schedule that is all convergence.
    """

    def __init__(
        self,
        profile: NoiseProfile,
        k: float = 5.0,
        lam: float = 0.6,
        r: float | None = None,
        tau: int | None = None,
        variant: Literal["paper", "released"] = "paper",
    ) -> None:
        _check(checked(profile), k, lam, r, tau, variant)
        self.profile, self.k, self.lam, self.variant = profile, k, lam, variant
        self.T, self.edges = profile.T, profile.edges
        self.tau = _tau(profile, 140.5 if r is None else r) if tau is None else int(tau)
        self.slope = _slope(1 - profile.alpha_bar)

    @property
    def bound(self) -> float:
        """T / tau: how many times more often the useful timesteps can be drawn than by uniform sampling, at most."""
        return self.T / self.tau

    @property
    def areas(self) -> Areas:
        """Acceleration ends where 1 - alpha-bar is steepest, deceleration at tau."""
        steepest = min(int(self.slope.argmax()), self.tau)
        bounds = (0, steepest, self.tau, self.T)
        return Areas(*(Region(lo, hi) if lo < hi else None for lo, hi in pairwise(bounds)))

    def asymmetric(self) -> Tensor:
        """float64[T]: the paper's P, in both variants."""
        pmf = torch.ones(self.T, dtype=torch.float64)
        pmf[: self.tau] = self.k
        return pmf / (self.T + self.tau * (self.k - 1))

    def pmf(self) -> Tensor:
        pmf = self.asymmetric()
        if self.variant == "paper":
            return pmf
        return (pmf + torch.zeros_like(pmf).index_add(0, (torch.arange(self.T) - self._dual_of_0).abs(), pmf)) / 2

    def weights(self) -> Tensor:
        return normalised(self._change_aware(Region(0, self.T)), self.pmf())

    def weights_in(self, region: Region) -> Tensor:
        """w with the least and the largest slope of the region itself."""
        return normalised(self._change_aware(region), conditional(self.pmf(), region.lo, region.hi))

    def _change_aware(self, region: Region) -> Tensor:
        """float64[T]: w before scaling, right inside the region."""
        useful = self.slope[region.lo : min(region.hi, self.tau)]
        if not len(useful):
            return torch.ones(self.T, dtype=torch.float64)
        least, most = self.slope[region.lo : region.hi].min(), useful.max()
        height = (self.slope - least) / (most - least) if most > least else torch.ones_like(self.slope)
        weights = 1 - self.lam + (2 * self.lam - 1) * height
        weights[self.tau :] = 1.0 if self.variant == "released" else 1 - self.lam
        return weights.clamp(min=0)  # outside the region w may be less

    def uniforms(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Of the released variant the numbers whose inverse under `pmf` are the timesteps that its code would draw."""
        u = super().uniforms(n, generator, device)
        if self.variant == "paper":
            return u
        first = self._first.draw(u[: n // 2 + 1].cpu())[0]
        t = torch.cat([first, (first - self._dual_of_0).abs()])[:n].to(device)
        t = t.index_select(0, torch.randperm(n, generator=generator, device=device))
        begin, end = self._bounds.to(device).index_select(0, t).unbind(1)
        return torch.lerp(begin, end, super().uniforms(n, generator, device))

    def spread(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        return super().uniforms(n, generator, device)

    @cached_property
    def _first(self) -> Tables:
        """P, of which the released variant draws the first half of a batch."""
        return Tables.of(self.asymmetric(), torch.ones(self.T), None, torch.device("cpu"))

    @cached_property
    def _bounds(self) -> Tensor:
        """float64[T, 2]: where the numbers u begin and end that `pmf` turns into each timestep."""
        bounds = torch.cat([torch.zeros(1, dtype=torch.float64), self.pmf().cumsum(0)]).clamp(max=1)
        return torch.stack([bounds[:-1], bounds[1:]], dim=1)

    @cached_property
    def _dual_of_0(self) -> int:
        """m: one more than the first timestep at which sqrt(1 - alpha-bar) grows by less than 1e-4."""
        slow = _slope((1 - self.profile.alpha_bar).sqrt()) < 1e-4
        return min(int(slow.int().argmax()) + 1, self.T - 1)

    def plot(self, path: Path | str | None = None) -> Figure:
        """The areas, and in them the density as T P(t) and the weight w(t); written to a file where a path is given."""
        from .speed_plot import figure

        drawn = figure(self)
        if path is not None:
            content = io.BytesIO()
            drawn.savefig(content, format=Path(path).suffix.lstrip(".") or "png")
            write_bytes(path, content.getvalue())
        return drawn


def _check(profile: NoiseProfile, k: float, lam: float, r: float | None, tau: int | None, variant: str) -> None:
    wrong = [
        ("k", "1 <= k < infinity", k, 1 <= k < math.inf),
        ("lam", "0.5 <= lam <= 1: outside, weights would be negative or upside down", lam, 0.5 <= lam <= 1),
        ("r", "1 < r < infinity", r, r is None or 1 < r < math.inf),
        ("tau", f"a whole number from 1 to {profile.T}", tau, tau is None or tau in range(1, profile.T + 1)),
        ("r and tau", "one of them", f"{r} and {tau}", r is None or tau is None),
        ("variant", "paper or released", variant, variant in ("paper", "released")),
        ("profile", "at least 2 timesteps", profile.T, profile.T > 1),
    ]
    for name, expected, got, right in wrong:
        if not right:
            remedy = "the paper has k = 5, lam = 0.6 and r = 140.5"
            raise EbdiffError(f"SpeeD's {name}", expected=expected, got=str(got), remedy=remedy)


def _tau(profile: NoiseProfile, r: float) -> int:
    """min {t : alpha-bar(t) <= 1 / r}, T where there is none. alpha-bar falls with t."""
    tau = int((profile.alpha_bar > 1 / r).sum())
    if tau == 0:
        raise EbdiffError(
            "a schedule that is all convergence",
            expected=f"alpha-bar above 1 / {r:g} somewhere",
            got=f"at most {float(profile.alpha_bar[0]):.4g}",
            remedy="a larger r, or tau",
        )
    return tau


def _slope(values: Tensor) -> Tensor:
    """float64[T]: central differences per cell, one-sided at both ends."""
    return torch.gradient(values)[0]
