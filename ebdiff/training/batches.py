"""What each optimizer step sees: images, noise, timesteps and weights, a function of (seed, step) alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data import to_model
from ..seeds import generator
from ..timesteps.region import Partition
from ..timesteps.sampler import Sampler, Within
from .conditions import Conditions, Told
from .seeds import DataOrder
from .state import TrainConfig

__all__ = ["Batch", "Batches", "region_at"]


@dataclass(frozen=True)
class Batch:
    """One optimizer step, over all micro-batches and processes.

    Args:
        clean, noise: float32 [n, C, H, W].
        t: int64 [n].
        weight: float32 [n].
        region: the number of the region that all timesteps come from, where regions were given.
        told: what the network is told about each image.
    """

    clean: Tensor
    noise: Tensor
    t: Tensor
    weight: Tensor
    region: int | None = None
    told: Told = field(default_factory=dict)

    def part(self, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """clean, noise, t and weight of the samples from `start` on."""
        chosen = slice(start, start + count)
        return tuple(x[chosen].to(device) for x in (self.clean, self.noise, self.t, self.weight))  # type: ignore[return-value]

    def told_part(self, start: int, count: int, device: torch.device) -> Told:
        """What the network is told about the samples from `start` on."""
        return {key: rows[start : start + count].to(device) for key, rows in self.told.items()}


class Batches:
    """Draws the batch of any step.

    Args:
        images: uint8 [N, C, H, W], or latents as floats, on the CPU.
        sampler: of timesteps and weights.
        config: batch size, accumulation, flips and seed.
        regions: let each step's timesteps come from one of these regions, drawn with the mass that `sampler` gives it.
        conditions: what the network is told about each of the images.
    """

    def __init__(
        self,
        images: Tensor,
        sampler: Sampler,
        config: TrainConfig,
        regions: Partition | None = None,
        conditions: Conditions | None = None,
    ) -> None:
        self.images, self.sampler, self.config, self.regions = images, sampler, config, regions
        self.conditions = conditions or Conditions()
        self.order = DataOrder(len(images), config.seed)
        self._inside: tuple[tuple[Sampler, int], dict[int, Within], Tensor] | None = None

    def __call__(self, step: int) -> Batch:
        """The batch of that step."""
        total, seed = self.config.batch_size * self.config.accumulate, self.config.seed
        chosen = self.order(step * total, total)
        clean = to_model(self.images[chosen])
        if self.config.flip:
            flipped = torch.rand(total, generator=generator(seed, "flip", step)) < 0.5
            clean = torch.where(flipped[:, None, None, None], clean.flip(-1), clean)
        noise = torch.randn(clean.shape, generator=generator(seed, "noise", step))
        told = self.conditions.in_training(chosen, clean, seed, step)
        sampler = self.sampler.at(step)
        if self.regions is None:
            t, weight = sampler.sample(total, step=step, seed=seed)
            return Batch(clean, noise, t, weight, told=told)
        inside, region = self._of_region(self.regions, sampler, step)
        t, _ = inside.sample(total, step=step, seed=seed)
        # Within gives every region mean weight 1; here the regions share one objective.
        return Batch(clean, noise, t, sampler.tables(t.device).weights[t], region, told)

    def _of_region(self, regions: Partition, sampler: Sampler, step: int) -> tuple[Sampler, int]:
        key = sampler, sampler.version
        if self._inside is None or self._inside[0] != key:
            masses = torch.tensor([sampler.mass(region) for region in regions], dtype=torch.float64)
            within = {i: Within(region, sampler) for i, region in enumerate(regions) if masses[i] > 0}
            self._inside = key, within, masses
        _, within, masses = self._inside
        number = region_at(step, masses, self.config.seed)
        return within[number], number


def region_at(step: int, masses: Tensor, seed: int) -> int:
    """The number of the region that all timesteps of a step come from, by their masses, float64 [regions]."""
    return int(torch.multinomial(masses, 1, generator=generator(seed, "region", step)))
