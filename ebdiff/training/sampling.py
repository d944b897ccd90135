"""Images drawn by DDIM (Song et al. 2021), guided where the network is told something."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import EbdiffError
from .conditions import guided
from .seeds import DataOrder
from .world import World

__all__ = ["draw_images", "drawn_about", "in_turn", "of_labels", "passes"]


def drawn_about(world: World, count: int, seed: int) -> Tensor:
    """int64 [count]: the held-out images whose labels, captions or low resolutions drawing is told.

    Every one of them comes before any comes again, so that classes have the shares they have there.
    """
    return DataOrder(len(world.data.test), seed)(0, count)


def of_labels(world: World, labels: Tensor) -> Tensor:
    """int64 [N]: for each label the number of a held-out image that has it.

    Raises:
        EbdiffError: the network is told no labels, or no held-out image has such a one.
    """
    held_out, c = world.data.test_labels, world.config.conditional
    if held_out is None or c is None or c.by != "labels":
        raise EbdiffError("the network is told no labels", remedy="leave --label out, or train with --conditional")
    found = held_out == labels[:, None]
    absent = labels[~found.any(1)]
    if len(absent):
        expected = f"one of {', '.join(map(str, held_out.unique().tolist()))}"
        raise EbdiffError("no such label", expected=expected, got=str(int(absent[0])), remedy="choose one of these")
    return found.int().argmax(1)


def in_turn(world: World, count: int) -> Tensor:
    """int64 [count]: held-out images of every label that they have, equally many of each, labels ascending."""
    known = world.held_out_conditions.rows["class_labels"].unique()
    return of_labels(world, known[torch.arange(count) * len(known) // count])


@torch.no_grad()
def draw_images(world: World, network: Any, about: Tensor, seed: int) -> Iterator[Tensor]:
    """uint8 [N, C, H, W] batches by DDIM. Batch i starts from noise that depends on (seed, i) alone.

    Args:
        about: int64: an image for each of these held-out ones, with what the network is told about it.

    Raises:
        EbdiffError: the network's predictions are not finite.
    """
    network, told_nothing = network.eval(), world.held_out_conditions.silenced
    size = world.config.sample.batch_size
    for number, chosen in enumerate(about[first : first + size] for first in range(0, len(about), size)):
        told = {key: rows.to(world.device) for key, rows in world.told_about(chosen).items()}
        silent = told_nothing(told, torch.ones(len(chosen), dtype=torch.bool))
        predict = guided(network, told, silent, world.guidance)
        start = torch.Generator().manual_seed(seed * 100_003 + number)
        x = torch.randn(len(chosen), *world.image_shape, generator=start).to(world.device)
        scheduler = world.sampling_scheduler()
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, t), t, x).prev_sample
        if not torch.isfinite(x).all():
            raise EbdiffError("the images drawn are not finite", remedy="the network has diverged: lower train.lr")
        yield world.to_images(x)


def passes(world: World) -> int:
    """Forward passes of an image per step: guidance takes two."""
    return 1 if world.config.conditional is None or world.guidance in (0, 1) else 2
