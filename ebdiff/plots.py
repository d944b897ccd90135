"""Pictures of the report, as PNG: plain values in, a file out. No display is needed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from .files import write_bytes

__all__ = ["COLOURS", "Panel", "grid", "heatmaps", "lines", "write"]

COLOURS = {"dense control": "#4477aa", "tickets": "#cc3311"}  # tell apart also without red and green
_GREY = "#888888"


@dataclass(frozen=True)
class Panel:
    """One set of axes: {series: [(x, y), ...]}, with vertical lines at `marks`."""

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    marks: Sequence[float] = field(default=())
    log: bool = False


def lines(panels: Sequence[Panel], path: Path) -> None:
    """Panels side by side, each with its lines."""
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(_row(figure, len(panels)), panels, strict=True):
        for name, points in panel.series.items():
            xs, ys = zip(*points, strict=True) if points else ((), ())
            marker = "o" if len(points) < 10 else ""
            axes.plot(xs, ys, label=name, color=COLOURS.get(name), marker=marker, linewidth=1.6, markersize=5)
        for mark in panel.marks:
            axes.axvline(mark, color=_GREY, linewidth=0.8, linestyle=":")
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        if panel.log:
            axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.legend(framealpha=0.8, edgecolor="none")
    write(figure, path)


def heatmaps(maps: Sequence[tuple[str, Sequence[int], Sequence[Sequence[float]]]], top: float, path: Path) -> None:
    """Pairwise distances: for each (title, steps, distances [n, n]) a square, all on one scale from 0 to `top`."""
    figure = Figure(figsize=(4.2 * len(maps) + 0.8, 4.9), layout="constrained")
    rows = _row(figure, len(maps))
    for axes, (title, steps, distances) in zip(rows, maps, strict=True):
        image = axes.imshow(distances, vmin=0, vmax=top, cmap="viridis", interpolation="nearest")
        places = range(0, len(steps), max(1, ceil(len(steps) / 8)))
        labels = [str(steps[place]) for place in places]
        axes.set_xticks(list(places), labels, rotation=60)
        axes.set_yticks(list(places), labels)
        axes.set(title=title, xlabel="step of the search")
    figure.colorbar(image, ax=rows, label="mask distance", shrink=0.8)
    write(figure, path)


def grid(sets: Mapping[str, Tensor], path: Path) -> None:
    """Sets of images side by side, each as a square grid: {title: uint8 [N, C, H, W]}; image i has the same place."""
    figure = Figure(
        figsize=(4.7 * len(sets), 4.4 + 0.4 * any(sets)), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.08)
    )
    for axes, (title, images) in zip(_row(figure, len(sets)), sets.items(), strict=True):
        axes.imshow(_tiled(images).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title)
        axes.axis("off")
    write(figure, path, dpi=160)


def write(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a figure, atomically; the same figure gives the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi, metadata={"Software": None})
    write_bytes(path, content.getvalue())


def _tiled(images: Tensor, gap: int = 1) -> Tensor:
    """uint8 [N, C, H, W] -> [H', W'] or [H', W', 3]: row by row, white between them."""
    count, channels, height, width = images.shape
    across = ceil(sqrt(count))
    down = ceil(count / across)
    sheet = images.new_full((channels, down * (height + gap) - gap, across * (width + gap) - gap), 255)
    for number, image in enumerate(images):
        y, x = (number // across) * (height + gap), (number % across) * (width + gap)
        sheet[:, y : y + height, x : x + width] = image
    return sheet[0] if channels == 1 else sheet.permute(1, 2, 0)


def _row(figure: Any, count: int) -> list[Any]:
    return list(figure.subplots(1, count, squeeze=False)[0])
