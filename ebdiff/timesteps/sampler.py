"""Which timesteps to train on, and with which weight. t is int64 in [0, T); weights have mean 1 under their sampler.

A sampler is a distribution (`pmf`), a weight per timestep (`weights`) and a way to draw uniform numbers (`uniforms`).
`sample` is the same for all of them, by inverse CDF, so samplers wrap each other in any order:
`Within(region, Stratified(1000))` is stratified inside its region.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import EbdiffError
from .region import Region

__all__ = ["Sampler", "Stratified", "Timesteps", "Uniform", "Within"]


@dataclass(frozen=True, eq=False)
class Timesteps:
    """A batch of timesteps, which unpacks as `t, weight`.

    Args:
        t: int64[B], or float32[B] in continuous time.
        weight: float32[B], what each sample's loss is multiplied with; finite and >= 0 (checked on the CPU only, since
            a check elsewhere would wait for the device).

    Raises:
        EbdiffError: for other dtypes or shapes, or such a weight.
    """

    t: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        t, weight = self.t, self.weight
        if (
            t.dim() != 1
            or weight.shape != t.shape
            or (t.dtype, weight.dtype)
            not in (
                (torch.int64, torch.float32),
                (torch.float32, torch.float32),
            )
        ):
            raise EbdiffError(
                "no batch of timesteps",
                expected="t int64[B] or float32[B] and weight float32[B]",
                got=f"{t.dtype}{list(t.shape)} and {weight.dtype}{list(weight.shape)}",
                remedy="convert them first",
            )
        if weight.device.type == "cpu" and not bool((weight.isfinite() & (weight >= 0)).all()):
            raise EbdiffError(
                "bad loss weight", expected="finite and >= 0", got=str(weight), remedy="check the sampler"
            )

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.t, self.weight))

    def __len__(self) -> int:
        return len(self.t)

    def to(self, device: torch.device | str) -> Timesteps:
        """The same batch on another device."""
        return Timesteps(self.t.to(device), self.weight.to(device))


class Sampler(ABC):
    """A distribution over the timesteps [0, T), with a weight for each."""

    T: int

    @abstractmethod
    def pmf(self) -> Tensor:
        """float64[T] on the CPU: the probability of each timestep. Sums to 1."""

    def weights(self) -> Tensor:
        """float32[T] on the CPU: the loss weight of each timestep. Mean 1 under `pmf`."""
        return torch.ones(self.T)

    def uniforms(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """float64[n]: the numbers in [0, 1] that are pushed through the inverse CDF."""
        return torch.rand(n, dtype=torch.float64, generator=generator, device=device)

    def mass(self, region: Region) -> float:
        """The probability that a drawn timestep lies in `region`."""
        return float(self.pmf()[region.lo : region.hi].sum())

    def sample(
        self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Timesteps:
        """Draw `n` timesteps and their weights.

        Args:
            n: how many, at least 1.
            generator: makes the draw repeatable. The draw runs on its device; without one, on the CPU.
            device: where the result goes; by default where it was drawn.

        Raises:
            EbdiffError: for n < 1.
        """
        if n < 1:
            raise EbdiffError("nothing to draw", expected="at least one timestep", got=str(n), remedy="ask for more")
        place = generator.device if generator is not None else torch.device("cpu")
        u = self.uniforms(n, generator, place)
        t = torch.searchsorted(_cumulative(self.pmf()).to(place), u, right=True)
        return Timesteps(t, self.weights().to(place)[t]).to(device or place)


def _cumulative(pmf: Tensor) -> Tensor:
    """float64[T]: the CDF, so that the first entry greater than u in [0, 1] is the timestep drawn.

    Scaled by the largest entry first, which makes a constant pmf exact. The entry where all mass has been counted, and
    those of probability 0 after it, become infinite: so no rounding, of the sum or of u, can leave the support.
    """
    counts = (pmf / pmf.max()).cumsum(0)
    return torch.where(counts >= counts[-1], torch.inf, counts / counts[-1])


def _sampler(value: Sampler | int) -> Sampler:
    """A sampler as it is, a number of timesteps as the uniform one."""
    return value if isinstance(value, Sampler) else Uniform(value)


class Uniform(Sampler):
    """Every timestep in [0, T) alike, with weight 1: DDPM's own choice.

    Raises:
        EbdiffError: unless T is a whole number, at least 1.
    """

    def __init__(self, T: int) -> None:
        if isinstance(T, bool) or not isinstance(T, int) or T < 1:
            raise EbdiffError(
                "no schedule", expected="a whole number of timesteps, at least 1", got=repr(T), remedy="Uniform(1000)"
            )
        self.T = T

    def pmf(self) -> Tensor:
        return torch.full((self.T,), 1 / self.T, dtype=torch.float64)


class Stratified(Sampler):
    """The same distribution as `sampler`, spread evenly over each batch of n: one draw from each n-th of its mass.

    The strata are permuted, so that the place in a batch says nothing about t. As in k-diffusion's stratified sampling;
    it takes the variance that comes from t out of the batch's mean loss.
    """

    def __init__(self, sampler: Sampler | int) -> None:
        self.sampler = _sampler(sampler)
        self.T = self.sampler.T

    def pmf(self) -> Tensor:
        return self.sampler.pmf()

    def weights(self) -> Tensor:
        return self.sampler.weights()

    def uniforms(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        within = torch.rand(n, dtype=torch.float64, generator=generator, device=device)
        return (torch.randperm(n, generator=generator, device=device) + within) / n


class Within(Sampler):
    """`sampler` on condition that t lies in `region`, in closed form: nothing is rejected, clamped or left outside.

    The weights are renormalised to mean 1 inside the region, so the learning rate means the same in every region.

    Raises:
        EbdiffError: when the region is not inside [0, T), or the sampler never draws in it.
    """

    def __init__(self, region: Region, sampler: Sampler | int) -> None:
        sampler = _sampler(sampler)
        if not isinstance(region, Region):
            raise EbdiffError(
                "no region", expected="a Region", got=repr(region), remedy="Within(Region(lo, hi), sampler)"
            )
        if region.hi > sampler.T:
            raise EbdiffError(
                "region outside the schedule",
                expected=f"a region inside [0, {sampler.T})",
                got=str(region),
                remedy="hi is exclusive and at most the number of timesteps",
            )
        self.region, self.sampler, self.T = region, sampler, sampler.T
        self.pmf()

    def pmf(self) -> Tensor:
        """P(t | R) = P(t) / P(R) inside the region R, 0 outside."""
        inside = torch.zeros(self.T, dtype=torch.float64)
        inside[self.region.lo : self.region.hi] = self.sampler.pmf()[self.region.lo : self.region.hi]
        mass = inside.sum()
        if not mass > 0:
            raise EbdiffError(
                f"the sampler never draws in {self.region}",
                expected="a region of positive probability",
                got=f"a sampler of {int((self.sampler.pmf() > 0).sum())} timesteps, none of them in it",
                remedy="nested regions must overlap",
            )
        return inside / mass

    def weights(self) -> Tensor:
        """w(t) / E[w | R] inside the region R, 0 outside."""
        pmf, weights = self.pmf(), self.sampler.weights().double()
        weights = torch.where(pmf > 0, weights, 0.0)
        mean = (pmf * weights).sum()
        if not mean > 0:
            raise EbdiffError(
                f"every weight in {self.region} is zero",
                expected="one above 0",
                got="none",
                remedy="check the weighting",
            )
        return (weights / mean).float()

    def uniforms(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        return self.sampler.uniforms(n, generator, device)
