"""Any sampler in the code of others: as the object that they ask (guided-diffusion, DiT), or put into their model."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import EbdiffError
from .learned import Learned
from .sampler import Sampler, Wrapped

__all__ = ["ScheduleSampler", "install"]


class ScheduleSampler:
    """A drop-in for what `create_named_schedule_sampler` returns in guided-diffusion, improved-diffusion and the like.

        schedule_sampler = ScheduleSampler(SpeeD(NoiseProfile.from_alphas_cumprod(diffusion.alphas_cumprod)))
        t, weights = schedule_sampler.sample(batch.shape[0], device)
        loss = (losses["loss"] * weights).mean()

    Processes of torch.distributed share one draw per step, so each has its own part of it. Every call is one
    micro-batch; to resume, set `calls` to how many there were.

    Args:
        sampler: what to draw from.
        seed: of the run; the same in every process.
        accumulate: calls per training step.
    """

    def __init__(self, sampler: Sampler, seed: int = 0, accumulate: int = 1) -> None:
        self.sampler, self.seed, self.accumulate = sampler, seed, accumulate
        self.calls = 0

    def weights(self) -> Any:
        """numpy float64[T]: how often each timestep is drawn; sums to 1. (Not the loss weights, in those codebases.)"""
        return self.sampler.pmf().numpy()

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """The next (t, loss weights): int64[batch_size], or float32 in continuous time, and float32[batch_size]."""
        step, micro = divmod(self.calls, self.accumulate)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.calls += 1
        drawn = self.sampler.sample(
            batch_size,
            step=step,
            seed=self.seed,
            rank=rank,
            world=world,
            micro=micro,
            accumulate=self.accumulate,
            device=device,
        )
        return drawn.t, drawn.weight

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Let a sampler that learns do so, wrapped in others or not; where none does, nothing happens.

        Those codebases ask `isinstance(schedule_sampler, LossAwareSampler)` first: call it without. Every process calls
        it with as many losses as the others.

        Args:
            local_ts: [B], as drawn here.
            local_losses: [B], each sample's loss, without its weight.
        """
        sampler = self.sampler
        while isinstance(sampler, Wrapped):
            if isinstance(sampler, Learned):
                sampler.update(local_ts, local_losses)
            sampler = sampler.sampler


def install(diffusion: Any, sampler: Sampler, seed: int = 0) -> None:
    """Let a `GaussianDiffusion` of denoising_diffusion_pytorch train on a sampler's timesteps, with its weights.

    Its `forward` draws timesteps uniformly and calls ``self.p_losses(images, t)``; on this instance, and on copies of
    it, `p_losses` takes the sampler's instead. Drawing images, the state dict and `loss_weight` stay as they are.

    Args:
        diffusion: the instance, or one that has its `p_losses`, `loss_weight` and `num_timesteps`; not wrapped.
        sampler: what to draw from.
        seed: of the run; the same in every process.

    Raises:
        EbdiffError: it is no such thing, or has another number of timesteps.
    """
    missing = [name for name in ("p_losses", "loss_weight", "num_timesteps") if not hasattr(diffusion, name)]
    if missing or diffusion.num_timesteps != sampler.T:
        raise EbdiffError(
            f"cannot give {type(diffusion).__name__} a sampler of {sampler.T} timesteps",
            expected="a GaussianDiffusion of denoising_diffusion_pytorch with as many",
            got=f"one without {', '.join(missing)}" if missing else f"{diffusion.num_timesteps} timesteps",
            remedy="make the sampler's profile of this schedule: NoiseProfile.from_alphas_cumprod(...alphas_cumprod)",
        )
    diffusion._schedule_sampler = ScheduleSampler(sampler, seed)
    diffusion.p_losses = MethodType(_p_losses, diffusion)  # a deep copy binds it to the copy


def _p_losses(self: Any, x_start: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Its class's mean over the batch of ``loss_weight[t] * error``, at timesteps of the sampler's."""
    if isinstance(x_start, FakeTensor):  # traced: no step of training
        traced: Tensor = type(self).p_losses(self, x_start, t, *args, **kwargs)
        return traced
    t, weight = self._schedule_sampler.sample(len(x_start), x_start.device)
    usual = self.loss_weight
    self.loss_weight = usual.index_put((t,), usual[t] * weight.to(usual.dtype))  # the same t has the same weight
    try:
        loss: Tensor = type(self).p_losses(self, x_start, t, *args, **kwargs)
    finally:
        self.loss_weight = usual
    return loss
