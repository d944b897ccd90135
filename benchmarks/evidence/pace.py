"""What a step costs, measured interleaved in one run, so that a busy spell hits every network.

`ratio_costs` is for choosing steps before anything has run. `clock` times every stage of all arms: cells that ran
beside other work or elsewhere differ in what the same step took, and steps times one clock's seconds are free of that.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from ebdiff.errors import EbdiffError
from ebdiff.pruning.mask import ChannelMask
from ebdiff.pruning.shrink import shrink
from ebdiff.training.loop import TrainState
from ebdiff.training.search import search
from ebdiff.training.stages import Tick
from ebdiff.training.stretch import Stretch, begun
from ebdiff.training.world import World

from .arms import ARMS
from .cells import Cell
from .result import BEFORE, widths_of
from .suite import Suite

Key = TypeVar("Key")
Seconds = dict[str, dict[str, list[float]]]

WARM = 1  # rounds that do not count
ROUNDS = 7
STEPS = 8  # per round and network, in turn


def ratio_costs(suite: Suite, rounds: int = ROUNDS) -> dict[tuple[str, float], list[float]]:
    """{(scope, ratio): device-seconds of a training step of its ticket, in each round}."""
    stretches = {}
    for scope, costs in (("local", suite.cost_of_step), ("cost", suite.cost_of_step_by_cost)):
        for ratio in costs:
            changes = {"search.ratios": [ratio], "search.scope": scope}
            world = World(suite.config({**ARMS["dense"].overrides(suite), **changes}, 0), Path("nowhere"))
            stretches[scope, ratio] = world, alone(world, scattered(world, widths_of(world.example_masks[0])))
    return interleaved(stretches, rounds, suite.threads)


def alone(world: World, mask: ChannelMask) -> Stretch:
    """The training of one ticket on all timesteps."""
    macs, seed = world.plan.macs(mask), world.config.seed
    return Stretch("alone", Path("nowhere"), macs, 1, world.sampler, seed, lambda: shrunken(world, mask), {})


def clock(cells: Sequence[Cell], rounds: int = ROUNDS) -> tuple[Seconds, dict[str, str]]:
    """{arm: {stage: device-seconds of a step in each round}} of the cells' arms, from results alone; {arm: `timed`}.

    Of an arm without a result the widths are those that its ratios lead to; one that branches needs a result, since how
    wide its joint network is the search decides. Stages of equal networks that do the same are timed once.

    Raises:
        EbdiffError: nothing is known of any.
    """
    arms: dict[str, dict[str, str]] = {}
    of: dict[str, str] = {}
    stretches: dict[str, tuple[World, Stretch]] = {}
    for cell in sorted(cells, key=lambda cell: cell.facts() is None):
        if cell.arm.name in arms:
            continue
        world = World(cell.config.model_copy(update={"pretrained": None}), Path("nowhere"))
        found = widths_found(cell, world)
        if found is None:
            continue
        arms[cell.arm.name] = keys = {}
        of[cell.arm.name] = timed(cell.config.model_dump(mode="json"), found)
        for name, stretch in stages(world, found, cell.before is not None).items():
            keys[name] = key = key_of(world, name, stretch)
            stretches.setdefault(key, (world, stretch))
    if not arms:
        raise EbdiffError("--clock", expected="arms whose widths are known", got="none", remedy="run their cells first")
    each = interleaved(stretches, rounds, cells[0].suite.threads)
    return {arm: {name: each[key] for name, key in keys.items()} for arm, keys in arms.items()}, of


def timed(config: Mapping[str, Any], widths: Mapping[str, Mapping[str, int]]) -> str:
    """A digest of what the seconds of an arm's steps depend on: results of one digest are timed alike.

    A joint network's width follows from the seed's masks and differs little: the clock takes that of one seed for all.
    """
    facts = {
        "networks": [config["model"], config["conditional"], {key: of for key, of in widths.items() if key != "joint"}],
        "steps": stepped(config["train"]),
        "search": drawn(config["search"]),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def stepped(train: Mapping[str, Any]) -> list[Any]:
    """What makes the same step of equal networks faster or slower."""
    of_steps = ("batch_size", "accumulate", "precision", "channels_last", "accelerate", "compile", "grad_clip")
    return [train[key] for key in of_steps]


def drawn(search: Mapping[str, Any]) -> dict[str, Any]:
    """What distinguishes one search's step from another's."""
    return {key: value for key, value in search.items() if key not in ("steps", "until")} if search["steps"] else {}


def widths_found(cell: Cell, world: World) -> dict[str, dict[str, int]] | None:
    """{stage after the search: {channel space: kept channels}}; None where they are not known yet."""
    facts = cell.facts()
    if facts is not None:
        widths: dict[str, dict[str, int]] = facts["widths"]
        return widths
    if cell.config.regions.branch_at:
        return None
    return {f"region {number}": widths_of(mask) for number, mask in enumerate(world.example_masks)}


def stages(world: World, widths: Mapping[str, Mapping[str, int]], after: bool) -> dict[str, Stretch]:
    """The stages of a run, each to begin with a network drawn anew: how fast it is does not depend on its weights.

    Args:
        world: of the run, without a network to start from.
        widths: {stage after the search: {channel space: kept channels}}.
        after: did it start from another arm's network?
    """
    unwatched = replace(search(world), watch=None)
    found = {"search": search(world) if world.config.search.steps else unwatched}
    if after:
        found[BEFORE] = unwatched
    return found | {name: alone(world, scattered(world, each)) for name, each in widths.items()}


def scattered(world: World, widths: Mapping[str, int]) -> ChannelMask:
    """A mask of these widths that keeps channels at random, so that groups of norms are as ragged as a ticket's."""
    order = torch.Generator().manual_seed(0)
    keep = {space.name: torch.randperm(space.size, generator=order) < widths[space.name] for space in world.plan}
    return ChannelMask(world.plan, keep, world.config.search.norm)


def key_of(world: World, name: str, stretch: Stretch) -> str:
    """What a stage's step depends on: stages of one key are timed once."""
    config = world.config.model_dump(mode="json")
    search = drawn(config["search"]) if name == "search" else {}
    return f"{stretch.macs:.0f} {search} {stepped(config['train'])}"


def shrunken(world: World, mask: ChannelMask) -> TrainState:
    """A network of these widths before its first step."""
    return begun(world, shrink(world.network(), mask))


def interleaved(stretches: Mapping[Key, tuple[World, Stretch]], rounds: int, threads: int) -> dict[Key, list[float]]:
    """{key: device-seconds of a step in each round}; every round takes a few steps of each in turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with TemporaryDirectory() as place:
        running = {
            key: endless(world, stretch, Path(place) / str(n))
            for n, (key, (world, stretch)) in enumerate(stretches.items())
        }
        seconds: dict[Key, list[float]] = {key: [] for key in running}
        try:
            for _ in range(WARM + rounds):
                for key, ticks in running.items():
                    seconds[key].append(seconds_of(ticks, stretches[key][0].device) / STEPS)
        finally:
            for ticks in running.values():
                ticks.close()
            torch.set_num_threads(before)
    return {key: values[WARM:] for key, values in seconds.items()}


def endless(world: World, stretch: Stretch, folder: Path) -> Generator[Tick, None, None]:
    """The steps of a stage as a run takes them, without an end, in a folder of its own."""
    changes = {"steps": 10**9, "marks": {}, "conclude": None, "until_settled": False, "resumable": False}
    yield from replace(stretch, folder=folder, **changes).run(world)


def seconds_of(ticks: Iterator[Tick], device: torch.device) -> float:
    """Device-seconds of a few steps, to the end of what they left at work on a GPU.

    Two more go before: they find caches and the heap as another network left them, as no step of a run does.
    """
    read = time.process_time if device.type == "cpu" else time.perf_counter

    def after(steps: int) -> float:
        for _ in range(steps):
            next(ticks)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return read()

    began = after(2)
    return after(STEPS) - began
