"""A run in slices, stopped after so many minutes and gone on with by the same command, is a run at one stretch."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tiny import ebdiff, run, same, tiny, weights

from ebdiff import progress
from ebdiff.files import read_json
from ebdiff.progress import Slice, follow
from ebdiff.training import job
from ebdiff.training.stages import Tick, Work, while_alive
from ebdiff.training.world import World

SHORT = ("search.steps=5", "regions.steps=[2, 2, 3]", "search.window=3", "evaluate.marks=[1.0]")


def slices(world: World, ticks: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the main job in slices of so many ticks, by a clock that goes on a minute whenever a slice asks."""
    clock = itertools.count()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(clock)))
    job.prepare(world)
    for count in itertools.count(1):
        timed = Slice(job.run(world), ticks)
        assert len(list(timed)) >= ticks or not timed.closed
        if not timed.closed:
            return count
    raise AssertionError


def test_in_slices_it_ends_as_at_one_stretch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tiny(tmp_path / "whole", *SHORT))
    assert slices(tiny(tmp_path / "slices", *SHORT), 4, monkeypatch) >= 4
    assert same(weights(tmp_path / "slices"), weights(tmp_path / "whole"))
    for folder in ("search", "regions/2", "dense"):
        costs = [read_json(tmp_path / each / folder / "done.json")["cost"] for each in ("whole", "slices")]
        assert [costs[0][key] for key in ("steps", "images", "macs")] == [
            costs[1][key] for key in ("steps", "images", "macs")
        ]


def test_a_slice_is_told_and_leaves_with_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = tiny(tmp_path / "run", *SHORT)
    (tmp_path / "tiny.yaml").write_text(world.config.to_yaml())
    command = ("find", "--config", tmp_path / "tiny.yaml", "--out", world.out, "--minutes")
    assert ebdiff(monkeypatch, *command, "0") == 0
    assert "stopped after 0 minutes at search, step 1, loss" in capsys.readouterr().out
    assert [path.name for path in (world.out / "search" / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (world.out / "search" / "done.json").exists()
    assert ebdiff(monkeypatch, *command, "60") == 0
    assert "resumed at step 1" in capsys.readouterr().out
    assert (world.out / "search" / "done.json").exists()
    assert ebdiff(monkeypatch, *command, "-1") == 2


def test_a_slice_ends_only_where_nothing_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    """Not at what another process did, or it would never get on; not in the middle of what is not kept."""
    ticks = [Tick("a", 0, "resumed", before=True), Tick("a", 1, "half", kept=False), Tick("a", 1, "x"), Tick("a", 1)]
    timed = Slice(iter(ticks), 0)
    assert [tick.note for tick in timed] == ["resumed", "half", "x"]
    assert timed.closed
    assert not follow(ticks, [Work("a", 3)], Console(), 0)
    assert "stopped after 0 minutes at a, x; the same command goes on" in capsys.readouterr().out
    assert follow(ticks, [Work("a", 3)], Console(), 60)
    assert follow(ticks, [Work("a", 3)], Console())


def test_a_child_that_is_ended_leaves_a_checkpoint(tmp_path: Path) -> None:
    """What `--parallel` does to its processes when it stops: SIGTERM, and then it waits."""
    world = tiny(tmp_path, *SHORT)
    job.prepare(world)

    def ticks() -> Iterator[Tick]:
        for number, tick in enumerate(job.find(world)):
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield tick

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="3"):
            list(while_alive(ticks(), os.getppid()))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert next(job.find(world)).note == "resumed at step 2"
