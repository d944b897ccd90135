"""How much signal and how much noise a training process has at each timestep: x_t = alpha(t) x0 + sigma(t) eps.

t = 0 is the least noisy. Time is cut into T cells. In discrete time cell i is the timestep i, and t is int64; in
continuous time cell i is the half-open [edges[i], edges[i + 1]) of t, which is float32. Tables are float64, on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..errors import EbdiffError
from . import curves
from .curves import Curve

__all__ = ["NoiseProfile", "checked"]


@dataclass(frozen=True, eq=False)
class NoiseProfile:
    """Signal and noise of every cell, checked when it is made. One of the `from_...` makes it from what you have.

    Args:
        alpha: float64[T], the signal at each timestep, or at the centre of each cell; >= 0.
        sigma: float64[T], the noise's standard deviation there; > 0.
        t: float64[T], those timesteps or centres.
        edges: float64[T + 1], ascending borders of the cells, in continuous time only.
        data_std: standard deviation of the data: 1, EDM's 0.5.
        prediction: what the network predicts, where that is known: "epsilon", "v_prediction", "sample" or "flow".
        curves: (alpha, sigma) as functions of a float64 t, in continuous time only.

    Raises:
        EbdiffError: for values out of range, a signal-to-noise ratio that rises with t, or sizes that differ.
    """

    alpha: Tensor
    sigma: Tensor
    t: Tensor
    edges: Tensor | None = None
    data_std: float = 1.0
    prediction: str | None = None
    curves: tuple[Curve, Curve] | None = field(default=None, repr=False)
    _on: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = [x.numel() for x in (self.alpha, self.sigma, self.t)]
        sizes += [] if self.edges is None else [self.edges.numel() - 1]
        if self.alpha.dim() != 1 or len(set(sizes)) > 1 or not sizes[0]:
            raise _refused("tables of one length, 1 or more", f"lengths {sizes}", "one entry for each timestep")
        if (self.edges is None) != (self.curves is None):
            raise _refused("edges and curves together", "one of them", "use NoiseProfile.from_functions")
        if self.edges is not None and not bool((self.edges.diff() > 0).all()):
            raise _refused("edges that rise", str(self.edges), "t = 0 is the least noisy")
        if not (math.isfinite(self.data_std) and self.data_std > 0):
            raise _refused("data_std > 0", str(self.data_std), "1 for normalised data, 0.5 for EDM's")
        for name, table, least in (("alpha", self.alpha, 0.0), ("sigma", self.sigma, 5e-324)):
            wrong = ~(table.isfinite() & (table >= least))
            if bool(wrong.any()):
                where = int(wrong.nonzero()[0])
                bound = ">= 0" if name == "alpha" else "> 0"
                remedy = "drop timesteps that have no noise" if name == "sigma" else "check the schedule"
                raise _refused(f"{name} finite and {bound}", f"{float(table[where])} in cell {where}", remedy)
        rising = self.snr[1:] > self.snr[:-1] * (1 + 1e-12)
        if bool(rising.any()):
            where = int(rising.nonzero()[0])
            got = f"{float(self.snr[where]):.6g} and then {float(self.snr[where + 1]):.6g} in cell {where + 1}"
            raise _refused("a signal-to-noise ratio that falls with t", got, "flip a table that starts with noise")

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseProfile:
        """The training process of a diffusers scheduler, however many sampling steps it has been set to.

        Raises:
            EbdiffError: for a scheduler that defines none, with the reason.
        """
        from .schedulers import profile_of

        return profile_of(scheduler)

    @classmethod
    def from_alphas_cumprod(
        cls, alphas_cumprod: Tensor | Sequence[float], *, prediction: str | None = None
    ) -> NoiseProfile:
        """Discrete, variance preserving: alpha = sqrt(alpha-bar), sigma = sqrt(1 - alpha-bar). It may end at 0."""
        table = _table(alphas_cumprod)
        return cls(table.sqrt(), (1 - table).sqrt(), _whole(table.numel()), prediction=prediction)

    @classmethod
    def from_sigmas(
        cls, sigmas: Tensor | Sequence[float], *, data_std: float = 1.0, prediction: str | None = None
    ) -> NoiseProfile:
        """Discrete, variance exploding: alpha = 1, and sigma rises with the timestep."""
        table = _table(sigmas)
        return cls(torch.ones_like(table), table, _whole(table.numel()), data_std=data_std, prediction=prediction)

    @classmethod
    def from_functions(
        cls,
        alpha: Curve,
        sigma: Curve,
        *,
        span: tuple[float, float] = (0.0, 1.0),
        cells: int = 1000,
        edges: Tensor | None = None,
        data_std: float = 1.0,
        prediction: str | None = None,
    ) -> NoiseProfile:
        """Continuous: alpha(t) and sigma(t), each from a float64 tensor to one like it.

        Args:
            alpha, sigma: the process; looked at in the cells' centres here, and at every drawn t in `coefficients`.
            span: the least and the largest t, cut into `cells` of equal width.
            cells: how many. Samplers call it T.
            edges: float64[cells + 1]: the borders instead, where cells should not be equally wide.
            data_std, prediction: see the class.
        """
        if edges is None:
            edges = torch.linspace(*span, _counted(cells) + 1, dtype=torch.float64)
        t = (edges[1:] + edges[:-1]) / 2
        return cls(_at(alpha, t), _at(sigma, t), t, edges, data_std, prediction, (alpha, sigma))

    @classmethod
    def vp(
        cls, beta_min: float = 0.1, beta_max: float = 20.0, *, least: float = 1e-5, cells: int = 1000
    ) -> NoiseProfile:
        """The variance-preserving score SDE (2011.13456), t in [`least`, 1)."""
        return cls._drifting(curves.vp, beta_min, beta_max, least, cells)

    @classmethod
    def sub_vp(
        cls, beta_min: float = 0.1, beta_max: float = 20.0, *, least: float = 1e-5, cells: int = 1000
    ) -> NoiseProfile:
        """The sub-VP score SDE (2011.13456), t in [`least`, 1): the same signal, less noise."""
        return cls._drifting(curves.sub_vp, beta_min, beta_max, least, cells)

    @classmethod
    def _drifting(
        cls, sigma: Callable[..., Tensor], beta_min: float, beta_max: float, least: float, cells: int
    ) -> NoiseProfile:
        """The two of those SDEs that share their signal."""
        signal, noise = (partial(curve, beta_min=beta_min, beta_max=beta_max) for curve in (curves.drift, sigma))
        return cls.from_functions(signal, noise, span=(least, 1.0), cells=cells)

    @classmethod
    def ve(
        cls, sigma_min: float = 0.01, sigma_max: float = 50.0, *, least: float = 0.0, cells: int = 1000
    ) -> NoiseProfile:
        """The variance-exploding score SDE (2011.13456), t in [`least`, 1): sigma_min (sigma_max / sigma_min)^t."""
        _rising(sigma_min, sigma_max)
        noise = partial(curves.exponential, at_0=sigma_min, rate=math.log(sigma_max / sigma_min))
        return cls.from_functions(partial(curves.constant, value=1.0), noise, span=(least, 1.0), cells=cells)

    @classmethod
    def edm(
        cls, sigma_min: float = 0.002, sigma_max: float = 80.0, data_std: float = 0.5, *, cells: int = 1000
    ) -> NoiseProfile:
        """EDM (2206.00364): alpha = 1, cells even in ln sigma, t = c_noise = ln(sigma) / 4. It predicts the sample."""
        _rising(sigma_min, sigma_max)
        return cls.from_functions(
            partial(curves.constant, value=1.0),
            partial(curves.exponential, at_0=1.0, rate=4.0),
            span=(math.log(sigma_min) / 4, math.log(sigma_max) / 4),
            cells=cells,
            data_std=data_std,
            prediction="sample",
        )

    @classmethod
    def flow(cls, shift: float = 1.0, *, cells: int = 1000) -> NoiseProfile:
        """Rectified flow: x_t = (1 - sigma) x0 + sigma eps, and the network is handed t = `cells` * sigma.

        SD3's `shift` moves the cells toward the noise: cell i holds the t with sigma = s u / (1 + (s - 1) u) for u in
        [i, i + 1) / cells. A sampler that is uniform over cells then is what diffusers' training scripts draw.
        """
        if not (math.isfinite(shift) and shift > 0):
            raise _refused("shift > 0", str(shift), "1 is none, SD3 uses 3")
        edges = cells * curves.shifted(torch.linspace(0, 1, _counted(cells) + 1, dtype=torch.float64), shift)
        signal = partial(curves.linear, at_0=1.0, slope=-1 / cells)
        noise = partial(curves.linear, at_0=0.0, slope=1 / cells)
        return cls.from_functions(signal, noise, edges=edges, prediction="flow")

    @property
    def T(self) -> int:
        """The number of cells: of timesteps, in discrete time."""
        return len(self.t)

    @property
    def is_continuous(self) -> bool:
        """Whether t is a float32 inside the cells."""
        return self.edges is not None

    @cached_property
    def snr(self) -> Tensor:
        """float64[T]: alpha² / sigma²; 0 only where the schedule ends in pure noise."""
        return (self.alpha / self.sigma) ** 2

    @cached_property
    def log_snr(self) -> Tensor:
        """float64[T]: ln of `snr`; -inf only where the schedule ends in pure noise."""
        return 2 * (self.alpha.log() - self.sigma.log())

    @cached_property
    def alpha_bar(self) -> Tensor:
        """float64[T]: alpha-bar of the variance-preserving process with the same ratio of signal to noise.

        sd² a² / (sd² a² + s²) for data of standard deviation sd: what makes schedules comparable.
        """
        signal = (self.data_std * self.alpha) ** 2
        return signal / (signal + self.sigma**2)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise of a batch: (table float32[2, K], row int64[B]), alpha(t_b) = table[0, row_b], sigma below.

        In discrete time the table holds all T and is made once per device; in continuous time it holds alpha and sigma
        of every t, exactly. Both are on t's device, and nothing waits for it; t is not checked for that reason.

        Args:
            t: int64[B], or float[B] in continuous time.
        """
        if self.curves is None:
            return self._there("table", t.device), t.to(torch.int64)
        exact = t.to(torch.float64)
        table = torch.stack([_at(curve, exact) for curve in self.curves]).to(torch.float32)
        return table, torch.arange(len(t), device=t.device)

    def cells(self, t: Tensor) -> Tensor:
        """int64[B] on t's device: the cell of each t. In continuous time what lies outside is in the first or the last.

        In discrete time that is t itself, unchecked: looking it up refuses what is no timestep.
        """
        if self.edges is None:
            return t.to(torch.int64)
        return torch.bucketize(t.to(torch.float64), self._there("inner", t.device), right=True)

    def _there(self, what: str, device: torch.device) -> Tensor:
        """The float32 table of alpha and sigma, or the inner edges, on a device: copied there once."""
        if device not in self._on:
            if self.edges is None:
                self._on[device] = torch.stack([self.alpha, self.sigma]).float().to(device)
            else:
                self._on[device] = self.edges[1:-1].contiguous().to(device)
        return self._on[device]


def checked(value: object) -> NoiseProfile:
    """`value`, if it is a profile: samplers are often handed a scheduler, or a number of timesteps."""
    if not isinstance(value, NoiseProfile):
        raise _refused("a NoiseProfile", type(value).__name__, "NoiseProfile.from_scheduler(scheduler) makes one")
    return value


def _at(curve: Curve, t: Tensor) -> Tensor:
    """The curve's values, also where it returns a plain number."""
    value = curve(t)
    return value if isinstance(value, Tensor) else torch.full_like(t, value)


def _table(values: Tensor | Sequence[float]) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64).detach().cpu()  # plain numbers are no float32 on their way


def _counted(cells: int) -> int:
    if cells < 1:
        raise _refused("1 cell or more", str(cells), "1000 is usual")
    return cells


def _rising(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise _refused("0 < sigma_min < sigma_max", f"{sigma_min} and {sigma_max}", "EDM has 0.002 and 80")


def _whole(T: int) -> Tensor:
    return torch.arange(T, dtype=torch.float64)


def _refused(expected: str, got: str, remedy: str) -> EbdiffError:
    return EbdiffError("no noise profile", expected=expected, got=got, remedy=remedy)
