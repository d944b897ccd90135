"""The samplers that a configuration can name, and the steps that a budget gives the regions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from tiny import tiny

from ebdiff.errors import EbdiffError
from ebdiff.timesteps.named import SAMPLERS, sampler_named
from ebdiff.timesteps.profile import NoiseProfile
from ebdiff.training.regions import steps_of


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_each_draws_the_whole_schedule_with_mean_weight_1(name: str, kind: str) -> None:
    profile = NoiseProfile.from_scheduler(DDPMScheduler(num_train_timesteps=200, prediction_type=kind))
    sampler = sampler_named(name, profile)
    assert sampler.T == 200
    assert float(sampler.pmf().sum()) == pytest.approx(1)
    assert float((sampler.pmf() * sampler.weights()).sum()) == pytest.approx(1)
    t, weight = sampler.sample(64, step=3)
    assert t.dtype == torch.int64
    assert torch.equal(weight, sampler.weights()[t])


def test_a_published_weight_is_that_of_the_same_objective_for_every_prediction() -> None:
    """Min-SNR on epsilon is min(S, 5) / S, on x0 min(S, 5): the same up to the mean, which is 1 in both."""
    shares = {}
    for kind in ("epsilon", "sample"):
        profile = NoiseProfile.from_scheduler(DDPMScheduler(prediction_type=kind))
        weights = sampler_named("min-snr", profile).weights().double() * (profile.snr if kind == "epsilon" else 1)
        shares[kind] = weights / weights.sum()
    torch.testing.assert_close(shares["sample"], shares["epsilon"], rtol=1e-5, atol=0)


def test_edm_is_its_density_with_its_weight_by_hand() -> None:
    """On x0 1/d² + S with d = 0.5, and ln sigma of N(-1.2, 1.2²): two cells' odds are those of their middles."""
    profile = NoiseProfile.edm(cells=4000)
    sampler = sampler_named("edm", profile)
    weights, pmf, sigma = sampler.weights().double(), sampler.pmf(), profile.sigma
    assert float(weights[3000] / weights[1000]) == pytest.approx(
        float((4 + sigma[3000] ** -2) / (4 + sigma[1000] ** -2)), rel=1e-6
    )
    level = (sigma.log() + 1.2) / 1.2
    assert float((pmf[3000] / pmf[1000]).log()) == pytest.approx(
        float(level[1000] ** 2 - level[3000] ** 2) / 2, rel=1e-5
    )


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(EbdiffError, match=r"no such sampler: expected one of uniform, speed.*got sped"):
        sampler_named("sped", NoiseProfile.flow())


def test_a_name_takes_settings() -> None:
    """By hand: with k = 2 and tau = 100 of 1000, twice the chance before tau as behind it."""
    profile = NoiseProfile.from_scheduler(DDPMScheduler())
    pmf = sampler_named("speed(k=2, tau=100)", profile).pmf()
    torch.testing.assert_close(pmf[[0, 99, 100, 999]] * 1100, torch.tensor([2, 2, 1, 1]), check_dtype=False)
    weights = sampler_named("p2(gamma=0.5)", profile).weights().double()
    assert float(weights[900] / weights[10]) == pytest.approx(
        float((1 + profile.snr[10]) / (1 + profile.snr[900])) ** 0.5, rel=1e-5
    )
    assert sampler_named("logit-normal(mean=-0.5)", profile).mean == -0.5
    assert torch.equal(sampler_named("beta( b = 1.0 )", profile).pmf(), sampler_named("beta", profile).pmf())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("speed(k=0.5)", "SpeeD's k: expected 1 <= k"),
        ("speed(gamma=5)", "settings of speed: expected k, lam, r, tau, got gamma"),
        ("uniform(k=2)", "settings of uniform: expected none, got k"),
        ("speed-released(variant=1)", "settings of speed-released: expected k, lam, r, tau, got variant"),
        ("min-snr(prediction=1)", "settings of min-snr: expected gamma, got prediction"),
        *(
            (text, r"expected name\(key=number, \.\.\.\)")
            for text in (
                "speed(k=2",
                "speed(2)",
                "speed(k=)",
                "speed(k=2).x",
                "speed(k=2, k=3)",
                "speed(k='2')",
                "speed(k=True)",
                "speed(k=not 2)",
                "speed(k=2)(tau=9)",
                "speed(k={[]: 1})",
                "speed(**{'k': 2})",
                "speed(k=len([]))",
                "speed)k=2(",
            )
        ),
        ("(k=2)", "no such sampler"),
    ],
)
def test_settings_that_make_no_sense_are_refused(text: str, words: str) -> None:
    with pytest.raises(EbdiffError, match=words):
        sampler_named(text, NoiseProfile.from_scheduler(DDPMScheduler()))


def test_a_run_with_an_unknown_sampler_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(EbdiffError, match="no such sampler"):
        tiny(tmp_path / "run", "train.sampler=sped").check()
    assert not list(tmp_path.iterdir())


def test_a_region_that_the_sampler_never_draws_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """So steep a schedule ends in pure noise, which is infinitely far from EDM's mean."""
    options = ["train.sampler=edm", "schedule.timesteps=1000", "schedule.beta_end=0.9"]
    with pytest.raises(EbdiffError, match=r"never draws in \[440, 999\).*another region"):
        tiny(tmp_path / "run", *options, "regions.bounds=[0, 440, 999, 1000]").check()
    assert not list(tmp_path.iterdir())


def test_one_number_of_steps_is_spent_by_mass_and_costs_what_equal_shares_would(tmp_path: Path) -> None:
    """Regions of mass m and MACs c get n in the proportion of m, and sum n c = N mean c, up to whole steps."""
    world = tiny(tmp_path, "regions.steps=3000")
    steps = torch.tensor(steps_of(world), dtype=torch.float64)
    mass = torch.tensor([world.sampler.mass(region) for region in world.partition])
    costs = torch.tensor([world.plan.macs(mask) for mask in world.example_masks], dtype=torch.float64)
    torch.testing.assert_close(steps / steps.sum(), mass / mass.sum(), rtol=2e-3, atol=0, check_dtype=False)
    assert float((steps * costs).sum()) == pytest.approx(3000 * float(costs.mean()), rel=2e-3)
    assert float(steps.sum()) > 3000  # more of them go to small networks


def test_steps_that_are_configured_are_taken_as_they_are(tmp_path: Path) -> None:
    assert steps_of(tiny(tmp_path)) == [5, 4, 6]
