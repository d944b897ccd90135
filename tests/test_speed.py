"""SpeeD against the paper's closed forms, on every kind of schedule and in every region."""

from __future__ import annotations

import math
from pathlib import Path

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ebdiff.errors import EbdiffError
from ebdiff.timesteps.profile import NoiseProfile
from ebdiff.timesteps.region import Partition, Region
from ebdiff.timesteps.reweighted import Weighted
from ebdiff.timesteps.sampler import Stratified, Uniform, Within
from ebdiff.timesteps.speed import SpeeD


def of_betas(betas: Tensor) -> NoiseProfile:
    return NoiseProfile.from_alphas_cumprod((1 - betas).cumprod(0))


def even(lo: float, hi: float, T: int = 1000) -> Tensor:
    return torch.linspace(lo, hi, T, dtype=torch.float64)


def zero_terminal() -> NoiseProfile:
    return NoiseProfile.from_scheduler(diffusers.DDPMScheduler(rescale_betas_zero_snr=True))


LINEAR = of_betas(even(1e-4, 0.02))
PROFILES = {
    "linear": LINEAR,
    "quad": of_betas(even(0.01, 0.02**0.5) ** 2),
    "cosine": NoiseProfile.from_scheduler(diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")),
    "stable diffusion": of_betas(even(0.00085**0.5, 0.012**0.5) ** 2),
    "sigmoid": NoiseProfile.from_scheduler(diffusers.DDPMScheduler(beta_schedule="sigmoid")),
    "zero terminal": zero_terminal(),
    "flow": NoiseProfile.flow(),
    "flow, shift 3": NoiseProfile.flow(3.0),
    "flow, shift 6": NoiseProfile.flow(6.0),
    "edm": NoiseProfile.edm(),
    "vp": NoiseProfile.vp(),
    "sub_vp": NoiseProfile.sub_vp(),
    "ve": NoiseProfile.ve(),
}


@pytest.mark.parametrize(
    ("name", "tau"),
    [
        ("linear", 698),
        ("quad", 873),
        ("cosine", 945),
        ("stable diffusion", 963),
        ("flow", 922),  # 1 / (1 + 1 / sqrt(139.5)) = 0.92194
        ("flow, shift 3", 797),
        ("flow, shift 6", 663),
        ("vp", 700),
    ],
)
def test_tau_of_any_schedule(name, tau):
    assert SpeeD(PROFILES[name]).tau == tau


@pytest.mark.parametrize(("r", "tau"), [(10, 476), (50, 622), (100, 675), (200, 725), (1000, 828), (10_000, 957)])
def test_tau_of_any_r_follows_the_paper_s_closed_form(r, tau):
    between = 0.02 - 1e-4  # the last beta less the first
    closed = math.sqrt(2 * 1000 * math.log(r) / between + (1000 * 1e-4 / between) ** 2) - 1000 * 1e-4 / between
    assert closed == pytest.approx(tau, abs=0.6)
    assert SpeeD(LINEAR, r=r).tau == pytest.approx(closed, abs=4)  # of continuous time, to first order in beta


def test_the_paper_s_700_is_r_of_its_own_closed_form():
    assert math.exp((1e-4 + (0.02 - 1e-4) * 700 / 2000) * 700) == pytest.approx(140.54, abs=0.005)
    assert (SpeeD(PROFILES["stable diffusion"], r=140.54).tau, SpeeD(LINEAR, r=140.54).tau) == (964, 698)


def test_edm_s_tau_is_where_the_noise_drowns_the_data():
    profile = PROFILES["edm"]
    assert float(profile.sigma[SpeeD(profile).tau]) == pytest.approx(0.5 * math.sqrt(139.5), rel=0.02)


def test_the_paper_s_density():
    speed = SpeeD(LINEAR, tau=700)
    density = 1000 * speed.pmf()
    assert density[:700].tolist() == [pytest.approx(5000 / 3800)] * 700  # k T / (T + tau (k - 1))
    assert density[700:].tolist() == [pytest.approx(1000 / 3800)] * 300
    assert speed.bound == pytest.approx(1.42857, abs=1e-5)
    assert [round(float(x), 3) for x in (1000 * SpeeD(LINEAR).pmf())[[0, 999]]] == [1.319, 0.264]


def test_the_mass_of_regions():
    four = Partition(0, 240, 440, 720, 1000)
    assert [round(SpeeD(LINEAR, tau=700).mass(region), 3) for region in four] == [0.316, 0.263, 0.347, 0.074]


def test_areas():
    assert SpeeD(LINEAR).areas == (Region(0, 219), Region(219, 698), Region(698, 1000))
    assert SpeeD(PROFILES["flow, shift 3"]).areas[0] == Region(0, 195)  # the slope is steepest at u = 0.196
    assert SpeeD(LINEAR, tau=100).areas == (Region(0, 100), None, Region(100, 1000))
    constant = of_betas(torch.full((1000,), 0.01).double())
    assert SpeeD(constant).areas.acceleration is None
    assert SpeeD(of_betas(even(1e-5, 1e-4))).areas.convergence is None


def test_weights_follow_the_slope():
    speed = SpeeD(LINEAR, tau=700)
    w = speed.weights()
    alpha_bar = LINEAR.alpha_bar
    slope = (alpha_bar[:-2] - alpha_bar[2:]) / 2
    relative = (w - w[700]) / (w[219] - w[700])  # w[700] is the least and w[219] the largest
    expected = (slope - slope.min()) / (slope.max() - slope.min())
    torch.testing.assert_close(relative[1:700].double(), expected[:699], rtol=0, atol=5e-3)
    assert float(w[219] / w[700]) == pytest.approx(0.6 / 0.4)
    assert w[700:].tolist() == [float(w[700])] * 300
    share = float((speed.pmf() * w)[700:].sum())
    assert share == pytest.approx(0.064, abs=5e-4)  # of the objective that lies past tau


def test_lam_one_half_weights_all_alike_and_k_one_draws_all_alike():
    torch.testing.assert_close(SpeeD(LINEAR, lam=0.5).weights(), torch.ones(1000))
    torch.testing.assert_close(SpeeD(LINEAR, k=1).pmf(), Uniform(1000).pmf())


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("name", PROFILES)
def test_on_every_schedule_it_is_a_sampler(name, variant):
    speed = SpeeD(PROFILES[name], variant=variant)
    pmf, weights = speed.pmf(), speed.weights()
    assert float(pmf.sum()) == pytest.approx(1, abs=1e-12)
    assert float((pmf * weights).sum()) == pytest.approx(1, abs=1e-6)
    assert bool((weights.isfinite() & (weights >= 0)).all())
    t, weight = Stratified(speed).sample(256, step=0)
    assert torch.equal(weight, weights[PROFILES[name].cells(t)])


@pytest.mark.parametrize("name", PROFILES)
def test_inside_a_region_the_density_is_conditional_in_closed_form(name):
    speed = SpeeD(PROFILES[name])
    for region in (Region(0, 240), Region(240, 440), Region(440, 720), Region(720, 1000), Region(650, 960)):
        low = max(0, min(region.hi, speed.tau) - region.lo)
        total = 5 * low + len(region) - low
        expected = torch.tensor([5 / total] * low + [1 / total] * (len(region) - low), dtype=torch.float64)
        pmf = Within(region, speed).pmf()[region.lo : region.hi]
        torch.testing.assert_close(pmf, expected, rtol=1e-12, atol=0)
        assert speed.mass(region) == pytest.approx(total / (1000 + 4 * speed.tau), rel=1e-12)


def test_inside_a_region_weights_keep_their_contrast():
    speed = SpeeD(LINEAR)
    for region in (Region(100, 200), Region(240, 440), Region(500, 698)):
        flat = speed.weights()[region.lo : region.hi]
        inside = Within(region, speed).weights()[region.lo : region.hi]
        assert float(inside.max() / inside.min()) == pytest.approx(0.6 / 0.4, rel=1e-6)
        assert float(flat.max() / flat.min()) < 1.42
        assert torch.equal(inside.argsort(), flat.argsort())
    assert set(Within(Region(720, 1000), speed).weights()[720:].tolist()) == {1.0}


def test_contrast_survives_other_wrappers():
    speed, region = SpeeD(LINEAR), Region(240, 440)
    for sampler in (Stratified(speed), Within(Region(100, 800), speed)):
        torch.testing.assert_close(Within(region, sampler).weights(), Within(region, speed).weights())
    product = Within(region, Weighted(speed, torch.arange(1.0, 1001))).weights()
    ratio = product[240:440] / Within(region, speed).weights()[240:440] / torch.arange(241.0, 441)
    torch.testing.assert_close(ratio, torch.full((200,), float(ratio[0])))


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(PROFILES)),
    k=st.floats(1, 100),
    lam=st.floats(0.5, 1),
    r=st.floats(1.5, 1e6),
    variant=st.sampled_from(["paper", "released"]),
    lo=st.integers(0, 998),
    size=st.integers(1, 1000),
    antithetic=st.booleans(),
    step=st.integers(0, 5),
)
def test_nothing_leaves_its_region_and_no_weight_is_negative(name, k, lam, r, variant, lo, size, antithetic, step):
    profile, region = PROFILES[name], Region(lo, min(lo + size, 1000))
    speed = SpeeD(profile, k, lam, r, variant=variant)
    for sampler in (Within(region, speed), Stratified(Within(region, speed), antithetic)):
        t, weight = sampler.sample(16, step=step)
        cells = profile.cells(t)
        assert bool(((cells >= region.lo) & (cells < region.hi)).all())
        assert bool((weight.isfinite() & (weight >= 0)).all())
    inside = Within(region, speed)
    pmf, weights = inside.pmf(), inside.weights()
    assert bool((weights.isfinite() & (weights >= 0)).all())
    assert float((pmf * weights).sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k": 0.5}, "k: expected 1 <= k"),
        ({"k": math.nan}, "SpeeD's k"),
        ({"k": math.inf}, "SpeeD's k"),
        ({"lam": 5}, "lam: expected 0.5 <= lam <= 1"),  # the authors' default, which makes weights negative
        ({"lam": 0.4}, "SpeeD's lam"),
        ({"r": 1.0}, "SpeeD's r"),
        ({"tau": 0}, "from 1 to 1000"),
        ({"tau": 1001}, "SpeeD's tau"),
        ({"tau": 700, "r": 140.5}, "one of them"),
        ({"variant": "theirs"}, "paper or released"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(EbdiffError, match=words):
        SpeeD(LINEAR, **settings)


def test_a_schedule_without_useful_timesteps_is_refused():
    with pytest.raises(EbdiffError, match="all convergence"):
        SpeeD(NoiseProfile.from_alphas_cumprod([0.001, 0.0005]))
    with pytest.raises(EbdiffError, match="2 timesteps"):
        SpeeD(NoiseProfile.from_alphas_cumprod([0.5]))


@pytest.mark.parametrize("name", ["linear", "edm"])
def test_the_picture_shows_areas_density_and_weight(name, tmp_path: Path):
    figure = SpeeD(PROFILES[name]).plot(tmp_path / "speed.png")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [label.split()[0] for label in labels] == [
        "acceleration",
        "deceleration",
        "convergence",
        "density",
        "weight",
    ]
    assert (tmp_path / "speed.png").stat().st_size > 1000
