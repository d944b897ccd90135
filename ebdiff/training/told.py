"""What the networks of a run are told, out of its configuration and its data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..config import Conditional
from ..data import Images, Latents, decode
from ..errors import EbdiffError
from ..evaluation.likeness import SMALLEST
from .conditions import Conditions

__all__ = ["check_vae", "classes_of", "conditions_of", "made_up"]


def conditions_of(c: Conditional, data: Images | Latents, held_out: bool, tokens: bool = False) -> Conditions:
    """What they are told about each training image, or about each held-out one; `tokens`: see `Conditions.of_labels`.

    Raises:
        EbdiffError: the data have nothing of the kind, labels outside the classes, or images too small to be judged.
    """
    if c.by == "low_res":
        height, width = data.test.shape[-2:]
        if min(height, width) < SMALLEST:
            raise EbdiffError(
                f"{data.name}: SSIM cannot judge images so small",
                expected=f"at least {SMALLEST} pixels wide and high",
                got=f"{width}x{height}",
                remedy="set data.size",
            )
        return Conditions(dropout=c.dropout, factor=c.factor)
    labels = data.test_labels if held_out else data.labels
    embeddings = data.test_embeddings if held_out else data.embeddings
    if c.by == "labels" and c.classes == 1:
        labels = torch.zeros(len(data.test if held_out else data.train), dtype=torch.int64)
    if c.by == "labels" and labels is not None:
        return Conditions.of_labels(labels, classes_of(c, lambda: data), c.dropout, tokens)
    if c.by == "embeddings" and embeddings is not None:
        return Conditions.of_embeddings(embeddings, data.null_embedding, c.dropout)
    raise _without(c, data)


def _without(c: Conditional, data: Images | Latents) -> EbdiffError:
    return EbdiffError(
        f"{data.name} has no {c.by}",
        expected=f"{c.by} of training and of held-out images",
        got="none",
        remedy="see ebdiff.data.load_images for where they are kept, or train without conditional",
    )


def made_up(c: Conditional, classes: int, count: int, tokens: bool = False) -> Conditions:
    """What they are told about so many images that there are not: labels in turn, or low resolutions."""
    if c.by == "low_res":
        return Conditions(dropout=c.dropout, factor=c.factor)
    return Conditions.of_labels(torch.arange(count) % classes, classes, c.dropout, tokens)


def classes_of(c: Conditional | None, read: Callable[[], Images | Latents]) -> int:
    """How many labels there are; 0 where none are told. The data are read only to count them.

    Raises:
        EbdiffError: to be counted, and fewer than 2.
    """
    if c is None or c.by != "labels":
        return 0
    if c.classes != "auto":
        return c.classes
    data = read()
    if data.labels is None:
        raise _without(c, data)
    highest = max(int(labels.max()) for labels in (data.labels, data.test_labels) if labels is not None)
    if highest < 1:
        expected, got = "at least 2 classes", f"none above {highest}"
        raise EbdiffError(f"labels of {data.name}", expected=expected, got=got, remedy="check them")
    return highest + 1


def check_vae(vae: Any, data: Latents) -> None:
    """Refuse a VAE that did not make these latents, by their channels and the size of their images.

    Raises:
        EbdiffError: it did not.
    """
    channels, wanted, got = int(vae.config.latent_channels), data.test.shape[1], ""
    if channels != wanted:
        got = f"latents of {channels}"
    elif data.pictures is not None:
        made = decode(data.test[:1], vae, data.scaling, data.shift).shape[1:]
        got = f"images {list(made)}" if made != data.pictures.shape[1:] else ""
    if got:
        size = "" if data.pictures is None else f", images {list(data.pictures.shape[1:])}"
        raise EbdiffError(
            f"the VAE did not make {data.name}",
            expected=f"latents of {wanted} channels{size}",
            got=got,
            remedy="set data.vae to the VAE that did",
        )
