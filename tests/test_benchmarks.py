"""The benchmarks run small, print ratios and write JSON; what is committed says how it was measured, at full size."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import few, pool

ROOT = Path(__file__).parent.parent
COMMAND = re.compile(r"pytest benchmarks/ --benchmark-only -k (\w+) --full --results DIR")


def test_without_full_there_are_three_rounds_at_most() -> None:
    assert [few(rounds, full=False) for rounds in (1, 3, 41)] == [1, 3, 3]
    assert [few(rounds, full=True) for rounds in (1, 3, 41)] == [1, 3, 41]


def test_processes_start_when_they_are_ready_and_no_more_than_asked_for() -> None:
    waiting, begun, ended = [3, 0, 7, 9], [], []

    def start(code: int) -> subprocess.Popen[bytes]:
        assert len(begun) - len(ended) < 2
        begun.append(code)
        return subprocess.Popen(["sh", "-c", f"exit {code}"])

    for item, code in pool(waiting, start, 2, lambda item: item != 9 and (item != 3 or 7 in begun)):
        assert code == item
        ended.append(item)
    assert begun == [0, 7, 3]
    assert sorted(ended) == [0, 3, 7]
    assert waiting == [9]


def test_processes_end_with_their_pool() -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(seconds: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", seconds]))
        return started[-1]

    running = pool(["0", "60"], start, 2)
    next(running)
    running.close()
    assert started[1].returncode == -signal.SIGTERM


def test_every_committed_result_names_a_benchmark_at_full_size() -> None:
    known = set(
        re.findall(r"def test_(\w+)\(", "".join(path.read_text() for path in ROOT.glob("benchmarks/bench_*.py")))
    )
    named = set()
    for path in ROOT.glob("benchmarks/results/*.json"):
        command = json.loads(path.read_text(encoding="utf-8")).get("command", "")
        if "pytest" not in command:
            continue
        found = COMMAND.fullmatch(command)
        assert found, command
        assert path.stem.startswith(found[1])
        named.add(found[1])
    assert named
    assert named <= known


@pytest.mark.parametrize("options", [[], ["--full"]])
def test_a_run_prints_its_ratios_and_writes_them_with_its_command(options: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/bench_sampling.py",
        "--benchmark-only",
        "-k",
        "test_sampling and not coefficients",
    ]
    ran = subprocess.run(
        [*command, "--results", str(tmp_path), "--device", "cpu", *options],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "times_ours" in ran.stdout
    (path,) = tmp_path.iterdir()
    facts = json.loads(path.read_text(encoding="utf-8"))
    assert facts["rounds"] == (21 if options else 3)
    assert ("--full" in facts["command"]) == bool(options)
    assert all(row["times_ours"] > 0 for row in facts["rows"])
