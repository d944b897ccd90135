"""Which timesteps to train on, and with which weight. Weights have mean 1 under their sampler.

A sampler is a distribution over the cells of time (`pmf`), a weight for each (`weights`) and a way to draw uniform
numbers (`uniforms`). A cell is a timestep where time is discrete, else an interval of t (see `NoiseProfile`), inside
which all t are alike. `sample` is the same for all samplers, by inverse CDF, so they wrap each other in any order:
`Within(region, Stratified(1000))` is stratified inside its region.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from .. import seeds
from ..errors import EbdiffError
from ..numbers import as_whole
from .batch import Timesteps
from .profile import NoiseProfile
from .region import Region
from .tables import Tables, conditional, normalised

if TYPE_CHECKING:
    from .learned import Learned

__all__ = ["Sampler", "Stratified", "Timesteps", "Uniform", "Within", "Wrapped"]

_CPU = torch.device("cpu")


class Sampler(ABC):
    """A distribution over the cells of time, with a weight for each.

    `pmf` and `weights` are read once per device, and again when `version` has risen.
    """

    T: int
    edges: Tensor | None = None  # float64[T + 1], the borders of the cells, in continuous time only

    @abstractmethod
    def pmf(self) -> Tensor:
        """float64[T] on the CPU: the probability of each cell. Sums to 1."""

    def weights(self) -> Tensor:
        """float32[T] on the CPU: the loss weight of each cell. Mean 1 under `pmf`."""
        return torch.ones(self.T)

    def weights_in(self, region: Region) -> Tensor:
        """float32[T] on the CPU: the weights for training inside `region` only; 0 outside, mean 1 inside.

        Those of the whole schedule, unless a sampler has a reason to weight a region by itself otherwise.
        """
        return normalised(self.weights(), conditional(self.pmf(), region.lo, region.hi))

    def uniforms(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """float64[n]: the numbers in [0, 1] that are pushed through the inverse CDF, in no order."""
        return torch.rand(n, dtype=torch.float64, generator=generator, device=device)

    def spread(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """`uniforms` for another sampler's inverse CDF: the same, unless they only suit this one's."""
        return self.uniforms(n, generator, device)

    def at(self, step: int) -> Sampler:
        """The sampler of that step of training: itself, unless it changes by a plan."""
        return self

    @property
    def version(self) -> int:
        """Rises whenever `pmf` or `weights` become others: in samplers that learn."""
        return 0

    @property
    def learner(self) -> Learned | None:
        """What in it learns from losses, and wants them by `update`."""
        return None

    def mass(self, region: Region) -> float:
        """The probability that a drawn timestep lies in `region`."""
        return float(self.pmf()[region.lo : region.hi].sum())

    def tables(self, device: torch.device) -> Tables:
        """What `sample` reads, on that device; kept until `version` rises."""
        kept: dict[torch.device, tuple[int, Tables]] = self.__dict__.setdefault("_tables", {})
        found = kept.get(device)
        if found is None or found[0] != self.version:
            found = self.version, self._read(device)
            kept[device] = found
        return found[1]

    def _read(self, device: torch.device) -> Tables:
        return Tables.of(self.pmf(), self.weights(), self.edges, device)

    def sample(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        step: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        micro: int = 0,
        accumulate: int = 1,
        device: torch.device | str | None = None,
    ) -> Timesteps:
        """Draw `n` timesteps and their weights.

        With `step` the draw depends on (seed, step) alone: all n * world * accumulate timesteps of that step are drawn,
        on the CPU, and part number micro * world + rank of them is returned. So the sequence of timesteps is the same
        for any number of processes, and after a resume; and what is stratified is so over the whole step.

        Args:
            n: how many, at least 1.
            generator: instead of `step`, makes the draw repeatable. It runs on the generator's device; without one, on
                the CPU.
            step: the step of training, which also chooses among samplers that change by a plan (see `at`).
            seed: of the run.
            rank, world: this process, and how many there are.
            micro, accumulate: this micro-batch, and how many make up a step.
            device: where the result goes; by default where it was drawn. Nothing waits for it.

        Raises:
            EbdiffError: for n < 1, a rank or micro-batch out of range, or either of them without a step.
        """
        if n < 1:
            raise EbdiffError("nothing to draw", expected="at least one timestep", got=str(n), remedy="ask for more")
        parts = world * accumulate
        if step is None:
            if parts != 1 or rank or micro:
                raise EbdiffError("no step", expected="step=", got="none", remedy="ranks share one draw by its number")
            return self._drawn(self.uniforms(n, generator, _CPU if generator is None else generator.device), device)
        if generator is not None or not (0 <= rank < world and 0 <= micro < accumulate):
            raise EbdiffError(
                "no such part of a step",
                expected="0 <= rank < world, 0 <= micro < accumulate, and no generator",
                got=f"rank {rank} of {world}, micro {micro} of {accumulate}"
                + ("" if generator is None else ", and a generator"),
                remedy="a step's numbers come from (seed, step)",
            )
        sampler = self.at(step)
        u = sampler.uniforms(n * parts, seeds.generator(seed, "timesteps", step), _CPU)
        start = (micro * world + rank) * n
        return sampler._drawn(u if parts == 1 else u[start : start + n], device)

    def _drawn(self, u: Tensor, device: torch.device | str | None) -> Timesteps:
        place = u.device if device is None else torch.device(device)
        return Timesteps.read(*self.tables(place).draw(u.to(place, non_blocking=True)))


def _sampler(value: Sampler | NoiseProfile | int) -> Sampler:
    """A sampler as it is, a profile or a number of timesteps as the uniform one."""
    return value if isinstance(value, Sampler) else Uniform(value)


class Uniform(Sampler):
    """Every cell alike, with weight 1: DDPM's own choice.

    Args:
        schedule: the number of timesteps, or the profile whose cells are drawn.

    Raises:
        EbdiffError: unless T is a whole number, at least 1.
    """

    def __init__(self, schedule: NoiseProfile | int) -> None:
        if isinstance(schedule, NoiseProfile):
            self.T, self.edges = schedule.T, schedule.edges
            return
        T = as_whole(schedule)
        if T is None or T < 1:
            raise EbdiffError(
                "no schedule",
                expected="a NoiseProfile, or a whole number of timesteps, at least 1",
                got=repr(schedule) if isinstance(schedule, int | float | str) else type(schedule).__name__,
                remedy="Uniform(1000)",
            )
        self.T = T

    def pmf(self) -> Tensor:
        return torch.full((self.T,), 1 / self.T, dtype=torch.float64)


class Wrapped(Sampler):
    """A sampler like another: what a subclass does not say is as `sampler` says."""

    _last: Self | None = None  # see `_with`
    _lasting: bool = True

    def __init__(self, sampler: Sampler | NoiseProfile | int) -> None:
        self.sampler = _sampler(sampler)
        self.T, self.edges = self.sampler.T, self.sampler.edges

    def pmf(self) -> Tensor:
        return self.sampler.pmf()

    def weights(self) -> Tensor:
        return self.sampler.weights()

    def weights_in(self, region: Region) -> Tensor:
        return self.sampler.weights_in(region)

    def uniforms(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        return self.sampler.uniforms(n, generator, device)

    def spread(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        return self.sampler.spread(n, generator, device)

    def at(self, step: int) -> Sampler:
        inner = self.sampler.at(step)
        return self if inner is self.sampler else self._with(sampler=inner)

    @property
    def version(self) -> int:
        return self.sampler.version

    @property
    def learner(self) -> Learned | None:
        return self.sampler.learner

    def _read(self, device: torch.device) -> Tables:
        return Tables.of(self.pmf(), self.weights(), self.edges, device, lasting=self._lasting)

    def _with(self, **changed: object) -> Self:
        """A copy with other attributes; the same copy, and its tables, where the last call was for the same ones."""
        for name, value in changed.items():
            if self._last is None or not _same(self._last.__dict__[name], value):
                other = copy.copy(self)
                other.__dict__.update(changed, _tables={}, _last=None, _lasting=False)
                self._last = other
        assert self._last is not None
        return self._last


def _same(a: object, b: object) -> bool:
    return a is b or (isinstance(a, int | float) and a == b)


class Stratified(Wrapped):
    """The same distribution as `sampler`, spread evenly over each batch of n: one draw from each n-th of its mass.

    The strata are permuted, so that the place in a batch says nothing about t. As in k-diffusion's stratified sampling;
    it takes the variance that comes from t out of the batch's mean loss.

    Args:
        sampler: what to spread, or the number of timesteps.
        antithetic: pair the strata from both ends, with mirrored places inside them: u and 1 - u. Mirroring u keeps
            every distribution and every region, which mirroring t would not.
    """

    def __init__(self, sampler: Sampler | NoiseProfile | int, antithetic: bool = False) -> None:
        super().__init__(sampler)
        self.antithetic = antithetic

    def tables(self, device: torch.device) -> Tables:
        return self.sampler.tables(device)

    def uniforms(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        drawn = (n + 1) // 2 if self.antithetic else n
        within = torch.rand(drawn, dtype=torch.float64, generator=generator, device=device)
        if not self.antithetic:
            order = torch.randperm(n, dtype=torch.float64, generator=generator, device=device)
            return within.add_(order).div_(float(n))  # by a whole number takes longer than the division does
        low = torch.arange(drawn, dtype=torch.float64, device=device).add_(within).div_(float(n))
        order = torch.randperm(n, generator=generator, device=device)
        return torch.cat([low, 1.0 - low[: n - drawn]]).index_select(0, order)

    def spread(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        return self.uniforms(n, generator, device)


class Within(Wrapped):
    """`sampler` on condition that t lies in `region`, in closed form: nothing is rejected, clamped or left outside.

    The weights have mean 1 inside the region, so the learning rate means the same in every region; they are what the
    sampler's `weights_in` says.

    Args:
        region: in cells, that is, in timesteps where time is discrete.
        sampler: what to restrict, or the number of timesteps.

    Raises:
        EbdiffError: when the region is not inside [0, T), or the sampler never draws in it.
    """

    def __init__(self, region: Region, sampler: Sampler | NoiseProfile | int) -> None:
        super().__init__(sampler)
        if not isinstance(region, Region):
            raise EbdiffError(
                "no region", expected="a Region", got=repr(region), remedy="Within(Region(lo, hi), sampler)"
            )
        if region.hi > self.T:
            raise EbdiffError(
                "region outside the schedule",
                expected=f"a region inside [0, {self.T})",
                got=str(region),
                remedy="hi is exclusive and at most the number of timesteps",
            )
        self.region = region
        self.pmf()

    def pmf(self) -> Tensor:
        """P(t | R) = P(t) / P(R) inside the region R, 0 outside."""
        return conditional(self.sampler.pmf(), self.region.lo, self.region.hi)

    def uniforms(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        return self.sampler.spread(n, generator, device)

    def weights(self) -> Tensor:
        """The sampler's weights inside the region, 0 outside."""
        return self.sampler.weights_in(self.region)

    def weights_in(self, region: Region) -> Tensor:
        """Those inside both regions.

        Raises:
            EbdiffError: where they do not meet.
        """
        lo, hi = max(region.lo, self.region.lo), min(region.hi, self.region.hi)
        if lo >= hi:
            conditional(self.pmf(), region.lo, region.hi)  # says so
        return self.sampler.weights_in(Region(lo, hi))
