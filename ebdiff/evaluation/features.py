"""Feature extractors: what FID, KID, precision and recall look at. A score means nothing without its extractor's name.

`extractor_for` never falls back: data without an extractor of its own get an error that says what to do.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from ..files import checksum, read_tensors

__all__ = ["Classifier16", "FeatureExtractor", "InceptionExtractor", "extractor_for"]

EMBEDDED = "fashion16"  # the one data set that the embedded classifier was trained for
INCEPTION_VARIABLE = "EBDIFF_INCEPTION"


@runtime_checkable
class FeatureExtractor(Protocol):
    """Images to features.

    Attributes:
        name: stands beside every score, like "fashion16-cnn-91.8".
        num_features: d.
        fingerprint: sha256 of the weights.
    """

    name: str
    num_features: int
    fingerprint: str

    def __call__(self, images: Tensor, /) -> Tensor:
        """uint8 [N, C, H, W] -> float32 [N, d]."""
        ...


class Classifier16(nn.Module):
    """A small classifier of grey 16x16 images; its 128 penultimate features are the extractor (140k parameters).

    The batch norms of its training are folded into the convolutions (benchmarks/train_extractor.py).
    """

    num_features = 128

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.name, self.fingerprint, self.facts = "untrained", "", dict[str, str]()
        self.body = nn.Sequential(
            *_block(1, 32), *_block(32, 32), nn.MaxPool2d(2),
            *_block(32, 64), *_block(64, 64), nn.MaxPool2d(2),
            *_block(64, self.num_features), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, classes)

    @classmethod
    def load(cls, path: str | Path | None = None) -> Classifier16:
        """The embedded classifier, or another of the same shape from a safetensors file with `name` in its metadata.

        Raises:
            EbdiffError: the file is missing, damaged or holds something else.
        """
        if path is None:
            with resources.as_file(resources.files("ebdiff.assets") / f"{EMBEDDED}-classifier.safetensors") as file:
                return cls.load(file)
        weights, facts = read_tensors(path)
        model = cls(len(weights.get("head.bias", range(10))))
        expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
        if {key: tensor.shape for key, tensor in weights.items()} != expected or "name" not in facts:
            raise EbdiffError(
                f"{path} holds no Classifier16",
                expected=f"{', '.join(expected)} and a name in its metadata",
                got=f"{', '.join(weights)} and {', '.join(facts) or 'no metadata'}",
                remedy="make it with benchmarks/train_extractor.py",
            )
        model.load_state_dict(weights)
        model.name, model.facts, model.fingerprint = facts["name"], facts, _fingerprint(weights)
        return model.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [N, 1, 16, 16] -> features float32 [N, 128], all >= 0."""
        if images.dtype != torch.uint8 or images.shape[1:] != (1, 16, 16):
            raise EbdiffError(
                f"images for {self.name}",
                expected="uint8 [N, 1, 16, 16]",
                got=f"{images.dtype} {list(images.shape)}",
                remedy="pass weights of an extractor for such images, or run without extractor scores ('none')",
            )
        features: Tensor = self.body(images.to(self.head.weight.device, torch.float32) / 127.5 - 1)
        return features

    def logits(self, images: Tensor) -> Tensor:
        """uint8 [N, 1, 16, 16] -> float32 [N, classes]."""
        logits: Tensor = self.head(self(images))
        return logits


def _block(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()


def _fingerprint(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name}{tuple(weights[name].shape)}".encode())
        digest.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class InceptionExtractor:
    """The 2048 pool features of TensorFlow's Inception v3, the ones of published FIDs, from local weights.

    Args:
        path: torch-fidelity's weights file (pt_inception-2015-12-05-*.pth), read by torch-fidelity itself; nothing is
            downloaded. None takes the environment variable EBDIFF_INCEPTION.
        device: where it runs.

    Raises:
        EbdiffError: no path, no such file, torch-fidelity is not installed, or the file holds something else.
    """

    num_features = 2048

    def __init__(self, path: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        path = path or os.environ.get(INCEPTION_VARIABLE)
        if not path or not Path(path).is_file():
            raise EbdiffError(
                "no Inception weights", expected="a local file", got=str(path or "no path"), remedy=_REMEDIES
            )
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            torch.load(path, weights_only=True)  # torch-fidelity unpickles freely: let through nothing but tensors
            net = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
        except ModuleNotFoundError:
            raise EbdiffError(
                "Inception features need torch-fidelity", got="it is not installed", remedy="pip install torch-fidelity"
            ) from None
        except Exception as error:  # unpickling the wrong file raises nearly anything
            raise EbdiffError(
                f"{path} holds no Inception weights",
                expected="torch-fidelity's pt_inception-2015-12-05-*.pth",
                got=str(error).partition("\n")[0],
            ) from None
        self.net = net.to(device)
        self.device = device
        self.name, self.fingerprint = "inception-v3", checksum(path)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, 1 or 3, H, W] -> float32 [N, 2048]; grey becomes RGB, and any size is scaled to 299x299."""
        features: Tensor = self.net(images.to(self.device).expand(-1, 3, -1, -1))
        return features


_REMEDIES = (
    f"pass the path of local Inception weights (or set {INCEPTION_VARIABLE}), "
    "or run without extractor scores ('none'): the held-out loss per timestep needs no extractor"
)


def extractor_for(spec: str | Path, data_name: str) -> FeatureExtractor | None:
    """The extractor that `spec` asks for.

    Args:
        spec: "auto" is the embedded classifier for the embedded data set, otherwise Inception if EBDIFF_INCEPTION names
            local weights; "none" is None; "fashion16" is the embedded classifier, whatever the data; a path is a
            Classifier16 (.safetensors) or Inception weights (any other file).
        data_name: the `name` of the Images to be judged.

    Raises:
        EbdiffError: "auto" has no extractor for this data, or the file is missing or wrong.
    """
    if spec == "none":
        return None
    if spec == EMBEDDED or (spec == "auto" and data_name == EMBEDDED):
        return Classifier16.load()
    if spec == "auto":
        if os.environ.get(INCEPTION_VARIABLE):
            return InceptionExtractor()
        raise EbdiffError(f"no feature extractor for {data_name}", got="extractor 'auto'", remedy=_REMEDIES)
    return Classifier16.load(spec) if Path(spec).suffix == ".safetensors" else InceptionExtractor(spec)
