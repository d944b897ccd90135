"""A scheduler's objective is what its own methods say, whether one pass serves it or they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ebdiff.training.objective import Objective

KINDS = ["epsilon", "v_prediction", "sample"]


class Offset(DDPMScheduler):
    """Adds other noise than its schedule says."""

    def add_noise(self, clean: Tensor, noise: Tensor, t: Any) -> Tensor:
        return super().add_noise(clean, noise + 0.1, t)


def batch() -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    clean, noise, predicted = (torch.randn(5, 3, 4, 4, generator=g) for _ in range(3))
    return clean, noise, torch.tensor([0, 3, 500, 998, 999]), torch.rand(5, generator=g), predicted


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [DDPMScheduler, Offset])
def test_it_is_the_schedulers(make: Any, kind: str, zero_terminal: bool) -> None:
    scheduler = make(prediction_type=kind, rescale_betas_zero_snr=zero_terminal)
    clean, noise, t, weight, predicted = batch()
    objective = Objective(scheduler)
    assert (objective.profile is None) == (make is Offset)
    noisy = objective.noisy(clean, noise, t)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, t), rtol=1e-5, atol=1e-5)
    target = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, t)}[kind]
    predicted.requires_grad_()
    expected = (weight * (predicted - target).square().mean((1, 2, 3))).mean()
    gradient = torch.autograd.grad(expected, predicted)[0]
    loss = objective.loss(predicted, clean, noise, t, weight).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, predicted)[0], gradient, rtol=1e-5, atol=1e-7)
