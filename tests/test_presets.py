"""Presets are planned at full size without memory and without data; those that change another say only what."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from ebdiff.cli import Preset
from ebdiff.config import PRESETS, resolve
from ebdiff.dry_run import planned
from ebdiff.training import job
from ebdiff.training.world import World

# Millions of parameters, as published, but for LDM's embedding of classes and the embeddings of t in each block of DiT.
SIZES = {
    "cifar10": 35.75,
    "celeba": 78.70,
    "lsun-church": 113.67,
    "imagenet-ldm": 400.92 + 1001 * 512 / 1e6,
    "metfaces-dit": 717.58,
    "metfaces-unet": 35.87,
    "ffhq-dit": 717.58,
}


@pytest.mark.parametrize("preset", SIZES)
def test_full_size_without_memory_and_data(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "network", lambda world: pytest.fail("real weights"))
    monkeypatch.setattr(World, "data", property(lambda world: pytest.fail("data")))
    world = World(resolve(preset), tmp_path)
    assert planned(world, job.work, Console(file=io.StringIO()), dry_run=True)
    assert round(world.plan.parameters() / 1e6, 2) == round(SIZES[preset], 2)
    assert not list(tmp_path.iterdir())


def test_a_preset_on_another_changes_what_it_says() -> None:
    church, bedroom = resolve("lsun-church").model_dump(), resolve("lsun-bedroom").model_dump()
    assert {section for section in church if church[section] != bedroom[section]} == {"data", "train"}
    assert bedroom["train"] == {**church["train"], "lr": 2e-6}
    assert resolve("metfaces-unet").model_dump() == {
        **resolve("ffhq-unet").model_dump(),
        "data": resolve("metfaces-dit").data.model_dump(),
    }
    metfaces, ffhq = resolve("metfaces-dit").model_dump(), resolve("ffhq-dit").model_dump()
    assert [section for section in metfaces if metfaces[section] != ffhq[section]] == ["data", "train"]
    assert ffhq["train"] == {**metfaces["train"], "sampler": "speed(k=2)"}


def test_a_model_of_the_same_class_is_changed_and_one_of_another_replaced() -> None:
    cifar, celeba, imagenet = (resolve(name).model for name in ("cifar10", "celeba", "imagenet-ldm"))
    assert cifar.keys() == celeba.keys()
    assert celeba["downsample_padding"] == cifar["downsample_padding"] == 0
    assert "downsample_padding" not in imagenet


def test_help_names_every_preset() -> None:
    help_text = Preset.__metadata__[0].help  # type: ignore[attr-defined]
    assert set(PRESETS) <= set(help_text.replace(",", " ").replace(";", " ").replace(".", " ").split())
