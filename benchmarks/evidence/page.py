"""What is committed of a suite beside its cells: its page with pictures, its clock, its pace and its learning rate."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from operator import truediv
from pathlib import Path
from typing import Any

import yaml

from benchmarks import machine, write_results
from ebdiff.config import completed
from ebdiff.errors import EbdiffError
from ebdiff.files import read_json, write_bytes

from . import pace, plots
from .arms import ARMS
from .cells import Cell
from .counting import Results, measure_of
from .rates import TUNED, Tried, tabled
from .suite import Suite
from .table import markdown


def write(suite: Suite, cells: Sequence[Cell]) -> Path:
    """The page and its pictures, of the cells that are finished.

    Raises:
        EbdiffError: they saw different images.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    seen: dict[str, str] = {}
    unfinished: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        facts = cell.facts()
        if facts is None:
            state = "a damaged result, or one of another configuration" if cell.place.exists() else "no result"
            unfinished.setdefault((cell.arm.name, state), []).append(str(cell.seed))
        else:
            results.setdefault(cell.arm.name, []).append(facts)
            if "data" in facts:  # not in older results
                seen.setdefault(facts["data"]["fingerprint"], f"{cell.arm.name}-{cell.seed}")
    if len(seen) > 1:
        remedy = "remove the results of one data set, or give another --results"
        raise EbdiffError(f"{suite.name}: cells saw different images", got=", ".join(seen.values()), remedy=remedy)
    home = cells[0].results
    timed, pictures = clock_of(suite, home), {}
    known = seconds_of(timed, results) if timed else {}
    clock = known if "dense" in known else None  # by a clock that timed another dense network nothing can be compared
    if "dense" in results:
        measure = measure_of(results)
        pictures = {
            "quality against device-seconds": f"{suite.name}-curves.png",
            "device-seconds": f"{suite.name}-bars.png",
        }
        for draw, name in zip((plots.curves, plots.bars), pictures.values(), strict=True):
            draw(results, measure, clock, home / name)
    path = home / f"{suite.name}.md"
    rest = [f"{arm}, seed {', '.join(seeds)}: {state}" for (arm, state), seeds in unfinished.items()]
    place = named_device(timed["machine"]) if timed and clock else ""
    text = markdown(suite, results, rest, clock, pictures, tried(suite, cells[0].out, home), place)
    write_bytes(path, text.encode())
    return path


def clock_of(suite: Suite, home: Path) -> dict[str, Any] | None:
    """What `write_clock` left."""
    path = home / suite.name / "clock.json"
    return read_json(path) if path.exists() else None


def seconds_of(timed: Mapping[str, Any], results: Results) -> dict[str, dict[str, float]]:
    """{arm: {stage: device-seconds of a step}} of the clock, without arms of which it timed other networks."""
    digests: Mapping[str, str] = timed.get("timed", {})

    def same(arm: str, facts: Mapping[str, Any]) -> bool:
        return pace.timed(completed(facts["config"]), facts["widths"]) == digests.get(arm)

    return {
        arm: seconds
        for arm, seconds in timed["seconds_per_step"].items()
        if all(same(arm, facts) for facts in results.get(arm, []))
    }


def named_device(place: Mapping[str, Any]) -> str:
    """The GPU, or the CPU's model."""
    return str(place["cpu"] if place["device"] == "cpu" else place["device"])


def write_clock(suite: Suite, cells: Sequence[Cell]) -> Path:
    """Time every stage of the cells' arms on one clock: medians over rounds, and quartiles."""
    each, digests = pace.clock(cells)
    seconds = {arm: {name: statistics.median(values) for name, values in of.items()} for arm, of in each.items()}
    spread = {arm: {name: statistics.quantiles(values) for name, values in of.items()} for arm, of in each.items()}
    facts = {
        "rounds": pace.ROUNDS,
        "steps_per_turn": pace.STEPS,
        "seconds_per_step": seconds,
        "quartiles": spread,
        "timed": digests,
    }
    return _written(suite, cells[0].results, "clock", facts)


def write_pace(suite: Suite, home: Path) -> Path:
    """Measure the suite's `cost_of_step`: medians over rounds of a ticket's step over the dense one beside it."""
    seconds, facts = pace.ratio_costs(suite), {}
    for name, scope in (("cost_of_step", "local"), ("cost_of_step_by_cost", "cost")):
        facts[name] = {
            ratio: round(statistics.median(map(truediv, each, seconds["local", 0.0])), 3)
            for (asked, ratio), each in seconds.items()
            if asked == scope
        }
        print(f"{name}: {yaml.safe_dump(facts[name], default_flow_style=True, width=200).strip()}")
    medians = {f"{scope} {ratio:g}": statistics.median(each) for (scope, ratio), each in seconds.items()}
    return _written(
        suite, home, "pace", {"rounds": pace.ROUNDS, "steps_per_turn": pace.STEPS, **facts, "seconds_per_step": medians}
    )


def _written(suite: Suite, home: Path, what: str, facts: dict[str, Any]) -> Path:
    place = machine("cuda" if suite.on_gpu else "cpu")
    command = f"python -m benchmarks.evidence {suite.arguments} --{what}"
    folder = home / suite.name
    write_results(folder, what, {"command": command, "machine": {**place, "threads": suite.threads}, **facts})
    return folder / f"{what}.json"


def tuning(suite: Suite, out: Path, home: Path) -> list[Cell]:
    """The cells that choose the learning rate: as many for the dense arm as for a ticket."""
    return [Cell(suite.quarter(lr), ARMS[arm], 0, out, home) for lr in suite.lrs for arm in TUNED]


def tried(suite: Suite, out: Path, home: Path) -> list[Tried]:
    """What came of the learning rates; empty where not all of them are tried."""
    cells = tuning(suite, out, home)
    found = [cell.facts() for cell in cells]
    return outcomes(cells) if None not in found else []


def outcomes(cells: Sequence[Cell]) -> list[Tried]:
    """Of each, finished or not."""
    return [Tried.of(cell.suite.lr, cell.arm.name, cell.facts()) for cell in cells]


def write_tuning(suite: Suite, cells: Sequence[Cell]) -> Path:
    """A row per learning rate, of what is finished."""
    path = cells[0].results / suite.name / "tune.md"
    write_bytes(path, f"{tabled(suite.name, cells[0].suite.steps, outcomes(cells))}\n".encode())
    return path
