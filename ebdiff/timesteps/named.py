"""Samplers by the names that configurations and commands use."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import partial
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

_FIXED = ("prediction", "variant")  # follow from the schedule, the first parameter of all, and the name


def _weighted(weighting: Callable[..., Tensor]) -> Callable[..., Sampler]:
    """Uniform timesteps with a published weight, said of what the network predicts; takes the weighting's settings."""

    def sampler(profile: NoiseProfile, **settings: float) -> Sampler:
        return Weighted(Uniform(profile), weighting(profile, **settings, prediction=_predicted(profile)))

    sampler.__signature__ = inspect.signature(weighting)  # type: ignore[attr-defined]
    return sampler


def _predicted(profile: NoiseProfile) -> str:
    return profile.prediction or "epsilon"


def _edm(profile: NoiseProfile, **settings: float) -> Sampler:
    return Weighted(LogNormalSigma(profile, **settings), edm(profile, prediction=_predicted(profile)))


_edm.__signature__ = inspect.signature(LogNormalSigma)  # type: ignore[attr-defined]

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "uniform": Uniform,
    "speed": SpeeD,
    "speed-released": partial(SpeeD, variant="released"),
    "min-snr": _weighted(min_snr),
    "soft-min-snr": _weighted(soft_min_snr),
    "p2": _weighted(p2),
    "debias": _weighted(debias),
    "logit-normal": LogitNormal,
    "mode": Mode,
    "cosmap": CosMap,
    "beta": partial(Beta, a=0.8, b=1.0),
    "edm": _edm,
}


def sampler_named(text: str, profile: NoiseProfile) -> Sampler:
    """The sampler of that name on this schedule, with its published settings: "speed", or others: "speed(k=2)".

    Raises:
        EbdiffError: there is none, it takes no such settings, or they are out of range.
    """
    name, settings = _parsed(text)
    if name not in SAMPLERS:
        raise EbdiffError("no such sampler", expected=f"one of {', '.join(SAMPLERS)}", got=name, remedy="choose one")
    known = [key for key in list(inspect.signature(SAMPLERS[name]).parameters)[1:] if key not in _FIXED]
    other = [key for key in settings if key not in known]
    if other:
        raise EbdiffError(f"settings of {name}", expected=", ".join(known) or "none", got=", ".join(other))
    return SAMPLERS[name](profile, **settings)


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    """name(key=number, ...) as Python has it."""
    name, bracket, rest = text.partition("(")
    try:
        call: Any = ast.parse(f"settings({rest}" if bracket else "settings()", mode="eval").body
        return name.strip(), dict(_numbers(call))
    except (SyntaxError, TypeError, ValueError):
        raise EbdiffError(
            "settings of a sampler", expected="name(key=number, ...)", got=text, remedy="write them as in speed(k=2)"
        ) from None


def _numbers(call: Any) -> list[tuple[str, Any]]:
    """(key, number) of one call that has nothing else, each key once."""
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
        raise ValueError
    pairs = [(each.arg, each.value) for each in call.keywords]
    if None in dict(pairs) or len(dict(pairs)) < len(pairs):
        raise ValueError
    return [(str(key), _number(value)) for key, value in pairs]


def _number(node: ast.expr) -> float:
    value = ast.literal_eval(node)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    return value
