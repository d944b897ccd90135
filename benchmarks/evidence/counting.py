"""What an arm cost and when it was as good as the dense one: plain numbers in, plain numbers out.

Device-seconds are those of all stages, the search and what another arm's network cost included. Between two marks a
score is linear in the logarithm of the device-seconds. An arm reaches a score where its curve first comes down to it;
where the first mark is there already, at that mark at the latest. After its end an arm keeps its last network's score.
Before its first scored mark it has none, but that equal steps differ by LATE in what they took.

Seconds of a clock and a cell's own are never divided by each other: what is not on the clock is not compared.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ebdiff.training.accounting import FORWARD_AND_BACKWARD

Facts = Mapping[str, Any]
Clock = Mapping[str, Mapping[str, float]]  # {arm: {stage: device-seconds of a step}}
Results = Mapping[str, Sequence[Facts]]  # {arm: one per seed}
Points = Sequence[tuple[float, float]]  # (device-seconds, score), both finite, seconds rising

SHARES = (0.25, 0.5, 1.0)  # of the dense arm's training
LATE = 0.02  # by so much a first mark may lie after the device-seconds asked for
SEEDS = 3  # an arm with fewer is marked


def named(measure: str) -> str:
    """As it is written."""
    return "FID" if measure == "fid" else "held-out loss"


def measure_of(results: Results) -> str:
    """What arms are compared by: FID where images of all of them were scored, the held-out loss otherwise."""
    ends = [facts["curve"][-1] for found in results.values() for facts in found]
    return "fid" if all(end["fid"] is not None for end in ends) else "loss"


def curve(facts: Facts, measure: str, clock: Clock | None = None) -> list[tuple[float, float]]:
    """(device-seconds, score) at every mark that has this score ("fid" or "loss")."""
    return [(sum(seconds_at(facts, point, clock).values()), point[measure]) for point in scored(facts, measure)]


def scored(facts: Facts, measure: str) -> list[Facts]:
    """The marks that have this score ("fid" or "loss")."""
    return [point for point in facts["curve"] if point[measure] is not None]


def on_clock(found: Sequence[Facts], clock: Clock | None) -> bool:
    """Are all stages of these results on the clock? Without one, all count their own seconds, which is a clock, too."""
    if clock is None:
        return True
    return all(facts["curve"][-1]["stages"].keys() <= clock.get(facts["arm"], {}).keys() for facts in found)


def seconds_at(facts: Facts, point: Facts, clock: Clock | None = None) -> dict[str, float]:
    """{stage: device-seconds} at a mark: by `clock`, its steps times the seconds of one; as they were if not on it."""
    if clock is None or not on_clock([facts], clock):
        return {name: stage["device_seconds"] for name, stage in point["stages"].items()}
    each = clock[facts["arm"]]
    return {name: steps_of(facts, name, stage) * each[name] for name, stage in point["stages"].items()}


def steps_of(facts: Facts, name: str, stage: Facts) -> float:
    """Of a stage; of the search its MACs in dense steps, since importance may take passes without a step."""
    if name != "search":
        return float(stage["steps"])
    train = facts["config"]["train"]
    dense = facts["macs_per_image"]["dense"] * FORWARD_AND_BACKWARD * train["batch_size"] * train["accumulate"]
    return float(stage["macs"] / dense)


def wall_seconds(facts: Facts, clock: Clock | None = None) -> float:
    """Of the whole arm with a device for each region: what comes before the regions, and the slowest of them."""
    end = facts["curve"][-1]
    spent = seconds_at(facts, end, clock)
    if clock is None or not on_clock([facts], clock):
        spent = {name: stage["wall_seconds"] for name, stage in end["stages"].items()}
    regions = [seconds for name, seconds in spent.items() if name.startswith("region")]
    return sum(spent.values()) - sum(regions) + max(regions)


def reached(points: Points, target: float) -> float | None:
    """Device-seconds at which a curve first comes down to `target`; None where it never does."""
    if points and points[0][1] <= target:
        return points[0][0]
    for (before, above), (after, below) in pairwise(points):
        if below <= target:
            share = (above - target) / (above - below)
            return before * math.exp(share * math.log(after / before))
    return None


def score_at(points: Points, seconds: float) -> float | None:
    """The score of the network that so many device-seconds give; None more than LATE before the first mark."""
    if not points or seconds * (1 + LATE) < points[0][0]:
        return None
    if seconds <= points[0][0]:
        return points[0][1]
    for (before, first), (after, second) in pairwise(points):
        if seconds <= after:
            return first + (second - first) * math.log(seconds / before) / math.log(after / before)
    return points[-1][1]


@dataclass(frozen=True)
class Spread:
    """A mean and how far the seeds lie from it.

    Args:
        values: one per seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation of the seeds; 0 of one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def text(self, form: str = ".2f") -> str:
        """Mean and deviation."""
        if not self.values:
            return "-"
        spread = f" ± {self.deviation:{form}}" if len(self.values) > 1 else ""
        return f"{self.mean:{form}}{spread}"


@dataclass(frozen=True)
class Headline:
    """An arm against the dense arm, seed by seed.

    Args:
        seeds: how many of its seeds the dense arm has, too.
        reached: device-seconds to the dense arm's final score of the same seed over all of the dense arm's; only of
            seeds that reach it.
        at: {share: score at the device-seconds that the dense arm had taken then}; only where every seed has one.
        final: score at the end.
        timed: are both on one clock? Where not, nothing is reached and there is no score at any share.
    """

    seeds: int
    reached: Spread
    at: Mapping[float, Spread]
    final: Spread
    timed: bool = True

    @property
    def absent(self) -> str:
        """What stands where no seed reached the dense arm's score."""
        return "not reached" if self.seeds and self.timed else "-"


def compared(arm: Sequence[Facts], dense: Sequence[Facts]) -> list[Facts]:
    """Results of the seeds that the dense arm has, too."""
    seeds = {facts["seed"] for facts in dense}
    return [facts for facts in arm if facts["seed"] in seeds]


def seconds_of_share(facts: Facts, share: float, clock: Clock | None = None) -> float:
    """Device-seconds at its mark `share`, or where it has none that share of all of them."""
    spent = {point["share"]: sum(seconds_at(facts, point, clock).values()) for point in facts["curve"]}
    return spent[share] if share in spent else share * spent[1.0]


def reached_in_macs(arm: Sequence[Facts], dense: Sequence[Facts], measure: str) -> Spread:
    """MACs to the dense arm's final score over all of the dense arm's: what the time would be were all MACs alike."""
    goals = {facts["seed"]: macs_curve(facts, measure)[-1] for facts in dense}
    found = [(reached(macs_curve(f, measure), goals[f["seed"]][1]), goals[f["seed"]][0]) for f in compared(arm, dense)]
    return Spread(tuple(macs / whole for macs, whole in found if macs is not None))


def macs_curve(facts: Facts, measure: str) -> Points:
    """(MACs of training so far, score) at every mark that was scored."""
    points = scored(facts, measure)
    return [(sum(stage["macs"] for stage in point["stages"].values()), point[measure]) for point in points]


def headline(arm: Sequence[Facts], dense: Sequence[Facts], measure: str, clock: Clock | None = None) -> Headline:
    """Both headlines of an arm.

    Args:
        arm, dense: results of both, one per seed.
    """
    goals = {facts["seed"]: curve(facts, measure, clock)[-1] for facts in dense}
    curves = {facts["seed"]: curve(facts, measure, clock) for facts in compared(arm, dense)}
    final = Spread(tuple(points[-1][1] for points in curves.values()))
    if not on_clock([*arm, *dense], clock):
        return Headline(len(curves), Spread(()), dict.fromkeys(SHARES, Spread(())), final, timed=False)
    found = {seed: reached(points, goals[seed][1]) for seed, points in curves.items()}
    at = {}
    for share in SHARES:
        budgets = {facts["seed"]: seconds_of_share(facts, share, clock) for facts in dense}
        scores = [score_at(points, budgets[seed]) for seed, points in curves.items()]
        at[share] = Spread(tuple(score for score in scores if score is not None) if None not in scores else ())
    return Headline(
        len(curves),
        Spread(tuple(seconds / goals[seed][0] for seed, seconds in found.items() if seconds is not None)),
        at,
        final,
    )
