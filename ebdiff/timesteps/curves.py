"""Signal and noise of the processes that papers give in closed form: functions of t, float64 in, float64 out.

Plain functions with their constants bound by `functools.partial`, so that a profile can be copied and pickled.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Curve", "angle", "constant", "cosine", "drift", "exponential", "linear", "shifted", "sub_vp", "vp"]

Curve = Callable[[Tensor], Tensor]


def constant(t: Tensor, value: float) -> Tensor:
    """`value` everywhere: the signal of variance-exploding processes."""
    return torch.full_like(t, value)


def linear(t: Tensor, at_0: float, slope: float) -> Tensor:
    """Rectified flow: the signal 1 - t, the noise t (2209.03003)."""
    return at_0 + slope * t


def exponential(t: Tensor, at_0: float, rate: float) -> Tensor:
    """Noise that is even in ln sigma: the VE SDE, and EDM's c_noise = ln(sigma) / 4 solved for sigma."""
    return at_0 * torch.exp(rate * t)


def angle(t: Tensor) -> Tensor:
    """tan(pi t / 2): sigma of t = (2 / pi) atan(sigma), which diffusers' cosine DPM solver hands to its network."""
    return torch.tan(t * (math.pi / 2))


def _integral(t: Tensor, beta_min: float, beta_max: float) -> Tensor:
    """The integral of beta from 0 to t, for beta that is linear in t (2011.13456, appendix C)."""
    return beta_min * t + (beta_max - beta_min) / 2 * t**2


def drift(t: Tensor, beta_min: float, beta_max: float) -> Tensor:
    """The signal of the VP and sub-VP SDEs (2011.13456, equation 29)."""
    return torch.exp(-_integral(t, beta_min, beta_max) / 2)


def vp(t: Tensor, beta_min: float, beta_max: float) -> Tensor:
    """The noise of the VP SDE (2011.13456, equation 29)."""
    return torch.sqrt(-torch.expm1(-_integral(t, beta_min, beta_max)))


def sub_vp(t: Tensor, beta_min: float, beta_max: float) -> Tensor:
    """The noise of the sub-VP SDE (2011.13456, equation 29): the square of the VP SDE's."""
    return -torch.expm1(-_integral(t, beta_min, beta_max))


def cosine(t: Tensor, offset: float, power: float, noise: bool) -> Tensor:
    """Signal, or noise, of Wuerstchen's cosine: alpha-bar between 0.0001 and 0.9999, t first bent by `power`."""
    bent = 1 - (1 - t) ** power if power > 1 else t**power
    whole = math.cos(offset / (1 + offset) * math.pi / 2) ** 2
    alpha_bar = (torch.cos((bent + offset) / (1 + offset) * (math.pi / 2)) ** 2 / whole).clamp(1e-4, 0.9999)
    return torch.sqrt(1 - alpha_bar if noise else alpha_bar)


def shifted(u: Tensor, shift: float) -> Tensor:
    """SD3's shift of noise levels for resolution (2403.03206, equation 23): [0, 1] -> [0, 1]."""
    return shift * u / (1 + (shift - 1) * u)
