"""Feature extractors: what FID, KID, precision and recall look at. A score means nothing without its extractor's name.

`extractor_for` never falls back: data without an extractor of its own get an error that says what to do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import EbdiffError
from ..files import checksum
from .classifier import Classifier

__all__ = ["FeatureExtractor", "InceptionExtractor", "extractor_for"]

# The data sets whose classifier comes with the package: what their data are called, and (C, H, W) of their images.
EMBEDDED = {"fashion16": ("fashion16", (1, 16, 16)), "cifar10": (r"(?i).*cifar-?10(?!\d).*", (3, 32, 32))}
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
    f"pass the path of local Inception weights (or set {INCEPTION_VARIABLE}), or of a classifier of such images, which "
    "benchmarks/train_extractor.py trains, "
    "or run without extractor scores ('none'): the held-out loss per timestep needs no extractor"
)


def _embedded_for(data_name: str, shape: Sequence[int] | None) -> str | None:
    """The data set in EMBEDDED that these images belong to."""
    for name, (pattern, own) in EMBEDDED.items():
        if re.fullmatch(pattern, data_name) and (shape is None or tuple(shape) == own):
            return name
    return None


def extractor_for(spec: str | Path, data_name: str, shape: Sequence[int] | None = None) -> FeatureExtractor | None:
    """The extractor that `spec` asks for.

    Args:
        spec: "auto" is the embedded classifier of the data set that `data_name` names ("fashion16"; any name with
            "cifar10" or "cifar-10" in it, of 32x32 RGB images), otherwise Inception if EBDIFF_INCEPTION names local
            weights; "none" is None; "fashion16" and "cifar10" are the embedded classifiers, whatever the data; a path
            is a Classifier (.safetensors) or Inception weights (any other file).
        data_name: the `name` of the Images to be judged.
        shape: (C, H, W) of these images, where it is known.

    Raises:
        EbdiffError: "auto" has no extractor for this data, the file is missing or wrong, or is for other images.
    """
    if spec == "none":
        return None
    name = _embedded_for(data_name, shape) if spec == "auto" else str(spec)
    if name is None:
        if os.environ.get(INCEPTION_VARIABLE):
            return InceptionExtractor()
        raise EbdiffError(f"no feature extractor for {data_name}", got="extractor 'auto'", remedy=_REMEDIES)
    if name not in EMBEDDED and Path(name).suffix != ".safetensors":
        return InceptionExtractor(name)
    found = Classifier.embedded(name) if name in EMBEDDED else Classifier.load(name)
    if shape is not None:
        found.check(shape)
    return found
