"""Cells: an arm of a suite at a seed, each a process of `ebdiff run`; what is finished is not done again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ebdiff.config import Config
from ebdiff.files import read_json, write_bytes, write_json
from ebdiff.training.regions import region_folder
from ebdiff.training.stages import done
from ebdiff.training.stretch import network_at

from .arms import ARMS, Arm
from .result import cost_of_run, gathered, portable
from .suite import Suite

RESULTS = Path(__file__).parent.parent / "results" / "evidence"


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
    def network(self) -> Path:
        """The finished network of an arm with one region."""
        return network_at(region_folder(self.folder, 0), 1.0)

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
        return self.before is None or done(region_folder(self.before.folder, 0)) is not None

    def facts(self) -> dict[str, Any] | None:
        """Its result, None where there is none or one of another configuration."""
        if not self.place.exists():
            return None
        found: dict[str, Any] = read_json(self.place)
        return found if same(found["config"], portable(self.config)) else None

    def start(self) -> subprocess.Popen[bytes]:
        """Begin its run, or go on with it."""
        given = self.folder.with_suffix(".yaml")
        write_bytes(given, self.config.to_yaml().encode())
        command = [sys.executable, "-m", "ebdiff", "run", "--config", str(given), "--out", str(self.folder)]
        threads = str(self.suite.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with open(self.log, "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)

    def finish(self) -> str:
        """Write the result of its finished run; a line about it."""
        cost = cost_of_run(self.before.folder) if self.before is not None else None
        facts = {
            "suite": self.suite.name,
            "arm": self.arm.name,
            "about": self.arm.about,
            "seed": self.seed,
            "command": f"python -m benchmarks.evidence --suite {self.suite.name.partition('/')[0]} "
            f"--cells {self.arm.name} --seeds {self.seed}",
            **gathered(self.config, self.folder, cost),
        }
        write_json(self.place, facts)
        for checkpoints in list(self.folder.rglob("checkpoints")):  # large, and of no use to a finished run
            shutil.rmtree(checkpoints)
        end = facts["curve"][-1]
        fid = "" if end["fid"] is None else f", FID {end['fid']:.2f}"
        return f"{self}: {end['device_seconds']:.0f} device-seconds, loss {end['loss']:.4f}{fid}"

    def trouble(self) -> str:
        """Why its process ended, as its log says."""
        lines = self.log.read_text("utf-8", "replace").strip().splitlines() or ["no output"]
        return f"{self} FAILED: {lines[-1]} (see {self.log})"


def same(kept: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Is it the same configuration, where keys that are newer than what is kept have their defaults?"""
    try:
        return Config.model_validate(kept).model_dump(mode="json") == config
    except ValidationError:
        return False


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

    After so many minutes no cell is started, and those at work are interrupted: they go on from their newest checkpoint
    when the same command runs again.
    """
    waiting, running = list(cells), dict[subprocess.Popen[bytes], Cell]()
    until = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    try:
        while (waiting or running) and time.monotonic() < until:
            for cell in [cell for cell in waiting if cell.ready][: jobs - len(running)]:
                waiting.remove(cell)
                running[cell.start()] = cell
            if not running:
                yield from (f"{cell}: waits for {cell.before}" for cell in waiting)
                return
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                cell = running.pop(process)
                yield cell.finish() if process.returncode == 0 else cell.trouble()
        for process in running:
            process.send_signal(signal.SIGINT)
        while running:
            process, cell = running.popitem()
            yield cell.finish() if process.wait() == 0 else f"{cell}: interrupted; the same command goes on"
    finally:
        for process in running:
            process.terminate()
            process.wait()
