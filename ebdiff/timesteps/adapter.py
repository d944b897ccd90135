"""Any sampler as guided-diffusion, improved-diffusion and DiT call theirs: `sample(n, device) -> (t, weights)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .learned import Learned
from .sampler import Sampler, Wrapped

__all__ = ["ScheduleSampler"]


class ScheduleSampler:
    """A drop-in for what those codebases' `create_named_schedule_sampler` returns.

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
