"""Weight times squared error is the same for every prediction; each published weight is what a hand computes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ebdiff.errors import EbdiffError
from ebdiff.timesteps import weighting
from ebdiff.timesteps.profile import NoiseProfile
from ebdiff.timesteps.weighting import convert, debias, edm, min_snr, p2, soft_min_snr, uniform

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
METHODS = {
    "uniform": uniform,
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "p2": p2,
    "debias": debias,
    "edm": edm,
}


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


BY_HAND = NoiseProfile.from_alphas_cumprod(numbers(0.9, 0.5, 0.1, 0.0))  # SNR 9, 1, 1/9 and 0


def errors(alpha: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """The errors [T, 5] of all four predictions of a network that is wrong about x0 by random numbers."""
    T = len(alpha)
    a, s = alpha[:, None], sigma[:, None]
    x0, noise, wrong = torch.randn(3, T, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t, guess = a * x0 + s * noise, x0 + wrong
    implied = (x_t - a * guess) / s  # the noise that belongs to that guess
    return {
        "sample": wrong,
        "epsilon": implied - noise,
        "v_prediction": (a * implied - s * guess) - (a * noise - s * x0),
        "flow": (implied - guess) - (noise - x0),
    }


@pytest.mark.parametrize(
    "profile",
    [
        NoiseProfile.from_alphas_cumprod(torch.linspace(0.999, 0.01, 20)),
        NoiseProfile.sub_vp(cells=20),
        NoiseProfile.edm(cells=20),
        NoiseProfile.flow(shift=3.0, cells=20),
    ],
    ids=["vp", "sub-vp", "edm", "flow"],
)
@pytest.mark.parametrize("source", PREDICTIONS)
def test_conversion_leaves_weight_times_squared_error_what_it_was(profile: NoiseProfile, source: str) -> None:
    weight = torch.rand(profile.T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wrong = errors(profile.alpha, profile.sigma)
    expected = weight * wrong[source].square().sum(1)
    for target in PREDICTIONS:
        converted = convert(weight, profile, source, target)
        torch.testing.assert_close(converted * wrong[target].square().sum(1), expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(convert(converted, profile, target, source), weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (min_snr(BY_HAND), (5 / 9, 1, 1, 1)),
        (min_snr(BY_HAND, prediction="sample"), (5, 1, 1 / 9, 0)),
        (min_snr(BY_HAND, prediction="v_prediction"), (5 / 10, 1 / 2, (1 / 9) / (10 / 9), 0)),
        (min_snr(BY_HAND, gamma=0.5), (0.5 / 9, 0.5, 1, 1)),
        (soft_min_snr(BY_HAND), (4 / 13, 4 / 5, 4 / (4 + 1 / 9), 1)),
        (soft_min_snr(BY_HAND, prediction="sample"), (1 / (1 / 9 + 1 / 4), 1 / (1 + 1 / 4), 1 / (9 + 1 / 4), 0)),
        (p2(BY_HAND), (1 - 0.9, 1 - 0.5, 1 - 0.1, 1)),
        (p2(BY_HAND, k=2, gamma=0.5), (11**-0.5, 3**-0.5, (2 + 1 / 9) ** -0.5, 2**-0.5)),
        (debias(BY_HAND), (1 / 3, 1, 3, 3)),
        (debias(BY_HAND, cap=4), (1 / 2, 1, 3, 3)),
        (debias(BY_HAND, prediction="v_prediction"), (3 / 10, 1 / 2, (1 / 3) / (10 / 9), 0)),
        (edm(BY_HAND, prediction="sample"), (1 + 9, 1 + 1, 1 + 1 / 9, 1)),
        (edm(BY_HAND, prediction="v_prediction"), (1, 1, 1, 1)),
        (edm(BY_HAND), (1 + 1 / 9, 1 + 1, 1 + 9, 1 + 9)),
        (uniform(BY_HAND), (1, 1, 1, 1)),
        (uniform(BY_HAND, of="epsilon", prediction="v_prediction"), (0.9, 0.5, 0.1, 0)),
        (uniform(BY_HAND, of="v_prediction"), (1 / 0.9, 1 / 0.5, 1 / 0.1, 1 / 0.1)),
    ],
)
def test_each_method_as_computed_by_hand(weight: Tensor, expected: tuple[float, ...]) -> None:
    assert weight.dtype == torch.float64
    torch.testing.assert_close(weight, numbers(*expected), rtol=1e-12, atol=1e-15)


def test_edm_is_its_papers_formula_and_weighs_the_raw_output_of_the_network_alike() -> None:
    """(sigma² + sd²) / (sigma sd)² at sigma 2 and sd 0.5 is 4.25; the raw output is (D - c_skip x) / c_out."""
    profile = NoiseProfile.from_sigmas([0.1, 2.0, 30.0], data_std=0.5)
    weight = edm(profile, prediction="sample")
    assert float(weight[1]) == pytest.approx((4 + 0.25) / (2 * 0.5) ** 2)
    c_out = profile.sigma * 0.5 / (profile.sigma**2 + 0.25).sqrt()
    torch.testing.assert_close(weight * c_out**2, torch.ones(3, dtype=torch.float64))


def test_soft_min_snr_is_what_k_diffusion_puts_on_its_raw_output() -> None:
    """(sigma sd)² / (sigma² + sd²)² with sd = 0.5, gamma = 1 / sd² = 4."""
    profile = NoiseProfile.from_sigmas([0.1, 2.0, 30.0], data_std=0.5)
    c_out = profile.sigma * 0.5 / (profile.sigma**2 + 0.25).sqrt()
    raw = soft_min_snr(profile, gamma=4, prediction="sample") * c_out**2
    torch.testing.assert_close(raw, (profile.sigma * 0.5) ** 2 / (profile.sigma**2 + 0.25) ** 2)


def test_min_snr_is_not_p2() -> None:
    """As released with SpeeD the two are one: 5 / (SNR + 1)."""
    profile = NoiseProfile.from_alphas_cumprod(torch.linspace(0.9999, 1e-4, 100))
    ratio = min_snr(profile) / p2(profile)
    assert float(ratio.max() / ratio.min()) > 2
    torch.testing.assert_close(min_snr(profile), (5 / profile.snr).clamp(max=1), rtol=1e-12, atol=0)


def test_flow_matching_by_hand() -> None:
    """At t = 1/4: SNR 9, u's squared error is x0's over t², so W_flow = min(9, 5) / 16 = W_eps (3/4)²."""
    profile = NoiseProfile.flow(cells=2)
    assert float(profile.alpha[0]) == 0.75
    assert float(min_snr(profile, prediction="flow")[0]) == pytest.approx(5 / 16)
    assert float(min_snr(profile)[0] * 0.75**2) == pytest.approx(5 / 16)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", METHODS)
def test_no_schedule_makes_a_weight_infinite_or_negative(name: str, prediction: str) -> None:
    shapes = [numbers(1 - 1e-12, 0.5, 1e-12, 0, 0), torch.linspace(1 - 1e-6, 0, 1000), numbers(0)]
    for profile in (*map(NoiseProfile.from_alphas_cumprod, shapes), NoiseProfile.edm(), NoiseProfile.flow()):
        weight = METHODS[name](profile, prediction=prediction)
        assert weight.shape == (profile.T,)
        assert bool((weight.isfinite() & (weight >= 0)).all())


@given(
    snr=st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=6),
    gamma=st.floats(1e-3, 1e3),
    prediction=st.sampled_from(PREDICTIONS),
)
def test_min_snr_on_x0_is_the_lesser_of_snr_and_gamma(snr: list[float], gamma: float, prediction: str) -> None:
    snr = sorted(snr, reverse=True)
    profile = NoiseProfile.from_sigmas(numbers(*[value**-0.5 for value in snr]))
    weight = convert(min_snr(profile, gamma, prediction=prediction), profile, prediction, "sample")
    assert weight.tolist() == pytest.approx([min(value, gamma) for value in snr], rel=1e-9)


def test_a_weight_on_epsilon_without_a_limit_is_that_of_the_timestep_before() -> None:
    converted = convert(numbers(1, 2, 3, 4), BY_HAND, "sample", "epsilon")
    torch.testing.assert_close(converted, numbers(1 / 9, 2, 27, 27))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_settings_out_of_range_are_refused_by_name(bad: float) -> None:
    for name, call in (
        ("gamma", lambda: min_snr(BY_HAND, bad)),
        ("gamma", lambda: soft_min_snr(BY_HAND, bad)),
        ("gamma", lambda: p2(BY_HAND, gamma=bad)),
        ("k", lambda: p2(BY_HAND, k=bad)),
        ("cap", lambda: debias(BY_HAND, bad)),
    ):
        with pytest.raises(EbdiffError, match=name):
            call()


def test_no_weight_and_no_prediction_are_refused() -> None:
    for weight in (numbers(1, 2, 3), numbers(1, 2, 3, -1), numbers(1, 2, 3, math.inf), numbers(1, 2, 3, math.nan)):
        with pytest.raises(EbdiffError, match="no weight"):
            convert(weight, BY_HAND, "epsilon", "sample")
    for source, target in (("epsilon", "score"), ("score", "epsilon")):
        with pytest.raises(EbdiffError, match="score"):
            convert(numbers(1, 1, 1, 1), BY_HAND, source, target)


def test_every_method_of_the_module_is_tested() -> None:
    assert set(weighting.__all__) == {*METHODS, "convert"}
