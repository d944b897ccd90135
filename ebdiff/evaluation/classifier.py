"""A small image classifier whose penultimate features are an extractor: the embedded ones, or one trained by a user."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from ..files import read_tensors

__all__ = ["Classifier", "Residual"]

SHAPE = (1, 16, 16)  # fashion16's
WIDTH = 32  # channels of the first convolution
SMALL = 16  # pixels; larger images get residual stages


class Classifier(nn.Module):
    """A classifier of small images; what its last layer sees, `num_features` numbers, are the features.

    The batch norms of its training are folded into the convolutions (benchmarks/train_extractor.py).

    Args:
        shape: (C, H, W) of an image.
        classes: how many there are.
    """

    def __init__(self, shape: tuple[int, int, int] = SHAPE, classes: int = 10) -> None:
        super().__init__()
        self.name, self.fingerprint, self.facts = "untrained", "", dict[str, str]()
        self.shape = shape
        stages = _plain(shape[0]) if min(shape[1:]) <= SMALL else _stages(*shape)
        self.num_features = _outputs(stages)
        self.body = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(self.num_features, classes)

    @classmethod
    def embedded(cls, data: str) -> Classifier:
        """The one that comes with the package for this data set."""
        with resources.as_file(resources.files("ebdiff.assets") / f"{data}-classifier.safetensors") as file:
            return cls.load(file)

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """From a safetensors file with `name` and, but for grey 16x16 images, `shape` ("3x32x32") in its metadata.

        Raises:
            EbdiffError: the file is missing, damaged or holds something else.
        """
        weights, facts = read_tensors(path)
        channels, height, width = _shape(facts.get("shape", ""))
        model = cls((channels, height, width), len(weights.get("head.bias", range(10))))
        expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
        if {key: tensor.shape for key, tensor in weights.items()} != expected or "name" not in facts:
            raise EbdiffError(
                f"{path} holds no Classifier",
                expected=f"{', '.join(expected)} and a name in its metadata",
                got=f"{', '.join(weights)} and {', '.join(facts) or 'no metadata'}",
                remedy="make it with benchmarks/train_extractor.py",
            )
        model.load_state_dict(weights)
        model.name, model.facts, model.fingerprint = facts["name"], facts, _fingerprint(model.state_dict())
        return model.eval().requires_grad_(False)

    def check(self, shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> None:
        """Refuse images [C, H, W] that it was not trained for.

        Raises:
            EbdiffError: names both shapes.
        """
        if dtype != torch.uint8 or tuple(shape) != self.shape:
            raise EbdiffError(
                f"images for {self.name}",
                expected=f"uint8 [N, {', '.join(map(str, self.shape))}]",
                got=f"{dtype} [N, {', '.join(map(str, shape))}]",
                remedy="pass weights of an extractor for such images, or run without extractor scores ('none')",
            )

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> features float32 [N, num_features], all >= 0."""
        self.check(images.shape[1:], images.dtype)
        features: Tensor = self.body(images.to(self.head.weight.device, torch.float32) / 127.5 - 1)
        return features

    def logits(self, images: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> float32 [N, classes]."""
        logits: Tensor = self.head(self(images))
        return logits


class Residual(nn.Sequential):
    """x + layers(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        added: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]
        return added


def _plain(channels: int) -> list[nn.Module]:
    """Of 16x16 images (140k parameters): two convolutions per stage."""
    w = WIDTH
    return [
        *_block(channels, w), *_block(w, w), nn.MaxPool2d(2),
        *_block(w, 2 * w), *_block(2 * w, 2 * w), nn.MaxPool2d(2),
        *_block(2 * w, 4 * w),
    ]  # fmt: skip


def _stages(channels: int, height: int, width: int) -> list[nn.Module]:
    """Of larger images, 480k parameters at 32x32: each stage widens, halves the sides and adds two convolutions.

    The last stage's sides are 4 to 7.
    """
    layers: list[nn.Module] = []
    outputs = WIDTH
    for _ in range(min(height, width).bit_length() - 3):
        residual = Residual(*_block(outputs, outputs), *_block(outputs, outputs))
        layers += [*_block(channels, outputs), nn.MaxPool2d(2), residual]
        channels, outputs = outputs, 2 * outputs
    return layers


def _block(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()


def _outputs(layers: list[nn.Module]) -> int:
    convolutions = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Conv2d)]
    return convolutions[-1].out_channels


def _shape(text: str) -> tuple[int, int, int]:
    sides = [int(side) for side in text.split("x") if side.isdecimal()]
    return (sides[0], sides[1], sides[2]) if len(sides) == 3 and min(sides) > 0 else SHAPE


def _fingerprint(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name}{tuple(weights[name].shape)}".encode())
        digest.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
