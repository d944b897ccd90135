"""Other weights on the same density: Weighted and Corrected, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_timesteps import Table

from ebdiff.errors import EbdiffError
from ebdiff.timesteps.region import Region
from ebdiff.timesteps.reweighted import Corrected, Weighted, linear
from ebdiff.timesteps.sampler import Stratified, Uniform, Within


def test_weights_multiply_and_have_mean_one():
    inner = Table([1, 1, 2], [1, 2, 3])  # weights over their mean 9 / 4
    sampler = Weighted(inner, torch.tensor([4.0, 2.0, 0.0]))
    torch.testing.assert_close(sampler.weights(), torch.tensor([2.0, 2.0, 0.0]))  # 4, 4, 0 over 8 / 4
    assert torch.equal(sampler.pmf(), inner.pmf())


def test_correction_by_hand():
    inner = Table([3, 1])
    for gamma, expected in ((0.0, [1, 1]), (1.0, [2 / 3, 2]), (0.5, [1.5**-0.5, 0.5**-0.5])):
        weights = Corrected(inner, gamma).weights()
        raw = torch.tensor(expected)
        torch.testing.assert_close(weights, raw / (0.75 * raw[0] + 0.25 * raw[1]))


def test_full_correction_is_the_uniform_objective():
    sampler = Corrected(Table([1 + t % 7 for t in range(50)]), 1.0)
    torch.testing.assert_close(sampler.pmf() * sampler.weights(), torch.full((50,), 1 / 50).double(), rtol=1e-6, atol=0)
    inside = Within(Region(3, 9), sampler)
    product = inside.pmf() * inside.weights()
    torch.testing.assert_close(product[3:9], torch.full((6,), 1 / 6).double(), rtol=1e-6, atol=0)


def test_weights_in_a_list_or_an_array():
    for weights in ([0.1, 0.3], np.array([0.1, 0.3]), torch.tensor([0.1, 0.3], dtype=torch.float64)):
        assert torch.equal(Weighted(2, weights).table, torch.tensor([0.1, 0.3], dtype=torch.float64))


def test_timesteps_that_are_never_drawn_get_no_weight():
    inner = Table([1, 0, 1])
    for sampler in (Corrected(inner, 1.0), Weighted(inner, torch.tensor([1.0, 5.0, 1.0]))):
        assert sampler.weights().tolist() == [1, 0, 1]


@pytest.mark.parametrize("make", [lambda s: Weighted(s, torch.arange(1.0, 51)), lambda s: Corrected(s, 0.7)])
def test_order_of_wrapping_does_not_matter(make):
    inner, region = Table([1 + t % 7 for t in range(50)], [1 + t % 3 for t in range(50)]), Region(13, 31)
    one, other = Within(region, make(Stratified(inner))), Stratified(make(Within(region, inner)))
    torch.testing.assert_close(one.pmf(), other.pmf())
    torch.testing.assert_close(one.weights(), other.weights())
    torch.testing.assert_close(Within(region, one).weights(), one.weights())


def test_a_straight_line():
    plan = linear(0.0, 1.0, 100, 300)
    assert [plan(step) for step in (0, 100, 150, 300, 9999)] == [0, 0, 0.25, 1, 1]
    assert linear(1.0, 0.0, 0, 4)(1) == 0.75


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Weighted(3, torch.ones(2)), "3 of them"),
        (lambda: Weighted(3, []), "3 of them"),
        (lambda: Weighted(2, torch.tensor([1.0, -1])), "finite and >= 0"),
        (lambda: Weighted(2, torch.tensor([1.0, float("inf")])), "finite and >= 0"),
        (lambda: Weighted(2, torch.zeros(2)).weights(), "every weight"),
        (lambda: Corrected(2, 1.5), "no such gamma"),
        (lambda: Corrected(2, lambda step: -1.0), "no such gamma"),
        (lambda: linear(0, 1, 5, 5), "start < stop"),
        (lambda: Within(Region(0, 2), Within(Region(1, 4), Uniform(9))).weights_in(Region(4, 6)), "never draws"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(EbdiffError, match=words):
        make()
