"""Samplers by the names that configurations and commands use."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import EbdiffError
from .densities import Beta, CosMap, LogitNormal, LogNormalSigma, Mode
from .profile import NoiseProfile
from .reweighted import Weighted
from .sampler import Sampler, Uniform
from .speed import SpeeD
from .weighting import debias, edm, min_snr, p2, soft_min_snr

__all__ = ["SAMPLERS", "sampler_named"]


def _weighted(weighting: Callable[..., Tensor]) -> Callable[..., Sampler]:
    """Uniform timesteps with a published weight, said of what the network predicts."""

    def sampler(profile: NoiseProfile, **settings: Any) -> Sampler:
        return Weighted(Uniform(profile), weighting(profile, **settings, prediction=_predicted(profile)))

    return sampler


def _released(profile: NoiseProfile, **settings: Any) -> Sampler:
    return SpeeD(profile, variant="released", **settings)


def _predicted(profile: NoiseProfile) -> str:
    return profile.prediction or "epsilon"


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "uniform": Uniform,
    "speed": SpeeD,
    "speed-released": _released,
    "min-snr": _weighted(min_snr),
    "soft-min-snr": _weighted(soft_min_snr),
    "p2": _weighted(p2),
    "debias": _weighted(debias),
    "logit-normal": LogitNormal,
    "mode": Mode,
    "cosmap": CosMap,
    "beta": lambda profile, a=0.8, b=1.0: Beta(profile, a, b),
    "edm": lambda profile: Weighted(LogNormalSigma(profile), edm(profile, prediction=_predicted(profile))),
}


def sampler_named(text: str, profile: NoiseProfile) -> Sampler:
    """The sampler of that name on this schedule, with its published settings: "speed", or others: "speed(k=2)".

    Raises:
        EbdiffError: there is none, it takes no such settings, or they are out of range.
    """
    name, settings = _parsed(text)
    if name not in SAMPLERS:
        raise EbdiffError("no such sampler", expected=f"one of {', '.join(SAMPLERS)}", got=name, remedy="choose one")
    try:
        return SAMPLERS[name](profile, **settings)
    except TypeError as error:
        raise EbdiffError(
            f"settings of the sampler {name}",
            expected="some that it takes",
            got=f"{text}: {error}",
            remedy="see its class",
        ) from None


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    """name(key=value, ...) as Python has it."""
    name, bracket, rest = text.partition("(")
    try:
        call: Any = ast.parse(f"settings({rest}" if bracket else "settings()", mode="eval").body
        return name.strip(), {str(each.arg): ast.literal_eval(each.value) for each in _keywords(call)}
    except (SyntaxError, TypeError, ValueError):
        raise EbdiffError(
            "settings of a sampler", expected="name(key=value, ...)", got=text, remedy="write them as in speed(k=2)"
        ) from None


def _keywords(call: Any) -> list[ast.keyword]:
    """Those of one call that has nothing else."""
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
        raise ValueError
    names = [each.arg for each in call.keywords]
    if None in names or len({*names}) < len(names):
        raise ValueError
    return call.keywords
