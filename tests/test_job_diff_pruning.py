"""Diff-Pruning in the main job: scores by hand, what they cost, and the same tickets after an interruption."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny import TWO, found, same, tiny, weights
from torch import Tensor
from torch.nn import functional as F

from ebdiff import ChannelMask, importance
from ebdiff.config import resolve
from ebdiff.data import to_model
from ebdiff.errors import EbdiffError
from ebdiff.files import read_json
from ebdiff.seeds import generator
from ebdiff.training import job
from ebdiff.training.diff_pruning import Losses, macs_at_most
from ebdiff.training.regions import ticket_of
from ebdiff.training.world import World

pytestmark = pytest.mark.usefixtures("one_thread")

BY_LOSSES = (*TWO, "search.criterion=diff-pruning")


def losses_by_hand(world: World, network: torch.nn.Module, start: int, stop: int) -> Iterator[Tensor]:
    """Of every tenth timestep: the plain error of the predicted noise, of one batch with one noise."""
    drawn = generator(world.config.seed, "diff-pruning")
    clean = to_model(world.data.train[torch.randperm(64, generator=drawn)[:4]])
    noise = torch.randn(clean.shape, generator=drawn)
    for timestep in range(start, stop, 10):
        t = torch.full((4,), timestep)
        yield F.mse_loss(network(world.scheduler.add_noise(clean, noise, t), t).sample, noise)


def test_scores_are_those_of_the_losses_of_each_regions_timesteps(tmp_path: Path) -> None:
    world = tiny(tmp_path, *BY_LOSSES, "search.steps=0")
    job.prepare(world)
    ticks = list(job.find(world))
    network, masks = world.network().eval(), []
    for number, (region, ratio) in enumerate(zip(world.partition, (0.3, 0.6), strict=True)):
        losses = losses_by_hand(world, network, region.lo, region.hi)
        scores = importance(network, world.plan, "diff-pruning", losses)
        ticket = ticket_of(world, number)
        assert ticket.mask == ChannelMask.draw(scores, plan=world.plan, ratio=ratio)
        assert (ticket.criterion, ticket.step, ticket.settled, ticket.region) == ("diff-pruning", 0, False, region)
        masks.append(ChannelMask.draw(scores, plan=world.plan, ratio=0.5))
    assert masks[0] != masks[1]
    cost = read_json(tmp_path / "search" / "done.json")["cost"]
    assert cost["macs"] == 100 * 3 * 4 * world.plan.macs() == macs_at_most(world) == job.work(world)[0].macs
    assert cost["device_seconds"] > 0
    assert (cost["steps"], cost["images"]) == (0, 0)
    assert sum(tick.macs for tick in ticks) == cost["macs"]


def test_only_passes_that_were_made_are_counted(tmp_path: Path) -> None:
    world = tiny(tmp_path, *BY_LOSSES)
    losses = Losses(world, world.network())
    assert len(list(islice(losses.within(world.partition[1]), 7))) == losses.passes == 7
    assert len(list(losses.within(world.partition[0]))) == 44
    assert losses.passes == 51


def test_a_search_goes_on_to_the_same_tickets_after_an_interruption(tmp_path: Path) -> None:
    overrides = (*BY_LOSSES, "search.steps=4")
    for out, after in (("whole", 0), ("drawing", 4)):
        world = found(tmp_path / out, *overrides, after=after)
        assert same(weights(world.out), weights(tmp_path / "whole"))
        cost = read_json(world.out / "search" / "done.json")["cost"]
        assert cost["macs"] == (4 + 100) * 3 * 4 * world.plan.macs()


def test_it_draws_once_so_it_never_settles() -> None:
    with pytest.raises(EbdiffError, match="diff-pruning, which draws once"):
        resolve("smoke", overrides=[*BY_LOSSES, "search.until=settled"])
