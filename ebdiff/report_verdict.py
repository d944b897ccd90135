"""Which arm is better, by a stated rule; numbers in, one sentence out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

__all__ = ["RULE", "Facts", "seconds_shown", "value", "verdict"]

Facts = Mapping[str, Any]
_NAMED = {"dense": "the dense control", "tickets": "the set of tickets"}
RULE = (
    "The rule: of two scores the lower one is better if they differ by more than {margin:.0%}. Scores are compared at "
    "the end (equal MACs) and at equal device-seconds (the most that both arms reached; linear between the marks). The "
    "arm that is better in one of these and not worse in the other is called better; FID decides, the held-out loss "
    "where there is none. All of it comes from one seed ({seed}), so no difference here is shown to be significant."
)


def verdict(facts: Facts) -> dict[str, Any]:
    """Which arm is better here, and one sentence about it. {"better": "dense", "tickets" or None, "sentence": ...}."""
    if "dense" not in facts["marks"]:
        return alone(facts)
    margin = facts["config"]["evaluate"]["margin"]
    scored = all(facts["marks"][arm][-1]["scores"] for arm in ("dense", "tickets"))
    ends = {arm: facts["marks"][arm][-1] for arm in ("dense", "tickets")}
    measure = "FID" if scored else "held-out loss"
    at_macs = {arm: value(end, measure) for arm, end in ends.items()}
    seconds, at_seconds = equal_seconds(facts, measure)
    first, second = winner(at_macs, margin), winner(at_seconds, margin) if at_seconds else None
    votes = {first, second} - {None}
    better = votes.pop() if len(votes) == 1 else None
    if first and second and first != second:
        claim = f"It depends: {_NAMED[first]} is better at equal MACs, {_NAMED[second]} at equal device-seconds"
    else:
        claim = f"Better here: {_NAMED[better]}" if better else "Neither is better here"
    parts = [f"{claim}; {measure} {_pair(at_macs)} at equal MACs"]
    if at_seconds:
        parts.append(f"{_pair(at_seconds)} at {seconds_shown(seconds)} device-seconds each")
    if scored:
        parts.append(f"held-out loss {_pair({arm: value(end, 'held-out loss') for arm, end in ends.items()}, '.4f')}")
    share = ends["tickets"]["macs_per_image"]["sampler"] / ends["dense"]["macs_per_image"]["sampler"]
    parts.append(f"an image costs the tickets {share:.0%} of the dense MACs to draw (one seed)")
    return {"better": better, "measure": measure, "sentence": ", ".join(parts) + "."}


def alone(facts: Facts) -> dict[str, Any]:
    """What there is to say about tickets that nothing is compared with."""
    end = facts["marks"]["tickets"][-1]
    measure = "FID" if end["scores"] else "held-out loss"
    seconds = seconds_shown(end["cost"]["device_seconds"])
    score = value(end, measure)
    parts = [f"No dense control was trained; {measure} {score:{_form(score)}} after {seconds} device-seconds"]
    if end["scores"]:
        parts.append(f"held-out loss {value(end, 'held-out loss'):.4f}")
    share = end["macs_per_image"]["sampler"] / facts["dense"]["macs_per_image"]
    parts.append(f"an image costs {share:.0%} of the dense MACs to draw (one seed)")
    return {"better": None, "measure": measure, "sentence": ", ".join(parts) + "."}


def value(mark: Facts, measure: str) -> float:
    """A score of an arm at a mark; lower is better."""
    found: float = mark["scores"]["fid"] if measure == "FID" else mark["loss"]["total"]
    return found


def winner(values: Mapping[str, float], margin: float) -> str | None:
    """The arm with the lower value, if they differ by more than `margin` of the larger."""
    low, high = sorted(values, key=lambda arm: values[arm])
    return low if values[high] - values[low] > margin * values[high] else None


def equal_seconds(facts: Facts, measure: str) -> tuple[float, dict[str, float]]:
    """(device-seconds that both arms reached, {arm: score there}); empty where the marks do not allow it."""
    curves = {}
    for arm in ("dense", "tickets"):
        marks = [m for m in facts["marks"][arm] if measure != "FID" or m["scores"]]
        curves[arm] = [(m["cost"]["device_seconds"], value(m, measure)) for m in marks]
    seconds = min(points[-1][0] for points in curves.values())
    if any(points[0][0] > seconds for points in curves.values()):
        return seconds, {}
    return seconds, {arm: interpolated(points, seconds) for arm, points in curves.items()}


def interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    """Linear between points of rising x; x lies inside."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / max(x1 - x0, 1e-12)
    return points[-1][1]


def _pair(values: Mapping[str, float], form: str = "") -> str:
    form = form or _form(*values.values())
    return f"{values['tickets']:{form}} (tickets) against {values['dense']:{form}} (dense)"


def _form(*values: float) -> str:
    """More digits where all values are below 1."""
    return ".4f" if max(map(abs, values)) < 1 else ".2f"


def seconds_shown(seconds: float) -> str:
    """With a digit after the point where there are fewer than 100."""
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.1f}"
