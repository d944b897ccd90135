"""Samplers by the names that configurations and commands use."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..errors import EbdiffError
from .densities import Beta, CosMap, LogitNormal, LogNormalSigma, Mode
from .profile import NoiseProfile
from .reweighted import Weighted
from .sampler import Sampler, Uniform
from .speed import SpeeD
from .weighting import debias, edm, min_snr, p2, soft_min_snr

__all__ = ["SAMPLERS", "sampler_named"]


def _weighted(weighting: Callable[..., Tensor]) -> Callable[[NoiseProfile], Sampler]:
    """Uniform timesteps with a published weight, said of what the network predicts."""

    def sampler(profile: NoiseProfile) -> Sampler:
        return Weighted(Uniform(profile), weighting(profile, prediction=_predicted(profile)))

    return sampler


def _predicted(profile: NoiseProfile) -> str:
    return profile.prediction or "epsilon"


SAMPLERS: dict[str, Callable[[NoiseProfile], Sampler]] = {
    "uniform": Uniform,
    "speed": SpeeD,
    "speed-released": lambda profile: SpeeD(profile, variant="released"),
    "min-snr": _weighted(min_snr),
    "soft-min-snr": _weighted(soft_min_snr),
    "p2": _weighted(p2),
    "debias": _weighted(debias),
    "logit-normal": LogitNormal,
    "mode": Mode,
    "cosmap": CosMap,
    "beta": lambda profile: Beta(profile, 0.8, 1.0),
    "edm": lambda profile: Weighted(LogNormalSigma(profile), edm(profile, prediction=_predicted(profile))),
}


def sampler_named(name: str, profile: NoiseProfile) -> Sampler:
    """The sampler of that name with its published settings, on this schedule.

    Raises:
        EbdiffError: there is none.
    """
    if name not in SAMPLERS:
        raise EbdiffError("no such sampler", expected=f"one of {', '.join(SAMPLERS)}", got=name, remedy="choose one")
    return SAMPLERS[name](profile)
