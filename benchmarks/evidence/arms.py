"""Every arm: what it is in one line, and what it changes in its suite's base. Nothing else tells arms apart.

Arms get the steps that spend the dense arm's device-seconds, the search included; one that ends when its ticket has
settled counts at its shortest. Those that start from a trained network get what the papers give them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ebdiff.training.regions import steps_of
from ebdiff.training.world import World

from .suite import Suite

Overrides = dict[str, Any]

WHOLE: Overrides = {"regions.bounds": [0, 1000], "regions.overlap": 0}
THREE: Overrides = {"regions.bounds": [0, 240, 440, 1000], "regions.overlap": 20}
NO_SEARCH: Overrides = {"search.steps": 0, "search.window": 1, "search.criterion": "magnitude"}
SPEED: Overrides = {"train.sampler": "speed"}
ACCELERATED: Overrides = {"train.accelerate": True, "train.channels_last": True}


@dataclass(frozen=True)
class Arm:
    """One way of spending device-seconds.

    Args:
        name: of its cells.
        about: one line.
        family: arms that are drawn in one panel.
        make: overrides of the suite's base.
        changes: further ones, on top.
        after: the arm whose final network, of the same seed, this one starts from; its cost is added.
    """

    name: str
    about: str
    family: str
    make: Callable[[Suite], Overrides]
    changes: Overrides = field(default_factory=dict)
    after: str = ""

    def overrides(self, suite: Suite) -> Overrides:
        """What this arm changes in the base of `suite`."""
        return {**self.make(suite), **self.changes}


def dense(suite: Suite) -> Overrides:
    """Nothing removed, one region."""
    marks = {"evaluate.score_marks": list(suite.dense_score_marks)}
    return {**NO_SEARCH, **WHOLE, **marks, "search.ratios": [0.0], "regions.steps": [suite.steps]}


def pruned(suite: Suite, criterion: str, ratio: float) -> Overrides:
    """A trained network, pruned at once and finetuned."""
    made = {**NO_SEARCH, **WHOLE, "search.criterion": criterion, "search.ratios": [ratio]}
    if criterion == "taylor":  # needs gradients
        made |= {"search.steps": suite.search.window, "search.window": suite.search.window}
    few = {"evaluate.marks": [0.25, 0.5, 1.0], "evaluate.score_marks": [0.25, 0.5, 1.0]}
    return {**made, **few, "regions.steps": [round(suite.steps * suite.finetune)]}


def scratch(suite: Suite, ratio: float) -> Overrides:
    """The small architecture with weights drawn anew: its widths follow from the ratio alone."""
    steps = spent(suite, 0, [ratio])
    return {**NO_SEARCH, **WHOLE, "search.ratios": [ratio], "regions.start": "fresh", "regions.steps": steps}


def searching(suite: Suite, criterion: str = "taylor") -> Overrides:
    """A search of fixed length: what has not settled by then is drawn anyway, and marked so."""
    s = suite.search
    return {"search.steps": s.steps, "search.criterion": criterion, "search.window": s.window, "search.every": s.every}


def early_bird(suite: Suite, ratio: float, criterion: str = "taylor") -> Overrides:
    """One ticket for all timesteps."""
    steps = spent(suite, suite.search.steps, [ratio])
    return {**searching(suite, criterion), **WHOLE, "search.ratios": [ratio], "regions.steps": steps}


def short_search(suite: Suite) -> Overrides:
    """Half of the channels after a third of the search's steps."""
    third = replace(suite.search, steps=max(1, suite.search.steps // 3))
    return early_bird(replace(suite, search=third), 0.5)


def by_cost(suite: Suite) -> Overrides:
    """One ticket after a short search, which loses most at full resolution: there channels cost most."""
    steps = max(1, suite.search.steps // 3)
    (ratio,) = suite.cost_of_step_by_cost
    made = {**searching(suite), **WHOLE, "search.steps": steps, "search.ratios": [ratio], "search.scope": "cost"}
    return {**made, "regions.steps": spent(suite, steps, [ratio], "cost")}


def settled(suite: Suite, ratio: float, criterion: str, pace: str) -> Overrides:
    """As in the papers: the search ends when the ticket has settled."""
    s = suite.search
    window, every = (s.window, s.every) if pace == "iteration" else (4 * s.epoch, s.epoch)
    search = {"search.until": "settled", "search.steps": s.most, "search.window": window, "search.every": every}
    steps = spent(suite, window, [ratio])
    return {**searching(suite, criterion), **search, **WHOLE, "search.ratios": [ratio], "regions.steps": steps}


def at_rate(suite: Suite, times: float) -> Overrides:
    """Half of the channels, at so many times the suite's learning rate once they are cut."""
    return {**early_bird(suite, 0.5), "regions.lr": times * suite.lr}


def initial_mask(suite: Suite) -> Overrides:
    """The mask of the first weights, which stay."""
    return {**NO_SEARCH, **WHOLE, "search.ratios": [0.5], "regions.steps": spent(suite, 0, [0.5])}


def regions(suite: Suite, ratios: Sequence[float], sampler: str, budgeted: bool, joint: float) -> Overrides:
    """A ticket per region; equal steps, or those of the budget. `joint`: share of the dense steps on one ticket first.

    A joint step is counted as a dense one when steps are chosen: how wide its ticket is, the search will tell.
    """
    branch_at = round(joint * suite.steps)
    before = suite.search.steps + branch_at
    made = {**searching(suite), **THREE, "search.ratios": list(ratios), "regions.branch_at": branch_at}
    made["train.sampler"] = sampler
    return {**made, "regions.steps": budget(suite, made, before) if budgeted else spent(suite, before, ratios)}


def spent(suite: Suite, before: int, ratios: Sequence[float], scope: str = "local") -> list[int]:
    """Equal steps of each ticket that, with `before` dense steps, cost what the dense arm costs."""
    together = sum(suite.price(ratio, scope) for ratio in ratios)
    return [max(1, round((suite.steps - before) / together))] * len(ratios)


def budget(suite: Suite, overrides: Overrides, before: int) -> int:
    """The same as one number, which the project's budget deals out to the regions."""
    probe = 1000 * suite.steps
    each = steps_of(World(suite.config({**overrides, "regions.steps": probe}, 0), Path("nowhere")))
    costs = [suite.price(ratio) for ratio in overrides["search.ratios"]]
    together = sum(n * cost for n, cost in zip(each, costs, strict=True)) / probe
    return max(len(each), round((suite.steps - before) / together))


def _dense() -> Iterator[Arm]:
    yield Arm("dense", "the whole network, timesteps uniform", "dense", dense)
    for sampler, words in (
        ("speed", "SpeeD as in its paper"),
        ("speed-released", "SpeeD as in its authors' code"),
        ("min-snr", "Min-SNR weights"),
    ):
        yield Arm(f"dense-{sampler}", f"the whole network, {words}", "dense", dense, {"train.sampler": sampler})
    yield Arm("dense-accelerated", "the whole network, ebdiff's layers, channels_last", "dense", dense, ACCELERATED)


def _pruned() -> Iterator[Arm]:
    for ratio, criterion in product((0.3, 0.5), ("random", "magnitude", "taylor", "diff-pruning")):
        about = f"the dense arm's network, {ratio:.0%} pruned by {criterion}, then finetuned"
        make = partial(pruned, criterion=criterion, ratio=ratio)
        yield Arm(f"prune-{criterion}-{ratio * 100:.0f}", about, "pruned", make, after="dense")
    for ratio in (0.3, 0.5):
        about = f"the network {ratio:.0%} narrower, from random weights"
        yield Arm(f"scratch-{ratio * 100:.0f}", about, "from scratch", partial(scratch, ratio=ratio))


def _early_bird() -> Iterator[Arm]:
    for ratio, criterion, pace in product((0.3, 0.5), ("magnitude", "taylor"), ("iteration", "epoch")):
        about = f"one ticket, {ratio:.0%} removed by {criterion}, drawn {pace}-wise until it settles"
        make = partial(settled, ratio=ratio, criterion=criterion, pace=pace)
        yield Arm(f"eb-{criterion}-{ratio * 100:.0f}-{pace}", about, "early-bird", make)
    family = "early-bird, SpeeD"
    for ratio in (0.3, 0.5, 0.7):
        about = f"one ticket, {ratio:.0%} removed by taylor after a search of fixed length, SpeeD"
        yield Arm(f"eb-speed-{ratio * 100:.0f}", about, family, partial(early_bird, ratio=ratio), SPEED)
    about = "one ticket, 50% removed by magnitude as soon as it settles, SpeeD"
    make = partial(settled, ratio=0.5, criterion="magnitude", pace="iteration")
    yield Arm("eb-magnitude-50-iteration-speed", about, family, make, SPEED)
    about = "eb-speed-50 step by step, ebdiff's layers, channels_last"
    make = partial(early_bird, ratio=0.5)
    yield Arm("eb-speed-50-accelerated", about, family, make, {**SPEED, **ACCELERATED})
    about = "one ticket after a third of that search, which loses most where channels cost most, SpeeD"
    yield Arm("eb-cost-speed", about, family, by_cost, SPEED)
    about = "eb-cost-speed step by step, ebdiff's layers, channels_last"
    yield Arm("eb-cost-speed-accelerated", about, family, by_cost, {**SPEED, **ACCELERATED})


def _regions() -> Iterator[Arm]:
    for ratios, speed, budgeted, joint in product(
        ((0.3, 0.6, 0.8), (0.3, 0.4, 0.7)), (False, True), (False, True), (0.0, 0.25, 0.5)
    ):
        if joint and not (speed and budgeted and ratios == (0.3, 0.6, 0.8)):
            continue
        removed = "-".join(f"{ratio * 100:.0f}" for ratio in ratios)
        branch = f"-branch-{joint * 100:.0f}" if joint else ""
        name = f"regions-{removed}{'-speed' * speed}{'-budgeted' * budgeted}{branch}"
        about = f"a ticket per region, {removed.replace('-', ', ')}% removed{', SpeeD' * speed}"
        about += ", steps by the budget" if budgeted else ", equal steps"
        about += f", after {joint:.0%} of the dense steps on one joint ticket" if joint else ""
        sampler, family = "speed" if speed else "uniform", f"regions {removed}"
        make = partial(regions, ratios=ratios, sampler=sampler, budgeted=budgeted, joint=joint)
        yield Arm(name, about, family, make)
    make = partial(regions, ratios=(0.3, 0.6, 0.8), sampler="uniform", budgeted=False, joint=0.0)
    about = "a ticket per region, 30, 60, 80% removed, equal steps, trained on its own timesteps alone"
    yield Arm("regions-30-60-80-no-overlap", about, "regions 30-60-80", make, {"regions.overlap": 0})


def _controls() -> Iterator[Arm]:
    """Each differs in one thing from eb-speed-50, but for initial-mask.

    That one has no gradients and no search, so its mask is drawn by magnitude and it trains the steps of a search more.
    """
    half = partial(early_bird, ratio=0.5)
    for name, about, make, changes in (
        ("random", "a random mask, the search's weights", partial(half, criterion="random"), {}),
        ("fresh", "the ticket, weights drawn anew", half, {"regions.start": "fresh"}),
        ("initial", "the ticket, weights as before the first step", half, {"regions.start": "initial"}),
        ("initial-mask", "no search: mask by magnitude, and weights, as before the first step", initial_mask, {}),
        ("uniform", "timesteps uniform", half, {"train.sampler": "uniform"}),
        ("min-snr", "timesteps uniform, Min-SNR weights", half, {"train.sampler": "min-snr"}),
        ("half-lr", "half the learning rate after the cut", partial(at_rate, times=0.5), {}),
        ("double-lr", "twice the learning rate after the cut", partial(at_rate, times=2.0), {}),
        ("short-search", "a third of the search, in which nothing can settle", short_search, {}),
    ):
        yield Arm(f"control-{name}", f"eb-speed-50, but {about}", "controls", make, {**SPEED, **changes})


def arms_of(suite: Suite) -> list[Arm]:
    """Those that the suite can run: without a step's cost of tickets by cost, none of these."""
    return [arm for arm in ARMS.values() if arm.make is not by_cost or suite.cost_of_step_by_cost]


ARMS = {arm.name: arm for arms in (_dense, _pruned, _early_bird, _regions, _controls) for arm in arms()}
