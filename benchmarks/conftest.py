"""Options and fixtures of the benchmarks. They report; nothing here asserts a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine, write_results

Row = Mapping[str, Any]
Report = Callable[[Sequence[Row], Mapping[str, Any]], None]
_TABLES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    folder = os.environ.get("EBDIFF_RESULTS", "runs/benchmarks")
    parser.addoption("--results", metavar="DIR", default=folder, help="one JSON file per benchmark goes here")
    parser.addoption("--full", action="store_true", help="sizes and rounds of benchmarks/results; on a GPU always")
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, or cuda if there")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device to measure on, all cores of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield torch.device(request.config.getoption("--device"))
    torch.set_num_threads(threads)


@pytest.fixture
def full(request: pytest.FixtureRequest, device: torch.device) -> bool:
    """Measure at full size; else in a few rounds of what is small, so that all of them take minutes on two cores."""
    return bool(request.config.getoption("--full")) or device.type == "cuda"


@pytest.fixture
def report(request: pytest.FixtureRequest, benchmark: Any, device: torch.device, full: bool) -> Report:
    """report(rows, facts): print a table after the run, add the facts to the benchmark, write JSON."""
    where = machine(device)
    name = request.node.name.removeprefix("test_").replace("[", "_").replace("]", "")

    def finish(rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
        benchmark.extra_info.update({**facts, "rows": list(rows)})
        request.config.stash.setdefault(_TABLES, []).append(_table(name, rows, {**facts, **where}))
        test = request.node.name.removeprefix("test_").partition("[")[0]
        command = f"pytest benchmarks/ --benchmark-only -k {test}{' --full' if full else ''} --results DIR"
        folder = Path(request.config.getoption("--results"))
        write_results(folder, name, {"command": command, "machine": where, **facts, "rows": list(rows)})

    return finish


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for table in config.stash.get(_TABLES, []):
        terminalreporter.write_line(table)


def _table(name: str, rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *[[_shown(row.get(column, "")) for column in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(["", name, *lines, ", ".join(f"{key}: {_shown(value)}" for key, value in facts.items())])


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
