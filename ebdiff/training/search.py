"""The dense runs: the search that tickets are drawn from, and the control that gets equal MACs."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

from ..pruning.mask import ChannelMask, distance
from ..tickets.budget import split_budget
from ..tickets.early_bird import EarlyBird
from ..tickets.ticket import Ticket
from .costs import cost_at
from .loop import TrainState
from .stages import write_folder
from .stretch import Stretch, cost_per_step, dense_state
from .world import World

__all__ = ["control", "control_steps", "search"]

WATCHED = (0.3, 0.6, 0.8)  # with ratios "auto": what is watched, to tell whether the ranking has settled


def search(world: World) -> Stretch:
    """One dense run serves all regions: each step's timesteps come from one of them, in the proportion of their mass.

    At the end, what has not settled is drawn anyway and marked so.
    """
    return Stretch(
        name="search",
        folder=world.out / "search",
        macs=world.plan.macs(),
        steps=world.config.search.steps,
        sampler=world.sampler,
        seed=world.config.seed,
        start=lambda: dense_state(world),
        marks={0.0: world.config.search.steps},
        regions=world.partition,
        watch=lambda state: watcher(world, state),
        conclude=lambda watch: conclude(world, watch),
        until_settled=world.config.search.until == "settled",
    )


def control(world: World) -> Stretch:
    """The dense control: same first weights and seed, all timesteps, as many MACs as search and regions together."""
    steps = {share: control_steps(world, share) for share in world.config.evaluate.marks}
    return Stretch(
        name="dense control",
        folder=world.out / "dense",
        macs=world.plan.macs(),
        steps=steps[1.0],
        sampler=world.sampler,
        seed=world.config.seed,
        start=lambda: dense_state(world),
        marks=steps,
    )


def control_steps(world: World, share: float) -> int:
    """Dense steps that cost what the search, the joint stage and this share of the regions' training cost, in MACs."""
    return round(cost_at(world, share).macs / cost_per_step(world, world.plan.macs()))


def watcher(world: World, state: TrainState) -> EarlyBird:
    """An EarlyBird as the configuration describes it, on the raw weights: a slow EMA settles by construction."""
    s = world.config.search
    return EarlyBird(
        state.model,
        world.plan,
        ratios=WATCHED if s.ratios == "auto" else None,
        region_ratios=None if s.ratios == "auto" else s.ratios,
        criteria=(s.criterion,),
        window=s.window,
        every=s.every,
        eta=s.eta,
        corrected=s.corrected,
        regions=world.partition,
        norm=s.norm,
        multiple_of=s.multiple_of,
        seed=world.config.seed,
    )


def conclude(world: World, watch: EarlyBird) -> dict[str, Any]:
    """Write a ticket per region; returns what the report shows of the search."""
    tickets = tickets_of(world, watch)

    def write(where: Path) -> None:
        for number, ticket in enumerate(tickets):
            ticket.save(where / str(number))

    write_folder(world.out / "search" / "tickets", write)
    pictures = []
    for number, ratio in enumerate(watched_ratios(world)) if watch.steps else ():
        steps, distances = watch.heatmap((world.config.search.criterion, ratio, number))
        pictures.append({"ratio": ratio, "steps": list(steps), "distances": distances.tolist()})
    return {
        "tickets": [ticket.facts() for ticket in tickets],
        "heatmaps": pictures,
        "eta": watch.settings.eta,
        "corrected": watch.settings.corrected,
        "between_regions": between_regions(world, watch, tickets),
    }


def watched_ratios(world: World) -> list[float]:
    """The ratio at which each region was watched; of "auto" the middle one."""
    ratios = world.config.search.ratios
    return [WATCHED[1]] * len(world.partition) if isinstance(ratios, str) else ratios


def tickets_of(world: World, watch: EarlyBird) -> list[Ticket]:
    """One ticket per region, settled or not."""
    s, found = world.config.search, watch.finish()
    if s.ratios != "auto":
        asked = [found[s.criterion, ratio, number] for number, ratio in enumerate(watched_ratios(world))]
        return [ticket for ticket in asked if ticket is not None]
    assert s.macs is not None
    regions = list(world.partition)
    raw = [watch.scores(s.criterion, number, raw=True) for number in range(len(regions))]
    shares = split_budget(
        world.plan, raw, [len(region) for region in regions], s.macs, norm=s.norm, multiple_of=s.multiple_of
    )
    tickets = []
    for number, (region, share) in enumerate(zip(regions, shares, strict=True)):
        mask = draw(world, watch, number, share)
        nearest = found[s.criterion, min(WATCHED, key=lambda ratio: abs(ratio - mask.removed)), number]
        settled = nearest is not None and nearest.settled
        tickets.append(Ticket(mask, mask.removed, watch.steps, s.criterion, region, settled))
    return tickets


def draw(world: World, watch: EarlyBird, number: int, share: float) -> ChannelMask:
    """A mask of a region that keeps this share of the dense MACs."""
    s = world.config.search
    scores = watch.scores(s.criterion, number)
    wanted: dict[str, Any] = {"macs": share} if share < 1 else {"ratio": 0.0}
    return ChannelMask.draw(scores, plan=world.plan, norm=s.norm, multiple_of=s.multiple_of, **wanted)


def between_regions(world: World, watch: EarlyBird, tickets: list[Ticket]) -> dict[str, Any]:
    """Distances between the regions' masks: of the tickets, and at one common ratio, where only the choice differs."""
    s, count = world.config.search, len(tickets)
    common = sum(ticket.mask.removed for ticket in tickets) / count
    same = [
        ChannelMask.draw(watch.scores(s.criterion, number), plan=world.plan, ratio=common, norm=s.norm)
        for number in range(count)
    ]
    pairs = list(combinations(range(count), 2))
    return {
        "pairs": [list(pair) for pair in pairs],
        "tickets": [distance(tickets[a].mask, tickets[b].mask) for a, b in pairs],
        "common_ratio": common,
        "at_common_ratio": [distance(same[a], same[b]) for a, b in pairs],
        "corrected": [distance(same[a], same[b], corrected=True) for a, b in pairs],
    }
