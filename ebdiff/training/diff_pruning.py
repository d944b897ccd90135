"""Diff-Pruning's scores in the main job (Fang et al. 2023, eq. 7): from the losses of one batch at rising timesteps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..data import to_model
from ..pruning.importance import importance
from ..seeds import generator
from ..timesteps.region import Region
from .accounting import FORWARD_AND_BACKWARD
from .conditions import ask
from .objective import Objective
from .world import World

__all__ = ["macs_at_most", "region_scores"]

PASSES = 100  # forward and backward, over the whole schedule: every 10th of 1000 timesteps


def region_scores(world: World, network: nn.Module) -> tuple[list[dict[str, Tensor]], float]:
    """For each region the scores of its channels by its own timesteps, and the MACs that all of them took.

    Every region takes the same batch with the same noise, drawn from the run's seed, without dropout and in float32.
    Losses are those of evenly spaced timesteps, of which a region has at most `PASSES` times its share and one; they
    rise in t until one falls below 5% of the region's largest.
    """
    losses = Losses(world, network.eval())
    scores = [importance(network, world.plan, "diff-pruning", losses.within(region)) for region in world.partition]
    return scores, losses.passes * _macs_of_pass(world, len(losses.clean))


def macs_at_most(world: World) -> float:
    """What `region_scores` takes where no loss is small."""
    passes = sum(len(_timesteps(region, world.partition.T)) for region in world.partition)
    return passes * _macs_of_pass(world, world.config.train.batch_size)


class Losses:
    """The losses of one batch; counts those that were asked for."""

    def __init__(self, world: World, network: nn.Module) -> None:
        self.network, self.objective, self.T = network, Objective(world.scheduler), world.partition.T
        images, drawn = world.data.train, generator(world.config.seed, "diff-pruning")
        chosen = torch.randperm(len(images), generator=drawn)[: world.config.train.batch_size]
        clean = to_model(images[chosen])
        told = world.conditions.of(chosen, clean)
        self.clean, self.noise = clean.to(world.device), torch.randn(clean.shape, generator=drawn).to(world.device)
        self.told = {key: rows.to(world.device) for key, rows in told.items()}
        self.passes = 0

    def within(self, region: Region) -> Iterator[Tensor]:
        """Of a region's timesteps, rising."""
        for timestep in _timesteps(region, self.T):
            self.passes += 1
            t = torch.full((len(self.clean),), timestep, device=self.clean.device)
            predicted = ask(self.network, self.objective.noisy(self.clean, self.noise, t), t, self.told)
            yield self.objective.loss(predicted, self.clean, self.noise, t, torch.ones_like(t, dtype=torch.float32))[0]


def _timesteps(region: Region, T: int) -> range:
    return range(region.lo, region.hi, -(-T // PASSES))


def _macs_of_pass(world: World, images: int) -> float:
    return world.plan.macs() * FORWARD_AND_BACKWARD * images
