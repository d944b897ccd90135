"""The configuration: presets, files and overrides, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ebdiff.config import PRESETS, Config, keep, resolve
from ebdiff.errors import EbdiffError


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole_and_survive_a_file(preset: str, tmp_path: Path) -> None:
    config = resolve(preset)
    keep(config, tmp_path)
    assert resolve(file=tmp_path / "config.yaml") == config


def test_demo_is_the_default_and_cifar10_is_the_papers_setting() -> None:
    assert resolve() == resolve("demo")
    paper = resolve("cifar10")
    assert (paper.train.batch_size, paper.train.lr, paper.train.ema_decay) == (128, 2e-4, 0.9999)
    assert (paper.regions.bounds, paper.regions.overlap) == ([0, 240, 440, 1000], 20)
    assert (paper.search.ratios, paper.search.eta) == ([0.3, 0.6, 0.8], 0.1)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.lr=1e-4", "train", "lr", 1e-4),
        ("train.lr=.5e-4", "train", "lr", 5e-5),
        ("train.grad_clip=null", "train", "grad_clip", None),
        ("regions.bounds=[0, 500, 1000]", "regions", "bounds", [0, 500, 1000]),
        ("regions.bounds=[[0, 500], [500, 1000]]", "regions", "bounds", [(0, 500), (500, 1000)]),
        ("data.source=hf:mnist", "data", "source", "hf:mnist"),
        ("train.precision=no", "train", "precision", "no"),
        ("train.flip=false", "train", "flip", False),
        ("train.compile=true", "train", "compile", True),
        ("train.compile=reduce-overhead", "train", "compile", "reduce-overhead"),
    ],
)
def test_overrides_are_yaml(override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(resolve("smoke", overrides=[override]), section), key) == value


def test_later_ones_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\ntrain: {lr: 0.5}\n")
    assert resolve("smoke", file).train.lr == 0.5
    assert resolve("smoke", file).train.batch_size == resolve("smoke").train.batch_size
    assert resolve("smoke", file, ["train.lr=0.25", "train.lr=0.125"]).train.lr == 0.125
    assert resolve("smoke", file).seed == 3
    assert resolve("smoke", file, ["seed=4"], seed=5).seed == 5


def test_a_file_with_every_section_that_needs_one_stands_on_no_preset(tmp_path: Path) -> None:
    """What the demo says and the file does not is the schema's default, as in a kept file of an older version."""
    whole = {"model": {"sample_size": 8}, "search": {"steps": 9, "window": 3}, "regions": {"steps": 5}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(whole))
    assert resolve(file=tmp_path / "mine.yaml") == Config.model_validate(whole)
    older = resolve("demo").model_dump(mode="json")
    del older["search"]["multiple_of"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(older))
    keep(resolve(file=tmp_path / "config.yaml"), tmp_path)  # goes on in its folder
    (tmp_path / "short.yaml").write_text("model: {}\nsearch: {window: 3}\nregions: {steps: 5}\n")
    with pytest.raises(EbdiffError, match=r"search\.steps: expected Field required; give it, or a preset that does"):
        resolve(file=tmp_path / "short.yaml")
    (tmp_path / "part.yaml").write_text("train: {batch_size: 7}\n")
    assert resolve(file=tmp_path / "part.yaml") == resolve("demo", overrides=["train.batch_size=7"])


def test_a_files_model_replaces_the_presets(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {sample_size: 8}\n")
    assert resolve("smoke", file).model == {"sample_size": 8}
    assert resolve("smoke", file, ["model.in_channels=1"]).model == {"sample_size": 8, "in_channels": 1}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", "train.lrr; did you mean train.lr?"),
        ("trian.lr=1", "trian; did you mean train?"),
        ("serach={steps: 3}", "did you mean search?"),
        ("train.lr=fast", "train.lr"),
        ("train.lr=-1", "train.lr"),
        ("train.betas=[2, 3]", "train.betas.0"),
        ("train.betas=[0.9, 1]", "train.betas.1"),
        ("seed=-1", "seed"),
        (f"seed={2**63}", "seed"),
        ("train.compile=fast", "configuration key train.compile: expected Input should be a valid boolean"),
        (
            "search.ratios=0.5",
            "key search.ratios: expected Input should be a valid list or Input should be 'auto', got 0.5",
        ),
        ("search.ratios=[0.5, half]", "configuration key search.ratios.1: expected"),
        ("regions.steps=abc", "configuration key regions.steps: expected"),
        ("regions.steps=abc", "valid list or Input should be a valid integer"),
        ("regions.bounds=[[0, a]]", "configuration key regions.bounds.0.1: expected"),
        ("conditional={dropout: 2}", "configuration key conditional.dropout: expected"),
        ("train={compile: reduce-overhead, accumulate: 2}", "needs accumulate: 1"),
        ("search.ratios=auto", "macs"),
        ("search.macs=0.3", "macs"),
        ("regions.steps=0", "at least 1 for each region, or one for all, got 0"),
        ("regions.steps=[3, 0, 3]", "at least 1 for each region"),
        ("regions.steps=[]", "at least 1 for each region"),
        ("evaluate.marks=[0.5]", "marks"),
        ("evaluate.score_marks=[0.7, 1.0]", "marks"),
        ("sample.steps=1001", "sample.steps: at most schedule.timesteps, 1000"),
        ("train.lr", "key=value"),
        ("train.lr.deep=1", "section"),
        ("train.lr=[1", "YAML"),
    ],
)
def test_bad_overrides_are_named(override: str, words: str) -> None:
    with pytest.raises(EbdiffError) as refused:
        resolve("smoke", overrides=[override])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "3", "\tx: 1"])
def test_files_that_are_no_configuration(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(EbdiffError, match=r"mine\.yaml"):
        resolve("smoke", file)


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(EbdiffError, match=r"nowhere\.yaml"):
        resolve("smoke", tmp_path / "nowhere.yaml")
    with pytest.raises(EbdiffError, match="did you mean smoke"):
        resolve("smok")


def test_a_folder_belongs_to_one_configuration(tmp_path: Path) -> None:
    keep(resolve("smoke"), tmp_path)
    written = (tmp_path / "config.yaml").read_bytes()
    keep(resolve("smoke"), tmp_path)
    with pytest.raises(EbdiffError, match=r"train\.lr.*expected train\.lr=0\.001, got 0\.5.*--out"):
        keep(resolve("smoke", overrides=["train.lr=0.5"]), tmp_path)
    assert (tmp_path / "config.yaml").read_bytes() == written


def test_everything_is_written_down() -> None:
    config = resolve("smoke")
    values = yaml.safe_load(config.to_yaml())
    assert set(values) == set(Config.model_fields)
    assert set(values["train"]) == set(type(config.train).model_fields)


def test_a_kept_configuration_older_than_a_key_has_its_default(tmp_path: Path) -> None:
    config = resolve("smoke")
    older = config.model_dump(mode="json")
    del older["evaluate"]["control"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(older))
    keep(config, tmp_path)
    with pytest.raises(EbdiffError, match=r"evaluate\.control=True, got False"):
        keep(resolve("smoke", overrides=["evaluate.control=false"]), tmp_path)
