"""Models that none of us wrote: those of denoising_diffusion_pytorch, from PyPI."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from types import ModuleType
from typing import Any

import pytest

# What the package imports and its Unet does not use.
STAND_INS = {
    "torchvision": ("transforms", "utils"),
    "torchvision.transforms": (),
    "torchvision.utils": (),
    "pytorch_fid": (),
    "pytorch_fid.fid_score": ("calculate_frechet_distance",),
    "pytorch_fid.inception": ("InceptionV3",),
}


def foreign_unet(**options: Any) -> Any:
    """A Unet of denoising_diffusion_pytorch; skips the test where the package is not installed."""
    return _module("denoising_diffusion_pytorch").Unet(**options)


def karras_unet(kind: str = "", **options: Any) -> Any:
    """Its KarrasUnet; `kind` is "", "1D" or "3D". Skips as above."""
    return getattr(_module("karras_unet" + (kind and f"_{kind.lower()}")), f"KarrasUnet{kind}")(**options)


def _module(name: str) -> ModuleType:
    missing = [n for n in ("denoising_diffusion_pytorch", "einops", "ema_pytorch") if not importlib.util.find_spec(n)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    added = [stand_in for stand_in in STAND_INS if stand_in not in sys.modules]
    try:
        for stand_in in added:
            sys.modules[stand_in] = ModuleType(stand_in)
        for stand_in in added:
            for attribute in STAND_INS[stand_in]:
                setattr(sys.modules[stand_in], attribute, sys.modules.get(f"{stand_in}.{attribute}"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(f"denoising_diffusion_pytorch.{name}")
    finally:  # diffusers would take them for the real ones
        for stand_in in added:
            del sys.modules[stand_in]
