"""Steps per region, and the adapter for guided-diffusion's training loops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_speed import LINEAR
from test_timesteps import Table

from ebdiff.errors import EbdiffError
from ebdiff.timesteps.adapter import ScheduleSampler
from ebdiff.timesteps.adaptive import LossSecondMoment
from ebdiff.timesteps.budget import region_budget
from ebdiff.timesteps.region import Partition, Region
from ebdiff.timesteps.sampler import Sampler, Stratified, Uniform, Within
from ebdiff.timesteps.speed import SpeeD

FOUR = Partition(0, 240, 440, 720, 1000)
SPEED = SpeeD(LINEAR, tau=700)


def test_speed_s_budget_of_four_regions():
    # k n_lo + n_hi of 3800: 1200, 1000, 1320 and 280
    assert region_budget(FOUR, SPEED, 3800) == [1200, 1000, 1320, 280]
    assert region_budget(FOUR, SPEED, 10_000) == [3158, 2631, 3474, 737]
    assert region_budget(FOUR, Uniform(1000), 100) == [24, 20, 28, 28]


def test_costs_keep_the_price_of_equal_steps():
    # 4000 steps cost 3500 where those of the last region cost half. 3500 / 3660 of 1200, 1000, 1320 and 280 are 1147.5,
    # 956.3, 1262.3 and 267.8; the largest remainders take the 1.5 that rounding down leaves.
    assert region_budget(FOUR, SPEED, 4000, [1, 1, 1, 0.5]) == [1148, 956, 1262, 268]


def test_a_cheaper_network_means_more_steps_for_all():
    cheap, dear = (region_budget(FOUR, SPEED, 4000, [1, 1, cost, 1]) for cost in (0.5, 2.0))
    assert sum(cheap) > 4000 > sum(dear)


masses = st.lists(st.floats(0.001, 1), min_size=1, max_size=6)


@given(masses=masses, total=st.integers(6, 10_000), costs=st.lists(st.floats(0.1, 10), min_size=6, max_size=6))
def test_a_budget_is_kept(masses, total, costs):
    partition, sampler = Partition(*range(len(masses) + 1)), Table(masses)
    steps = region_budget(partition, sampler, total)
    assert sum(steps) == total
    assert min(steps) >= 1
    costs = costs[: len(masses)]
    steps = region_budget(partition, sampler, total, costs)
    left = total * sum(costs) / len(costs) - sum(n * cost for n, cost in zip(steps, costs, strict=True))
    assert min(steps) >= 1
    assert -1e-6 <= left < max(costs) + 1e-6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((Partition(0, 500), Uniform(1000), 10), "another schedule"),
        ((FOUR, Uniform(1000), 3), "too few steps"),
        ((FOUR, Uniform(1000), 10, [1, 2, 3]), "4 positive numbers"),
        ((FOUR, Uniform(1000), 10, [1, 2, 3, 0]), "4 positive numbers"),
    ],
)
def test_what_is_no_budget_is_refused(arguments, words):
    with pytest.raises(EbdiffError, match=words):
        region_budget(*arguments)


def test_the_adapter_has_the_interface_of_guided_diffusion():
    sampler = Stratified(SPEED)
    adapter = ScheduleSampler(sampler, seed=3)
    p = adapter.weights()
    assert isinstance(p, np.ndarray)
    assert (p.shape, p.sum()) == ((1000,), pytest.approx(1))
    for step in range(3):
        t, weights = adapter.sample(16, torch.device("cpu"))
        expected = sampler.sample(16, step=step, seed=3)
        assert torch.equal(t, expected.t)
        assert torch.equal(weights, expected.weight)


@pytest.mark.parametrize("wrap", [lambda s: s, Stratified, lambda s: Within(Region(10, 90), Stratified(s))])
def test_the_adapter_s_sampler_learns_where_it_can(wrap: Callable[[Sampler], Sampler]):
    learned = LossSecondMoment(100, history=1)
    t, losses = torch.arange(100), torch.linspace(1, 2, 100)
    ScheduleSampler(wrap(learned)).update_with_local_losses(t, losses)
    expected = 0.999 * losses.double() / losses.double().sum() + 1e-5
    torch.testing.assert_close(learned.pmf(), expected)
    ScheduleSampler(wrap(SPEED)).update_with_local_losses(t, losses)


def test_the_adapter_s_calls_may_be_micro_batches():
    adapter = ScheduleSampler(Stratified(100), accumulate=4)
    t = torch.cat([adapter.sample(25, "cpu")[0] for _ in range(4)])
    assert sorted(t.tolist()) == list(range(100))
    resumed = ScheduleSampler(Stratified(100), accumulate=4)
    resumed.calls = adapter.calls
    assert torch.equal(resumed.sample(25, "cpu")[0], adapter.sample(25, "cpu")[0])


def test_processes_of_torch_distributed_share_a_draw(monkeypatch: pytest.MonkeyPatch):
    parts = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(ScheduleSampler(Stratified(100)).sample(50, "cpu")[0])
    assert sorted(torch.cat(parts).tolist()) == list(range(100))
