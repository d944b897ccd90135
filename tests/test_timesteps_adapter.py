"""Samplers in a model that draws its timesteps by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ebdiff
from ebdiff.timesteps import ScheduleSampler, install


class GaussianDiffusion(nn.Module):
    """As in denoising_diffusion_pytorch."""

    def __init__(self, T: int = 10) -> None:
        super().__init__()
        self.num_timesteps, self.seen = T, list[Tensor]()
        self.model = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 3))
        self.register_buffer("loss_weight", torch.arange(1.0, T + 1))

    def p_losses(self, x_start: Tensor, t: Tensor, power: int = 1) -> Tensor:
        self.seen.append(t)
        return (self.model(x_start).abs().pow(power).mean(1) * self.loss_weight[t]).mean()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.p_losses(x, torch.randint(0, self.num_timesteps, (len(x),)), *args, **kwargs)


def speed() -> ebdiff.Stratified:
    betas = torch.linspace(1e-3, 0.5, 10, dtype=torch.float64)
    return ebdiff.Stratified(ebdiff.SpeeD(ebdiff.NoiseProfile.from_alphas_cumprod((1 - betas).cumprod(0))))


def test_its_loss_is_that_of_the_samplers_timesteps_and_weights() -> None:
    diffusion, sampler, x = GaussianDiffusion(), speed(), torch.randn(64, 3)
    expected = ScheduleSampler(sampler, seed=5)
    install(diffusion, sampler, seed=5)
    before = {name: tensor.clone() for name, tensor in diffusion.state_dict().items()}
    for _ in range(3):
        t, weight = expected.sample(64, "cpu")
        loss = diffusion(x, power=2)
        assert torch.equal(diffusion.seen[-1], t)
        torch.testing.assert_close(loss, (diffusion.model(x).square().mean(1) * (t + 1) * weight).mean())
        assert diffusion.state_dict().keys() == before.keys()
        assert torch.equal(diffusion.loss_weight, before["loss_weight"])


def test_a_copy_is_itself_and_draws_for_itself() -> None:
    diffusion = GaussianDiffusion()
    install(diffusion, speed())
    average = copy.deepcopy(diffusion)
    average(torch.randn(4, 3))
    assert (len(average.seen), len(diffusion.seen)) == (1, 0)
    assert diffusion._schedule_sampler.calls == 0


def test_it_is_traced_whole_and_that_is_no_step() -> None:
    diffusion = GaussianDiffusion()
    install(diffusion, speed())
    plan = ebdiff.trace(diffusion, torch.zeros(1, 3))
    assert [(space.name, space.size) for space in plan] == [("model.0", 4)]
    assert diffusion._schedule_sampler.calls == 0


def test_a_loss_that_fails_leaves_the_weights_as_they_were() -> None:
    diffusion = GaussianDiffusion()
    install(diffusion, speed())
    before = diffusion.loss_weight
    with pytest.raises(TypeError):
        diffusion(torch.randn(4, 3), power="two")
    assert diffusion.loss_weight is before


def test_what_is_no_diffusion_or_another_schedule_is_refused() -> None:
    with pytest.raises(ebdiff.EbdiffError, match="without p_losses, loss_weight, num_timesteps"):
        install(nn.Linear(2, 2), speed())
    diffusion = GaussianDiffusion(T=12)
    with pytest.raises(ebdiff.EbdiffError, match="12 timesteps"):
        install(diffusion, speed())
    assert "p_losses" not in vars(diffusion)
