"""Noising and the weighted loss, forward and backward, against what a diffusers training script writes.

Targets on 2 cores: twice as fast as eager, 1.2 times as fast as torch.compile.

The floor counts what has to be read and written: noising reads x0 and noise and writes x_t, the loss reads the
prediction and the noise and writes the gradient. Noise that torch draws is written once more; ours is drawn twice and
never stored, which a CPU pays for with arithmetic. `share_of_copy` is that floor by the time, over what copy_ of as
many elements reaches; tensors of a few MB stay in the caches, and so does the copy's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import Candidate, copy_of, few, replayed, side_by_side
from ebdiff.ops.timestep_loss import PhiloxNoise, fallbacks, noised, weighted_timestep_loss
from ebdiff.timesteps.profile import NoiseProfile

ROUNDS = 41
SHAPES = {"128x3x32x32": (128, 3, 32, 32), "16x4x64x64": (16, 4, 64, 64)}
LARGE = {"64x3x256x256": (64, 3, 256, 256)}  # on a GPU
Noising = Callable[[Any], tuple[Tensor, Any]]  # given noise, or None: x_t, and the noise
Loss = Callable[[Tensor, Any], Tensor]


class Training:
    """A training step but for the network, which would stand between noising and loss.

    Args:
        shape: [B, C, H, W].
        dtype: of the prediction; x0 and noise are float32, as under autocast.
        device: where.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        from diffusers import DDPMScheduler

        torch.manual_seed(0)
        self.x0, self.noise = torch.randn(2, *shape, device=device)
        self.pred = torch.randn(shape, device=device).to(dtype).requires_grad_()
        self.t = torch.randint(1000, shape[:1], device=device)
        self.weight = torch.rand(1000, device=device)
        self.scheduler = DDPMScheduler()
        self.profile = NoiseProfile.from_scheduler(self.scheduler)

    def plain_noising(self, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """As diffusers' scripts write it."""
        noise = torch.randn_like(self.x0) if noise is None else noise
        return self.scheduler.add_noise(self.x0, noise, self.t), noise

    def plain_loss(self, pred: Tensor, noise: Tensor) -> Tensor:
        """As diffusers' scripts write it, with a table of weights."""
        loss = F.mse_loss(pred.float(), noise.float(), reduction="none")
        return (loss.mean(dim=list(range(1, loss.dim()))) * self.weight[self.t]).mean()

    def noising(self, noise: Tensor | None) -> tuple[Tensor, Any]:
        """ebdiff's; drawn noise is never stored."""
        given = PhiloxNoise.draw(self.x0.device) if noise is None else noise
        return noised(self.x0, self.t, self.profile, given)

    def loss(self, pred: Tensor, noise: Any) -> Tensor:
        """ebdiff's."""
        target = self.x0, noise
        return weighted_timestep_loss(pred, target, self.t, self.weight, "epsilon", profile=self.profile).loss

    def step(self, noising: Noising, loss: Loss, drawn: bool) -> list[Tensor]:
        """x_t, the loss and its gradient."""
        x_t, noise = noising(None if drawn else self.noise)
        value = loss(self.pred, noise)
        return [x_t, value.detach(), *torch.autograd.grad(value, self.pred)]

    def ways(self) -> dict[str, tuple[Noising, Loss]]:
        """Everything a user would pick."""
        compiled = torch.compile(self.plain_noising, dynamic=False), torch.compile(self.plain_loss, dynamic=False)
        return {
            "ebdiff": (self.noising, self.loss),
            "eager": (self.plain_noising, self.plain_loss),
            "torch.compile": compiled,
        }


def candidates_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Candidate]:
    """Every way with noise that is given and with noise that is drawn; with given noise all of them have to agree."""
    training, found = Training(shape, dtype, device), {}
    expected = training.step(training.plain_noising, training.plain_loss, False)
    images, gradient = training.x0.nbytes, training.pred.nbytes
    for drawn in (False, True):
        label = f"{str(dtype)[6:]}, noise {'drawn' if drawn else 'given'}"
        for name, way in training.ways().items():
            step = partial(training.step, *way, drawn)
            if not drawn:
                torch.testing.assert_close(step(), expected, rtol=0.01, atol=1e-6)
            stored = (2 if drawn else 1) if name != "ebdiff" or not drawn else -1
            floor = (3 + stored) * images + 2 * gradient
            found[f"{label}: {name}"] = Candidate(step, floor, f"{label}: ebdiff")
            if device.type == "cuda" and name != "torch.compile":
                found[f"{label}: {name}, CUDA graph"] = Candidate(replayed(step), floor, f"{label}: ebdiff, CUDA graph")
    return found


@pytest.mark.benchmark(group="timestep loss")
@pytest.mark.parametrize("shape", SHAPES | LARGE)
def test_timestep_loss(benchmark: Any, device: torch.device, report: Any, full: bool, shape: str) -> None:
    if shape in LARGE and device.type == "cpu":
        pytest.skip("a batch that takes a GPU: benchmarks/gpu_suite.sh runs it")
    size = (SHAPES | LARGE)[shape]
    candidates = {"copy_": copy_of(torch.Size(size).numel(), device)}
    fallbacks.clear()
    torch._dynamo.reset()  # 8 variants of a function are compiled, then no more: just what one shape needs
    for dtype in (torch.float32, torch.bfloat16):
        candidates |= candidates_of(size, dtype, device)
    rounds = few(ROUNDS, full)
    rows = side_by_side(benchmark, device, candidates, rounds, warm=True)
    facts = {"what": "noising and loss, forward and backward", "shape": list(size), "rounds": rounds}
    report(rows, {**facts, "served_by_the_reference": dict(fallbacks)})
