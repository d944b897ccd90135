"""The training process of a diffusers scheduler, by what it has and says; diffusers itself is never imported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ..errors import EbdiffError
from . import curves
from .profile import NoiseProfile

__all__ = ["profile_of"]

_PREDICTIONS = {"flow_prediction": "flow", **{name: name for name in ("epsilon", "v_prediction", "sample")}}
_TOKENS = "it corrupts tokens, not numbers"
_CONSISTENCY = "consistency training compares neighbouring noise levels, no noise is regressed"
_STAGES = "every stage of its pyramid has noise levels of its own"
_REFUSED = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "CMStochasticIterativeScheduler": _CONSISTENCY,
    "ConsistencyDecoderScheduler": _CONSISTENCY,
    "SCMScheduler": _CONSISTENCY,
    "HeliosScheduler": _STAGES,
    "HeliosDMDScheduler": _STAGES,
    "MiniMaxH3Scheduler": "its t = 1 is the clean end, and its velocity points to the data",
    "RFD4ProteinaScheduler": "it moves two modalities, each with a time of its own",
    "IPNDMScheduler": "it defines how to sample, not how to train",
    "KarrasVeScheduler": "it defines how to sample, not how to train",
}


def profile_of(scheduler: Any) -> NoiseProfile:
    """See `NoiseProfile.from_scheduler`.

    The betas or sigmas of training are read, never those of the sampling steps, which `set_timesteps` overwrites. A
    scheduler with alphas_cumprod is discrete, and its own float32 table is taken, as its add_noise does.
    """
    config = getattr(scheduler, "config", None)
    names = [kind.__name__ for kind in type(scheduler).__mro__]
    known = next((_REFUSED[name] for name in names if name in _REFUSED), None)
    if known is not None or config is None:
        raise _no_process(scheduler, known or "it has no config")
    prediction = _PREDICTIONS.get(str(_setting(config, "prediction_type", "")))
    cells = int(_setting(config, "num_train_timesteps", 1000))
    if _setting(config, "use_flow_sigmas", False):
        return NoiseProfile.flow(float(_setting(config, "flow_shift", 1.0)), cells=cells)
    if _setting(config, "timestep_type", "discrete") == "continuous" and prediction == "v_prediction":
        return _karras(scheduler, config, cells)
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        table = scheduler.alphas_cumprod.double().cpu()
        if _setting(config, "rescale_betas_zero_snr", False):
            table[-1] = 0.0  # Euler and DPM-Solver put 2**-24 there, for the sake of a finite sigma in sampling
        return NoiseProfile.from_alphas_cumprod(table, prediction=prediction)
    if hasattr(scheduler, "precondition_noise"):
        return _preconditioned(config, cells, by_angle="CosineDPMSolverMultistepScheduler" in names)
    if hasattr(scheduler, "_alpha_cumprod"):
        return _wuerstchen(config, cells)
    if _setting(config, "beta_min", None) is not None:
        least = float(_setting(config, "sampling_eps", 1e-3))
        return NoiseProfile.vp(float(config["beta_min"]), float(config["beta_max"]), least=least, cells=cells)
    if "ScoreSdeVeScheduler" in names:
        least = float(_setting(config, "sampling_eps", 1e-5))
        return NoiseProfile.ve(float(config["sigma_min"]), float(config["sigma_max"]), least=least, cells=cells)
    if _setting(config, "invert_sigmas", False):
        raise _no_process(
            scheduler, "with invert_sigmas its t = 0 is the noisy end, and its velocity points to the data"
        )
    if any(name.startswith(("FlowMatch", "FlowMap", "Piflow", "LTXEulerAncestralRF")) for name in names):
        return NoiseProfile.flow(_shift(scheduler, config), cells=cells)
    raise _no_process(scheduler, "it has neither alphas_cumprod nor a process that is known here")


def _setting(config: Any, name: str, default: Any) -> Any:
    """An entry of a config; `default` where it is missing or None."""
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if value is None else value


def _shift(scheduler: Any, config: Any) -> float:
    """The shift of training: none where it depends on the image's size, which only a sampling run has."""
    if _setting(config, "use_dynamic_shifting", False):
        return 1.0
    return float(_setting(scheduler, "shift", _setting(config, "shift", 1.0)))


def _preconditioned(config: Any, cells: int, *, by_angle: bool) -> NoiseProfile:
    """EDM's schedulers: even in ln sigma; the preconditioned network predicts the sample."""
    least, most, data_std = (float(_setting(config, key, 0)) for key in ("sigma_min", "sigma_max", "sigma_data"))
    if not by_angle:
        return NoiseProfile.edm(least, most, data_std, cells=cells)
    sigma = torch.linspace(math.log(least), math.log(most), cells + 1, dtype=torch.float64).exp()
    signal = partial(curves.constant, value=1.0)
    return NoiseProfile.from_functions(
        signal, curves.angle, edges=2 / math.pi * sigma.atan(), data_std=data_std, prediction="sample"
    )


def _karras(scheduler: Any, config: Any, cells: int) -> NoiseProfile:
    """Euler on continuous timesteps (Stable Video Diffusion): t = ln(sigma) / 4 for data of standard deviation 1."""
    noise = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    least = float(_setting(config, "sigma_min", noise[0]))
    return NoiseProfile.edm(least, float(_setting(config, "sigma_max", noise[-1])), 1.0, cells=cells)


def _wuerstchen(config: Any, cells: int) -> NoiseProfile:
    offset, power = float(_setting(config, "s", 0.008)), float(_setting(config, "scaler", 1.0))
    signal, noise = (partial(curves.cosine, offset=offset, power=power, noise=noise) for noise in (False, True))
    return NoiseProfile.from_functions(signal, noise, cells=cells, prediction="epsilon")


def _no_process(scheduler: Any, reason: str) -> EbdiffError:
    return EbdiffError(
        f"{type(scheduler).__name__} has no training process to follow",
        expected="a diffusers scheduler that networks are trained with",
        got=reason,
        remedy="NoiseProfile.from_functions(alpha, sigma, span=...) takes any process",
    )
