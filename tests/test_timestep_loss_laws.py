"""What is true of weighted_timestep_loss whatever serves it: targets, weights, Huber, masks, statistics, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F

from ebdiff.ops import LossStatistics, PhiloxNoise, noised, weighted_timestep_loss
from ebdiff.ops import timestep_loss_reference as reference
from ebdiff.timesteps.profile import NoiseProfile

KINDS = reference.PREDICTIONS
B, T = 6, 1000


def scheduler(**settings: Any) -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=T, **settings)


def images(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, 3, 5, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)


def steps() -> Tensor:
    return torch.tensor([0, 999, 500, 17, 500, 3])


def weights() -> Tensor:
    return torch.linspace(0.2, 3, B)


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


# Targets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_snr", [False, True])
def test_noising_and_velocity_are_those_of_diffusers(zero_snr: bool) -> None:
    """Zero-terminal SNR included: the last timestep is noise alone, its velocity is -x0."""
    theirs = scheduler(rescale_betas_zero_snr=zero_snr)
    profile, x0, noise, t = NoiseProfile.from_scheduler(theirs), images(1), images(2), steps()
    x_t, _ = noised(x0, t, profile, noise)
    torch.testing.assert_close(x_t, theirs.add_noise(x0, noise, t), rtol=1e-6, atol=1e-6)
    velocity = theirs.get_velocity(x0, noise, t)
    found = weighted_timestep_loss(velocity, (x0, noise), t, weights(), "v_prediction", profile=profile)
    assert float(found.per_sample.max()) < 1e-12
    far = weighted_timestep_loss(velocity + 0.5, (x0, noise), t, weights(), "v_prediction", profile=profile)
    torch.testing.assert_close(far.per_sample, torch.full((B,), 0.25), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_target_made_inside_is_the_tensor_made_outside(kind: str, drawn: bool) -> None:
    profile, x0, t, pred = NoiseProfile.from_scheduler(scheduler()), images(1), steps(), images(3).requires_grad_()
    noise = PhiloxNoise(torch.tensor([7, 0])) if drawn else images(2)
    eps = noised(torch.zeros_like(x0), t, _OnlyNoise(), noise)[0]
    alpha, sigma = profile.coefficients(t)[0][:, t, None, None, None]
    target = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0, "flow": eps - x0}[kind]
    inside = weighted_timestep_loss(pred, (x0, noise), t, weights(), kind, profile=profile)
    outside = weighted_timestep_loss(pred, target, t, weights(), kind)
    assert torch.equal(inside.loss, outside.loss)
    assert torch.equal(inside.per_sample, outside.per_sample)
    assert torch.equal(*gradients(inside.loss, pred), *gradients(outside.loss, pred))


class _OnlyNoise:
    """x_t = noise at every timestep."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor([[0.0], [1.0]]), torch.zeros_like(t)

    def cells(self, t: Tensor) -> Tensor:
        return t


def test_continuous_time_has_coefficients_of_its_own() -> None:
    profile, t = NoiseProfile.flow(), torch.tensor([0.0, 250.0, 999.5, 500.0, 1.0, 750.0])
    x0, noise = images(1), images(2)
    x_t, _ = noised(x0, t, profile, noise)
    sigma = (t / 1000)[:, None, None, None]
    torch.testing.assert_close(x_t, (1 - sigma) * x0 + sigma * noise, rtol=1e-4, atol=1e-4)
    table = torch.arange(1000.0)
    found = weighted_timestep_loss(x_t, (x0, noise), t, table, "flow", profile=profile)
    torch.testing.assert_close(found.loss, (table[profile.cells(t)] * found.per_sample).mean())


# Weights --------------------------------------------------------------------------------------------------------------


def test_the_loss_is_linear_in_the_weights_and_the_mean_of_the_samples() -> None:
    pred, target, t, w = images(1).requires_grad_(), images(2), steps(), weights()
    once, half, ones = (weighted_timestep_loss(pred, target, t, x, "epsilon") for x in (w, w / 2, torch.ones(B)))
    torch.testing.assert_close(half.loss, once.loss / 2)
    assert torch.equal(*gradients(half.loss, pred), gradients(once.loss, pred)[0] / 2)
    torch.testing.assert_close(ones.loss, F.mse_loss(pred, target))
    assert torch.equal(ones.per_sample, once.per_sample)
    torch.testing.assert_close(once.loss, (w * once.per_sample).mean())


def test_a_table_of_weights_is_the_weight_of_each_cell() -> None:
    profile, table = NoiseProfile.from_scheduler(scheduler()), torch.rand(T)
    pred, t = images(1).requires_grad_(), steps()
    given = {"target": images(2), "t": t, "prediction_type": "epsilon"}
    by_table = weighted_timestep_loss(pred, weight=table, profile=profile, **given)  # type: ignore[arg-type]
    by_sample = weighted_timestep_loss(pred, weight=table[t], **given)  # type: ignore[arg-type]
    assert torch.equal(by_table.loss, by_sample.loss)
    assert torch.equal(*gradients(by_table.loss, pred), *gradients(by_sample.loss, pred))


@pytest.mark.parametrize("size", [B, T])
def test_weights_are_learned(size: int) -> None:
    """d loss / d weight_b = per_sample_b / B; in a table, added up where a cell comes twice."""
    pred, t, weight = images(1).requires_grad_(), steps(), torch.rand(size, requires_grad=True)
    found = weighted_timestep_loss(pred, images(2), t, weight, "epsilon")
    dweight, dpred = gradients(3 * found.loss, weight, pred)
    place = t if size == T else torch.arange(B)
    expected = torch.zeros(size).index_add(0, place, 3 * found.per_sample / B)
    torch.testing.assert_close(dweight, expected)
    alone = weighted_timestep_loss(pred, images(2), t, weight.detach(), "epsilon")
    torch.testing.assert_close(dpred, 3 * gradients(alone.loss, pred)[0])


# Huber and masks ------------------------------------------------------------------------------------------------------


def test_hubers_loss_by_its_formula() -> None:
    pred, target, c = images(1).double(), images(2).double(), torch.linspace(0.05, 4, B, dtype=torch.float64)
    found = weighted_timestep_loss(pred.float(), target.float(), steps(), weights(), "epsilon", huber_c=c)
    per_element = 2 * c[:, None] * (((pred - target).flatten(1) ** 2 + c[:, None] ** 2).sqrt() - c[:, None])
    torch.testing.assert_close(found.per_sample, per_element.mean(1).float())


@pytest.mark.parametrize("c", [1e4, 1e30, float("inf")])
def test_a_large_c_leaves_the_square(c: float) -> None:
    pred = images(1).requires_grad_()
    huber = weighted_timestep_loss(pred, images(2), steps(), weights(), "epsilon", huber_c=c)
    square = weighted_timestep_loss(pred, images(2), steps(), weights(), "epsilon")
    torch.testing.assert_close(huber, square, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradients(huber.loss, pred), gradients(square.loss, pred), rtol=1e-6, atol=0.0)


def test_a_small_c_is_proportional_to_the_distance() -> None:
    found = weighted_timestep_loss(images(1), images(2), steps(), weights(), "epsilon", huber_c=1e-6)
    torch.testing.assert_close(
        found.per_sample, 2e-6 * (images(1) - images(2)).abs().flatten(1).mean(1), rtol=1e-4, atol=0.0
    )


@pytest.mark.parametrize(("distance", "c"), [(1.0, 1e-20), (1e17, 1e-3), (1e30, 1.0), (-1e36, 0.5)])
def test_far_beyond_c_the_loss_is_2c_times_the_distance(distance: float, c: float) -> None:
    """Though its square may be more than float32 holds: a run that diverges is not to be told that all is well."""
    pred = torch.full((1, 20), distance, requires_grad=True)
    found = weighted_timestep_loss(
        pred, torch.zeros(1, 20), torch.zeros(1, dtype=torch.int64), torch.ones(1), "epsilon", huber_c=c
    )
    torch.testing.assert_close(found.loss, torch.tensor(2 * c * abs(distance)), rtol=1e-6, atol=0.0)
    slope = torch.full_like(pred, 2 * c / 20).copysign(pred)
    torch.testing.assert_close(*gradients(found.loss, pred), slope, rtol=1e-6, atol=0.0)


def test_masks_broadcast_and_count() -> None:
    pred, target = images(1).requires_grad_(), images(2)
    mask = torch.rand(B, 1, 5, 7)
    found = weighted_timestep_loss(pred, target, steps(), weights(), "epsilon", mask=mask)
    expected = (mask * (pred - target).square()).flatten(1).mean(1)
    torch.testing.assert_close(found.per_sample, expected.detach())
    torch.testing.assert_close(gradients(found.loss, pred), gradients((expected * weights()).mean(), pred))
    bools = weighted_timestep_loss(pred, target, steps(), weights(), "epsilon", mask=mask > 0.5)
    numbers = weighted_timestep_loss(pred, target, steps(), weights(), "epsilon", mask=(mask > 0.5).to(torch.bfloat16))
    assert torch.equal(bools.loss, numbers.loss)


@pytest.mark.parametrize("huber_c", [None, 0.3])
def test_what_a_mask_leaves_out_may_hold_anything(huber_c: float | None) -> None:
    mask = torch.rand(B, 3, 5, 7) > 0.4
    spoiled = images(1).masked_fill(~mask, float("nan")).requires_grad_()
    clean = images(1).requires_grad_()
    losses = []
    for pred in (spoiled, clean):
        found = weighted_timestep_loss(pred, images(2), steps(), weights(), "flow", mask=mask, huber_c=huber_c)
        losses.append([found.loss, *gradients(found.loss, pred)])
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    assert not losses[0][1][~mask].any()


# Statistics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_are_those_of_bincount(dtype: torch.dtype) -> None:
    buckets = torch.arange(T) * 4 // T
    statistics = LossStatistics(buckets, dtype=dtype)
    profile = NoiseProfile.from_scheduler(scheduler())
    samples, at = [], []
    for seed in range(5):
        t = torch.randint(T, (B,), generator=torch.Generator().manual_seed(seed))
        found = weighted_timestep_loss(
            images(seed), images(9), t, weights(), "epsilon", profile=profile, statistics=statistics
        )
        samples.append(found.per_sample.double())
        at.append(buckets[t])
    losses, place = torch.cat(samples), torch.cat(at)
    expected = [torch.bincount(place, values, 4) for values in (losses, losses**2)]
    torch.testing.assert_close(statistics.sum.double(), expected[0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(statistics.square.double(), expected[1], rtol=1e-6, atol=0.0)
    assert torch.equal(statistics.count, torch.bincount(place, minlength=4).to(dtype))
    statistics.reset_()
    assert not statistics.totals.any()


# Gradients ------------------------------------------------------------------------------------------------------------


def loss_and_plain(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A prediction, our loss of it, and torch's."""
    pred = images(1, dtype).requires_grad_()
    found = weighted_timestep_loss(pred, images(2), steps(), weights(), "epsilon")
    plain = (F.mse_loss(pred.float(), images(2), reduction="none").mean([1, 2, 3]) * weights()).mean()
    return pred, found.loss, plain


@pytest.mark.parametrize("factor", [1.0, 0.25, 1 / 3, 0.0])
def test_factors_of_the_loss(factor: float) -> None:
    """As gradient accumulation has them."""
    pred, ours, plain = loss_and_plain()
    torch.testing.assert_close(gradients(ours * factor, pred), gradients(plain * factor, pred))


def test_a_second_pass_over_the_same_graph_finds_what_the_first_did() -> None:
    """The first one may scale what it finds in place only where no other can follow."""
    pred, ours, plain = loss_and_plain()
    (expected,) = gradients(plain * 3, pred)
    for keep in (True, True, False):
        (found,) = torch.autograd.grad(ours * 3, pred, retain_graph=keep)
        torch.testing.assert_close(found, expected)
        found.zero_()  # nobody else's memory
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(ours, pred)


def test_a_loss_that_counts_twice_and_a_prediction_that_is_used_elsewhere() -> None:
    pred, ours, plain = loss_and_plain()
    for total in (lambda x: x + 2 * x, lambda x: x * pred.square().sum(), lambda x: x + pred.sin().sum()):
        torch.testing.assert_close(
            torch.autograd.grad(total(ours), pred, retain_graph=True),
            torch.autograd.grad(total(plain), pred, retain_graph=True),
        )
    pred.grad = torch.ones_like(pred)
    (ours * 2).backward()
    torch.testing.assert_close(pred.grad, 1 + 2 * gradients(plain, pred)[0])


def test_float16_gradients_do_not_underflow_before_the_loss_scale() -> None:
    pred = (torch.full((64, 3, 64, 64), 1e-3)).to(torch.float16).requires_grad_()
    target, t, w = torch.zeros(64, 3, 64, 64), torch.zeros(64, dtype=torch.int64), torch.ones(64)
    found = weighted_timestep_loss(pred, target, t, w, "epsilon")
    (grad,) = gradients(found.loss * 65536, pred)
    expected = 65536 * 2 * pred.detach().double() / pred.numel()
    torch.testing.assert_close(grad.double(), expected, rtol=2e-3, atol=0.0)


def test_gradients_of_a_target() -> None:
    """As of a network that is distilled into another one while it moves."""
    pred, target, weight = images(1).requires_grad_(), images(2).requires_grad_(), weights().requires_grad_()
    found = weighted_timestep_loss(pred, target, steps(), weight, "sample", huber_c=0.5)
    dpred, dtarget, dweight = gradients(found.loss, pred, target, weight)
    torch.testing.assert_close(dtarget, -dpred)
    torch.testing.assert_close(dweight, found.per_sample / B)


def test_what_carries_no_gradient() -> None:
    """The losses of the samples, x0 and noise."""
    x0, noise, pred = (images(i).requires_grad_() for i in range(3))
    found = weighted_timestep_loss(pred, (x0, noise), steps(), weights(), "flow")
    assert not found.per_sample.requires_grad
    found.loss.backward()
    assert pred.grad is not None
    assert x0.grad is noise.grad is None


def test_noising_passes_gradients_on_to_an_encoder() -> None:
    profile, t, x0 = NoiseProfile.from_scheduler(scheduler()), steps(), images(1).requires_grad_()
    x_t, _ = noised(x0, t, profile, images(2))
    alpha = profile.coefficients(t)[0][0, t]
    (dx0,) = torch.autograd.grad(x_t.sum(), x0)
    torch.testing.assert_close(dx0, alpha[:, None, None, None].expand_as(x0))
