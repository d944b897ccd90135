"""What is drawn from the search: a ticket per region, and what the report shows of how that came about."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor

from ..pruning.mask import ChannelMask, distance
from ..tickets.attention_watch import AttentionWatch
from ..tickets.budget import split_budget
from ..tickets.early_bird import EarlyBird
from ..tickets.settings import Pace
from ..tickets.ticket import Ticket
from .accounting import Cost
from .checkpoint import Checkpoints
from .diff_pruning import region_scores
from .loop import TrainState
from .stages import Tick, write_folder
from .stretch import Conclusion, Watch
from .world import World

__all__ = ["conclude", "watcher"]

WATCHED = (0.3, 0.6, 0.8)  # with ratios "auto": what is watched, to tell whether the ranking has settled


def watcher(world: World, state: TrainState) -> Watch | None:
    """An EarlyBird as the configuration describes it, on the raw weights: a slow EMA settles by construction.

    With the criterion "diff-pruning", which looks at the end of the search only, what watches the attention, if any.
    """
    s = world.config.search
    if s.criterion == "diff-pruning":
        pace = Pace.of(s.window, s.every, s.eta, s.corrected, regions=world.partition)
        return None if s.attention is None else AttentionWatch(state.model, s.attention, pace)
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
        **s.how,
        attention=s.attention,
        seed=world.config.seed,
    )


def conclude(world: World, state: TrainState, watch: Watch | None) -> Generator[Tick, None, Conclusion]:
    """Write a ticket per region; what the report shows of the search, and what drawing it took."""
    s, numbers, cost = world.config.search, range(len(world.partition)), Cost()
    if isinstance(watch, EarlyBird):
        tickets = tickets_of(world, watch)
        scores = [watch.scores(s.criterion, number) for number in numbers]
    else:
        checkpoints = Checkpoints(world.out / "search" / "checkpoints" / s.criterion, keep=1)
        scores, cost = yield from region_scores(world, state.model, checkpoints)
        if isinstance(watch, AttentionWatch):
            watch.finish()
        drawn = [from_losses(world, state, scores[number], number) for number in numbers]
        tickets = [with_blocks(ticket, watch, number) for number, ticket in enumerate(drawn)]

    def write(where: Path) -> None:
        for number, ticket in enumerate(tickets):
            ticket.save(where / str(number))

    write_folder(world.out / "search" / "tickets", write)
    facts = {
        "tickets": [ticket.facts() for ticket in tickets],
        "heatmaps": heatmaps(world, watch) if isinstance(watch, EarlyBird) and watch.steps else [],
        "eta": Pace.of(s.window, s.every, s.eta, s.corrected).eta,
        "corrected": s.corrected,
        "between_regions": between_regions(world, scores, tickets),
    }
    return Conclusion(facts, cost)


def heatmaps(world: World, watch: EarlyBird) -> list[dict[str, Any]]:
    """For each region the distances between all masks that were drawn for it."""
    pictures = []
    for number, ratio in enumerate(watched_ratios(world)):
        steps, distances = watch.heatmap((world.config.search.criterion, ratio, number))
        pictures.append({"ratio": ratio, "steps": list(steps), "distances": distances.tolist()})
    return pictures


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
    shares = split_budget(world.plan, raw, [len(region) for region in regions], s.macs, **s.how)
    tickets = []
    for number, (region, share) in enumerate(zip(regions, shares, strict=True)):
        mask = draw(world, watch, number, share)
        nearest = found[s.criterion, min(WATCHED, key=lambda ratio: abs(ratio - mask.removed)), number]
        assert nearest is not None
        tickets.append(Ticket(mask, mask.removed, watch.steps, s.criterion, region, nearest.settled, nearest.blocks))
    return tickets


def from_losses(world: World, state: TrainState, scores: Mapping[str, Tensor], number: int) -> Ticket:
    """The ticket of a region by Diff-Pruning's scores, which nothing has watched: it has not settled."""
    s, ratio = world.config.search, watched_ratios(world)[number]
    mask = ChannelMask.draw(scores, plan=world.plan, ratio=ratio, **s.how)
    return Ticket(mask, ratio, state.step, s.criterion, world.partition[number], settled=False)


def with_blocks(ticket: Ticket, watch: Watch | None, number: int) -> Ticket:
    """The same with the blocks of attention that were found in its region, where it was watched."""
    found = watch.found(number) if isinstance(watch, AttentionWatch) else None
    return ticket if found is None else replace(ticket, blocks=found.blocks)


def draw(world: World, watch: EarlyBird, number: int, share: float) -> ChannelMask:
    """A mask of a region that keeps this share of the dense MACs."""
    s = world.config.search
    scores = watch.scores(s.criterion, number)
    wanted: dict[str, Any] = {"macs": share} if share < 1 else {"ratio": 0.0}
    return ChannelMask.draw(scores, plan=world.plan, **s.how, **wanted)


def between_regions(world: World, scores: Sequence[Mapping[str, Tensor]], tickets: Sequence[Ticket]) -> dict[str, Any]:
    """Distances between the regions' masks: of the tickets, and at one common ratio, where only the choice differs."""
    s, count = world.config.search, len(tickets)
    common = sum(ticket.mask.removed for ticket in tickets) / count
    same = [ChannelMask.draw(each, plan=world.plan, ratio=common, norm=s.norm) for each in scores]
    pairs = list(combinations(range(count), 2))
    return {
        "pairs": [list(pair) for pair in pairs],
        "tickets": [distance(tickets[a].mask, tickets[b].mask) for a, b in pairs],
        "common_ratio": common,
        "at_common_ratio": [distance(same[a], same[b]) for a, b in pairs],
        "corrected": [distance(same[a], same[b], corrected=True) for a, b in pairs],
    }
