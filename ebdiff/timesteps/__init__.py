"""Which timesteps to draw, and with which weight."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import ScheduleSampler as ScheduleSampler
    from .adapter import install as install
    from .adaptive import Adaptive as Adaptive
    from .adaptive import LossSecondMoment as LossSecondMoment
    from .batch import Timesteps as Timesteps
    from .budget import region_budget as region_budget
    from .densities import CLTS as CLTS
    from .densities import Beta as Beta
    from .densities import CosMap as CosMap
    from .densities import LogitNormal as LogitNormal
    from .densities import LogNormalSigma as LogNormalSigma
    from .densities import Mode as Mode
    from .log_variance import LogVariance as LogVariance
    from .named import SAMPLERS as SAMPLERS
    from .named import sampler_named as sampler_named
    from .profile import NoiseProfile as NoiseProfile
    from .region import Partition as Partition
    from .region import Region as Region
    from .reweighted import Corrected as Corrected
    from .reweighted import Weighted as Weighted
    from .reweighted import linear as linear
    from .sampler import Sampler as Sampler
    from .sampler import Stratified as Stratified
    from .sampler import Uniform as Uniform
    from .sampler import Within as Within
    from .speed import SpeeD as SpeeD
    from .weighting import convert as convert
    from .weighting import debias as debias
    from .weighting import edm as edm
    from .weighting import min_snr as min_snr
    from .weighting import p2 as p2
    from .weighting import soft_min_snr as soft_min_snr

_ROOMS = {
    "adapter": (
        "ScheduleSampler",
        "install",
    ),
    "adaptive": (
        "Adaptive",
        "LossSecondMoment",
    ),
    "batch": ("Timesteps",),
    "budget": ("region_budget",),
    "densities": (
        "Beta",
        "CLTS",
        "CosMap",
        "LogNormalSigma",
        "LogitNormal",
        "Mode",
    ),
    "log_variance": ("LogVariance",),
    "named": (
        "SAMPLERS",
        "sampler_named",
    ),
    "profile": ("NoiseProfile",),
    "region": (
        "Partition",
        "Region",
    ),
    "reweighted": (
        "Corrected",
        "Weighted",
        "linear",
    ),
    "sampler": (
        "Sampler",
        "Stratified",
        "Uniform",
        "Within",
    ),
    "speed": ("SpeeD",),
    "weighting": (
        "convert",
        "debias",
        "edm",
        "min_snr",
        "p2",
        "soft_min_snr",
    ),
}
_HOME = {name: module for module, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ebdiff.timesteps' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
