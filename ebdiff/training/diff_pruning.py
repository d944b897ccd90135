"""Diff-Pruning's scores in the main job (Fang et al. 2023, eq. 7): from the losses of one batch at rising timesteps."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
from torch import Tensor, nn

from ..data import to_model
from ..pruning.importance import THRESHOLD, Gradients
from ..seeds import generator
from ..timesteps.region import Region
from .accounting import FORWARD_AND_BACKWARD, Cost, Meter
from .checkpoint import Checkpoints, Saved
from .conditions import ask
from .objective import Objective
from .stages import Tick
from .world import World

__all__ = ["macs_at_most", "region_scores"]

PASSES = 100  # forward and backward, over the whole schedule: every 10th of 1000 timesteps
KEPT_EVERY = 10  # passes: what a kill loses at most

Scores = dict[str, Tensor]


def region_scores(
    world: World, network: nn.Module, checkpoints: Checkpoints
) -> Generator[Tick, None, tuple[list[Scores], Cost]]:
    """For each region the scores of its channels by its own timesteps.

    Every region takes the same batch with the same noise, drawn from the run's seed, without dropout and in float32.
    Losses are those of evenly spaced timesteps, of which a region has at most `PASSES` times its share and one; they
    rise in t until one falls below 5% of the region's largest.

    Yields after every timestep; closed there, or killed, it goes on from `checkpoints` to the same bits.

    Returns:
        The scores; and the cost: all MACs, with the seconds of earlier processes, since the caller measures this one's.
    """
    scoring, saved, before = Scoring(world, network.eval()), checkpoints.newest(), Cost()
    macs = _macs_of_pass(world, len(scoring.clean))
    if saved is not None:
        scoring.restore(saved)
        before = Cost.from_json(saved.facts["cost"])
        yield Tick("search", scoring.passes * macs, f"resumed after {scoring.passes} timesteps", before=True)
    meter = Meter(world.device.type, before)

    def keep() -> None:
        checkpoints.save(scoring.passes, scoring.tensors(), {**scoring.facts(), "cost": meter.read().to_json()})

    try:
        for timestep in scoring.timesteps():
            if scoring.passes % KEPT_EVERY == 0:
                keep()
            yield Tick("search", macs, f"scored channels at timestep {timestep}")
    except GeneratorExit:
        keep()
        raise
    keep()
    yield Tick("search", macs_at_most(world) - scoring.passes * macs, "scored all channels", before=True)
    return scoring.scores, before + Cost(macs=scoring.passes * macs)


def macs_at_most(world: World) -> float:
    """What `region_scores` takes where no loss is small."""
    passes = sum(len(_timesteps(region, world.partition.T)) for region in world.partition)
    return passes * _macs_of_pass(world, world.config.train.batch_size)


class Scoring:
    """Scores of the regions that are finished, gradients of the next, and how many passes were made for both."""

    def __init__(self, world: World, network: nn.Module) -> None:
        self.world, self.network, self.objective = world, network, Objective(world.scheduler)
        images, drawn = world.data.train, generator(world.config.seed, "diff-pruning")
        chosen = torch.randperm(len(images), generator=drawn)[: world.config.train.batch_size]
        clean = to_model(images[chosen])
        told = world.conditions.of(chosen, clean)
        self.clean, self.noise = clean.to(world.device), torch.randn(clean.shape, generator=drawn).to(world.device)
        self.told = {key: rows.to(world.device) for key, rows in told.items()}
        self.scores: list[Scores] = []
        self.gradients, self.passes = self._none(), 0

    def timesteps(self) -> Iterator[int]:
        """Take those that are left, each yielded when it is done."""
        regions = self.world.partition
        while len(self.scores) < len(regions):
            own = _timesteps(regions[len(self.scores)], regions.T)
            timestep = own[self.gradients.count]
            more = self.gradients.add(self.loss(timestep))
            self.passes += 1
            if not more or self.gradients.count == len(own):
                self.scores.append(self.gradients.scores("diff-pruning"))
                self.gradients = self._none()
            yield timestep

    def loss(self, timestep: int) -> Tensor:
        """Of the batch, all of it at this timestep."""
        t = torch.full((len(self.clean),), timestep, device=self.clean.device)
        predicted = ask(self.network, self.objective.noisy(self.clean, self.noise, t), t, self.told)
        return self.objective.loss(predicted, self.clean, self.noise, t, torch.ones_like(t, dtype=torch.float32))[0]

    def tensors(self) -> dict[str, Tensor]:
        """With `facts` all that going on exactly needs, besides the network."""
        tensors = {f"{k}.{name}": tensor for k, own in enumerate(self.scores) for name, tensor in own.items()}
        tensors["largest"] = torch.tensor(self.gradients.largest, dtype=torch.float64)
        if self.gradients.count:
            tensors |= {f"sum.{name}": tensor for name, tensor in self.gradients.total.items()}
        return tensors

    def facts(self) -> dict[str, int]:
        """See `tensors`."""
        return {"regions": len(self.scores), "count": self.gradients.count}

    def restore(self, saved: Saved) -> None:
        """Go on from what `tensors` and `facts` were, after so many passes as its step says."""
        names = [space.name for space in self.world.plan]
        self.scores = [{name: saved.tensors[f"{k}.{name}"] for name in names} for k in range(saved.facts["regions"])]
        self.gradients.count, self.gradients.largest = saved.facts["count"], float(saved.tensors["largest"])
        for name, total in self.gradients.total.items() if self.gradients.count else ():
            total.copy_(saved.tensors[f"sum.{name}"])
        self.passes = saved.step

    def _none(self) -> Gradients:
        return Gradients(self.network, self.world.plan, THRESHOLD)


def _timesteps(region: Region, T: int) -> range:
    return range(region.lo, region.hi, -(-T // PASSES))


def _macs_of_pass(world: World, images: int) -> float:
    return world.plan.macs() * FORWARD_AND_BACKWARD * images
