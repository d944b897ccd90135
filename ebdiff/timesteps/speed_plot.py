"""A picture of SpeeD on one schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from .speed import SpeeD

__all__ = ["figure"]

_SHADES = {"acceleration": "#f4f4f4", "deceleration": "#e6e6e6", "convergence": "#d4d4d4"}


def figure(speed: SpeeD) -> Figure:
    """The density as T P(t), 1 where uniform, and the weight w(t), with the areas behind them."""
    drawn = Figure(figsize=(8, 3.6), layout="constrained")
    axes = drawn.subplots()
    t, edges = speed.profile.t.tolist(), speed.profile.edges
    for name, region in speed.areas._asdict().items():
        if region is not None:
            lo, hi = (region.lo, region.hi) if edges is None else (float(edges[region.lo]), float(edges[region.hi]))
            axes.axvspan(lo, hi, facecolor=_SHADES[name], label=f"{name} {region}")
    axes.plot(t, (speed.T * speed.pmf()).tolist(), color="#4477aa", label="density T P(t)")
    axes.plot(t, speed.weights().tolist(), color="#cc3311", label="weight w(t)")
    axes.set(title=f"SpeeD ({speed.variant}), tau = {speed.tau}", xlabel="t", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn
