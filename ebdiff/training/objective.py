"""What a scheduler asks of a network: its noisy input, and the loss of its prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import EbdiffError
from ..timesteps.loss import TimestepLoss, noised, weighted_timestep_loss
from ..timesteps.profile import NoiseProfile

__all__ = ["Objective"]


class Objective:
    """Noising and loss, in one pass over the images each where the scheduler does what its schedule says.

    A scheduler with an `add_noise` or a `get_velocity` of its own kind is asked for both instead.

    Args:
        scheduler: diffusers' DDPMScheduler or its like.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.kind = scheduler, str(scheduler.config.prediction_type)
        self.profile = _profile(scheduler, self.kind)

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network sees: [B, C, H, W]."""
        if self.profile is None:
            return self.scheduler.add_noise(clean, noise, t)  # type: ignore[no-any-return]
        return noised(clean, t, self.profile, noise)[0]

    def loss(self, predicted: Tensor, clean: Tensor, noise: Tensor, t: Tensor, weight: Tensor) -> TimestepLoss:
        """The mean of weight times the squared error of each sample, and those errors, in float32."""
        target: Any = clean, noise
        if self.profile is None:
            target = _target(self.scheduler, self.kind, clean, noise, t)
        return weighted_timestep_loss(predicted, target, t, weight, self.kind, profile=self.profile)


def _profile(scheduler: Any, kind: str) -> NoiseProfile | None:
    """The scheduler's schedule, if its own methods follow it."""
    try:
        profile = NoiseProfile.from_scheduler(scheduler)
    except EbdiffError:
        return None
    t = torch.arange(0, profile.T, max(1, profile.T // 7))
    clean, noise = (
        torch.linspace(-1, 1, 2 * len(t)).view(-1, 1, 1, 2),
        torch.linspace(2, -1, 2 * len(t)).view(-1, 1, 1, 2),
    )
    same = [torch.allclose(scheduler.add_noise(clean, noise, t), noised(clean, t, profile, noise)[0], atol=1e-5)]
    if kind == "v_prediction":
        alpha, sigma = (table[t].float().view(-1, 1, 1, 1) for table in (profile.alpha, profile.sigma))
        same.append(torch.allclose(scheduler.get_velocity(clean, noise, t), alpha * noise - sigma * clean, atol=1e-5))
    return profile if all(same) else None


def _target(scheduler: Any, kind: str, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    known = {"epsilon": noise, "sample": clean}
    return known[kind] if kind in known else scheduler.get_velocity(clean, noise, t)
