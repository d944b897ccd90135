"""Noise profiles: closed forms, what is refused, coefficients and cells."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ebdiff.errors import EbdiffError
from ebdiff.timesteps.adaptive import Adaptive
from ebdiff.timesteps.densities import CLTS, LogitNormal
from ebdiff.timesteps.profile import NoiseProfile
from ebdiff.timesteps.speed import SpeeD

CONTINUOUS = {
    "vp": NoiseProfile.vp(),
    "sub_vp": NoiseProfile.sub_vp(),
    "ve": NoiseProfile.ve(),
    "edm": NoiseProfile.edm(),
    "flow": NoiseProfile.flow(),
    "flow, shift 3": NoiseProfile.flow(3.0),
}


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_alphas_cumprod_by_hand():
    profile = NoiseProfile.from_alphas_cumprod([0.64, 0.36, 0.0])
    torch.testing.assert_close(profile.alpha, float64(0.8, 0.6, 0.0))
    torch.testing.assert_close(profile.sigma, float64(0.6, 0.8, 1.0))
    torch.testing.assert_close(profile.snr, float64(16 / 9, 9 / 16, 0.0))
    torch.testing.assert_close(profile.log_snr, float64(math.log(16 / 9), math.log(9 / 16), -math.inf))
    torch.testing.assert_close(profile.alpha_bar, float64(0.64, 0.36, 0.0))
    assert (profile.T, profile.is_continuous, profile.t.tolist()) == (3, False, [0, 1, 2])


def test_sigmas_by_hand():
    profile = NoiseProfile.from_sigmas(torch.tensor([0.5, 1.0]), data_std=0.5)
    assert profile.alpha.tolist() == [1, 1]
    assert profile.snr.tolist() == [4, 1]
    assert profile.alpha_bar.tolist() == [0.5, 0.2]  # .25 / (.25 + .25), .25 / (.25 + 1)


def test_functions_are_looked_at_in_the_centres_and_may_be_plain_numbers():
    profile = NoiseProfile.from_functions(lambda t: 1.0, lambda t: t, span=(1, 3), cells=2)  # type: ignore[arg-type, return-value]
    assert (profile.T, profile.t.tolist(), profile.edges.tolist()) == (2, [1.5, 2.5], [1, 2, 3])
    assert (profile.alpha.tolist(), profile.sigma.tolist()) == ([1, 1], [1.5, 2.5])


@pytest.mark.parametrize(
    ("profile", "t", "alpha", "sigma"),
    [
        # beta from 0.1 to 20: B(1) = 10.05, B(0.5) = 0.05 + 19.9 / 8
        (CONTINUOUS["vp"], 0.5, math.exp(-2.5375 / 2), math.sqrt(1 - math.exp(-2.5375))),
        (CONTINUOUS["vp"], 1.0, math.exp(-10.05 / 2), math.sqrt(1 - math.exp(-10.05))),
        (CONTINUOUS["sub_vp"], 0.5, math.exp(-2.5375 / 2), 1 - math.exp(-2.5375)),
        (CONTINUOUS["ve"], 0.0, 1.0, 0.01),
        (CONTINUOUS["ve"], 0.5, 1.0, math.sqrt(0.01 * 50)),
        (CONTINUOUS["edm"], math.log(0.5) / 4, 1.0, 0.5),
        (CONTINUOUS["flow"], 250.0, 0.75, 0.25),
        (CONTINUOUS["flow, shift 3"], 250.0, 0.75, 0.25),  # the network is handed sigma; the shift moves the cells
    ],
)
def test_continuous_processes_are_exact_at_any_t(profile, t, alpha, sigma):
    table, row = profile.coefficients(torch.tensor([t, t]))
    assert (table.dtype, row.tolist()) == (torch.float32, [0, 1])
    torch.testing.assert_close(table, torch.tensor([[alpha] * 2, [sigma] * 2]), rtol=1e-6, atol=1e-7)


def test_sd3_s_shift_is_where_the_cells_lie():
    profile = CONTINUOUS["flow, shift 3"]
    assert profile.edges[500] == pytest.approx(750)  # 3 * .5 / (1 + 2 * .5)
    torch.testing.assert_close(profile.sigma, profile.t / 1000)
    torch.testing.assert_close(CONTINUOUS["flow"].edges, torch.arange(1001, dtype=torch.float64))


def test_cells_of_edm_are_even_in_the_logarithm_of_sigma():
    profile = CONTINUOUS["edm"]
    steps = profile.sigma.log().diff()
    torch.testing.assert_close(steps, torch.full_like(steps, math.log(80 / 0.002) / 1000))
    assert (profile.data_std, profile.prediction) == (0.5, "sample")


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_continuous_profile_agrees_with_itself(name):
    profile = CONTINUOUS[name]
    table, row = profile.coefficients(profile.t)
    torch.testing.assert_close(table[0, row].double(), profile.alpha, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(table[1, row].double(), profile.sigma, rtol=1e-6, atol=1e-6)
    assert torch.equal(profile.cells(profile.t), torch.arange(profile.T))
    assert torch.equal(profile.cells(profile.edges[:-1]), torch.arange(profile.T)), "cells are not half-open"
    assert profile.cells(torch.tensor([-1e9, 1e9])).tolist() == [0, profile.T - 1]


def test_discrete_coefficients_are_one_table_made_once():
    profile = NoiseProfile.from_alphas_cumprod(torch.linspace(0.99, 0.01, 10))
    t = torch.tensor([3, 3, 9, 0])
    table, row = profile.coefficients(t)
    assert table.shape == (2, 10)
    assert torch.equal(row, t)
    torch.testing.assert_close(table, torch.stack([profile.alpha, profile.sigma]).float())
    assert profile.coefficients(t)[0] is table
    assert profile.cells(torch.tensor([3, 0, 9])).tolist() == [3, 0, 9]


def test_profiles_can_be_copied_and_pickled():
    for profile in CONTINUOUS.values():
        again = pickle.loads(pickle.dumps(copy.deepcopy(profile)))
        assert torch.equal(again.sigma, profile.sigma)
        assert torch.equal(again.coefficients(again.t)[0], profile.coefficients(profile.t)[0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NoiseProfile.from_alphas_cumprod([0.1, 0.9]), ["falls with t", "flip", "cell 1"]),
        (lambda: NoiseProfile.from_sigmas([3.0, 1.0]), ["falls with t"]),
        (lambda: NoiseProfile.from_sigmas([0.0, 1.0]), ["sigma", "> 0", "cell 0"]),
        (lambda: NoiseProfile.from_alphas_cumprod([1.0, 0.5]), ["sigma", "> 0"]),
        (lambda: NoiseProfile.from_alphas_cumprod([0.9, -0.1]), ["alpha", "cell 1"]),
        (lambda: NoiseProfile.from_alphas_cumprod([1.1, 0.5]), ["sigma"]),
        (lambda: NoiseProfile.from_sigmas([1.0, math.inf]), ["finite"]),
        (lambda: NoiseProfile.from_sigmas([]), ["1 or more"]),
        (lambda: NoiseProfile.from_sigmas([[1.0, 2.0]]), ["1 or more"]),
        (lambda: NoiseProfile.from_sigmas([1.0], data_std=0.0), ["data_std"]),
        (lambda: NoiseProfile.from_alphas_cumprod(0.5), ["1 or more"]),
        (lambda: NoiseProfile.flow(0.0), ["shift"]),
        (lambda: NoiseProfile.flow(cells=0), ["1 cell"]),
        (lambda: NoiseProfile.edm(0.0), ["sigma_min < sigma_max"]),
        (lambda: NoiseProfile.ve(50.0, 0.01), ["sigma_min < sigma_max"]),
        (lambda: SpeeD(1000), ["a NoiseProfile", "int", "from_scheduler"]),
        (lambda: LogitNormal(DDPMScheduler()), ["a NoiseProfile", "DDPMScheduler"]),
        (lambda: CLTS(1000, 300, 50, 100), ["a NoiseProfile"]),
        (lambda: Adaptive(1000), ["a NoiseProfile"]),
        (lambda: NoiseProfile.from_functions(torch.cos, torch.sin, span=(1, 0)), ["rise"]),
        (lambda: NoiseProfile(*[torch.ones(2)] * 3, edges=torch.arange(3.0)), ["curves"]),
        (lambda: NoiseProfile(torch.ones(2), torch.ones(3), torch.ones(2)), ["lengths [2, 3, 2]"]),
    ],
)
def test_what_is_no_profile_is_refused(make, words):
    with pytest.raises(EbdiffError, match="no noise profile") as error:
        make()
    assert all(word in str(error.value) for word in words)


def test_plain_numbers_are_taken_to_all_their_digits():
    numbers = [0.9, 0.5, 0.1]
    assert torch.equal(
        NoiseProfile.from_alphas_cumprod(numbers).alpha, torch.tensor(numbers, dtype=torch.float64).sqrt()
    )
