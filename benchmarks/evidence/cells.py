"""Cells: an arm of a suite at a seed, each a process of `ebdiff run`; what is finished is not done again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, pool
from ebdiff.config import Config, completed
from ebdiff.config.resolve import refuse_other
from ebdiff.errors import EbdiffError
from ebdiff.files import read_json, read_object, write_bytes, write_json
from ebdiff.pruning.save import load
from ebdiff.training.costs import cost_at
from ebdiff.training.regions import region_folder
from ebdiff.training.stages import busy, write_folder
from ebdiff.training.stretch import network_at
from ebdiff.training.world import World

from .arms import ARMS, Arm
from .result import gathered, portable
from .suite import Suite

RESULTS = Path(__file__).parent.parent / "results" / "evidence"


class Failed(str):
    """A line about a cell that cannot be finished."""


@dataclass(frozen=True)
class Cell:
    """An arm of a suite at a seed.

    Args:
        suite, arm, seed: which.
        out: where runs are kept.
        results: where what is to be committed goes.
    """

    suite: Suite
    arm: Arm
    seed: int
    out: Path
    results: Path = RESULTS

    def __str__(self) -> str:
        return f"{self.suite.name}: {self.arm.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Of its run."""
        return self.out / self.suite.name / f"{self.arm.name}-{self.seed}"

    @property
    def place(self) -> Path:
        """Of its result."""
        return self.results / self.suite.name / f"{self.arm.name}-{self.seed}.json"

    @property
    def log(self) -> Path:
        """What its process wrote."""
        return self.folder.with_suffix(".log")

    @property
    def starts(self) -> Path:
        """The machine at each start of its process."""
        return self.folder.with_suffix(".machine.json")

    @property
    def network(self) -> Path:
        """Where a cell that removes nothing leaves its network, as the dense one that it is."""
        return self.folder / "network"

    @property
    def command(self) -> str:
        """What runs it."""
        which = "--tune" if self.suite.tuning else f"--cells {self.arm.name} --seeds {self.seed}"
        return f"python -m benchmarks.evidence {self.suite.arguments} {which}"

    @cached_property
    def before(self) -> Cell | None:
        """The cell whose network this one starts from."""
        return Cell(self.suite, ARMS[self.arm.after], self.seed, self.out, self.results) if self.arm.after else None

    @cached_property
    def config(self) -> Config:
        """The configuration of its run."""
        start = {"pretrained": str(self.before.network)} if self.before is not None else {}
        return self.suite.config({**self.arm.overrides(self.suite), **start}, self.seed)

    @property
    def ready(self) -> bool:
        """Is there what it starts from?"""
        return self.before is None or self.before.network.exists()

    def facts(self) -> dict[str, Any] | None:
        """Its result, None where there is none, a damaged one or one of another configuration."""
        try:
            found = read_object(self.place)
        except EbdiffError:
            return None
        return found if completed(found.get("config", {})) == portable(self.config) else None

    def obstacle(self) -> str:
        """Why its run cannot go on: another process is at it, or its folder is another configuration's. Else empty."""
        if held := busy(self.folder):
            return held
        kept = self.folder / "config.yaml"
        try:
            if kept.exists():
                refuse_other(self.config, kept)
        except EbdiffError as error:
            return f"{str(error).rpartition('; ')[0]}; remove {self.folder} to train it anew"
        return ""

    def start(self, minutes: float | None = None) -> subprocess.Popen[bytes]:
        """Begin its run, or go on with it; for so many minutes."""
        given = self.folder.with_suffix(".yaml")
        write_bytes(given, self.config.to_yaml().encode())
        write_json(self.starts, [*self.begun_on(), self.here()])
        command = [sys.executable, "-m", "ebdiff", "run", "--config", str(given), "--out", str(self.folder)]
        command += [] if minutes is None else ["--minutes", f"{minutes:.2f}"]
        threads = str(self.suite.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with open(self.log, "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)

    def here(self) -> dict[str, Any]:
        """This machine, now."""
        return machine("cuda" if self.suite.on_gpu and torch.cuda.is_available() else "cpu")

    def begun_on(self) -> list[dict[str, Any]]:
        """The machine at each start so far."""
        found: list[dict[str, Any]] = read_json(self.starts) if self.starts.exists() else []
        return found

    def ran_on(self) -> dict[str, Any]:
        """The machine where it began, with the commit of every start; as it is now where no start was kept."""
        starts = self.begun_on() or [self.here()]
        return {**starts[0], "commit": ", ".join(dict.fromkeys(start["commit"] for start in starts))}

    def ended(self, code: int) -> str:
        """What came of its process, which ended with this exit code; the result is written if it was finished."""
        if code:
            lines = self.log.read_text("utf-8", "replace").strip().splitlines() or ["no output"]
            return Failed(f"{self} FAILED: {lines[-1]} (see {self.log})")
        return self.finish() if (self.folder / "report.md").exists() else f"{self}: stopped; the same command goes on"

    def finish(self) -> str:
        """Keep what is needed of its finished run, and nothing else; a line about it.

        A result that is there stays: then it ran again only for the network that others start from.
        """
        if self.arm.name in {arm.after for arm in ARMS.values()}:
            keep_dense(World(self.config, self.folder), self.network)
        for checkpoints in list(self.folder.rglob("checkpoints")):  # large, and of no use to a finished run
            shutil.rmtree(checkpoints)
        stays = self.facts() is not None
        return f"{self}: trained again for its network; its result stays" if stays else self.written()

    def written(self) -> str:
        """Write its result; a line about it."""
        start = self.before
        cost = cost_at(World(start.config, start.folder), 1.0) if start is not None else None
        facts = {
            "suite": self.suite.name,
            "arm": self.arm.name,
            "about": self.arm.about,
            "seed": self.seed,
            "command": self.command,
            **gathered(self.config, self.folder, cost, self.ran_on()),
        }
        write_json(self.place, facts)
        end = facts["curve"][-1]
        fid = "" if end["fid"] is None else f", FID {end['fid']:.2f}"
        return f"{self}: {end['device_seconds']:.0f} device-seconds, loss {end['loss']:.4f}{fid}"


def keep_dense(world: World, folder: Path) -> None:
    """Save the finished network of a run that removed nothing as diffusers does."""
    network = world.network()
    network.load_state_dict(load(network_at(region_folder(world.out, 0), 1.0)).state_dict())
    write_folder(folder, lambda where: network.save_pretrained(str(where)))


def wanted(cells: Sequence[Cell]) -> list[Cell]:
    """Those without a result, each after the one whose network it needs."""
    found: dict[Path, Cell] = {}
    for cell in cells:
        if cell.facts() is None:
            if cell.before is not None and not cell.ready:
                found.setdefault(cell.before.folder, cell.before)
            found.setdefault(cell.folder, cell)
    return list(found.values())


def run(cells: Sequence[Cell], jobs: int, minutes: float | None = None) -> Iterator[str]:
    """Every cell in a process of its own, `jobs` side by side; yields a line for each that ends.

    After so many minutes no cell is started, and those at work stop where the same command goes on.
    """
    waiting, until = list(cells), float("inf") if minutes is None else time.monotonic() + 60 * minutes

    def start(cell: Cell) -> subprocess.Popen[bytes]:
        return cell.start(None if minutes is None else max(0.0, until - time.monotonic()) / 60)

    def may_start(cell: Cell) -> bool:
        return cell.ready and not busy(cell.folder) and time.monotonic() < until

    for cell in cells:
        if why := cell.obstacle():
            waiting.remove(cell)
            yield Failed(f"{cell} FAILED: {why}")
    for cell, code in pool(waiting, start, jobs, may_start):
        yield cell.ended(code)
    yield from (f"{cell}: not begun" for cell in waiting)
