"""Laws of the training loop: what a step sees, what its loss is, and what it leaves."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from kill_me import STEPS, Seen, net, pictures, steps, training
from torch import Tensor, nn
from unets import unet

import ebdiff
from ebdiff.seeds import generator, seed_for
from ebdiff.training.checkpoint import Checkpoints
from ebdiff.training.loop import TrainConfig, TrainState
from ebdiff.training.seeds import DataOrder

SCRIPT = Path(__file__).with_name("kill_me.py")


class Transparent:
    """A scheduler that adds no noise, so that a model sees its images; it keeps the noise."""

    config = SimpleNamespace(num_train_timesteps=1000, prediction_type="epsilon")

    def __init__(self) -> None:
        self.noise: list[Tensor] = []

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        self.noise.append(noise)
        return clean


class Ramp(ebdiff.Uniform):
    """P(t) in proportion to t + 1, weight in proportion to 1 / (t + 1)."""

    def pmf(self) -> Tensor:
        p = torch.arange(1, self.T + 1, dtype=torch.float64)
        return p / p.sum()

    def weights(self) -> Tensor:
        return (1 / (self.pmf() * self.T)).float()


def numbered(count: int) -> Tensor:
    """Images of one value each: 0, 1, 2, ... of 255."""
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 1, 2, 2).contiguous()


def values(seen: list[Tensor]) -> list[int]:
    return [round(float(v + 1) * 127.5) for x in seen for v in x[:, 0, 0, 0]]


# What a step sees


@given(st.integers(1, 9), st.integers(0, 3), st.lists(st.integers(1, 25), min_size=1, max_size=4))
def test_every_epoch_has_every_image_once(length: int, seed: int, counts: list[int]) -> None:
    order, places = DataOrder(length, seed), []
    for count in counts:
        places += order(len(places), count).tolist()
    assert places == DataOrder(length, seed)(0, len(places)).tolist()
    for start in range(0, len(places) - length + 1, length):
        assert sorted(places[start : start + length]) == list(range(length))
    assert DataOrder(length, seed)(len(places) - 1, 1).tolist() == places[-1:]


def test_epochs_and_seeds_differ() -> None:
    order = DataOrder(50, 0)(0, 100)
    assert not torch.equal(order[:50], order[50:])
    assert not torch.equal(order[:50], DataOrder(50, 1)(0, 50))
    assert (
        len({seed_for(*key) for key in ((0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", 0, 1))}) == 6
    )
    assert all(0 <= seed_for(0, "x", i) < 2**63 for i in range(99))
    assert torch.equal(torch.rand(3, generator=generator(0, "a")), torch.rand(3, generator=generator(0, "a")))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_sees_every_image_once_per_epoch(accumulate: int) -> None:
    model = Seen()
    reports = steps(model, 14, numbered(7), scheduler=Transparent(), batch_size=2, accumulate=accumulate)
    seen = values(model.noisy)
    assert len(seen) == 14 * 2 * accumulate == reports[-1].images
    for start in range(0, len(seen), 7):
        assert sorted(seen[start : start + 7]) == list(range(7))


def test_half_of_the_images_are_mirrored() -> None:
    images = torch.zeros(1, 1, 1, 2, dtype=torch.uint8)
    images[..., 1] = 255
    for flip, low, high in ((False, 0, 0), (True, 0.4, 0.6)):
        model = Seen()
        steps(model, 10, images, scheduler=Transparent(), batch_size=40, flip=flip)
        x = torch.cat(model.noisy)
        assert bool((x[..., 0] == -x[..., 1]).all())
        assert low <= float((x[..., 0] > 0).float().mean()) <= high


def test_noise_and_timesteps_are_new_in_every_step() -> None:
    model, scheduler = Seen(), Transparent()
    steps(model, 5, scheduler=scheduler, batch_size=8, accumulate=2)
    noise, t = torch.stack(scheduler.noise), torch.stack(model.t)
    assert len(noise.flatten().unique()) == noise.numel()
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
    assert len({tuple(x.tolist()) for x in t}) == 10


def test_with_regions_no_step_leaves_its_own_and_the_timesteps_stay_the_sampler_s() -> None:
    regions, sampler, model = ebdiff.Partition(0, 5, 8, 20), Ramp(20), Seen()
    count = 600
    reports = steps(model, count, sampler=sampler, regions=regions, scheduler=DDPMScheduler(20), lr=1e-9)
    for report, t in zip(reports, model.t, strict=True):
        assert report.region is not None
        assert all(int(x) in regions[report.region] for x in t)
    for i, region in enumerate(regions):
        mass = sampler.mass(region)
        drawn = sum(report.region == i for report in reports) / count
        assert abs(drawn - mass) < 4 * (mass * (1 - mass) / count) ** 0.5
    found = torch.bincount(torch.cat(model.t), minlength=20) / (4 * count)
    assert float((found - sampler.pmf()).abs().sum()) < 0.15
    assert steps(Seen(), 1)[0].region is None


def test_the_loss_is_weighted_as_the_sampler_says() -> None:
    model, scheduler, sampler = Seen(), Transparent(), Ramp(1000)
    reports = steps(model, 6, scheduler=scheduler, sampler=sampler, lr=1e-12, accumulate=2)
    weight = sampler.weights()[torch.stack(model.t)]
    errors = torch.stack(scheduler.noise).square().flatten(2).mean(2)
    expected = (weight.view(6, -1) * errors.view(6, 8)).mean(1)
    torch.testing.assert_close(torch.tensor([r.loss for r in reports]), expected)


# What the loss is


def solutions(image: Tensor) -> dict[str, Any]:
    """What a network that knows the only image would say: DDPM's eq. 4, Salimans & Ho's v = alpha eps - sigma x0."""
    alphas = DDPMScheduler(1000).alphas_cumprod.double()

    def known(t: Tensor) -> tuple[Tensor, Tensor]:
        a = alphas[t][:, None, None, None]
        return a.sqrt(), (1 - a).sqrt()

    def epsilon(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = known(t)
        return (x - alpha * image) / sigma

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = known(t)
        return alpha * epsilon(x, t) - sigma * image

    return {"epsilon": epsilon, "v_prediction": velocity, "sample": lambda x, t: image.expand_as(x)}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_of_a_perfect_network_is_zero(kind: str) -> None:
    images = pictures(1)
    for name, solution in solutions(images.double() / 127.5 - 1).items():
        report = steps(Seen(solution), 1, images, batch_size=64, scheduler=DDPMScheduler(1000, prediction_type=kind))[0]
        assert report.loss < 1e-8 if name == kind else report.loss > 0.1, name


class Double(nn.Module):
    """A network that computes in float64."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x.double(), t.double())  # type: ignore[no-any-return]


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    assert all(g is not None for g in found)
    return [g.clone() for g in found if g is not None]


def test_accumulated_gradients_are_those_of_the_larger_batch() -> None:
    found = []
    for batch, accumulate in ((6, 1), (3, 2), (2, 3), (1, 6)):
        model = Double(net(dropout=0))
        report = next(training(model, 1, batch_size=batch, accumulate=accumulate, grad_clip=None))
        found.append([*gradients(model), torch.tensor([report.loss, report.grad_norm], dtype=torch.float64)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)


def test_bf16_computes_in_bf16_and_keeps_weights_in_float32() -> None:
    seen = {}
    for precision in ("no", "bf16"):
        model = net()
        model.first.register_forward_hook(lambda _, __, output, key=precision: seen.update({key: output.dtype}))
        steps(model, 2, precision=precision)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert seen == {"no": torch.float32, "bf16": torch.bfloat16}


def test_dropout_is_new_in_every_micro_batch() -> None:
    model, dropped = net(dropout=0.5), []
    model.first.bias.data.fill_(9)  # so that relu lets everything through
    model.drop.register_forward_hook(lambda _, __, output: dropped.append(output == 0))
    steps(model, 3, batch_size=2, accumulate=2)
    assert len(dropped) == 6
    for i, one in enumerate(dropped):
        for other in dropped[:i]:
            assert 0.4 < float((one != other).float().mean()) < 0.6


# What a step leaves


def test_the_first_step_of_adam_moves_every_weight_by_the_rate() -> None:
    model, before = net(), net()
    next(training(model, 1, lr=1e-3, weight_decay=0.0))
    for p, old in zip(model.parameters(), before.parameters(), strict=True):
        moved = p.grad != 0
        assert bool(moved.any())
        torch.testing.assert_close((old - p)[moved], 1e-3 * p.grad.sign()[moved], rtol=1e-2, atol=0)  # type: ignore[union-attr]


def test_gradients_are_there_and_new_at_every_report() -> None:
    """Those of step n are what a run that starts there finds, whatever a consumer does with the gradients before."""
    disturbed, plain = net(), net()
    both = zip(training(disturbed, 4, batch_size=3), training(plain, 4, batch_size=3), strict=True)
    before = None
    for _ in both:
        now = gradients(plain)
        assert all(torch.equal(a, b) for a, b in zip(now, gradients(disturbed), strict=True))
        assert before is None or not torch.equal(before[0], now[0])
        before = now
        for p in disturbed.parameters():
            assert p.grad is not None
            p.grad.fill_(1e9)
    state = TrainState.begin(net(), TrainConfig(batch_size=3, lr=1e-2))
    steps(state, 3, batch_size=3)
    state.optimizer.zero_grad()
    last = [gradients(state.model) for _ in training(state, 4, batch_size=3)][-1]
    assert before is not None
    assert all(torch.equal(a, b) for a, b in zip(last, before, strict=True))


def test_clipping_and_the_norm_before_it() -> None:
    free, clipped = net(), net()
    a, b = next(training(free, 1, grad_clip=None)), next(training(clipped, 1, grad_clip=1e-2))
    norm = torch.cat([g.flatten() for g in gradients(free)]).norm()
    assert a.grad_norm == b.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert float(torch.cat([g.flatten() for g in gradients(clipped)]).norm()) == pytest.approx(1e-2, rel=1e-3)


def test_reports_and_the_moving_average() -> None:
    """EMA with warm-up: the decay of step n is 1 - n^-0.75, at most ema_decay (diffusers' EMAModel counts from 0)."""
    state = TrainState.begin(net(), TrainConfig(ema_decay=0.5))
    mean = [p.detach().clone() for p in state.model.parameters()]
    for n, report in enumerate(training(state, 6, batch_size=3, accumulate=2, ema_decay=0.5), start=1):
        assert (report.step, report.images, report.lr) == (n, 6 * n, 2e-4) == (state.step, 6 * n, 2e-4)
        decay = min(0.5, 1 - n**-0.75)
        for old, p, shadow in zip(mean, state.model.parameters(), state.ema.shadow_params, strict=True):
            old.copy_(decay * old + (1 - decay) * p.detach())
            torch.testing.assert_close(shadow, old)


class Around(nn.Module):
    """Training, around a network that may not be."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.inner(x, t)


def test_every_step_trains_what_the_caller_has_put_in_evaluation_mode() -> None:
    model, modes = Around(net().eval()), []
    model.inner.register_forward_hook(lambda module, *_: modes.append(module.training))
    for _ in training(model, 3):
        model.inner.eval()
    assert modes == [True] * 3


def test_the_user_s_random_numbers_and_modes_are_left_alone() -> None:
    for make, size in ((net, 6), (lambda: unet(dropout=0.3), 8)):
        images, model, again = pictures().repeat(1, 1, 2, 2)[:, :, :size, :size], make(), make()
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
        losses = []
        for report in training(model, 3, images):
            assert model.training
            model.eval()  # as a consumer that samples would
            losses.append(report.loss)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert (np.random.get_state()[1] == before[2]).all()  # type: ignore[index] # noqa: NPY002
        torch.rand(7)
        assert losses == [report.loss for report in steps(again, 3, images)]


# Several processes


@pytest.mark.slow
@pytest.mark.parametrize("learns", [False, True])
def test_two_processes_are_one(tmp_path: Path, learns: bool) -> None:
    """Shrunken on the way, so that gradients of the smaller network are exchanged too."""
    options = ["--dropout", "0", "--shrink-at", "3", *(["--learns"] if learns else [])]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    losses = []
    for name, launcher in (("one", []), ("two", several)):
        command = [sys.executable, *launcher, str(SCRIPT), str(tmp_path / name), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        losses.append([float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("loss")])
    assert len(losses[0]) == STEPS
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, two = (Checkpoints(tmp_path / name).newest() for name in ("one", "two"))
    assert one is not None
    assert two is not None
    assert one.tensors["model.first.weight"].shape[0] == 4
    assert one.facts["step"] == two.facts["step"]
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-4, atol=1e-6)
