"""Each density has the mass of its distribution in every cell, and is drawn as it says."""

import math

import pytest
import torch
from torch import Tensor

from ebdiff.errors import EbdiffError
from ebdiff.timesteps.densities import CLTS, Beta, CosMap, Density, LogitNormal, LogNormalSigma, Mode
from ebdiff.timesteps.profile import NoiseProfile
from ebdiff.timesteps.sampler import Sampler


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def linear(T: int = 1000) -> NoiseProfile:
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    return NoiseProfile.from_alphas_cumprod((1 - betas).cumprod(0))


DISCRETE, FLOW = linear(40), NoiseProfile.flow(shift=3.0, cells=40)
OVER_TIME = {
    "logit-normal": lambda profile: LogitNormal(profile, -0.7, 0.8),
    "mode": lambda profile: Mode(profile, 1.29),
    "mode, negative": lambda profile: Mode(profile, -0.7),
    "cosmap": CosMap,
    "beta": lambda profile: Beta(profile, 0.8, 1.0),
    "beta, both": lambda profile: Beta(profile, 2.5, 0.7),
}


def middle(T: int) -> Tensor:
    """float64[T, 2000]: x at 2000 places inside each of T cells of [0, 1]."""
    return (torch.arange(T)[:, None] + (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000) / T


def density(name: str, x: Tensor) -> Tensor:
    """The published densities, where they have a formula."""
    if name == "logit-normal":
        return torch.exp(-((torch.logit(x) + 0.7) ** 2) / (2 * 0.8**2)) / (0.8 * math.sqrt(2 * math.pi) * x * (1 - x))
    if name == "cosmap":
        return 2 / (math.pi - 2 * math.pi * x + 2 * math.pi * x**2)
    a, b = (0.8, 1.0) if name == "beta" else (2.5, 0.7)
    return x ** (a - 1) * (1 - x) ** (b - 1) * math.gamma(a + b) / (math.gamma(a) * math.gamma(b))


@pytest.mark.parametrize("profile", [DISCRETE, FLOW], ids=["discrete", "flow"])
@pytest.mark.parametrize("name", OVER_TIME)
def test_each_cell_has_its_difference_of_the_cdf(name: str, profile: NoiseProfile) -> None:
    sampler = OVER_TIME[name](profile)
    pmf, ends = sampler.pmf(), torch.linspace(0, 1, 41, dtype=torch.float64)
    assert float(pmf.sum()) == pytest.approx(1, abs=1e-14)
    torch.testing.assert_close(sampler.cdf(numbers(0, 1)), numbers(0, 1), rtol=0, atol=1e-15)
    torch.testing.assert_close(pmf, sampler.cdf(ends).diff(), rtol=1e-12, atol=1e-15)
    assert torch.equal(sampler.weights(), torch.ones(40))


@pytest.mark.parametrize("name", ["logit-normal", "cosmap", "beta", "beta, both"])
def test_the_masses_integrate_the_published_density(name: str) -> None:
    """Up to the outermost cells, where a pole may be."""
    mass = density(name, middle(40)).mean(1) / 40
    torch.testing.assert_close(OVER_TIME[name](DISCRETE).pmf()[1:-1], mass[1:-1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.0, 1.29, 1.75, 2 / (math.pi - 2)])
def test_mode_is_the_push_forward_of_a_uniform_number(scale: float) -> None:
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    x = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    share = torch.histc(x, 40, 0, 1) / len(u)
    torch.testing.assert_close(Mode(DISCRETE, scale).pmf(), share, rtol=0, atol=1e-5)


def test_by_hand() -> None:
    four = linear(4)
    # logit(1/4) = -ln 3 and the normal distribution has 0.135968 below -1.098612.
    torch.testing.assert_close(
        LogitNormal(four).pmf(), numbers(0.135968, 0.364032, 0.364032, 0.135968), rtol=0, atol=1e-6
    )
    # atan(-1/2) = -0.463648: 1/2 - 2 * 0.463648 / pi = 0.204833.
    torch.testing.assert_close(CosMap(four).pmf(), numbers(0.204833, 0.295167, 0.295167, 0.204833), rtol=0, atol=1e-6)
    torch.testing.assert_close(Beta(four, 2, 1).pmf(), numbers(1, 3, 5, 7) / 16, rtol=1e-12, atol=0)
    torch.testing.assert_close(Beta(four, 1, 3).pmf(), numbers(37, 19, 7, 1) / 64, rtol=1e-12, atol=0)
    # 3 x² - 2 x³ at 1/4 and 1/2 is 10/64 and 1/2.
    torch.testing.assert_close(Beta(four, 2, 2).pmf(), numbers(10, 22, 22, 10) / 64, rtol=1e-12, atol=0)
    torch.testing.assert_close(Mode(four, 0).pmf(), numbers(1, 1, 1, 1) / 4, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("a", "b"), [(0.01, 0.02), (0.5, 0.5), (30.0, 2.0), (1000.0, 3000.0), (1e4, 1e4)])
def test_beta_for_any_shape(a: float, b: float) -> None:
    """Its mean and variance, and the reflection I_x(a, b) = 1 - I_{1 - x}(b, a)."""
    profile = linear(1000)
    pmf, x = Beta(profile, a, b).pmf(), (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    mean, variance = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
    assert float((pmf * x).sum()) == pytest.approx(mean, abs=1e-3)
    assert float((pmf * (x - mean) ** 2).sum()) == pytest.approx(variance, rel=0.05, abs=1e-6)
    torch.testing.assert_close(pmf, Beta(profile, b, a).pmf().flip(0), rtol=1e-6, atol=1e-12)


def test_a_mean_above_zero_favours_noise() -> None:
    assert float(LogitNormal(DISCRETE, mean=1).pmf()[20:].sum()) == pytest.approx(0.841345, abs=1e-6)


@pytest.mark.parametrize("profile", [NoiseProfile.edm(), NoiseProfile.flow(), linear(), NoiseProfile.ve()])
def test_log_normal_is_the_same_noise_on_every_schedule(profile: NoiseProfile) -> None:
    """Mean and deviation of ln sigma as stated, wherever the schedule reaches 4 deviations to both sides."""
    pmf = LogNormalSigma(profile, -1.2, 0.7).pmf()
    level = torch.log(profile.sigma / profile.alpha)
    mean = float((pmf * level).sum())
    assert mean == pytest.approx(-1.2, abs=2e-3)
    assert float((pmf * (level - mean) ** 2).sum()) == pytest.approx(0.49, rel=0.01)


@pytest.mark.parametrize("shift", [1.0, 3.0, 1.15, 0.1])
def test_log_normal_of_flow_is_logit_normal(shift: float) -> None:
    """sigma / alpha = sigma / (1 - sigma), so ln of it is logit(sigma): and SD3's shift moves that by ln(shift)."""
    flow = NoiseProfile.flow(shift, cells=40)
    expected = LogitNormal(flow, 0.3 - math.log(shift), 0.8).pmf()
    torch.testing.assert_close(LogNormalSigma(flow, 0.3, 0.8).pmf(), expected, rtol=1e-9, atol=1e-15)


def test_log_normal_of_edm_by_hand() -> None:
    """Four cells, even in ln sigma from -4 to 4: [-4, -2] is -2.3333 to -0.6667 deviations, and so on."""
    profile = NoiseProfile.edm(math.exp(-4), math.exp(4), cells=4)
    below = [0.0098153, 0.2524925, 0.8413447, 0.9961696, 0.9999927]  # the normal at (-4 .. 4 + 1.2) / 1.2
    by_hand = numbers(*below).diff() / (below[-1] - below[0])
    torch.testing.assert_close(LogNormalSigma(profile).pmf(), by_hand, rtol=0, atol=1e-6)


def test_log_normal_counts_nothing_twice_and_leaves_zero_snr_alone() -> None:
    """ln sigma is -1, 1, 3 and infinite: cells meet at 0 and 2 and end at -2 and 4."""
    sigma = torch.exp(2 * numbers(-1, 1, 3))
    profile = NoiseProfile.from_alphas_cumprod(torch.cat([1 / (1 + sigma), numbers(0)]))
    below = [0.0227501, 0.5, 0.9772499, 0.9999683]  # the normal at -2, 0, 2 and 4
    by_hand = numbers(*below).diff() / (below[-1] - below[0])
    pmf = LogNormalSigma(profile, 0, 1).pmf()
    torch.testing.assert_close(pmf[:3], by_hand, rtol=0, atol=1e-6)
    assert float(pmf[3]) == 0
    assert LogNormalSigma(NoiseProfile.from_alphas_cumprod(numbers(0.5, 0))).pmf().tolist() == [1, 0]


def test_log_normal_does_not_starve_the_noisiest_third() -> None:
    """As released with SpeeD it puts 5e-5 there; levels of ln sigma above 2.3 are 0.2% of N(-1.2, 1.2²), not less."""
    assert 1e-3 < float(LogNormalSigma(linear()).pmf()[700:].sum()) < 3e-3


def test_clts_goes_from_uniform_to_a_gaussian() -> None:
    curriculum = CLTS(linear(), mu=300, std=50, steps=200)
    t = torch.arange(1000, dtype=torch.float64)
    gaussian = torch.exp(-((t - 300) ** 2) / (2 * 50**2)) / (50 * math.sqrt(2 * math.pi))
    for step, share in ((0, 0.0), (50, 0.25), (200, 1.0), (10_000, 1.0)):
        expected = (1 - share) / 1000 + share * gaussian
        torch.testing.assert_close(curriculum.at(step).pmf(), expected, rtol=1e-4, atol=1e-8)
        assert float(curriculum.at(step).pmf().sum()) == pytest.approx(1, abs=1e-12)
    assert curriculum.at(0) is curriculum
    assert curriculum.at(200) is curriculum.at(10_000) is not curriculum
    assert torch.equal(curriculum.at(50).at(0).pmf(), curriculum.pmf())


def test_clts_in_continuous_time_is_centred_on_mu() -> None:
    pmf = CLTS(NoiseProfile.flow(), mu=300, std=50, steps=1).at(1).pmf()
    assert float((pmf * (torch.arange(1000) + 0.5)).sum()) == pytest.approx(300, abs=1e-6)
    assert float(pmf[:300].sum()) == pytest.approx(0.5, abs=1e-6)


def samplers() -> list[Sampler]:
    return [
        *(make(DISCRETE) for make in OVER_TIME.values()),
        LogNormalSigma(DISCRETE),
        CLTS(DISCRETE, 10, 3, 2, step=1),
    ]


@pytest.mark.parametrize("sampler", samplers(), ids=[*OVER_TIME, "log-normal", "clts"])
def test_drawn_as_it_says(sampler: Sampler) -> None:
    """Chi-square over the cells that expect 5 or more of 40,000 draws."""
    t, weight = sampler.sample(40_000, generator=torch.Generator().manual_seed(0))
    if sampler.edges is not None:
        t = torch.bucketize(t.double(), sampler.edges[1:-1], right=True)
    counts, expected = torch.bincount(t, minlength=40).double(), sampler.pmf() * 40_000
    enough = expected >= 5
    chi_square = float(((counts - expected) ** 2 / expected)[enough].sum())
    freedom = int(enough.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    assert torch.equal(weight, torch.ones(40_000))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: LogitNormal(DISCRETE, math.nan), "mean"),
        (lambda: LogitNormal(DISCRETE, 0, 0), "std"),
        (lambda: Mode(DISCRETE, 1.76), "scale"),
        (lambda: Mode(DISCRETE, -1.01), "scale"),
        (lambda: Mode(DISCRETE, math.nan), "scale"),
        (lambda: Beta(DISCRETE, 0, 1), "no such a"),
        (lambda: Beta(DISCRETE, 1, -1), "no such b"),
        (lambda: LogNormalSigma(DISCRETE, math.inf), "mean"),
        (lambda: LogNormalSigma(DISCRETE, 0, -1), "std"),
        (lambda: LogNormalSigma(DISCRETE, 50), "LogNormalSigma has no mass"),
        (lambda: LogNormalSigma(NoiseProfile.from_alphas_cumprod(numbers(0))), "LogNormalSigma has no mass"),
        (lambda: CLTS(DISCRETE, math.nan, 1, 1), "mu"),
        (lambda: CLTS(DISCRETE, 1, 0, 1), "std"),
        (lambda: CLTS(DISCRETE, 1, 1, 0), "steps"),
        (lambda: CLTS(DISCRETE, 1, 1, 1, step=-1), "step"),
        (lambda: CLTS(DISCRETE, 9000, 1, 1), "CLTS has no mass"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(call, word: str) -> None:
    with pytest.raises(EbdiffError, match=word):
        call()


def test_a_density_of_ones_own_is_a_cdf() -> None:
    class Square(Density):
        def cdf(self, x: Tensor) -> Tensor:
            return x**2

    assert Square(linear(2)).pmf().tolist() == [0.25, 0.75]
