"""Distances between real and generated images in an extractor's features: FID, KID, precision and recall.

FID is biased by the number of images (measured with the embedded classifier, training images against the 10,000 test
images: 0.20 at n = 1000, 0.04 at 5000), so compare scores of equal n and of one extractor only; `Scores` carries both.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import EbdiffError
from .features import FeatureExtractor

__all__ = ["Scores", "evaluate", "features_of", "fid", "kid", "precision_recall", "refuse_too_few"]

NEIGHBOURS = 3  # k of Kynkäänniemi et al.
KID_SUBSETS, KID_SUBSET_SIZE = 20, 1000
_references: OrderedDict[tuple[str, str], Tensor] = OrderedDict()  # the newest few; in a run there is one


class HeldOut(Protocol):
    """What `evaluate` needs of `ebdiff.data.Images`."""

    @property
    def test(self) -> Tensor: ...

    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Scores:
    """How close generated images come to held-out ones. `dataclasses.asdict` of it is JSON.

    Args:
        fid: Fréchet distance, lower is better.
        kid: squared maximum mean discrepancy, lower is better; about 0, also slightly below, for equal distributions.
        precision: share of generated images that look real, in [0, 1].
        recall: share of real images that the generator could have made, in [0, 1].
        extractor: name of the feature extractor.
        n: number of generated images.
        n_real: number of held-out images that FID and KID refer to.
    """

    fid: float
    kid: float
    precision: float
    recall: float
    extractor: str
    n: int
    n_real: int

    def __str__(self) -> str:
        return (
            f"FID {self.fid:.2f}, KID {self.kid:.4f}, precision {self.precision:.3f}, recall {self.recall:.3f} "
            f"[{self.extractor}, {self.n} images against {self.n_real}]"
        )


def evaluate(data: HeldOut, fake: Tensor, extractor: FeatureExtractor, *, batch_size: int = 500) -> Scores:
    """All scores of generated images against the held-out images, whose features are computed once per process.

    Args:
        data: the images whose test split is the reference.
        fake: uint8 [N, C, H, W]. Precision and recall compare it with as many held-out images, evenly spaced.
        extractor: from `extractor_for`.

    Raises:
        EbdiffError: too few images, or the extractor cannot take them.
    """
    key = (data.fingerprint, extractor.fingerprint)
    if key not in _references:
        _references[key] = features_of(data.test, extractor, batch_size)
        while len(_references) > 4:
            _references.popitem(last=False)
    real, made = _references[key], features_of(fake, extractor, batch_size)
    equal = min(len(real), len(made))
    spread = torch.arange(equal) * len(real) // equal  # held-out images may lie in the order of their classes
    precision, recall = _precision_recall(real[spread], made[:equal])
    return Scores(_fid(real, made), _kid(real, made), precision, recall, extractor.name, len(made), len(real))


def fid(real: Tensor, fake: Tensor, extractor: FeatureExtractor) -> float:
    """Fréchet inception distance (Heusel et al. 2017, eq. 6) of uint8 [N, C, H, W] images."""
    return _fid(features_of(real, extractor), features_of(fake, extractor))


def kid(real: Tensor, fake: Tensor, extractor: FeatureExtractor) -> float:
    """Kernel inception distance (Bińkowski et al. 2018, eq. 4), the mean of 20 seeded subsets of up to 1000 images."""
    return _kid(features_of(real, extractor), features_of(fake, extractor))


def precision_recall(real: Tensor, fake: Tensor, extractor: FeatureExtractor) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1-3, k = 3). Pass equally many real and fake images.

    Args:
        real: uint8 [N, C, H, W].
        fake: uint8 [M, C, H, W].
    """
    return _precision_recall(features_of(real, extractor), features_of(fake, extractor))


def refuse_too_few(count: int, which: str) -> None:
    """Of so many images there are no scores.

    Raises:
        EbdiffError: fewer than 5; the third neighbour of a point needs more.
    """
    if count < NEIGHBOURS + 2:
        expected, remedy = f"at least {NEIGHBOURS + 2}", "more images, or evaluate.extractor=none"
        raise EbdiffError(f"too few {which} to score", expected=expected, got=str(count), remedy=remedy)


@torch.no_grad()
def features_of(images: Tensor, extractor: FeatureExtractor, batch_size: int = 500) -> Tensor:
    """uint8 [N, C, H, W] -> float64 [N, d].

    Raises:
        EbdiffError: fewer than 5 images (the third neighbour of a point needs more), or features that are not finite.
    """
    refuse_too_few(len(images), "images")
    features = torch.cat([extractor(batch).double() for batch in torch.split(images, batch_size)])
    if features.shape != (len(images), extractor.num_features) or not features.isfinite().all():
        raise EbdiffError(
            f"features of {extractor.name}",
            expected=f"finite [{len(images)}, {extractor.num_features}]",
            got=f"{list(features.shape)}, finite: {bool(features.isfinite().all())}",
        )
    return features


class _Identity(nn.Module):
    """Hands torchmetrics features that are already there."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _fid(real: Tensor, fake: Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Identity(real.shape[1])).to(real.device)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return max(0.0, float(metric.compute()))  # rounding leaves about -1e-9 for equal sets


def _kid(real: Tensor, fake: Tensor) -> float:
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET_SIZE, len(real), len(fake))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features, which we have already
        torch.manual_seed(0)
        metric = KernelInceptionDistance(feature=_Identity(real.shape[1]), subsets=KID_SUBSETS, subset_size=size)
        metric.to(real.device)
        metric.update(real, real=True)
        metric.update(fake, real=False)
        return float(metric.compute()[0])


def _precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    return _share_within(fake, real), _share_within(real, fake)


def _share_within(points: Tensor, manifold: Tensor, chunk: int = 1000) -> float:
    """Share of `points` that lie in a ball around some point of `manifold`, reaching to its third nearest neighbour."""
    radii = torch.cat([_third_distance(part, manifold) for part in torch.split(manifold, chunk)])
    inside = [(torch.cdist(part, manifold) <= radii).any(1) for part in torch.split(points, chunk)]
    return float(torch.cat(inside).double().mean())


def _third_distance(part: Tensor, manifold: Tensor) -> Tensor:
    """Distance from each point to its third neighbour; the nearest of all is the point itself."""
    return torch.cdist(part, manifold).kthvalue(NEIGHBOURS + 1, dim=1).values
