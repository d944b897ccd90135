"""EDM2's learned weight: where u is the logarithm of the loss nothing pulls at it, and training leads there."""

import math

import pytest
import torch
from torch import Tensor

from ebdiff.errors import EbdiffError
from ebdiff.ops.timestep_loss import weighted_timestep_loss
from ebdiff.timesteps.log_variance import LogVariance
from ebdiff.timesteps.profile import NoiseProfile
from ebdiff.timesteps.weighting import edm

EDM = NoiseProfile.edm()
ZERO_SNR = NoiseProfile.from_alphas_cumprod(torch.linspace(0.99, 0, 10, dtype=torch.float64))


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def times(n: int = 16) -> Tensor:
    return torch.linspace(float(EDM.t[0]), float(EDM.t[-1]), n)


def test_u_by_hand() -> None:
    """Two features of c_noise 1/2, where sigma = e² alpha, and the weight (3, 4), which is (0.6, 0.8) of length 1."""
    u = LogVariance(EDM, channels=2)
    u.frequencies.copy_(torch.tensor([1.0, 3.0]))
    u.phases.copy_(torch.tensor([0.2, 0.5]))
    with torch.no_grad():
        u.weight.copy_(torch.tensor([3.0, 4.0]))
    by_hand = math.sqrt(2) * (0.6 * math.cos(0.7) + 0.8 * math.cos(2.0))
    assert float(u(torch.tensor([0.5])).detach()) == pytest.approx(by_hand, abs=1e-5)
    alphas = torch.tensor([0.5, 1 / (1 + math.e**4)], dtype=torch.float64)
    discrete = LogVariance(NoiseProfile.from_alphas_cumprod(alphas), channels=2)
    discrete.load_state_dict(u.state_dict())
    assert float(discrete(torch.tensor([1])).detach()) == pytest.approx(by_hand, abs=1e-5)


def test_its_magnitude_is_one_and_not_that_of_its_weight() -> None:
    found = []
    for seed in range(400):
        u = LogVariance(EDM, generator=g(seed))
        found.append(u(times()).detach())
        with torch.no_grad():
            u.weight.mul_(7.0)
        torch.testing.assert_close(u(times()), found[-1])
    assert float(torch.stack(found).square().mean()) == pytest.approx(1, abs=0.1)


def test_the_loss_by_hand() -> None:
    """w L / e^u + u, both times the sampler's weight; w of EDM at sigma 1 and sd 0.5 is 4 + 1."""
    u = LogVariance(EDM, edm(EDM, prediction="sample"))
    t, weight, per_sample = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 3.0]), torch.tensor([0.2, 0.4])
    guess = float(u(t)[0].detach())
    expected = (1 * (5 * 0.2 * math.exp(-guess) + guess) + 3 * (5 * 0.4 * math.exp(-guess) + guess)) / 2
    assert float(u.loss(per_sample, t, weight).detach()) == pytest.approx(
        expected, rel=1e-2
    )  # w is that of the cell's centre
    factor, penalty = u.terms(t, weight)
    assert factor.tolist() == pytest.approx([5 * math.exp(-guess), 15 * math.exp(-guess)], rel=1e-2)
    assert float(penalty.detach()) == pytest.approx(2 * guess, rel=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_pulls_where_u_is_the_logarithm_of_the_loss(weighted: bool) -> None:
    """Whatever the sampler's weights: they do not enter the minimum."""
    table = edm(EDM, prediction="sample")
    u = LogVariance(EDM, table if weighted else None, generator=g())
    t, weight = times(), torch.rand(16, generator=g()) + 0.1
    inside = table[EDM.cells(t)].float() if weighted else torch.ones(16)
    u.loss(u(t).detach().exp() / inside, t, weight).backward()
    assert float(u.weight.grad.abs().max()) < 1e-5  # type: ignore[union-attr]
    u.weight.grad = None
    u.loss(2 * u(t).detach().exp() / inside, t, weight).backward()
    assert float(u.weight.grad.abs().max()) > 1e-2  # type: ignore[union-attr]


def test_the_fused_loss_takes_its_terms() -> None:
    u = LogVariance(EDM, edm(EDM, prediction="sample"), generator=g())
    t, weight = times(), torch.rand(16, generator=g())
    pred, x0 = torch.randn(2, 16, 3, 4, 4, generator=g())
    found = []
    for fused in (False, True):
        u.weight.grad = None
        if fused:
            factor, penalty = u.terms(t, weight)
            loss = weighted_timestep_loss(pred, x0, t, factor, "sample").loss + penalty
        else:
            loss = u.loss((pred - x0).square().mean((1, 2, 3)), t, weight)
        loss.backward()
        found.append((loss.detach(), u.weight.grad))
    torch.testing.assert_close(*found)


def test_training_finds_the_logarithm_of_the_loss() -> None:
    """Also with noisy losses, of which it finds the mean's."""
    u = LogVariance(EDM, generator=g())
    optimizer = torch.optim.Adam(u.parameters(), lr=0.02)
    t = times(64)
    truth = 0.7 * torch.cos(3 * t)
    for step in range(300):
        noisy = truth.exp() * torch.empty(64).exponential_(generator=g(step))
        optimizer.zero_grad()
        u.loss(noisy, t, torch.ones(64)).backward()
        optimizer.step()
    assert float((u(t) - truth).detach().square().mean().sqrt()) < 0.15


def test_the_state_brings_its_features_along() -> None:
    one, other = LogVariance(EDM, generator=g(1)), LogVariance(EDM, generator=g(2))
    assert not torch.equal(one(times()), other(times()))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(times()), other(times()))
    assert set(one.state_dict()) == {"weight", "frequencies", "phases"}
    assert [name for name, _ in one.named_parameters()] == ["weight"]


def test_zero_snr_and_autocast() -> None:
    u = LogVariance(ZERO_SNR, generator=g())
    found = u(torch.arange(10))
    assert bool(found.isfinite().all())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(u(torch.arange(10)), found)


def test_what_cannot_be_learned_against_is_refused() -> None:
    for weight in (torch.ones(9), torch.zeros(10), torch.full((10,), math.inf), -torch.ones(10)):
        with pytest.raises(EbdiffError, match="no weight to learn against"):
            LogVariance(ZERO_SNR, weight)
    with pytest.raises(EbdiffError, match="Fourier"):
        LogVariance(ZERO_SNR, channels=0)
