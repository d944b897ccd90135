"""Which extractor an image set gets, and the script that trains one for any labelled set."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import train_extractor
from ebdiff.data import load_images
from ebdiff.errors import EbdiffError
from ebdiff.evaluation import Classifier, FeatureExtractor, extractor_for
from ebdiff.evaluation.features import EMBEDDED

RGB32 = (3, 32, 32)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_ones_say_how_accurate_they_are_and_how_they_were_made(name: str) -> None:
    classifier = Classifier.embedded(name)
    stated = float(classifier.facts["accuracy"])
    assert classifier.name == f"{name}-cnn-{100 * stated:.1f}"
    assert stated > 0.8
    assert "benchmarks/train_extractor.py" in classifier.facts["command"]
    assert classifier.shape == EMBEDDED[name][1]
    size = len(resources.files("ebdiff.assets").joinpath(f"{name}-classifier.safetensors").read_bytes())
    assert size < 1_000_000


def test_features_of_colour_images_are_finite_and_not_negative() -> None:
    classifier = Classifier.embedded("cifar10")
    assert isinstance(classifier, FeatureExtractor)
    images = torch.randint(0, 256, (3, *RGB32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = classifier(images)
    assert (features.shape, features.dtype) == ((3, classifier.num_features), torch.float32)
    assert bool((features >= 0).all())
    assert features.isfinite().all()


@pytest.mark.parametrize("name", ["cifar10_train_jpeg.npz", "CIFAR-10/", "hf:cifar10", "hf:someone/cifar10", "cifar10"])
def test_auto_knows_cifar10_by_its_name(name: str) -> None:
    assert extractor_for("auto", name, RGB32).name == Classifier.embedded("cifar10").name


def test_auto_knows_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EBDIFF_INCEPTION", raising=False)
    others = [("cifar100.npz", RGB32), ("cifar.npz", RGB32), ("cifar10.npz", (3, 16, 16)), ("cifar10.npz", (1, 32, 32))]
    for name, shape in others:
        with pytest.raises(EbdiffError, match=r"no feature extractor for .*train_extractor.py.*'none'"):
            extractor_for("auto", name, shape)


def test_one_that_was_named_is_for_any_images_of_its_shape() -> None:
    assert extractor_for("cifar10", "cats/", RGB32).name.startswith("cifar10-cnn")
    with pytest.raises(EbdiffError, match=r"expected uint8 \[N, 3, 32, 32\], got .*\[N, 1, 16, 16\]"):
        extractor_for("cifar10", "fashion16", (1, 16, 16))


def stripes(count: int, shape: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, with a bright band across (class 1) or none (class 0)."""
    draw, (channels, height, width) = np.random.default_rng(seed), shape
    labels = draw.integers(0, 2, count)
    x = draw.integers(0, 80, (count, height, width, channels))
    x[labels == 1, height // 3 : height // 2] += 150
    return x.astype(np.uint8), labels


@pytest.mark.parametrize(("shape", "features"), [((3, 20, 20), 64), ((1, 12, 12), 128)])
def test_one_can_be_trained_for_any_labelled_images(
    shape: tuple[int, int, int],
    features: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (x, y), (x_test, y_test) = stripes(250, shape, 0), stripes(60, shape, 1)
    np.savez(tmp_path / "bands.npz", x=x, y=y, x_test=x_test, y_test=y_test)
    out = tmp_path / "bands.safetensors"
    arguments = ["--data", tmp_path / "bands.npz", "--epochs", 1, "--threads", 1, "--out", out]
    monkeypatch.setattr(sys, "argv", ["train_extractor.py", *map(str, arguments)])
    train_extractor.main()
    found, data = extractor_for(out, "bands.npz", shape), load_images(tmp_path / "bands.npz")
    assert isinstance(found, Classifier)
    assert found.name == f"bands-cnn-{100 * float(found.facts['accuracy']):.1f}"
    assert found.facts["command"] == (
        "python benchmarks/train_extractor.py --data bands.npz --name bands --epochs 1 --seed 0"
    )
    assert train_extractor.accuracy(found, data.test, data.test_labels) == float(found.facts["accuracy"])
    assert found.num_features == features
    assert "bands-cnn" in capsys.readouterr().out


def test_without_labels_there_is_nothing_to_train_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "mute.npz", x=stripes(20, (1, 12, 12), 0)[0])
    monkeypatch.setattr(sys, "argv", ["train_extractor.py", "--data", str(tmp_path / "mute.npz")])
    with pytest.raises(EbdiffError, match="no labels"):
        train_extractor.main()


def test_folded_batch_norms_compute_the_same() -> None:
    torch.manual_seed(0)
    model = Classifier((3, 20, 20))
    body = train_extractor.with_batch_norm(model.body)
    x = torch.randn(8, 3, 20, 20)
    with torch.no_grad():
        for _ in range(3):
            body(x)  # running statistics
        assert sum(isinstance(module, nn.BatchNorm2d) for module in body.modules()) == 6
        wanted = body.eval()(x)
        train_extractor.fold(body)
        torch.testing.assert_close(model.body(x), wanted, rtol=1e-4, atol=1e-5)
