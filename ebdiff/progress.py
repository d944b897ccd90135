"""Shows how far a run is: a bar with an ETA in a terminal, else a line every few seconds. Weights are planned MACs."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["follow"]

LINE_SECONDS = 10.0


class Work(Protocol):
    """`ebdiff.training.stages.Work`, without importing torch."""

    @property
    def stage(self) -> str: ...
    @property
    def macs(self) -> float: ...


class Tick(Protocol):
    """`ebdiff.training.stages.Tick`, without importing torch."""

    @property
    def stage(self) -> str: ...
    @property
    def macs(self) -> float: ...
    @property
    def note(self) -> str: ...
    @property
    def before(self) -> bool: ...
    @property
    def kept(self) -> bool: ...


class Tally:
    """The share done and the time left, from ticks. Work done by an earlier process says nothing about speed."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.planned = {work.stage: work.macs for work in works}
        self.done = dict.fromkeys(self.planned, 0.0)
        self.before, self.started = 0.0, time.monotonic()
        self.stage, self.note = "", ""

    def add(self, tick: Tick) -> None:
        """Take a tick. A stage that is left behind has finished, whatever its plan said."""
        planned = self.planned.setdefault(tick.stage, tick.macs)
        had = self.done.setdefault(tick.stage, 0.0)
        self.done[tick.stage] = planned if tick.note == "already there" else min(planned, had + tick.macs)
        if tick.before:
            self.before += self.done[tick.stage] - had
        self.stage, self.note = tick.stage, tick.note

    @property
    def share(self) -> float:
        """Done, in [0, 1]."""
        return sum(self.done.values()) / max(sum(self.planned.values()), 1e-30)

    @property
    def seconds_left(self) -> float | None:
        """At the mean speed of this process so far; None in the first seconds."""
        elapsed, here = time.monotonic() - self.started, sum(self.done.values()) - self.before
        if elapsed < 2 or here <= 0:
            return None
        return (sum(self.planned.values()) - sum(self.done.values())) * elapsed / here

    def __str__(self) -> str:
        left = self.seconds_left
        return f"{self.share:6.1%}  {self.stage}: {self.note}" + (f"  (ETA {_clock(left)})" if left else "")


class Slice:
    """The ticks of so many minutes; then their generator is closed, where nothing is lost and something was done."""

    def __init__(self, ticks: Iterable[Tick], minutes: float) -> None:
        self.ticks, self.until, self.closed = ticks, time.monotonic() + 60 * minutes, False

    def __iter__(self) -> Iterator[Tick]:
        for tick in self.ticks:
            yield tick
            if tick.kept and not tick.before and time.monotonic() >= self.until:
                self.closed = True
                if isinstance(self.ticks, Generator):
                    self.ticks.close()
                return


def follow(ticks: Iterable[Tick], works: Sequence[Work], console: Console, minutes: float | None = None) -> bool:
    """Run `ticks` to the end, or for so many minutes, and show it; was it to the end?"""
    tally, timed = Tally(works), Slice(ticks, float("inf") if minutes is None else minutes)
    _show(timed, tally, console)
    if timed.closed:
        sentence = f"stopped after {minutes:g} minutes at {tally.stage}, {tally.note}; the same command goes on"
        console.print(sentence, highlight=False, soft_wrap=True)
    return not timed.closed


def _show(ticks: Iterable[Tick], tally: Tally, console: Console) -> None:
    if not console.is_terminal:
        _lines(ticks, tally, console)
        return
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>5.1f}%"),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, TextColumn("ETA {task.fields[eta]}"), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0, eta="-")
        for tick in ticks:
            tally.add(tick)
            left = tally.seconds_left
            eta = "-" if left is None else _clock(left)
            bar.update(task, completed=tally.share, description=f"{tally.stage}: {tally.note}", eta=eta)


def _lines(ticks: Iterable[Tick], tally: Tally, console: Console) -> None:
    shown, stage = float("-inf"), None
    for tick in ticks:
        tally.add(tick)
        if tick.stage != stage or time.monotonic() - shown >= LINE_SECONDS:
            console.print(str(tally), highlight=False, markup=False, soft_wrap=True)
            shown, stage = time.monotonic(), tick.stage


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
