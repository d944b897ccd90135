"""EDM2's learned weight: a small network guesses ln E[loss] at each noise level, and the loss is divided by it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from .profile import NoiseProfile

__all__ = ["LogVariance"]


class LogVariance(nn.Module):
    """u(sigma): every noise level contributes alike, without a weight set by hand. Train it along with the model.

    Karras et al. (arXiv 2312.02696), equation 21: the loss is E[w L / e^u + u], where L is a sample's mean squared
    error and w a table such as `weighting.edm`. Its minimum over u is u = ln E[w L] at each level. u is magnitude-
    preserving Fourier features of c_noise = ln(sigma / alpha) / 4 (their equation 75) and one linear layer of unit
    weight (equation 47). They also write the normalised weight back before each step (equation 66), which only keeps
    its learning rate from falling as the weight grows.

    `terms` serves the fused loss; `forward` is u alone.

    Args:
        profile: sigma and alpha of each t.
        weight: [T], w on the prediction's squared error; 1 if missing.
        channels: number of Fourier features.
        generator: of the random features, and of the first weight.

    Raises:
        EbdiffError: for channels below 1, or a weight that is not finite and > 0 in each of T cells.
    """

    frequencies: Tensor
    phases: Tensor
    ln_weight: Tensor

    def __init__(
        self,
        profile: NoiseProfile,
        weight: Tensor | None = None,
        *,
        channels: int = 128,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise EbdiffError("no Fourier features", expected="at least 1", got=str(channels), remedy="EDM2 has 128")
        table = torch.ones_like(profile.alpha) if weight is None else weight.detach().to("cpu", torch.float64)
        if table.shape != profile.alpha.shape or not bool((table.isfinite() & (table > 0)).all()):
            raise EbdiffError(
                "no weight to learn against",
                expected=f"{profile.T} numbers, finite and > 0",
                got=f"{list(table.shape)}, the least {float(table.min())}",
                remedy="a weight of 0 has no logarithm; leave such timesteps to the sampler",
            )
        self.profile = profile
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels, generator=generator))
        self.register_buffer("ln_weight", table.log().float(), persistent=False)
        self.weight = nn.Parameter(torch.randn(channels, generator=generator))

    def forward(self, t: Tensor) -> Tensor:
        """u, float32[B], of int64[B] timesteps, or of float32[B] in continuous time. Nothing waits for the device."""
        table, row = self.profile.coefficients(t)
        # Where alpha is 0 the level is infinite; the largest float32 keeps its features finite.
        alpha, sigma = table.index_select(1, row).clamp(min=torch.finfo(torch.float32).tiny).unbind()
        level = (sigma.log() - alpha.log()) / 4
        features = math.sqrt(2) * torch.cos(torch.outer(level, self.frequencies) + self.phases)
        direction: Tensor = self.weight / (self.weight.norm() + 1e-6)
        return (features * direction).sum(1)  # not a matrix product, which autocast would round to 16 bits

    def terms(self, t: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What the fused loss needs: `loss = weighted_timestep_loss(..., weight=factor, ...).loss + penalty`.

        A sampler's weight multiplies both terms. Inside the first alone u would learn it and so undo it, together with
        the correction for the density that is part of it.

        Args:
            t: [B].
            weight: float32[B], the sampler's.

        Returns:
            factor: float32[B], weight * w / e^u, differentiable by u.
            penalty: float32, the mean of weight * u.
        """
        u = self(t)
        ln_weight = self.ln_weight.index_select(0, self.profile.cells(t))
        return weight * torch.exp(ln_weight - u), (weight * u).mean()

    def loss(self, per_sample: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        """The mean of weight * (w L / e^u + u), for the losses L, float[B], of single samples."""
        factor, penalty = self.terms(t, weight)
        return (factor * per_sample).mean() + penalty
