"""SpeeD's released variant: the closed-form density of what the authors' code draws, and the draws themselves."""

from __future__ import annotations

import pytest
import torch
from test_speed import LINEAR, PROFILES

from ebdiff.timesteps.adaptive import Adaptive
from ebdiff.timesteps.region import Region
from ebdiff.timesteps.reweighted import Weighted
from ebdiff.timesteps.sampler import Stratified, Within
from ebdiff.timesteps.speed import SpeeD

RELEASED = SpeeD(LINEAR, tau=700, variant="released")


def steps(speed: SpeeD) -> list[tuple[int, float]]:
    """Where T times the density takes another value, and which."""
    density = speed.T * speed.pmf()
    places = [0, *(density.diff().abs() > 1e-9).nonzero().flatten().add(1).tolist()]
    return [(place, round(float(density[place]), 2)) for place in places]


def test_linear():
    # Half of P, 5/3.8 and 1/3.8, and half of what its dual |t - 642| brings to each timestep.
    assert steps(RELEASED) == [(0, 1.32), (1, 1.97), (58, 1.45), (358, 1.32), (643, 0.66), (700, 0.13)]
    assert RELEASED.mass(Region(700, 1000)) == pytest.approx(0.0395, abs=5e-5)


def test_quad_and_cosine():
    quad = SpeeD(PROFILES["quad"], tau=700, variant="released")
    assert steps(quad) == [(0, 0.79), (1, 0.92), (130, 1.45), (171, 1.32), (700, 0.79), (830, 0.13)]
    cosine = SpeeD(PROFILES["cosine"], tau=700, variant="released")
    assert cosine.mass(Region(700, 1000)) == pytest.approx(0.21, abs=2e-3)


def test_the_convergence_area_has_the_largest_weight():
    w = RELEASED.weights()
    assert w[700:].tolist() == [float(w.max())] * 300
    assert float(w[699] / w[700]) == pytest.approx(0.407, abs=1e-3)
    assert float(w[219] / w[700]) == pytest.approx(0.6, abs=1e-4)
    assert float((RELEASED.pmf() * w)[700:].sum()) == pytest.approx(0.075, abs=5e-4)


def test_draws_follow_the_density():
    n = 40_000
    t, weight = RELEASED.sample(n, generator=torch.Generator().manual_seed(0))
    expected = n * RELEASED.pmf().view(40, 25).sum(1)
    counts = torch.bincount(t // 25, minlength=40).double()
    assert float(((counts - expected) ** 2 / expected).sum()) < 72.1  # chi-square, 39 degrees of freedom, p = 0.001
    assert torch.equal(weight, RELEASED.weights()[t])


@pytest.mark.parametrize("n", [1, 2, 7, 8, 64])
def test_the_second_half_of_a_batch_is_the_dual_of_the_first(n):
    t = RELEASED.sample(n, step=4).t.tolist()
    drawn = list(t)
    for _ in range(n - (n // 2 + 1)):  # so many duals: each is 642 away from one of the others
        pair = next((a, b) for a in drawn for b in drawn if a is not b and b == abs(a - 642))
        for one in pair:
            drawn.remove(one)
    assert len(drawn) == n - 2 * max(0, n - (n // 2 + 1))


def test_a_small_batch_has_fewer_duals():
    # Of 8 timesteps 3 are duals, of which 4% come to lie past 700; of P itself 7.9%.
    t = torch.cat([RELEASED.sample(8, step=step).t for step in range(4000)])
    assert float((t >= 700).double().mean()) == pytest.approx(5 / 8 * 0.0789, abs=0.004)


@pytest.mark.parametrize("n", [1, 7, 30_000])
@pytest.mark.parametrize(
    "inside",
    [Within(Region(0, 500), RELEASED), Within(Region(0, 500), Weighted(RELEASED, RELEASED.slope)),
     Within(Region(0, 500), Adaptive(RELEASED.profile, RELEASED)), Adaptive(RELEASED.profile, RELEASED)],
)  # fmt: skip
def test_where_another_density_is_drawn_only_that_is_left(inside, n):
    """The split of a batch belongs to the whole schedule: elsewhere a batch of any size follows the density."""
    t = torch.cat([inside.sample(n, step=step, seed=n).t for step in range(max(1, 6_000 // n))])
    expected = len(t) * inside.pmf().view(20, 50).sum(1)
    counts, live = torch.bincount(t // 50, minlength=20).double(), expected > 0
    assert not counts[~live].any()
    # Chi-square of at most 19 degrees of freedom, p = 0.0001.
    assert float(((counts - expected) ** 2 / expected)[live].sum()) < 50.8


def test_strata_keep_the_density():
    torch.testing.assert_close(Stratified(RELEASED).pmf(), RELEASED.pmf())
