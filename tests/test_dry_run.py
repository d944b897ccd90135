"""Dry runs: what the tickets will be, and how a measured step becomes an estimate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, ebdiff, tiny
from torch import Tensor

from ebdiff.dry_run import kept
from ebdiff.errors import EbdiffError
from ebdiff.training import estimate
from ebdiff.training.estimate import Measured, measure


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command writes."""
    ebdiff(monkeypatch, *arguments)
    written = capsys.readouterr()
    return written.out + written.err


def test_widths_are_told_by_size(tmp_path: Path) -> None:
    """Blocks of 8 and 16 channels, times embedded in 32: 0.7 of them is 5.6, 11.2 and 22.4; 0.2 is 1.6, 3.2 and 6.4."""
    masks = tiny(tmp_path).example_masks
    assert kept(masks[0]) == "8→6, 16→11, 32→22"
    assert kept(masks[2]) == "8→2, 16→3, 32→6"
    assert kept(tiny(tmp_path, "search.ratios=[0.0, 0.0, 0.0]").example_masks[0]) == "all"


def test_heads_are_told_apart(tmp_path: Path) -> None:
    """Of several heads whole ones go, and what blocks add to stays; 32 embeds times, 128 is inside the MLP."""
    model = "{class: DiTTransformer2DModel, sample_size: 16, in_channels: 1, num_attention_heads: 4, num_layers: 1, "
    overrides = [f"model={model}attention_head_dim: 8}}", "conditional.classes=3", "search.ratios=[0.5, 0.5, 0.5]"]
    assert kept(tiny(tmp_path, *overrides).example_masks[0]) == "32→16, 128→64, head 4→2"


def test_an_estimate_is_by_macs() -> None:
    assert Measured("cpu", images=4, seconds=2.0, macs=100.0).seconds_of(50.0) == 1.0


def test_a_step_is_measured_with_images_made_up(tmp_path: Path) -> None:
    world = tiny(tmp_path / "out", "conditional.classes=3", "data.source=/nowhere")
    measured = measure(world)
    assert (measured.device, measured.images) == ("cpu", world.config.train.batch_size)
    assert measured.macs == 3 * measured.images * world.plan.macs()
    assert measured.seconds > 0
    assert not (tmp_path / "out").exists()


def test_a_batch_is_halved_until_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = 3

    def step(state: Any, images: Tensor, **settings: Any) -> Iterator[None]:
        if len(images) > room:
            raise torch.OutOfMemoryError
        yield None

    monkeypatch.setattr(estimate, "train", step)
    world = tiny(tmp_path, "train.batch_size=20")
    assert measure(world).images == 2
    room = 0
    with pytest.raises(EbdiffError, match="no training step fits"):
        measure(world)


def test_only_a_dry_run_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = ("find", "--preset", "smoke", *TINY)
    assert "device-seconds" not in shown(monkeypatch, capsys, *plain, "--dry-run")
    text = shown(monkeypatch, capsys, *plain, "--dry-run", "--measure")
    assert "with 4 images on cpu" in text
    assert "an estimate" in text
    assert "--dry-run with it" in shown(monkeypatch, capsys, *plain, "--measure")
    assert not list(tmp_path.iterdir())


def test_a_search_of_no_steps_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    none = ("search.steps=0", "search.criterion=magnitude", "--dry-run")
    assert "total 0 MACs" in shown(monkeypatch, capsys, "find", "--preset", "smoke", *TINY, *none)
