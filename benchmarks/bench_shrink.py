"""What half the channels buy: forward and backward of google/ddpm-cifar10-32's network, dense against shrunken.

Targets on 2 cores: 3.2 times faster balanced, 2.8 ragged; four times fewer parameters and MACs would be 4.0.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

import ebdiff
from benchmarks import SideBySide, ddpm_cifar10, few, halved_by_torch_pruning

BATCH = {True: 8, False: 2}  # at full size, and elsewhere
ROUNDS = 7


def training_step(model: nn.Module, device: torch.device, batch: int) -> Callable[[], None]:
    """Forward and backward of one batch in float32; gradients are dropped before the clock starts again."""
    x, t = torch.randn(batch, 3, 32, 32, device=device), torch.randint(0, 1000, (batch,), device=device)
    model.to(device).train()

    def step() -> None:
        model(x, t).sample.square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def halves(dense: nn.Module) -> dict[str, nn.Module]:
    """The dense network with half of the channels removed, by each way there is."""
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([1])
    plan = ebdiff.trace(dense, x, t)
    scores = ebdiff.importance(dense, plan)
    networks = {
        norm: ebdiff.shrink(dense, ebdiff.ChannelMask.draw(scores, plan=plan, ratio=0.5, norm=norm))
        for norm in ("balanced", "ragged")
    }
    with suppress(ModuleNotFoundError):
        networks["torch-pruning"] = halved_by_torch_pruning(ddpm_cifar10(), {"sample": x, "timestep": t})
    return networks


def macs_of(model: nn.Module, device: torch.device) -> float:
    """Of one image's forward pass."""
    return ebdiff.trace(model, torch.empty(1, 3, 32, 32, device=device), torch.ones(1, device=device)).macs()


@pytest.mark.benchmark(group="shrink")
def test_half_the_channels(benchmark: Any, device: torch.device, report: Any, full: bool) -> None:
    dense, batch, rounds = ddpm_cifar10(), BATCH[full], few(ROUNDS, full)
    networks = {"dense": dense, **halves(dense)}
    timing = SideBySide({name: training_step(net, device, batch) for name, net in networks.items()}, device)
    timing.run(benchmark, rounds)
    macs = {name: macs_of(net, device) for name, net in networks.items()}
    rows = [
        {
            "network": name,
            "parameters": sum(p.numel() for p in net.parameters()),
            "gmacs": macs[name] / 1e9,
            "times_fewer_macs": macs["dense"] / macs[name],
            "seconds": timing.median(name),
            "times_faster": timing.ratio("dense", name),
            "least_seconds": timing.least(name),
            "times_faster_by_least": timing.least("dense") / timing.least(name),
        }
        for name, net in networks.items()
    ]
    report(rows, {"what": "forward + backward, float32", "batch": batch, "rounds": rounds})
