"""How many device-seconds a run would take here, from one training step of the dense network on images made up."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from ..errors import EbdiffError
from .accounting import FORWARD_AND_BACKWARD, Meter
from .loop import TrainState, train
from .stretch import train_config
from .world import World

__all__ = ["Measured", "measure"]

_STEPS = 4  # the first ones warm up
_MACS_ON_CPU = 5e10  # of a forward pass: some seconds a step


@dataclass(frozen=True)
class Measured:
    """A training step of the dense network: forward and backward pass, optimizer, EMA.

    Args:
        device: its kind.
        images: of the step.
        seconds: the least device-seconds that one took.
        macs: of the step, forward and backward.
    """

    device: str
    images: int
    seconds: float
    macs: float

    def seconds_of(self, macs: float) -> float:
        """Device-seconds of so many MACs at the speed of that step. Small networks are slower than their MACs."""
        return self.seconds * macs / self.macs


def measure(world: World) -> Measured:
    """Take a few steps and keep none: a whole batch on a GPU, or as much of it as fits; on the CPU a few images.

    Raises:
        EbdiffError: one image is too much for the GPU's memory.
    """
    images = world.config.train.batch_size
    if world.device.type == "cpu":
        images = max(1, min(images, int(_MACS_ON_CPU // world.plan.macs())))
    while images:
        measured = _measured(world, images)
        if measured is not None:
            return measured
        images //= 2
    raise EbdiffError(
        "no training step fits the GPU",
        expected="memory for weights, gradients, two moments, EMA and one image",
        got=f"{world.plan.parameters() / 1e6:.0f}M parameters",
        remedy="choose a smaller model, or device=cpu",
    )


def _measured(world: World, images: int) -> Measured | None:
    """None where there is no memory for so many images."""
    kind, config = world.device.type, replace(train_config(world, world.config.seed), batch_size=images, accumulate=1)
    seconds = []
    try:
        steps = train(
            TrainState.begin(world.network(), config),
            torch.randn(images, *world.image_shape),
            scheduler=world.scheduler,
            sampler=world.sampler,
            config=config,
            until=_STEPS,
            conditions=world.made_up_conditions(images),
            accelerator=Accelerator(cpu=kind == "cpu"),
        )
        meter = Meter(kind)
        for _ in steps:
            seconds.append(meter.read().device_seconds)
            meter = Meter(kind)
    except torch.OutOfMemoryError:
        return None
    return Measured(kind, images, min(seconds), world.plan.macs() * FORWARD_AND_BACKWARD * images)
