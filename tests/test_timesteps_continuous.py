"""Continuous time: float32 timesteps that never leave their cell, alike inside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebdiff.errors import EbdiffError
from ebdiff.timesteps.profile import NoiseProfile
from ebdiff.timesteps.region import Region
from ebdiff.timesteps.sampler import Stratified, Uniform, Within
from ebdiff.timesteps.tables import Tables

PROFILES = {
    "flow": NoiseProfile.flow(),
    "flow, shift 6": NoiseProfile.flow(6.0),
    "edm": NoiseProfile.edm(),
    "vp": NoiseProfile.vp(),
    "ve": NoiseProfile.ve(),
}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", PROFILES)
def test_uniform_over_cells(name):
    profile = PROFILES[name]
    t, weight = Uniform(profile).sample(40_000, generator=torch.Generator().manual_seed(0))
    assert (t.dtype, weight.dtype) == (torch.float32, torch.float32)
    counts = torch.bincount(profile.cells(t) // 100, minlength=10).double()
    assert float(((counts - 4000) ** 2 / 4000).sum()) < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_inside_a_cell_all_t_are_alike():
    profile = NoiseProfile.from_functions(torch.cos, torch.sin, span=(0.0, 1.0), cells=2)
    t = Within(Region(1, 2), Stratified(profile)).sample(1000, step=0).t.sort().values
    torch.testing.assert_close(t, torch.linspace(0.5, 1, 1000), rtol=0, atol=1e-3)


@given(
    name=st.sampled_from(sorted(PROFILES)),
    lo=st.integers(0, 998),
    size=st.integers(1, 1000),
    u=st.lists(st.floats(0, 1), min_size=1, max_size=8),
)
def test_no_t_leaves_its_region(name, lo, size, u):
    profile, region = PROFILES[name], Region(lo, min(lo + size, 1000))
    t, weight = Within(region, Uniform(profile)).tables(CPU).draw(torch.tensor([0.0, *u, 1 - 2**-53, 1.0]).double())
    assert profile.edges is not None
    assert bool((t.double() >= profile.edges[region.lo]).all())
    assert bool((t.double() < profile.edges[region.hi]).all())
    cells = profile.cells(t)
    assert bool(((cells >= region.lo) & (cells < region.hi)).all())
    assert bool((weight == 1).all())


def test_cells_that_hold_no_float32_are_refused():
    edges = 1 + torch.arange(3, dtype=torch.float64) * 1e-9
    with pytest.raises(EbdiffError, match="too narrow"):
        Tables.of(torch.tensor([0.5, 0.5]).double(), torch.ones(2), edges, CPU)
