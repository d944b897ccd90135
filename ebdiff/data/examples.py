"""What training learns from: examples of one shape in memory, and what is known about each of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import EbdiffError

__all__ = ["Examples", "Images", "to_model", "to_uint8"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples to learn from and examples held out.

    Args:
        train: [N, C, H, W].
        test: [M, C, H, W], never trained on: the reference of every score and of the held-out loss.
        name: where they come from.
        labels: int64 [N], classes counted from 0, or None.
        test_labels: int64 [M] or None.
        embeddings: float [N, L, D] or None: what a text encoder made of each one's caption.
        test_embeddings: float [M, L, D] or None.
        null_embedding: float [L, D]: what the encoder made of no caption; None is zeros.

    `fingerprint` is the sha256 of both splits' shapes and bytes.
    """

    noun: ClassVar[str] = "examples"

    train: Tensor
    test: Tensor
    name: str
    labels: Tensor | None = None
    test_labels: Tensor | None = None
    embeddings: Tensor | None = None
    test_embeddings: Tensor | None = None
    null_embedding: Tensor | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self._check_values()
        if self.train.shape[1:] != self.test.shape[1:]:
            sizes = [str(list(split.shape[1:])) for split in (self.train, self.test)]
            raise EbdiffError(f"test {self.noun} of {self.name}", expected=f"{sizes[0]} like the others", got=sizes[1])
        for split, labels in ((self.train, self.labels), (self.test, self.test_labels)):
            self._check_labels(len(split), labels)
        for split, embeddings in ((self.train, self.embeddings), (self.test, self.test_embeddings)):
            self._check_embeddings(len(split), embeddings)
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            digest.update(repr(tuple(split.shape)).encode())
            digest.update(split.contiguous().numpy().data)
        object.__setattr__(self, "fingerprint", digest.hexdigest())

    def _check_values(self) -> None:
        raise NotImplementedError

    def _check_labels(self, count: int, labels: Tensor | None) -> None:
        if labels is not None and (labels.shape != (count,) or labels.dtype != torch.int64):
            got = f"{labels.dtype} {list(labels.shape)}"
            raise EbdiffError(f"labels of {self.name}", expected=f"int64 [{count}]", got=got)

    def _check_embeddings(self, count: int, embeddings: Tensor | None) -> None:
        if embeddings is None:
            return
        like = self.embeddings.shape[1:] if self.embeddings is not None else embeddings.shape[1:]
        shaped = embeddings.ndim == 3 and embeddings.shape == (count, *like)
        whole = shaped and embeddings.is_floating_point() and bool(embeddings.isfinite().all())
        if not whole or (self.null_embedding is not None and self.null_embedding.shape != like):
            raise EbdiffError(
                f"embeddings of {self.name}",
                expected=f"finite floats [{count}, L, D], and [L, D] of no caption",
                got=f"{embeddings.dtype} {list(embeddings.shape)}",
            )


@dataclass(frozen=True, eq=False)
class Images(Examples):
    """Images as uint8 [N, C, H, W]; see `Examples`. `name`: "fashion16" for the embedded set as it is, "cats/", ..."""

    noun: ClassVar[str] = "images"

    def _check_values(self) -> None:
        for split in (self.train, self.test):
            if split.dtype != torch.uint8 or split.ndim != 4 or not split.numel():
                raise EbdiffError(
                    f"images of {self.name}",
                    expected="uint8 [N, C, H, W], N > 0, in both splits",
                    got=f"{split.dtype} {list(split.shape)}",
                )


def to_model(examples: Tensor) -> Tensor:
    """What a diffusion model sees, float32: of uint8 [0, 255] the values in [-1, 1], of floats (latents) their own."""
    values = examples.to(torch.float32)
    return values / 127.5 - 1 if examples.dtype == torch.uint8 else values


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255], rounded, what lies outside clipped; the inverse of `to_model`.

    Raises:
        EbdiffError: a value is NaN or infinite, as after a training run that diverged.
    """
    if not torch.isfinite(images).all():
        raise EbdiffError(
            "images hold NaN or infinity",
            remedy="the model that made them has diverged: use an earlier checkpoint or a smaller learning rate",
        )
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
