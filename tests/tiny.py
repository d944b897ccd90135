"""The main job small enough for a test: every stage, a few steps each."""

from __future__ import annotations

from pathlib import Path

from ebdiff.config import resolve
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


def tiny(out: Path, *overrides: str) -> World:
    """A world whose job takes a few seconds."""
    return World(resolve("smoke", overrides=[*TINY, *overrides]), out)


def run(world: World) -> list[Tick]:
    """Prepare and run the whole job."""
    job.prepare(world)
    return list(job.run(world))
