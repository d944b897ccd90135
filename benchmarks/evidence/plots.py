"""Pictures of a suite: quality against device-seconds, and device-seconds to the dense arm's final score."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ebdiff.plots import write

from .arms import ARMS
from .counting import SEEDS, Clock, Headline, Results, curve, headline, named, on_clock

_GREY = "#666666"
_COLOURS = (
    *("#4477aa", "#cc3311", "#228833", "#ccbb44", "#aa3377", "#66ccee", "#ee7733", "#000000"),
    *("#8c564b", "#f781bf", "#332288", "#88cc22"),
)  # as many as the largest family has arms
_SHORT = 4  # an axis that spans less than this factor has few ticks
_SOLID = 8  # so many of a panel's lines; those after them are dashed


def curves(results: Results, measure: str, clock: Clock | None, path: Path) -> None:
    """A panel per family, the dense arm in each; bands are the seeds' extremes.

    Arms that start from the dense arm's network get the device-seconds after it alone, which a logarithm would squeeze.
    """
    families = list(dict.fromkeys(ARMS[arm].family for arm in results if arm != "dense")) or ["dense"]
    across = min(3, len(families))
    down = -(-len(families) // across)
    figure = Figure(figsize=(5.6 * across, 5.4 * down), layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for axes, family in zip(grid, families, strict=False):
        arms = [arm for arm in results if arm != "dense" and ARMS[arm].family == family]
        _line(axes, "dense", results["dense"], measure, clock, _GREY, "-")
        for number, arm in enumerate(arms):
            colour, dash = _COLOURS[number % len(_COLOURS)], "-" if number < _SOLID else "--"
            _line(axes, arm, results[arm], measure, clock, colour, dash)
        goal = statistics.mean(curve(facts, measure, clock)[-1][1] for facts in results["dense"])
        axes.axhline(goal, color=_GREY, linewidth=0.8, linestyle=":")
        axes.set(title=family, xlabel="device-seconds, the search included", ylabel=named(measure))
        axes.set(xscale="log", yscale="log")
        if arms and all(ARMS[arm].after for arm in arms):
            axes.set(xscale="linear", xlim=_finetuning(results, arms, measure, clock))
            axes.set(xlabel="device-seconds, the dense arm's included (linear)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6, which="both")
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2, edgecolor="none", fontsize=7, handlelength=3
        )
    for axes in grid[: len(families)]:
        for axis in (axes.xaxis, axes.yaxis):
            _label(axis)
    for axes in grid[len(families) :]:
        axes.set_visible(False)
    write(figure, path)


def _finetuning(results: Results, arms: Sequence[str], measure: str, clock: Clock | None) -> tuple[float, float]:
    """Device-seconds, with a margin, from where the dense arm ends to the last mark of these arms."""
    before = [curve(facts, measure, clock)[-1][0] for facts in results["dense"]]
    seconds = [point[0] for arm in arms for facts in results[arm] for point in curve(facts, measure, clock)]
    left, right = min(statistics.mean(before), *seconds), max(seconds)
    return left - 0.05 * (right - left), right + 0.05 * (right - left)


def _label(axis: Any) -> None:
    """Plain numbers; between powers of ten all where an axis is short, else those that leave each other room."""
    low, high = axis.get_view_interval()
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(FuncFormatter(_plain if high < _SHORT * low else _few))


def _plain(value: float, _: object = None) -> str:
    return f"{value:g}"


def _few(value: float, _: object = None) -> str:
    """Of the ticks between powers of ten only 2 and 5, which leave each other room."""
    return _plain(value) if f"{value:e}"[0] in "25" else ""


def _line(axes: Any, arm: str, found: Any, measure: str, clock: Clock | None, colour: str, dash: str) -> None:
    """Means over the seeds at each mark."""
    marks = list(zip(*(curve(facts, measure, clock) for facts in found), strict=True))
    seconds = [statistics.mean(point[0] for point in mark) for mark in marks]
    scores = [[point[1] for point in mark] for mark in marks]
    name = arm if len(found) >= SEEDS else f"{arm} ({len(found)} seed{'s' * (len(found) > 1)})"
    name += "" if on_clock(found, clock) else ", not on the clock"
    axes.plot(
        seconds,
        [statistics.mean(values) for values in scores],
        label=name,
        color=colour,
        linestyle=dash,
        marker="o",
        linewidth=1.5,
        markersize=3.5,
    )
    if len(found) > 1:
        axes.fill_between(
            seconds, list(map(min, scores)), list(map(max, scores)), color=colour, alpha=0.15, linewidth=0
        )


def bars(results: Results, measure: str, clock: Clock | None, path: Path) -> None:
    """Device-seconds to the dense arm's final score over the dense arm's own; a dot per seed."""
    heads = {arm: headline(found, results["dense"], measure, clock) for arm, found in results.items()}
    figure = Figure(figsize=(7.5, 0.8 + 0.24 * len(heads)), layout="constrained")
    axes = figure.subplots()
    for row, (arm, head) in enumerate(heads.items()):
        whole = head.seeds > 0 and len(head.reached.values) == head.seeds
        if whole:
            axes.barh(row, head.reached.mean, color=_GREY if arm == "dense" else _COLOURS[0], height=0.7, alpha=0.7)
        else:
            axes.text(0.01, row, _missing(head), va="center", fontsize=7)
        axes.plot(head.reached.values, [row] * len(head.reached.values), "k.", markersize=4)
    names = [arm if heads[arm].seeds >= SEEDS else f"{arm} *" for arm in heads]
    axes.set_yticks(range(len(heads)), names, fontsize=7)
    axes.set_ylim(len(heads) - 0.4, -0.6)
    axes.set_xlim(left=0)
    for share, words in ((1 / 3, "1/3: the aim"), (1, "1: the dense arm")):
        axes.axvline(share, color=_GREY, linewidth=0.8, linestyle=":")
        axes.text(share, -0.7, words, ha="center", va="bottom", fontsize=7, color=_GREY)
    axes.set(
        xlabel=f"device-seconds to the dense arm's final {named(measure)}, over its own\n"
        f"(a dot is a seed; *: fewer than {SEEDS} seeds)"
    )
    axes.spines[["top", "right"]].set_visible(False)
    write(figure, path)


def _missing(head: Headline) -> str:
    """What stands in place of a bar where not all seeds got there."""
    count = len(head.reached.values)
    return f"{count} of {head.seeds} seeds" if count else head.absent
