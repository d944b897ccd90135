"""Schedules and lessons for the tests of samplers that learn."""

import torch
from torch import Tensor

from ebdiff.timesteps.learned import Learned
from ebdiff.timesteps.profile import NoiseProfile

FOUR = NoiseProfile.from_alphas_cumprod(torch.tensor([0.9, 0.5, 0.1, 0.0], dtype=torch.float64))
LINEAR = NoiseProfile.from_alphas_cumprod((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def taught(sampler: Learned, scale: Tensor, steps: int = 40, n: int = 256) -> Learned:
    """`sampler` after some steps of losses that have mean `scale` at each cell."""
    for step in range(steps):
        t = sampler.sample(n, generator=g(step)).t
        cell = t if sampler.profile is None else sampler.profile.cells(t)
        sampler.update(t, scale[cell] * torch.rand(n, generator=g(step)))
    return sampler
