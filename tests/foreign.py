"""A model that none of us wrote: denoising_diffusion_pytorch's Unet, from PyPI."""

from __future__ import annotations

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
    missing = [n for n in ("denoising_diffusion_pytorch", "einops", "ema_pytorch") if not importlib.util.find_spec(n)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    added = [name for name in STAND_INS if name not in sys.modules]
    try:
        for name in added:
            sys.modules[name] = ModuleType(name)
        for name in added:
            for attribute in STAND_INS[name]:
                setattr(sys.modules[name], attribute, sys.modules.get(f"{name}.{attribute}"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Unet
    finally:  # diffusers would take them for the real ones
        for name in added:
            del sys.modules[name]
    return Unet(**options)
