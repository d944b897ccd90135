"""A sampler that learns within the training loop: it is told every loss, and is saved and restored with the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from kill_me import Seen, net, pictures, steps, whole
from torch import Tensor

import ebdiff
from ebdiff.errors import EbdiffError
from ebdiff.seeds import generator
from ebdiff.timesteps.adaptive import Adaptive, LossSecondMoment
from ebdiff.training.batches import Batches
from ebdiff.training.checkpoint import Checkpoints
from ebdiff.training.loop import TrainConfig, TrainState

PROFILE = ebdiff.NoiseProfile.from_scheduler(DDPMScheduler(1000))
CONFIG = TrainConfig(batch_size=8, accumulate=2, lr=1e-2)
HALVES = ebdiff.Partition(0, 500, 1000)


def adaptive() -> Adaptive:
    """Two buckets, so that the density has changed after a few steps."""
    return Adaptive(PROFILE, ebdiff.SpeeD(PROFILE), buckets=2, every=3)


SAMPLERS: dict[str, Callable[[], ebdiff.timesteps.Sampler]] = {
    "adaptive": adaptive,
    "stratified": lambda: ebdiff.Stratified(adaptive()),
    "within": lambda: ebdiff.Within(ebdiff.Region(100, 900), adaptive()),
    "second moment": lambda: LossSecondMoment(PROFILE, history=1),
}


def begin(sampler: ebdiff.timesteps.Sampler) -> TrainState:
    return TrainState.begin(net(), CONFIG, sampler.learner)


def go(state: TrainState, sampler: ebdiff.timesteps.Sampler, until: int, **options: object) -> None:
    steps(state, until, sampler=sampler, batch_size=8, accumulate=2, **options)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_is_told_each_samples_loss(name: str) -> None:
    """A network that predicts 0 has the mean square of the noise as its loss, which is drawn here once more."""
    sampler, by_hand = SAMPLERS[name](), SAMPLERS[name]()
    model = Seen()
    assert sampler.learner is not None
    assert by_hand.learner is not None
    steps(TrainState.begin(model, CONFIG, sampler.learner), 1, sampler=sampler, batch_size=8, accumulate=2)
    losses = torch.randn(16, 2, 6, 6, generator=generator(0, "noise", 0)).square().mean((1, 2, 3))
    for t, part in zip(model.t, losses.split(8), strict=True):
        by_hand.learner.update(t, part)
    found, expected = sampler.learner.state_dict(), by_hand.learner.state_dict()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=0)


@pytest.mark.parametrize("regions", [None, HALVES])
@pytest.mark.parametrize("name", SAMPLERS)
def test_going_on_is_never_having_stopped(tmp_path: Path, name: str, regions: ebdiff.Partition | None) -> None:
    sampler = SAMPLERS[name]()
    uninterrupted = begin(sampler)
    go(uninterrupted, sampler, 9, regions=regions)
    first, checkpoints = SAMPLERS[name](), Checkpoints(tmp_path)
    go(begin(first), first, 4, regions=regions, checkpoints=checkpoints)
    second = SAMPLERS[name]()
    resumed = begin(second)
    resumed.restore(whole(checkpoints))
    go(resumed, second, 9, regions=regions)
    assert same(resumed.tensors(), uninterrupted.tensors())
    if name == "adaptive":
        assert not torch.equal(second.pmf(), adaptive().pmf())


def test_regions_are_drawn_with_the_mass_that_they_have_now() -> None:
    """Whoever has drawn before draws as a newcomer does."""
    sampler = adaptive()
    used = Batches(pictures(), sampler, CONFIG, HALVES)
    used(0)
    sampler.update(torch.arange(1000), torch.where(torch.arange(1000) < 500, 9.0, 0.1))
    sampler.update(torch.arange(2), torch.ones(2))
    sampler.update(torch.arange(2), torch.ones(2))
    assert sampler.mass(HALVES[0]) > 1.1 * adaptive().mass(HALVES[0])
    fresh = Batches(pictures(), sampler, CONFIG, HALVES)
    for step in range(60):
        a, b = used(step), fresh(step)
        assert a.region == b.region
        assert torch.equal(a.t, b.t)


def test_one_that_would_not_be_saved_is_refused() -> None:
    for learner in (None, adaptive()):
        with pytest.raises(EbdiffError, match="a sampler that learns"):
            steps(TrainState.begin(net(), CONFIG, learner), 1, sampler=ebdiff.Stratified(adaptive()))
    with pytest.raises(EbdiffError, match="a sampler that learns"):
        steps(TrainState.begin(net(), CONFIG, adaptive()), 1)


def test_what_another_has_learned_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    sampler, checkpoints = adaptive(), Checkpoints(tmp_path)
    go(begin(sampler), sampler, 2, checkpoints=checkpoints)
    state = begin(LossSecondMoment(PROFILE))
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    with pytest.raises(EbdiffError, match="no state of this LossSecondMoment"):
        state.restore(whole(checkpoints))
    assert same(state.tensors(), before)
    plain = TrainState.begin(net(), CONFIG)
    plain.restore(whole(checkpoints))
    assert plain.step == 2


def test_what_is_learned_lies_where_the_model_does_from_the_first_draw_on() -> None:
    """Another device rounds otherwise: a run that goes on would begin with a draw that the whole one had not."""
    sampler = adaptive()
    begin(sampler).to(torch.device("meta"))
    assert {tensor.device.type for tensor in sampler.state.tensors.values()} == {"meta"}
