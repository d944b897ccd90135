"""One run per region: search state in, its own shrunken network out; one after another or side by side."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import EbdiffError
from ..pruning.blocks import of_kept_heads
from ..pruning.mask import ChannelMask
from ..pruning.plan import ChannelPlan
from ..pruning.shrink import shrink, shrink_
from ..seeds import seed_for
from ..tickets.attention import union
from ..tickets.ticket import Ticket
from ..timesteps.budget import region_budget
from ..timesteps.sampler import Within
from .accounting import Cost
from .checkpoint import Checkpoints, Saved
from .fresh import drawn_anew
from .log import read_log
from .loop import TrainState
from .stages import Tick, done, needed
from .stretch import Stretch, begun, cost_per_step, dense_state, restore
from .world import World

__all__ = ["joint", "region", "region_folder", "side_by_side", "steps_of", "ticket_of"]

FIND = "ebdiff find"


def region_folder(out: Path, number: int) -> Path:
    """Where region `number` is trained."""
    return out / "regions" / str(number)


def ticket_of(world: World, number: int) -> Ticket:
    """The ticket that the search drew for region `number`.

    Raises:
        EbdiffError: no search was finished, or the ticket is damaged or of another architecture.
    """
    world.region_number(number)
    needed(world.out / "search", FIND)
    return Ticket.load(world.out / "search" / "tickets" / str(number), plan=world.plan)


def region(world: World, number: int) -> Stretch:
    """The training of region `number`: the network of its ticket, by default with all that the search left."""
    ticket, where, trained = ticket_of(world, number), world.partition[number], world.trained_region(number)
    steps = steps_of(world)[number]

    return Stretch(
        name=f"region {number}",
        folder=region_folder(world.out, number),
        macs=world.plan.macs(ticket.mask),
        steps=steps,
        sampler=Within(trained, world.sampler),
        seed=world.config.seed + 1_000_003 * (number + 1),
        start=lambda: at_own_rate(world, start_of(world, number, ticket)),
        marks={share: max(1, round(share * steps)) for share in world.config.evaluate.marks if share > 0},
        facts={"region": where.to_json(), "trained": trained.to_json(), "T": world.partition.T},
    )


def steps_of(world: World) -> list[int]:
    """Training steps of each region: as configured, or what the budget allows each (see `region_budget`).

    Costs are MACs of the regions' tickets. Before the search they are those of a mask of the same ratio, which has the
    same widths; with ratios "auto" they are taken to be equal then.
    """
    steps, numbers = world.config.regions.steps, range(len(world.partition))
    if isinstance(steps, list):
        return steps
    masks = [ticket_of(world, k).mask for k in numbers] if done(world.out / "search") else world.example_masks
    return region_budget(world.partition, world.sampler, steps, [world.plan.macs(mask) for mask in masks])


def joint(world: World) -> Stretch:
    """`branch_at` steps of one network on all timesteps: it has every channel that some region keeps."""
    ticket = joint_ticket(world)
    return Stretch(
        name="joint",
        folder=world.out / "joint",
        macs=world.plan.macs(ticket.mask),
        steps=world.config.regions.branch_at,
        sampler=world.sampler,
        seed=world.config.seed + 999_983,
        start=lambda: at_own_rate(world, from_search(world, ticket)),
        marks={},
    )


def joint_mask(masks: Sequence[ChannelMask]) -> ChannelMask:
    """Every channel that some of these masks of one plan keeps."""
    keep = {name: torch.stack([mask.keep[name] for mask in masks]).any(0) for name in masks[0]}
    return ChannelMask(masks[0].plan, keep, masks[0].norm)


def joint_ticket(world: World) -> Ticket:
    """Every channel and every block of attention that some region's ticket keeps."""
    tickets = [ticket_of(world, number) for number in range(len(world.partition))]
    mask = joint_mask([each.mask for each in tickets])
    return replace(
        tickets[0], mask=mask, ratio=mask.removed, region=None, blocks=union([each.blocks for each in tickets])
    )


def inside(mask: ChannelMask, outer: ChannelMask, plan: ChannelPlan) -> ChannelMask:
    """`mask`, which keeps nothing that `outer` removed, as a mask of the plan of the network shrunken by `outer`."""
    keep = {name: mask.keep[name][outer.keep[name]] for name in mask if name in plan}
    return ChannelMask(plan, keep, mask.norm, mask.asked)


def start_of(world: World, number: int, ticket: Ticket) -> TrainState:
    """What region `number` starts from; see the configuration's `regions.start`."""
    r = world.config.regions
    if r.start == "fresh":
        return begun(world, drawn_anew(world, ticket, seed_for(world.config.seed, "fresh", number)))
    if r.start == "initial":
        return begun(world, shrink(world.network(), ticket))
    return (from_joint if r.branch_at else from_search)(world, ticket)


def at_own_rate(world: World, state: TrainState) -> TrainState:
    """The state with the learning rate of tickets; see the configuration's `regions.lr`."""
    rate = world.config.regions.lr or world.config.train.lr
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    return state


def from_search(world: World, ticket: Ticket) -> TrainState:
    """The training state at the end of the search, shrunken: weights, Adam moments, EMA, step."""
    state = dense_state(world)
    restore(_newest(world.out / "search", FIND), state)
    shrink_(state.model, ticket, optimizer=state.optimizer, ema=state.ema)
    return state


def from_joint(world: World, ticket: Ticket) -> TrainState:
    """The training state at the end of the joint stage, shrunken on to `ticket`."""
    mask, outer = ticket.mask, joint_ticket(world)
    state = from_search(world, outer)
    restore(_newest(world.out / "joint", "ebdiff run"), state)
    plan = world.trace(state.model)
    inner = inside(mask, outer.mask, plan)
    if plan.macs(inner) != world.plan.macs(mask):
        raise EbdiffError(
            "the joint network cannot be shrunken on to a region's ticket",
            expected=f"{world.plan.macs(mask):.0f} MACs",
            got=f"{plan.macs(inner):.0f}",
            remedy="use regions.branch_at=0 for this architecture",
        )
    left = replace(ticket, mask=inner, blocks=of_kept_heads(ticket.blocks, outer.mask))
    shrink_(state.model, left, optimizer=state.optimizer, ema=state.ema)
    return state


def _newest(folder: Path, command: str) -> Saved:
    needed(folder, command)
    saved = Checkpoints(folder / "checkpoints").newest()
    if saved is None:
        raise EbdiffError(
            f"{folder} lost its last checkpoint", expected=str(folder / "checkpoints"), remedy="start in another --out"
        )
    return saved


def side_by_side(world: World, parallel: int) -> Iterator[Tick]:
    """Train the regions in local processes, `parallel` at a time, each an `ebdiff train --region k` of its own.

    Each gets its share of the CPU cores, or the GPUs in turn. A killed one is resumed by the same command.

    Raises:
        EbdiffError: one of them failed; names its log.
    """
    waiting, running = list(range(len(world.partition))), dict[int, subprocess.Popen[bytes]]()
    progress = _Progress(world)
    for number in waiting:
        yield from progress(number, before=True)
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                number = waiting.pop(0)
                running[number] = _spawn(world, number, parallel)
            time.sleep(0.2)
            for number, process in list(running.items()):
                if process.poll() is not None:
                    del running[number]
                    _refuse_failure(world.out, number, process.returncode)
                yield from progress(number)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _spawn(world: World, number: int, parallel: int) -> subprocess.Popen[bytes]:
    folder = region_folder(world.out, number)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // parallel))}
    if world.device.type == "cuda" and "CUDA_VISIBLE_DEVICES" not in os.environ:
        environment["CUDA_VISIBLE_DEVICES"] = str(number % torch.cuda.device_count())
    command = [sys.executable, "-m", "ebdiff", "train", "--region", str(number), "--out", str(world.out)]
    command += ["--config", str(world.out / "config.yaml"), "--parent", str(os.getpid())]
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)


def _refuse_failure(out: Path, number: int, code: int) -> None:
    if code:
        log = region_folder(out, number) / "log.txt"
        last = (log.read_text("utf-8", "replace").strip().splitlines() or ["no output"])[-1]
        raise EbdiffError(
            f"region {number} failed with exit code {code}", got=last, remedy=f"see {log}; the same command resumes"
        )


class _Progress:
    """What the regions' processes do, from the records they write."""

    def __init__(self, world: World) -> None:
        numbers, r = range(len(world.partition)), world.config.regions
        searched = Cost.from_json(needed(world.out / "search", FIND)["cost"]).steps
        self.out, self.first = world.out, searched + r.branch_at if r.start == "search" else 0
        self.totals, self.told = steps_of(world), [0] * len(numbers)
        self.per_step = [cost_per_step(world, world.plan.macs(ticket_of(world, k).mask)) for k in numbers]

    def __call__(self, number: int, before: bool = False) -> Iterator[Tick]:
        """What region `number` did since it was asked for last; `before`: in an earlier run."""
        folder, total = region_folder(self.out, number), self.totals[number]
        records = read_log(folder)
        steps = total if done(folder) else min(total, records[-1]["step"] - self.first) if records else 0
        new = steps - self.told[number]
        if new > 0:
            self.told[number] = steps
            note = f"loss {records[-1]['loss']:.4f}" if records else "already there"
            yield Tick(f"region {number}", self.per_step[number] * new, note, before)
