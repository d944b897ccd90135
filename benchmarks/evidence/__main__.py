"""When tickets pay: trains every arm of a suite, one process per cell, and renders the tables.

    python -m benchmarks.evidence --suite fashion16 --jobs 2
    python -m benchmarks.evidence --suite fashion16 --cells 'eb-*' dense --seeds 0
    python -m benchmarks.evidence --suite fashion16 --clock
    python -m benchmarks.evidence --suite fashion16 --table

A cell is an arm at a seed. Finished ones lie in benchmarks/results/evidence/<suite>/ and are not done again; a killed
one goes on where it was.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ebdiff.errors import EbdiffError

from . import page
from .arms import ARMS, arms_of
from .cells import RESULTS, Cell, Failed, run, wanted
from .suite import NAMES, Suite


def main(arguments: Sequence[str] | None = None) -> None:
    """What the options ask for; what the user can put right is one line."""
    args, failed = options().parse_args(arguments), False
    try:
        for line in lines(args):
            failed |= isinstance(line, Failed)
            print(line, flush=True)
    except EbdiffError as error:
        sys.exit(f"benchmarks.evidence: {error}")
    if failed:
        sys.exit(1)


def options() -> argparse.ArgumentParser:
    """Those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", required=True, help=f"{', '.join(NAMES)}, or a .yaml file like theirs")
    add("--cells", nargs="+", default=["*"], metavar="PATTERN", help="arms by name; all by default")
    add("--seeds", default="0,1,2", help="0,1,2 by default; all arms of the first come first")
    add("--jobs", type=at_least_one, help="so many cells side by side: a core each, or one on a GPU")
    add("--minutes", type=float, help="stop after so long; the same command goes on")
    add("--data", metavar="FILE", help="images, as data.source of a configuration")
    add("--out", type=Path, default=Path("runs/evidence"), help="where runs are kept")
    add("--results", type=Path, default=RESULTS, help="where what is to be committed goes")
    what = parser.add_mutually_exclusive_group()
    flag = partial(what.add_argument, action="store_true")
    flag("--list", help="the cells, and which are finished")
    flag("--table", help="render the tables and pictures of what is finished")
    flag(
        "--tune", help="a quarter of the steps at several learning rates, dense and with a ticket of half the channels"
    )
    flag("--pace", help="what a step of a ticket costs at each ratio: the suite's cost_of_step")
    flag("--clock", help="time the networks of all arms again, in turn, in this one process")
    return parser


def lines(args: argparse.Namespace) -> Iterator[str]:
    """What is printed while it is done."""
    suite = Suite.load(args.suite).on(args.data)
    if (args.table or args.clock or args.tune or args.pace) and args.cells != ["*"]:
        raise EbdiffError(
            "--table, --clock, --tune and --pace", expected="no --cells", got="--cells", remedy="leave it out"
        )
    cells = cells_of(suite, args.cells, args.seeds, args.out, args.results)
    if args.list:
        yield from listed(cells)
    elif args.table:
        yield str(page.write(suite, with_results(cells)))
    elif args.pace:
        yield str(page.write_pace(suite, args.results))
    elif args.clock:
        yield str(page.write_clock(suite, with_results(cells)))
    elif args.tune:
        tuned = page.tuning(suite, args.out, args.results)
        yield from run(wanted(tuned), jobs_of(suite, args.jobs), args.minutes)
        yield str(page.write_tuning(suite, tuned))
    else:
        yield from run(wanted(cells), jobs_of(suite, args.jobs), args.minutes)


def at_least_one(text: str) -> int:
    """A number of --jobs."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, got {text}")
    return int(text)


def jobs_of(suite: Suite, asked: int | None) -> int:
    """Cells side by side: a core each, but one on a GPU, where device-seconds are wall-clock.

    Raises:
        EbdiffError: more were asked for a GPU.
    """
    if not suite.on_gpu:
        return asked or max(1, (os.cpu_count() or 1) // suite.threads)
    if asked and asked > 1:
        remedy = "on several, run the command once for each, by CUDA_VISIBLE_DEVICES and --seeds"
        raise EbdiffError(
            "--jobs", expected="1, since cells that share a GPU slow each other", got=str(asked), remedy=remedy
        )
    return 1


def with_results(cells: Sequence[Cell]) -> list[Cell]:
    """The cells, and every other seed of their arms that has a result: no page and no clock forgets one."""
    found = {cell.place: cell for cell in cells}
    for cell in cells:
        for path in sorted(cell.place.parent.glob(f"{cell.arm.name}-*.json")):
            seed = path.stem.removeprefix(f"{cell.arm.name}-")
            if seed.isdecimal():
                found.setdefault(path, replace(cell, seed=int(seed)))
    return list(found.values())


def cells_of(suite: Suite, patterns: Sequence[str], seeds: str, out: Path, results: Path) -> list[Cell]:
    """Every arm of the suite that a pattern names at every seed, all arms of a seed together.

    Raises:
        EbdiffError: a pattern that names no arm, or none that the suite can run, or a seed that is no number.
    """
    arms = {arm.name: arm for arm in arms_of(suite)}
    for pattern in patterns:
        if not fnmatch.filter(ARMS, pattern):
            raise EbdiffError("no such arm", expected=f"one of {', '.join(ARMS)}", got=pattern)
        if not fnmatch.filter(arms, pattern):
            raise EbdiffError(
                f"{suite.name} leaves {', '.join(fnmatch.filter(ARMS, pattern))} out",
                expected="cost_of_step_by_cost in its file",
                got="none",
                remedy="add it with a guess, as {0.44: 0.3}; --pace measures it",
            )
    if not all(seed.strip().isdecimal() for seed in seeds.split(",")):
        raise EbdiffError("--seeds", expected="numbers, as 0,1,2", got=seeds)
    chosen = [arm for name, arm in arms.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    each = dict.fromkeys(int(seed) for seed in seeds.split(","))
    return [Cell(suite, arm, seed, out, results) for seed in each for arm in chosen]


def listed(cells: Sequence[Cell]) -> Iterator[str]:
    """A line for each cell."""
    for cell in cells:
        state = "finished" if cell.facts() else "begun" if cell.folder.exists() else "-"
        yield f"{cell.arm.name}, seed {cell.seed}: {state}; {cell.arm.about}"


if __name__ == "__main__":
    main()
