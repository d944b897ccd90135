"""Where the losses say to draw: by hand, and without changing the objective."""

import math
from collections import deque

import pytest
import torch
from lessons import FOUR, LINEAR, g, numbers, taught

from ebdiff.errors import EbdiffError
from ebdiff.ops.timestep_loss_statistics import LossStatistics
from ebdiff.timesteps.adaptive import Adaptive, LossSecondMoment
from ebdiff.timesteps.densities import CLTS, LogNormalSigma
from ebdiff.timesteps.profile import NoiseProfile
from ebdiff.timesteps.region import Region
from ebdiff.timesteps.reweighted import Weighted
from ebdiff.timesteps.sampler import Sampler, Uniform, Within


def weighted_prior() -> Sampler:
    return Weighted(Uniform(FOUR), numbers(1, 1, 2, 4))  # weights 1/2, 1/2, 1, 2


def test_loss_second_moment_by_hand() -> None:
    sampler = LossSecondMoment(2, history=2)
    for t, loss in ((0, 3.0), (1, 1.0), (0, 4.0)):
        assert torch.equal(sampler.pmf(), numbers(0.5, 0.5))
        assert torch.equal(sampler.weights(), torch.ones(2))
        sampler.update(torch.tensor([t]), torch.tensor([loss]))
    sampler.update(torch.tensor([1]), torch.tensor([-1.0]))
    root = numbers(math.sqrt((9 + 16) / 2), 1)
    expected = 0.999 * root / root.sum() + 0.001 / 2
    torch.testing.assert_close(sampler.pmf(), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(sampler.weights(), (1 / (2 * expected)).float())


def test_only_the_last_losses_count_however_they_come() -> None:
    """As one by one in Python, where a batch holds a timestep more often than is kept."""
    sampler, lists = LossSecondMoment(5, history=3), [deque[float](maxlen=3) for _ in range(5)]
    for step in range(20):
        t, losses = torch.randint(5, (17,), generator=g(step)), torch.rand(17, generator=g(step))
        sampler.update(t, losses)
        for at, loss in zip(t.tolist(), losses.tolist(), strict=True):
            lists[at].append(loss)
    root = numbers(*(math.sqrt(sum(loss**2 for loss in kept) / 3) for kept in lists))
    torch.testing.assert_close(sampler.pmf(), 0.999 * root / root.sum() + 0.001 / 5, rtol=1e-14, atol=0)
    assert float(sampler.state.tensors["losses"][5].abs().sum()) == 0


def test_losses_that_are_all_zero_change_nothing() -> None:
    for sampler in (LossSecondMoment(4, history=1), Adaptive(FOUR, buckets=4, every=1)):
        sampler.update(torch.arange(4).repeat(10), torch.zeros(40))
        torch.testing.assert_close(sampler.pmf(), Uniform(4).pmf(), rtol=1e-15, atol=0)


def test_adaptive_by_hand() -> None:
    """Buckets with losses 2 and 1: q ~ prior * weight * loss ~ (1/2 * 2, 1/2 * 2, 1 * 1, 2 * 1) = (1, 1, 1, 2)."""
    sampler = Adaptive(FOUR, weighted_prior(), buckets=2, mix=0.5, floor=0.1, every=1)
    assert sampler.buckets.tolist() == [0, 0, 1, 1]
    for t in ([0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 2], [1, 3]):
        assert torch.equal(sampler.weights(), weighted_prior().weights())  # ten losses of each bucket are wanted
        sampler.update(torch.tensor(t), torch.tensor([2.0, 2.0, 1.0, 1.0])[t])
    low, high = 0.9 * (0.5 / 4 + 0.5 / 5) + 0.1 / 4, 0.9 * (0.5 / 4 + 0.5 * 2 / 5) + 0.1 / 4
    torch.testing.assert_close(sampler.pmf(), numbers(low, low, low, high), rtol=1e-12, atol=0)
    weights = numbers(0.5 / 4 / low, 0.5 / 4 / low, 1 / 4 / low, 2 / 4 / high)
    torch.testing.assert_close(sampler.weights(), weights.float())


def test_the_average_forgets_by_half_after_a_halflife() -> None:
    """Squares 1 and then 9, each one loss and one halflife: (1 * 1/2 + 9) / (1/2 + 1)."""
    sampler = Adaptive(FOUR, buckets=1, halflife=1, every=1)
    for loss in (1.0, 3.0):
        sampler.update(torch.tensor([2]), torch.tensor([loss]))
    moment, share = sampler.state.tensors["average"]
    assert float(moment / share) == pytest.approx(9.5 / 1.5)
    assert float(share) == pytest.approx(0.75)


def test_losses_count_alike_in_whatever_batches_they_come() -> None:
    whole, parts = (Adaptive(LINEAR, every=every) for every in (1, 4))
    t, losses = torch.randint(1000, (64,), generator=g()), torch.rand(64, generator=g())
    whole.update(t, losses)
    for part in range(4):
        assert torch.equal(parts.state.tensors["average"], torch.zeros(2, 32, dtype=torch.float64))
        parts.update(t[part * 16 : part * 16 + 16], losses[part * 16 : part * 16 + 16])
    averages = (sampler.state.tensors["average"] for sampler in (whole, parts))
    torch.testing.assert_close(*averages, rtol=1e-13, atol=0)


def test_statistics_of_the_fused_loss_teach_the_same() -> None:
    one, other = Adaptive(LINEAR, every=2), Adaptive(LINEAR, every=2)
    statistics = LossStatistics(other.buckets)
    for step in range(6):
        t, losses = torch.randint(1000, (64,), generator=g(step)), torch.rand(64, generator=g(step))
        one.update(t, losses)
        statistics.add(t, losses)
        other.update_from(statistics)
    assert float(statistics.count.sum()) == 0
    torch.testing.assert_close(one.state.tensors["average"], other.state.tensors["average"], rtol=1e-13, atol=0)
    statistics.add(torch.tensor([0, 999]), torch.tensor([math.inf, 7.0]))
    before = one.state.tensors["average"].clone()
    other.update_from(statistics)
    other.update_from(statistics)
    changed = (other.state.tensors["average"] / before - 1).abs().amax(0) > 1e-9
    assert changed.nonzero().flatten().tolist() == [31]
    with pytest.raises(EbdiffError, match="other buckets"):
        Adaptive(LINEAR, buckets=8).update_from(statistics)


def priors() -> dict[str, tuple[NoiseProfile, Sampler | None]]:
    edm = NoiseProfile.edm()
    return {
        "uniform": (LINEAR, None),
        "weighted": (LINEAR, Weighted(Uniform(LINEAR), torch.linspace(0, 2, 1000))),
        "within": (LINEAR, Within(Region(240, 440), Uniform(LINEAR))),
        "continuous": (edm, LogNormalSigma(edm)),
    }


@pytest.mark.parametrize("name", priors())
def test_the_objective_stays_the_priors(name: str) -> None:
    """E_p[w L] is the prior's for any L; the weights have mean 1 under p; nothing leaves the prior's support."""
    profile, prior = priors()[name]
    prior = Uniform(profile) if prior is None else prior
    sampler = taught(Adaptive(profile, prior, mix=0.5, floor=0.01, every=4), torch.linspace(5, 0.1, 1000))
    pmf, weights = sampler.pmf(), sampler.weights().double()
    assert not torch.allclose(pmf, prior.pmf(), rtol=0.05)
    assert float(pmf.sum()) == pytest.approx(1, abs=1e-12)
    assert torch.equal(pmf > 0, prior.pmf() > 0)
    for seed in range(3):
        losses = torch.rand(1000, dtype=torch.float64, generator=g(seed)) ** 3
        expected = float((prior.pmf() * prior.weights() * losses).sum())
        assert float((pmf * weights * losses).sum()) == pytest.approx(expected, rel=1e-6)
    assert float((pmf * weights).sum()) == pytest.approx(1, abs=1e-6)
    bound = prior.weights().double() / (0.99 * 0.5)
    assert bool((weights <= bound * (1 + 1e-6)).all())


@pytest.mark.parametrize("name", ["uniform", "weighted", "within"])
def test_it_learns_the_density_of_least_variance(name: str) -> None:
    """Where a bucket has one loss, w L is constant under that density: its second moment is its mean squared."""
    profile, prior = priors()[name]
    prior = Uniform(profile) if prior is None else prior
    sampler = Adaptive(profile, prior, mix=1.0, floor=1e-9, every=1)
    losses = 1 + sampler.buckets.double() % 5
    sampler.update(torch.arange(1000).repeat(10), losses.repeat(10))
    pmf, weights = sampler.pmf(), sampler.weights().double()
    mean = float((prior.pmf() * prior.weights() * losses).sum())
    assert float((pmf * (weights * losses) ** 2).sum()) == pytest.approx(mean**2, rel=1e-5)
    assert float((prior.pmf() * (prior.weights() * losses) ** 2).sum()) > 1.05 * mean**2


def test_buckets_have_equal_shares_of_the_prior_and_are_intervals_of_log_snr() -> None:
    edm = NoiseProfile.edm()
    for profile, prior in (
        (LINEAR, Uniform(LINEAR)),
        (edm, LogNormalSigma(edm)),
        (LINEAR, CLTS(LINEAR, 300, 40, 1, step=1)),
    ):
        bucket = Adaptive(profile, prior, buckets=32).buckets
        assert bool((bucket.diff() >= 0).all())
        mass = torch.zeros(32, dtype=torch.float64).index_add(0, bucket, prior.pmf())
        assert float((mass - 1 / 32).abs().max()) <= 2 * float(prior.pmf().max())


def test_fewer_buckets_where_a_timestep_has_more_than_its_share() -> None:
    assert Adaptive(FOUR, buckets=32).buckets.tolist() == [0, 1, 2, 3]
    inside = Adaptive(FOUR, Within(Region(1, 3), Uniform(4)), buckets=8)
    assert sorted(set(inside.buckets.tolist())) == [0, 1]
    inside.update(torch.tensor([1, 2]).repeat(10), torch.tensor([1.0, 3.0]).repeat(10))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: LossSecondMoment(4, history=0), "history"),
        (lambda: LossSecondMoment(4, floor=0), "floor"),
        (lambda: LossSecondMoment(0), "schedule"),
        (lambda: Adaptive(FOUR, buckets=0), "buckets"),
        (lambda: Adaptive(FOUR, mix=0), "mix"),
        (lambda: Adaptive(FOUR, mix=1.1), "mix"),
        (lambda: Adaptive(FOUR, floor=math.nan), "floor"),
        (lambda: Adaptive(FOUR, halflife=-1), "halflife"),
        (lambda: Adaptive(FOUR, every=0), "every"),
        (lambda: Adaptive(FOUR, Uniform(5)), "another schedule"),
        (lambda: Adaptive(FOUR).update(torch.zeros(3), torch.zeros(4)), "one length"),
        (lambda: Adaptive(FOUR).update(torch.tensor(0), torch.tensor(0.0)), "one length"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(call, word: str) -> None:
    with pytest.raises(EbdiffError, match=word):
        call()
