"""The held-out loss per timestep bin: hand-checked values, whatever is predicted, the same batches for every model."""

import dataclasses
import json

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from ebdiff.data import load_images
from ebdiff.errors import EbdiffError
from ebdiff.evaluation import LossProfile, loss_per_bin


@pytest.fixture(scope="module")
def data():
    return load_images("fashion16")


KINDS = ["epsilon", "v_prediction", "sample"]


def oracle(scheduler, image, scale):
    """A model that knows the only image there is, and predicts `scale` times the noise, in the scheduler's terms."""

    def model(x, t):
        signal2 = scheduler.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
        a, s = signal2.sqrt(), (1 - signal2).sqrt()
        noise = scale * (x.double() - a * image) / s
        x0 = (x.double() - s * noise) / a
        return {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[scheduler.config.prediction_type]

    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_in_terms_of_the_noise_whatever_is_predicted(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    images = torch.randint(0, 256, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x0 = images.double() / 127.5 - 1
    settings = {"bins": 10, "per_bin": 64, "seed": 1}
    perfect = loss_per_bin(oracle(scheduler, x0, 1.0), images, scheduler, **settings)
    assert max(perfect.mean) < 1e-6
    nothing = loss_per_bin(oracle(scheduler, x0, 0.0), images, scheduler, **settings)
    assert nothing.mean == pytest.approx([1.0] * 10, abs=0.08)  # the noise's own mean square over 64 x 64 values
    half = loss_per_bin(oracle(scheduler, x0, 0.5), images, scheduler, **settings)
    assert half.mean == pytest.approx([mean / 4 for mean in nothing.mean], rel=1e-3)
    assert nothing.total == pytest.approx(sum(nothing.mean) / 10)


def test_a_wrong_image_costs_what_the_signal_is_worth():
    # An error d of x0 is an error (a/s) d of the noise, so that early timesteps punish it most.
    scheduler = DDPMScheduler(prediction_type="sample")
    images = torch.full((4, 1, 8, 8), 255, dtype=torch.uint8)
    profile = loss_per_bin(lambda x, t: torch.full_like(x, 0.5), images, scheduler, bins=1000, per_bin=1)
    a2 = scheduler.alphas_cumprod.double()
    assert profile.mean == pytest.approx((0.25 * a2 / (1 - a2)).tolist(), rel=1e-4)
    assert profile.edges == tuple(range(1001))


def test_every_model_sees_the_same_batches_and_stays_in_its_bins(data):
    scheduler, seen = DDPMScheduler(), []

    def watched(x, t):
        seen.append((x.clone(), t.clone()))
        return torch.zeros_like(x)

    first = loss_per_bin(watched, data.test, scheduler, bins=3, per_bin=40, batch_size=16)
    assert first.edges == (0, 333, 666, 1000)
    assert [len(t) for _, t in seen] == [16, 16, 8] * 3
    for i, (lo, hi) in enumerate(((0, 333), (333, 666), (666, 1000))):
        t = torch.cat([t for _, t in seen[3 * i : 3 * i + 3]])
        assert lo <= t.min() < lo + 9, "timesteps do not reach down to their bin's edge"
        assert hi - 9 < t.max() + 1 <= hi
    before, seen = seen, []
    assert loss_per_bin(watched, data.test, scheduler, bins=3, per_bin=40, batch_size=40) == first
    assert torch.equal(torch.cat([x for x, _ in before]), torch.cat([x for x, _ in seen]))
    other = loss_per_bin(watched, data.test, scheduler, bins=3, per_bin=40, seed=1)
    assert other.mean != first.mean


def test_each_bin_takes_all_images_in_its_own_order_with_its_own_noise():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    scheduler, noises, orders = DDPMScheduler(), [], []
    scheduler.add_noise = lambda x0, noise, t: noises.append(noise) or x0

    def watched(x, t):
        orders.append(((x.flatten() + 1) * 127.5).round().int().tolist())
        return torch.zeros_like(x)

    loss_per_bin(watched, images, scheduler, bins=4, per_bin=10)
    assert [sorted(order) for order in orders] == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]] * 4
    assert len({tuple(order) for order in orders}) == 4
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == 4


def test_a_module_is_evaluated_without_dropout_and_gets_its_modes_back(data):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Dropout(0.5).eval()
            self.drop = nn.Dropout(0.5)
            self.weight = nn.Parameter(torch.tensor(0.1))

        def forward(self, x, t):
            assert not torch.is_grad_enabled()
            return type("Output", (), {"sample": torch.cat([self.drop(x * self.weight), x], dim=1)})

    net, scheduler = Net(), DDPMScheduler()
    profile = loss_per_bin(net, data.test, scheduler, bins=2, per_bin=8)
    assert profile == loss_per_bin(lambda x, t: x * net.weight.detach(), data.test, scheduler, bins=2, per_bin=8)
    assert (net.training, net.drop.training, net.frozen.training) == (True, True, False)


def test_any_seed_will_do(data):
    def constant(x, t):
        return torch.full_like(x, 0.5)

    drawn = [loss_per_bin(constant, data.test, DDPMScheduler(), bins=2, per_bin=8, seed=seed) for seed in (1, 2**62)]
    assert drawn[0] != drawn[1]


def test_the_total_weighs_bins_by_their_width():
    profile = LossProfile(edges=(0, 10, 40), mean=(4.0, 1.0), n=8)
    assert profile.total == 1.75
    assert json.loads(json.dumps(dataclasses.asdict(profile))) == {"edges": [0, 10, 40], "mean": [4.0, 1.0], "n": 8}


def test_a_loss_that_cannot_be_measured_is_refused(data):
    def zero(x, t):
        return torch.zeros_like(x)

    with pytest.raises(EbdiffError, match="FlowMatch"):
        loss_per_bin(zero, data.test, FlowMatchEulerDiscreteScheduler())
    for wrong in ({"bins": 0}, {"bins": 1001}, {"per_bin": 0}):
        with pytest.raises(EbdiffError, match="bins"):
            loss_per_bin(zero, data.test, DDPMScheduler(), **wrong)
    with pytest.raises(EbdiffError, match=r"\[500, 1000\) are not finite"):
        loss_per_bin(
            lambda x, t: torch.where(t.view(-1, 1, 1, 1) < 500, x, x / 0), data.test, DDPMScheduler(), bins=2, per_bin=8
        )
