"""The tables of a draw: looking up with a guide finds what searching finds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebdiff.timesteps.region import Region
from ebdiff.timesteps.sampler import Uniform, Within
from ebdiff.timesteps.tables import Tables

CPU = torch.device("cpu")


def tables(pmf: list[float]) -> Tables:
    table = torch.tensor(pmf, dtype=torch.float64)
    return Tables.of(table / table.sum(), torch.ones(len(pmf)), None, CPU)


@given(
    pmf=st.lists(st.sampled_from([0.0, 1e-9, 0.2, 1.0, 5.0]), min_size=1, max_size=40).filter(any),
    u=st.lists(st.floats(0, 1), max_size=20),
)
def test_a_guide_finds_what_searching_finds(pmf, u):
    made = tables(pmf)
    steps = made.cdf[made.cdf.isfinite()].tolist()
    beside = [math.nextafter(x, side) for x in steps for side in (0, 1)]
    numbers = torch.tensor([0.0, *u, *steps, *beside, 1.0], dtype=torch.float64)
    expected = torch.searchsorted(made.cdf, numbers, right=True)
    assert torch.equal(made.draw(numbers)[0], expected)
    assert all(pmf[cell] > 0 for cell in expected.tolist())


def test_numbers_beside_a_border_are_on_their_own_side():
    for T in range(2, 100):
        borders = [k / T for k in range(1, T)]
        below = torch.tensor([math.nextafter(border, 0) for border in borders], dtype=torch.float64)
        made = tables([1.0] * T)
        assert torch.equal(made.draw(below)[0], torch.searchsorted(made.cdf, below, right=True))


@pytest.mark.parametrize(
    ("pmf", "guided"), [([1.0] * 1000, True), ([5.0] * 700 + [1.0] * 300, True), ([1e-9] * 3 + [1.0], False)]
)
def test_a_guide_is_for_densities_without_narrow_cells(pmf, guided):
    assert (tables(pmf).guide is not None) == guided


def test_a_region_has_a_guide_of_its_own():
    assert Within(Region(440, 720), Uniform(1000)).tables(CPU).guide is not None
