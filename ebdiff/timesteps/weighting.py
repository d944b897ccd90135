"""Weights on the squared error of a prediction, one per timestep; and the same weight said of another prediction.

x_t = alpha x0 + sigma eps. At one x_t the errors of all predictions are multiples of one another:

| prediction | is | its squared error, over that of x0 |
|---|---|---|
| `"epsilon"` | eps | alpha² / sigma² (the SNR) |
| `"sample"` | x0 | 1 |
| `"v_prediction"` | alpha eps - sigma x0 | (alpha² + sigma²)² / sigma² |
| `"flow"` | eps - x0 | (alpha + sigma)² / sigma² |

so a weight belongs to a prediction, and `convert` keeps weight times squared error what it was. Published methods, each
on the prediction that makes it shortest; S is the SNR alpha²/sigma², d the data's standard deviation, p the density:

| weight | formula | timesteps | source |
|---|---|---|---|
| `uniform` | 1 | any | DDPM's L_simple (2006.11239, eq. 14), on epsilon |
| `min_snr` | epsilon: min(S, gamma) / S | uniform | Hang et al., 2303.09556 |
| `soft_min_snr` | epsilon: gamma / (S + gamma) | any | Crowson et al., 2401.11605 |
| `p2` | epsilon: 1 / (k + S)^gamma | uniform | Choi et al., 2204.00227 |
| `debias` | epsilon: 1 / sqrt(min(S, cap)) | uniform | Yu et al., 2310.08442 |
| `edm` | x0: 1/d² + S | `LogNormalSigma` | Karras et al., 2206.00364, table 1 |
| `LogVariance` | x0: (1/d² + S) / e^u, u learned | `LogNormalSigma(-0.4, 1)` | Karras et al., 2312.02696, eq. 21 |
| `uniform` | flow: 1 | `LogitNormal`, `Mode`, `CosMap` | Esser et al., 2403.03206, section 3.1 |
| `uniform` | 1 | `Beta` | Zheng et al., ECCV 2024 (B-TTDM) |
| `uniform` | 1 | `CLTS` | Xu et al., 2404.07946 |
| 1 / (T p) | unbiased | `LossSecondMoment` | Nichol and Dhariwal, 2102.09672, eq. 18 |
| prior / p | unbiased | `Adaptive` | Kingma and Gao, 2303.00848: only p times weight counts |

With zero-terminal SNR alpha is 0 at the last timestep, x_t is the noise, and epsilon's error says nothing of the image:
a weight on it has a limit there (`min_snr`: 1) or takes the value of the timestep before (`debias`, `edm`), never
infinity. Tables are float64[T] on the CPU, finite and >= 0, in the paper's scale; `Weighted` divides by the mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import EbdiffError
from .profile import NoiseProfile

__all__ = ["convert", "debias", "edm", "min_snr", "p2", "soft_min_snr", "uniform"]

EPSILON, SAMPLE = "epsilon", "sample"


def convert(weight: Tensor, profile: NoiseProfile, source: str, target: str) -> Tensor:
    """The weight on the squared error of `target` that is `weight` on that of `source`: the same objective.

    Exact for any alpha and sigma, variance-preserving or not.

    Args:
        weight: [T], finite and >= 0.
        source: what the weight is for: "epsilon", "v_prediction", "sample" or "flow".
        target: what the network predicts.

    Returns:
        float64[T], finite and >= 0. Where alpha is 0, a weight on epsilon is that of the timestep before.

    Raises:
        EbdiffError: for another prediction or such a weight.
    """
    weight = weight.detach().to("cpu", torch.float64)
    if weight.shape != profile.alpha.shape or not bool((weight.isfinite() & (weight >= 0)).all()):
        raise EbdiffError(
            "no weight for this profile",
            expected=f"{profile.T} numbers, finite and >= 0",
            got=f"{list(weight.shape)}, the least {weight.min().item() if weight.numel() else 'missing'}",
            remedy="one weight per timestep",
        )
    share = _squared_error(profile, source) / _squared_error(profile, target)
    if target == source:
        return weight.clone()
    weight = weight * share
    if target == EPSILON:
        live = int((profile.alpha > 0).sum())  # the SNR does not rise, so zeros are at the end
        weight[live:] = weight[live - 1] if live else 0.0
    return weight


def _squared_error(profile: NoiseProfile, prediction: str) -> Tensor:
    """float64[T]: the squared error of a prediction where that of x0 is sigma². 0 only for epsilon at alpha = 0."""
    alpha, sigma = profile.alpha, profile.sigma
    if prediction == EPSILON:
        return alpha**2
    if prediction == SAMPLE:
        return sigma**2
    if prediction == "v_prediction":
        return (alpha**2 + sigma**2) ** 2
    if prediction == "flow":
        return (alpha + sigma) ** 2
    raise EbdiffError(
        "unknown prediction",
        expected="epsilon, v_prediction, sample or flow",
        got=repr(prediction),
        remedy="as in a diffusers scheduler's prediction_type; flow is eps - x0",
    )


def positive(**settings: float) -> None:
    """Refuse settings, by name, that are not finite and > 0."""
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise EbdiffError(f"no such {name}", expected="a finite number > 0", got=str(value), remedy="see its paper")


def uniform(profile: NoiseProfile, *, of: str | None = None, prediction: str = EPSILON) -> Tensor:
    """Weight 1 on the squared error of `of`, said of `prediction`; by default both are the same, so 1 everywhere.

    `uniform(profile, of="epsilon", prediction="v_prediction")` is DDPM's L_simple for a network that predicts v.
    """
    return convert(torch.ones_like(profile.alpha), profile, prediction if of is None else of, prediction)


def min_snr(profile: NoiseProfile, gamma: float = 5.0, *, prediction: str = EPSILON) -> Tensor:
    """Min-SNR-gamma: W_eps = min(S, gamma) / S, so W_x0 = min(S, gamma) and for VP W_v = min(S, gamma) / (S + 1).

    Hang et al. (arXiv 2303.09556), gamma 5. At S = 0 the limit is 1, as in
    their code. SpeeD's port takes element 0 of the minimum, which makes it 5 / (S + 1), that is P2: not this.

    Raises:
        EbdiffError: unless 0 < gamma < infinity.
    """
    positive(gamma=gamma)
    signal, noise = profile.alpha**2, profile.sigma**2
    # gamma / S without dividing by S: at S = 0 it is infinite, and the lesser of it and 1 is 1.
    weight = torch.where(signal <= gamma * noise, 1.0, gamma * noise / signal)
    return convert(weight, profile, EPSILON, prediction)


def soft_min_snr(profile: NoiseProfile, gamma: float = 4.0, *, prediction: str = EPSILON) -> Tensor:
    """Soft-Min-SNR: W_x0 = 1 / (sigma²/alpha² + 1/gamma), so W_eps = gamma / (S + gamma).

    Crowson et al. (arXiv 2401.11605, HDiT), gamma 4. k-diffusion writes it on the network's preconditioned output:
    (s d)² / (s² + d²)² with s = sigma / alpha, which is this one for gamma = 1/d².

    Raises:
        EbdiffError: unless 0 < gamma < infinity.
    """
    positive(gamma=gamma)
    signal, noise = profile.alpha**2, profile.sigma**2
    return convert(gamma * noise / (signal + gamma * noise), profile, EPSILON, prediction)


def p2(profile: NoiseProfile, k: float = 1.0, gamma: float = 1.0, *, prediction: str = EPSILON) -> Tensor:
    """Perception-prioritised: W_eps = 1 / (k + S)^gamma.

    Choi et al. (arXiv 2204.00227), the factor beside DDPM's own weight; k 1, gamma 0.5 or 1. For VP, k = 1 and
    gamma = 1 it is 1 - alpha-bar.

    Raises:
        EbdiffError: unless 0 < k, gamma < infinity.
    """
    positive(k=k, gamma=gamma)
    return convert((k + (profile.alpha / profile.sigma) ** 2) ** -gamma, profile, EPSILON, prediction)


def debias(profile: NoiseProfile, cap: float = 1000.0, *, prediction: str = EPSILON) -> Tensor:
    """Debiased: W_eps = 1 / sqrt(min(S, cap)).

    Yu et al. (arXiv 2310.08442); the cap is that of kohya's scripts. For v those scripts use 1 / (S + 1) instead of the
    exact sqrt(S) / (S + 1), which is another objective.

    Raises:
        EbdiffError: unless 0 < cap < infinity.
    """
    positive(cap=cap)
    # On x0 it is S / sqrt(min(S, cap)) = max(sqrt(S), S / sqrt(cap)), and has no pole.
    root = profile.alpha / profile.sigma
    return convert(torch.maximum(root, root**2 / cap**0.5), profile, SAMPLE, prediction)


def edm(profile: NoiseProfile, *, prediction: str = EPSILON) -> Tensor:
    """EDM: W_x0 = (s² + d²) / (s d)² = 1/d² + S, with s = sigma / alpha and d the profile's `data_std`.

    Karras et al. (arXiv 2206.00364), table 1 and eq. 8: weight 1 on the network's preconditioned output. With d = 1 and
    VP that output is v up to its sign.
    """
    return convert(profile.data_std**-2 + (profile.alpha / profile.sigma) ** 2, profile, SAMPLE, prediction)
