"""The main job small enough for a test: every stage, a few steps each; its commands, and what it leaves."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from ebdiff.cli import main
from ebdiff.config import resolve
from ebdiff.files import read_tensors
from ebdiff.training import job
from ebdiff.training.stages import Tick
from ebdiff.training.world import World

TINY = (
    "model.block_out_channels=[8, 16]",
    "model.norm_num_groups=4",
    "data.limit=64",
    "train.batch_size=4",
    "train.checkpoint_every=3",
    "train.log_every=2",
    "search.steps=20",
    "search.window=4",
    "search.every=1",
    "regions.steps=[5, 4, 6]",
    "sample.steps=3",
    "sample.grid=4",
    "evaluate.samples=6",
    "evaluate.loss_bins=4",
    "evaluate.loss_per_bin=4",
)
TWO = ("regions.bounds=[0, 440, 1000]", "search.ratios=[0.3, 0.6]", "regions.steps=[3, 4]")
NO_SEARCH = (*TWO, "search.steps=0", "search.criterion=magnitude")


def tiny(out: Path, *overrides: str) -> World:
    """A world whose job takes a few seconds."""
    return World(resolve("smoke", overrides=[*TINY, *overrides]), out)


def run(world: World) -> list[Tick]:
    """Prepare and run the whole job."""
    job.prepare(world)
    return list(job.run(world))


def found(out: Path, *overrides: str, after: int = 0) -> World:
    """A world whose search has finished; where `after` is given, abandoned after so many ticks and begun again."""
    world = tiny(out, *overrides)
    job.prepare(world)
    assert len(list(islice(job.find(world), after))) == after
    if after:
        return found(out, *overrides)
    list(job.find(world))
    return world


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every network and ticket in a run, by file and name; not of checkpoints."""
    files = [path for path in sorted(out.rglob("*.safetensors")) if "checkpoints" not in path.parts]
    return {f"{path.relative_to(out)} {key}": t for path in files for key, t in read_tensors(path)[0].items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Are these the same tensors under the same names, bit for bit?"""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def ebdiff(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of a command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["ebdiff", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)
