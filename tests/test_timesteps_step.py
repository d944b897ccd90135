"""Draws by step: the same sequence for any number of processes and micro-batches, and after a resume."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from ebdiff.errors import EbdiffError
from ebdiff.seeds import generator
from ebdiff.timesteps.profile import NoiseProfile
from ebdiff.timesteps.region import Region
from ebdiff.timesteps.reweighted import Corrected, Weighted, linear
from ebdiff.timesteps.sampler import Sampler, Stratified, Uniform, Within

SAMPLERS = {
    "uniform": Uniform(1000),
    "stratified": Stratified(1000),
    "antithetic": Stratified(1000, antithetic=True),
    "region": Within(Region(240, 440), Stratified(1000)),
    "weighted": Weighted(Stratified(1000), torch.arange(1000.0)),
    "flow": Stratified(NoiseProfile.flow(3.0)),
    "edm": Within(Region(100, 900), Uniform(NoiseProfile.edm())),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_processes_and_micro_batches_share_one_sequence(name):
    sampler = SAMPLERS[name]
    alone = sampler.sample(24, step=7, seed=3)
    for world, accumulate in ((1, 1), (2, 1), (4, 1), (1, 4), (2, 3), (3, 8)):
        parts = [
            sampler.sample(
                24 // world // accumulate, step=7, seed=3, rank=r, world=world, micro=m, accumulate=accumulate
            )
            for m in range(accumulate)
            for r in range(world)
        ]
        assert torch.equal(torch.cat([part.t for part in parts]), alone.t)
        assert torch.equal(torch.cat([part.weight for part in parts]), alone.weight)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_is_drawn_alike_by_a_sampler_made_anew(name):
    sampler = SAMPLERS[name]
    batches = [sampler.sample(16, step=step).t for step in range(5)]
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(other.sample(16, step=3).t, batches[3])
    assert len({tuple(batch.tolist()) for batch in batches}) == 5
    assert not torch.equal(sampler.sample(16, step=3, seed=1).t, batches[3])


def test_a_step_s_numbers_are_those_of_its_own_generator():
    sampler = SAMPLERS["stratified"]
    by_hand = sampler.sample(16, generator=generator(5, "timesteps", 9))
    assert torch.equal(sampler.sample(16, step=9, seed=5).t, by_hand.t)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_strata_cover_the_whole_step_and_say_nothing_of_the_place(n, antithetic):
    u = Stratified(10, antithetic).uniforms(n, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert sorted((u * n).floor().clamp(max=n - 1).int().tolist()) == list(range(n))
    if antithetic:
        ordered = u.sort().values
        torch.testing.assert_close(ordered[: n // 2], (1 - ordered).flip(0)[: n // 2], rtol=0, atol=1e-15)
    if n == 64:
        correlation = torch.corrcoef(torch.stack([u, torch.arange(64.0).double()]))[0, 1]
        assert abs(float(correlation)) < 0.3


def test_micro_batches_of_a_stratified_step_are_stratified_together():
    parts = [SAMPLERS["stratified"].sample(25, step=0, micro=m, accumulate=4).t for m in range(4)]
    assert sorted((torch.cat(parts) // 10).tolist()) == list(range(100))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rank": 2, "world": 2, "step": 0}, "rank 2 of 2"),
        ({"micro": -1, "step": 0}, "micro -1 of 1"),
        ({"step": 0, "generator": torch.Generator()}, "a generator"),
        ({"rank": 1, "world": 2}, "no step"),
        ({"accumulate": 2}, "no step"),
        ({"rank": 1}, "no step"),
    ],
)
def test_parts_that_do_not_exist_are_refused(wrong, words):
    with pytest.raises(EbdiffError, match=words):
        Uniform(10).sample(4, **wrong)


def test_a_step_is_its_number_whatever_holds_it():
    expected = SAMPLERS["stratified"].sample(8, step=3).t
    for step in (np.int64(3), torch.tensor(3), np.int32(3)):
        assert torch.equal(SAMPLERS["stratified"].sample(8, step=step).t, expected)


class Learning(Sampler):
    """Counts how often it was read."""

    def __init__(self) -> None:
        self.T, self.reads, self._version, self.favourite = 8, 0, 0, 2

    def pmf(self) -> Tensor:
        self.reads += 1
        return torch.nn.functional.one_hot(torch.tensor(self.favourite), 8).double()

    @property
    def version(self) -> int:
        return self._version


def test_tables_are_made_once_and_again_for_a_new_version():
    inner = Learning()
    sampler = Stratified(inner)
    for _ in range(5):
        assert sampler.sample(2).t.tolist() == [2, 2]
    assert inner.reads == 1
    inner.favourite = 6
    assert sampler.sample(2).t.tolist() == [2, 2], "tables are only read again when the version has risen"
    inner._version += 1
    assert sampler.sample(2).t.tolist() == [6, 6]


def test_a_plan_reaches_through_wrappers():
    plan = Corrected(Within(Region(0, 2), Weighted(3, torch.tensor([1.0, 3, 9]))), linear(0, 1, 10, 20))
    wrapped = Stratified(plan)
    assert wrapped.at(5) is wrapped
    late = wrapped.at(15)
    assert isinstance(late, Stratified)
    assert isinstance(late.sampler, Corrected)
    assert late.sampler.gamma == 0.5
    assert wrapped.at(99) is wrapped.at(100), "tables are kept where the plan has ended"


def test_weights_by_step():
    sampler = Stratified(Weighted(2, lambda step: torch.tensor([1.0, step])))
    batch = sampler.sample(2, step=3)
    assert sorted(zip(batch.t.tolist(), batch.weight.tolist(), strict=True)) == [(0, 0.5), (1, 1.5)]
    assert sampler.weights().tolist() == [2, 0]  # of step 0


def test_a_plan_is_asked_once_per_step():
    asked = []

    def plan(step: int) -> Tensor:
        asked.append(step)
        return torch.tensor([1.0, 2.0, 3.0 + step])

    sampler = Stratified(Weighted(3, plan))
    asked.clear()
    for step in (4, 5):
        for micro in range(3):
            sampler.sample(2, step=step, micro=micro, accumulate=3)
        assert sampler.at(step).at(step) is sampler.at(step)
    assert asked == [4, 5]
