"""Timesteps drawn for a GPU: those of the CPU, and nothing waits for the device.

Never run on a GPU so far.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ebdiff.timesteps.profile import NoiseProfile
from ebdiff.timesteps.region import Region
from ebdiff.timesteps.sampler import Sampler, Stratified, Within
from ebdiff.timesteps.speed import SpeeD

pytestmark = pytest.mark.gpu

DISCRETE = NoiseProfile.from_alphas_cumprod(torch.linspace(0.999, 0.001, 1000))
FLOW = NoiseProfile.flow(3.0)


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("profile", [DISCRETE, FLOW], ids=["discrete", "flow"])
def test_the_same_timesteps_as_on_the_cpu_without_waiting(profile: NoiseProfile, waiting_is_an_error: None) -> None:
    region = Region(300, 900)
    samplers: list[Sampler] = [SpeeD(profile), Stratified(SpeeD(profile), True), Within(region, SpeeD(profile))]
    for sampler in samplers:
        expected = sampler.sample(64, step=1)
        for step in (0, 1):  # the first makes the tables
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            t, weight = sampler.sample(64, step=step, device="cuda")
            table, row = profile.coefficients(t)
            cells = profile.cells(t)
        torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(t.cpu(), expected.t, rtol=1e-7, atol=0)
        assert torch.equal(weight.cpu(), expected.weight)
        assert torch.equal(cells.cpu(), profile.cells(expected.t))
        there, at = profile.coefficients(expected.t)
        torch.testing.assert_close(table[:, row].cpu(), there[:, at], rtol=1e-6, atol=1e-7)
