"""Diff-Pruning in the main job: scores by hand, what they cost, and the same after an interruption anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

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
from ebdiff.progress import Slice, Tally
from ebdiff.pruning.importance import Gradients
from ebdiff.seeds import generator
from ebdiff.training import diff_pruning, job
from ebdiff.training.checkpoint import Checkpoints, Saved
from ebdiff.training.diff_pruning import macs_at_most
from ebdiff.training.regions import ticket_of
from ebdiff.training.world import World

pytestmark = pytest.mark.usefixtures("one_thread")

BY_LOSSES = (*TWO, "search.criterion=diff-pruning")
SHORT = (*BY_LOSSES, "search.steps=4")


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A search that was never interrupted, of 4 steps, and 9 and 12 timesteps of the regions."""
    monkeypatch.setattr(diff_pruning, "PASSES", 20)
    return found(tmp_path / "whole", *SHORT)


def cost_of(world: World) -> dict[str, Any]:
    cost: dict[str, Any] = read_json(world.out / "search" / "done.json")["cost"]
    return cost


def kept(world: World) -> Saved:
    """What the passes left behind; at their end the scores of all regions."""
    saved = Checkpoints(world.out / "search" / "checkpoints" / "diff-pruning").newest()
    assert saved is not None
    return saved


def alike(ours: World, theirs: World) -> bool:
    """Have these searches the same tickets, out of the same scores, bit for bit, at the same MACs?"""
    scores = same(kept(ours).tensors, kept(theirs).tensors)
    return scores and same(weights(ours.out), weights(theirs.out)) and cost_of(ours)["macs"] == cost_of(theirs)["macs"]


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
    cost = cost_of(world)
    assert cost["macs"] == 100 * 3 * 4 * world.plan.macs() == macs_at_most(world) == job.work(world)[0].macs
    assert cost["device_seconds"] > 0
    assert (cost["steps"], cost["images"]) == (0, 0)
    assert sum(tick.macs for tick in ticks) == cost["macs"]


def test_progress_moves_at_every_timestep(tmp_path: Path) -> None:
    world = tiny(tmp_path, *BY_LOSSES, "search.steps=2")
    job.prepare(world)
    tally, shares = Tally(job.work(world)[:1]), [0.0]
    for tick in job.find(world):
        tally.add(tick)
        shares.append(tally.share)
    assert shares[:-1] == pytest.approx([n / 102 for n in range(103)])
    assert shares[-1] == 1


def test_only_passes_that_were_made_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a threshold of 1 a region ends at the first loss below another; the share of the rest is seen as done."""
    monkeypatch.setattr(diff_pruning, "THRESHOLD", 1.0)
    world = tiny(tmp_path / "whole", *BY_LOSSES, "search.steps=0")
    network, passes = world.network().eval(), 0
    for region in world.partition:
        losses = [float(loss.detach()) for loss in losses_by_hand(world, network, region.lo, region.hi)]
        passes += next(n for n in range(1, len(losses)) if losses[n] < max(losses[:n])) + 1
    job.prepare(world)
    ticks = list(job.find(world))
    assert len(ticks) == passes + 1 < 20
    assert sum(tick.macs for tick in ticks) == macs_at_most(world)
    assert cost_of(world)["macs"] == passes * 3 * 4 * world.plan.macs()
    for after in range(1, passes + 1):
        again = found(tmp_path / str(after), *BY_LOSSES, "search.steps=0", after=after)
        assert alike(again, world)


def test_a_search_goes_on_to_the_same_tickets_after_an_interruption(tmp_path: Path, whole: World) -> None:
    """After its last step, the first timestep, the first region's last, the second's first, the last."""
    for after in (4, 5, 4 + 9, 4 + 10, 4 + 21):
        world = found(tmp_path / str(after), *SHORT, after=after)
        assert alike(world, whole)
    assert cost_of(whole)["macs"] == (4 + 21) * 3 * 4 * whole.plan.macs()


def test_in_slices_of_one_timestep_it_ends(tmp_path: Path, whole: World) -> None:
    world = tiny(tmp_path / "slices", *SHORT)
    job.prepare(world)
    for stopped in range(4 + 21):
        timed = Slice(job.find(world), 0)
        assert [tick.before for tick in timed][-1] is False
        assert timed.closed, stopped
    timed = Slice(job.find(world), 0)
    assert {tick.before for tick in timed} == {True}
    assert not timed.closed
    assert alike(world, whole)


def test_a_kill_loses_at_most_ten_timesteps_and_keeps_no_half_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: World
) -> None:
    add, world = Gradients.add, tiny(tmp_path / "killed", *SHORT)

    def killed(gradients: Gradients, loss: Tensor) -> bool:
        if gradients.count == 10:  # in the second region, after 19 in all
            next(iter(gradients.total.values())).add_(1)
            raise KeyboardInterrupt
        return add(gradients, loss)

    job.prepare(world)
    monkeypatch.setattr(Gradients, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        list(job.find(world))
    monkeypatch.setattr(Gradients, "add", add)
    ticks = list(job.find(tiny(world.out, *SHORT)))
    assert [tick.note for tick in ticks[:2]] == ["resumed at step 4", "resumed after 10 timesteps"]
    assert ticks[1].before
    assert ticks[1].macs == 10 * 3 * 4 * world.plan.macs()
    assert alike(world, whole)


def test_seconds_of_earlier_processes_are_counted_once(tmp_path: Path) -> None:
    world = tiny(tmp_path, *SHORT)
    job.prepare(world)
    list(islice(job.find(world), 4 + 3))
    saved = kept(world)
    assert saved.step == 3
    assert saved.facts["cost"]["device_seconds"] > 0
    long_ago = {**saved.facts["cost"], "device_seconds": 1e6, "wall_seconds": 1e6}
    checkpoints = Checkpoints(tmp_path / "search" / "checkpoints" / "diff-pruning")
    checkpoints.save(saved.step, saved.tensors, {**saved.facts, "cost": long_ago})
    cost = cost_of(found(tmp_path, *SHORT))
    assert 1e6 < cost["device_seconds"] < 1.5e6
    assert 1e6 < cost["wall_seconds"] < 1.5e6


def test_it_draws_once_so_it_never_settles() -> None:
    with pytest.raises(EbdiffError, match="diff-pruning, which draws once"):
        resolve("smoke", overrides=[*BY_LOSSES, "search.until=settled"])
