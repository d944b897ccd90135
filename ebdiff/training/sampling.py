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

__all__ = ["draw_images", "drawn_about", "in_turn", "of_label", "passes"]


def drawn_about(world: World, count: int, seed: int) -> Tensor:
    """int64 [count]: the held-out images whose labels, captions or low resolutions drawing is told.

    Every one of them comes before any comes again, so that classes have the shares they have there.
    """
    return DataOrder(len(world.data.test), seed)(0, count)


def of_label(world: World, label: int, count: int) -> Tensor:
    """int64 [count]: this label for every image, whether or not a held-out image has it.

    Raises:
        EbdiffError: the network is told no labels, or knows none of that number.
    """
    if not world.classes:
        raise EbdiffError("the network is told no labels", remedy="leave --label out, or train with --conditional")
    if not 0 <= label < world.classes:
        raise EbdiffError(
            "no such label", expected=f"0 to {world.classes - 1}", got=str(label), remedy="choose another"
        )
    return torch.full((count,), label)


def in_turn(world: World, count: int) -> Tensor:
    """int64 [count]: every label that held-out images have, equally often, ascending."""
    known: Tensor = world.held_out_conditions.rows["class_labels"].unique()
    return known[torch.arange(count) * len(known) // count]


@torch.no_grad()
def draw_images(world: World, network: Any, about: Tensor, seed: int, labels: Tensor | None = None) -> Iterator[Tensor]:
    """uint8 [N, C, H, W] batches by DDIM. Batch i starts from noise that depends on (seed, i) alone.

    Args:
        about: int64 [N]: an image for each of these held-out ones, with what the network is told about it.
        labels: int64 [N], told instead.

    Raises:
        EbdiffError: the network's predictions are not finite.
    """
    network, told_nothing = network.eval(), world.held_out_conditions.silenced
    size = world.config.sample.batch_size
    for number, start in enumerate(range(0, len(about), size)):
        chosen = about[start : start + size]
        if labels is None:
            known = world.told_about(chosen)
        else:
            known = world.held_out_conditions.with_tokens({"class_labels": labels[start : start + size]})
        told = {key: rows.to(world.device) for key, rows in known.items()}
        silent = told_nothing(told, torch.ones(len(chosen), dtype=torch.bool))
        predict = guided(network, told, silent, world.guidance)
        chance = torch.Generator().manual_seed((seed * 100_003 + number) % 2**64)
        x = torch.randn(len(chosen), *world.image_shape, generator=chance).to(world.device)
        scheduler = world.sampling_scheduler()
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, t), t, x).prev_sample
        if not torch.isfinite(x).all():
            raise EbdiffError("the images drawn are not finite", remedy="the network has diverged: use a lower lr")
        yield world.to_images(x)


def passes(world: World) -> int:
    """Forward passes of an image per step: guidance takes two."""
    return 1 if world.config.conditional is None or world.guidance in (0, 1) else 2
