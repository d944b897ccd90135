"""Scores: hand-checked distances, laws that hold for any extractor, and never an extractor that nobody asked for."""

import dataclasses
import json
from importlib import resources

import pytest
import torch

from ebdiff.data import Images, load_images
from ebdiff.errors import EbdiffError
from ebdiff.evaluation import (
    Classifier,
    FeatureExtractor,
    InceptionExtractor,
    evaluate,
    extractor_for,
    fid,
    kid,
    metrics,
    precision_recall,
)
from ebdiff.files import write_tensors


class FirstPixels:
    """The first `num_features` pixels, as numbers around 0."""

    name, fingerprint = "toy", "0"

    def __init__(self, num_features=2):
        self.num_features, self.calls = num_features, 0

    def __call__(self, images):
        self.calls += 1
        return (images.flatten(1)[:, : self.num_features].float() - 128) / 16


@pytest.fixture(scope="module")
def data():
    return load_images("fashion16")


@pytest.fixture(scope="module")
def classifier():
    return Classifier.embedded("fashion16")


def gaussian(count, mean, covariance, seed=0):
    """uint8 [count, 1, 1, 2] whose toy features have about this mean and covariance."""
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = noise - noise.mean(0)
    noise = noise @ torch.linalg.inv(torch.linalg.cholesky(noise.T.cov())).T  # whitened: exactly unit covariance
    values = noise @ torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64)).T + torch.tensor(mean)
    return (values * 16 + 128).round().to(torch.uint8).view(count, 1, 1, 2)


# Fréchet and kernel distance


def test_fid_of_two_gaussians_is_the_closed_form():
    # Commuting covariances: |m1 - m2|^2 + sum (sqrt a - sqrt b)^2 = (1 + 4) + (1 - 2)^2 + (1 - 0.5)^2
    real = gaussian(4000, (0.0, 0.0), [[1.0, 0.0], [0.0, 1.0]])
    fake = gaussian(4000, (1.0, -2.0), [[4.0, 0.0], [0.0, 0.25]], seed=1)
    assert fid(real, fake, FirstPixels()) == pytest.approx(6.25, abs=0.02)  # the bytes round to 1/16
    # Not commuting: for 2x2, tr sqrt(AB) = sqrt(tr AB + 2 sqrt(det AB)); tr AB = 10, det AB = 3 * 6
    real = gaussian(4000, (0.0, 0.0), [[2.0, 1.0], [1.0, 2.0]])
    fake = gaussian(4000, (0.0, 0.0), [[3.0, 0.0], [0.0, 2.0]], seed=1)
    want = 4 + 5 - 2 * (10 + 2 * 18**0.5) ** 0.5
    assert fid(real, fake, FirstPixels()) == pytest.approx(want, abs=0.01)


def test_a_set_is_no_distance_from_itself(data, classifier):
    some = data.test[:600]
    assert fid(some, some.flip(0), classifier) == pytest.approx(0, abs=1e-6)
    assert abs(kid(some, some, classifier)) < 0.01
    assert precision_recall(some, some, classifier) == (1.0, 1.0)


def test_distances_grow_with_noise(data, classifier):
    real, clean = data.test[:700], data.train[:700].float()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(clean + sigma * noise).round().clamp(0, 255).byte() for sigma in (0, 8, 16, 32, 64)]
    for distance in (fid, kid):
        scores = [distance(real, images, classifier) for images in noisy]
        assert scores == sorted(scores)
        assert scores[-1] > 20 * abs(scores[0])


def test_scores_are_the_same_each_time_and_leave_the_random_state_alone(data, classifier):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = kid(data.test[:1050], data.train[:1050], classifier)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert kid(data.test[:1050], data.train[:1050], classifier) == first


# Precision and recall


def test_precision_and_recall_by_hand():
    # On a line, real at 0 1 2 3 4 (radii 3 2 2 2 3: reach [-3, 7]), fake at 5 6 7 8 9 (reach [2, 12]): of the fake,
    # 5, 6 and 7 are real enough; of the real, 2, 3 and 4 could have been made.
    points = torch.tensor([0, 1, 2, 3, 4], dtype=torch.uint8).view(-1, 1, 1, 1)
    toy = FirstPixels(1)
    assert precision_recall(points, points + 5, toy) == (0.6, 0.6)
    assert precision_recall(points, points + 100, toy) == (0.0, 0.0)
    # Fake at 3 3 3 3 3: all look real, but their balls have no radius and hold only the real 3.
    assert precision_recall(points, torch.full_like(points, 3), toy) == (1.0, 0.2)


def test_dropping_half_of_the_classes_costs_recall_alone(data, classifier):
    real = data.test[:2000]
    all_classes, half = data.train[:2000], data.train[data.labels < 5][:2000]
    precision, recall = precision_recall(real, all_classes, classifier)
    half_precision, half_recall = precision_recall(real, half, classifier)
    assert half_precision == pytest.approx(precision, abs=0.03)
    assert half_recall < recall - 0.25


def test_precision_and_recall_do_not_depend_on_the_chunks(monkeypatch):
    g = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(0, 256, (50, 1, 1, 2), generator=g, dtype=torch.uint8) for _ in range(2))
    whole = precision_recall(real, fake, FirstPixels())
    monkeypatch.setattr(metrics._share_within, "__defaults__", (7,))
    assert precision_recall(real, fake, FirstPixels()) == whole
    assert 0 < whole[0] < 1


# All scores


def test_evaluate_names_its_extractor_and_computes_the_reference_once():
    g = torch.Generator().manual_seed(0)
    train, test = (torch.randint(0, 256, (count, 1, 1, 2), generator=g, dtype=torch.uint8) for count in (10, 60))
    data, toy = Images(train, test, "dots/"), FirstPixels()
    scores = evaluate(data, test[::3], toy)
    assert toy.calls == 2
    assert evaluate(data, test[::3], toy) == scores
    assert toy.calls == 3, "the reference was computed again"
    assert (scores.extractor, scores.n, scores.n_real) == ("toy", 20, 60)
    assert (scores.precision, scores.recall) == (1.0, 1.0), "every third image against the same ones"
    assert scores.fid == pytest.approx(fid(test, test[::3], toy))
    assert json.loads(json.dumps(dataclasses.asdict(scores)))["extractor"] == "toy"
    assert "toy" in str(scores)
    toy.calls = 0
    evaluate(Images(train, test // 2, "dots/"), test[::3], toy)
    assert toy.calls == 2, "other images were taken for these"


def test_precision_and_recall_look_at_all_held_out_images_in_whatever_order():
    """Held-out images sorted by class, half as many drawn of both classes alike: they are all there."""
    dark, bright = (gaussian(40, [mean, 0.0], [[1.0, 0.0], [0.0, 1.0]], 0) for mean in (-4.0, 4.0))
    held_out = Images(dark, torch.cat([dark, bright]), "sorted")
    scores = evaluate(held_out, torch.cat([dark[::2], bright[::2]]), FirstPixels())
    assert (scores.precision, scores.recall) == (1.0, 1.0)


def test_what_cannot_be_scored_is_refused():
    images = torch.zeros(10, 1, 1, 2, dtype=torch.uint8)
    with pytest.raises(EbdiffError, match="too few"):
        fid(images, images[:4], FirstPixels())
    bad = FirstPixels(2)
    bad.num_features = 3
    with pytest.raises(EbdiffError, match="features of toy"):
        fid(images, images, bad)


# Extractors


def test_the_classifier_is_as_accurate_as_it_says(data, classifier):
    stated = float(classifier.facts["accuracy"])
    right = (classifier.logits(data.test[:2000]).argmax(1) == data.test_labels[:2000]).float().mean().item()
    assert right >= stated - 0.005
    assert stated >= 0.89
    assert classifier.name == f"fashion16-cnn-{100 * stated:.1f}"
    assert "benchmarks/train_extractor.py" in classifier.facts["command"]
    assert classifier.facts["data"] == data.fingerprint
    assert len(resources.files("ebdiff.assets").joinpath("fashion16-classifier.safetensors").read_bytes()) < 700_000


def test_the_classifier_is_an_extractor(data, classifier):
    assert isinstance(classifier, FeatureExtractor)
    features = classifier(data.test[:3])
    assert (features.shape, features.dtype) == ((3, 128), torch.float32)
    assert sum(p.numel() for p in classifier.parameters()) < 141_000
    assert not any(p.requires_grad for p in classifier.parameters())
    for wrong in (torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.zeros(3, 1, 16, 16)):
        with pytest.raises(EbdiffError, match=r"uint8 \[N, 1, 16, 16\]"):
            classifier(wrong)


def test_other_weights_have_another_fingerprint_and_foreign_ones_are_refused(tmp_path, classifier):
    weights = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    write_tensors(tmp_path / "same.safetensors", weights, name="same")
    weights["head.bias"][0] += 1
    write_tensors(tmp_path / "other.safetensors", weights, name="other")
    same, other = (extractor_for(tmp_path / f"{name}.safetensors", "cats/") for name in ("same", "other"))
    assert same.fingerprint == classifier.fingerprint != other.fingerprint
    assert other.name == "other"
    write_tensors(tmp_path / "nameless.safetensors", weights)
    write_tensors(tmp_path / "foreign.safetensors", {"weight": torch.zeros(3)}, name="foreign")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "same.safetensors").read_bytes()[:1000])
    for name in ("nameless", "foreign", "cut"):
        with pytest.raises(EbdiffError, match=name):
            extractor_for(tmp_path / f"{name}.safetensors", "fashion16")


def test_auto_is_the_embedded_classifier_for_the_embedded_images_only(monkeypatch, classifier):
    monkeypatch.delenv("EBDIFF_INCEPTION", raising=False)
    assert extractor_for("auto", "fashion16").fingerprint == classifier.fingerprint
    assert extractor_for("none", "fashion16") is None
    for name in ("fashion16/", "fashion16@3x32x32", "hf:fashion16", "cifar.npz"):
        with pytest.raises(EbdiffError, match=r"local Inception weights.*'none'"):
            extractor_for("auto", name)


def test_inception_without_weights_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("EBDIFF_INCEPTION", raising=False)
    with pytest.raises(EbdiffError, match="EBDIFF_INCEPTION"):
        InceptionExtractor()
    monkeypatch.setenv("EBDIFF_INCEPTION", str(tmp_path / "gone.pth"))
    with pytest.raises(EbdiffError, match=r"expected a local file, got .*gone\.pth"):
        extractor_for("auto", "cats/")
    with pytest.raises(EbdiffError, match=r"expected a local file, got .*elsewhere\.pth"):
        extractor_for(tmp_path / "elsewhere.pth", "fashion16")
    (tmp_path / "gone.pth").write_bytes(b"junk")
    with pytest.raises(EbdiffError, match=r"gone\.pth holds no Inception weights"):
        extractor_for("auto", "cats/")
    torch.save({}, tmp_path / "gone.pth")
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(EbdiffError, match="pip install torch-fidelity"):
        extractor_for("auto", "cats/")
