"""The main job: dense search, tickets, a small network per region, one router, and a dense control of equal MACs.

To resume, run it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import config as configuration
from ..errors import EbdiffError
from ..files import read_json, write_json
from ..nn.router import TimestepRouter
from ..pruning.save import load
from ..timesteps.region import Partition, Region
from .diff_pruning import macs_at_most
from .judge import arms_of, judge, judging
from .pretrained import fingerprint
from .regions import joint, region, region_folder, side_by_side, steps_of
from .search import control, search
from .stages import Tick, Work, locked, needed, write_folder
from .stretch import cost_per_step, network_at
from .world import World

__all__ = ["find", "merge", "parts", "prepare", "run", "train", "work"]

DATA = "data.json"


def prepare(world: World) -> None:
    """Check everything, then keep the configuration beside the results.

    Raises:
        EbdiffError: before anything is written.
    """
    kept = world.out / configuration.FILE
    if kept.exists():
        configuration.refuse_other(world.config, kept)
    world.check()
    ours = _from_outside(world)
    _refuse_other_data(world, ours)
    configuration.keep(world.config, world.out)
    write_json(world.out / DATA, ours)


def _from_outside(world: World) -> dict[str, str]:
    """What a configuration only names: its data, and the network whose weights it starts from."""
    weights = {} if world.pretrained is None else {"pretrained": fingerprint(world.pretrained)}
    return {"name": world.data.name, "fingerprint": world.data.fingerprint, **weights}


def _refuse_other_data(world: World, ours: dict[str, str]) -> None:
    """What is named may have changed since the run began."""
    if not (world.out / DATA).exists():
        return
    kept = read_json(world.out / DATA)
    if kept.get("pretrained") != ours.get("pretrained"):
        raise EbdiffError(
            f"{world.out} holds results of other pretrained weights",
            expected=f"{world.pretrained} as it was when the run began",
            got="another fingerprint",
            remedy="give another --out, or the same weights",
        )
    if kept["fingerprint"] != ours["fingerprint"]:
        raise EbdiffError(
            f"{world.out} holds results of other {world.data.noun}",
            expected=f"{world.data.name} as it was when the run began",
            got="another fingerprint",
            remedy="give another --out, or the same data",
        )


def run(world: World, parallel: int = 1) -> Iterator[Tick]:
    """The whole main job; each stage returns at once when its result is there.

    Raises:
        EbdiffError: another process runs it in the same folder.
    """
    with locked(world.out, patience_seconds=2):
        yield from search(world).run(world)
        yield from train(world, range(len(world.partition)), parallel)
        merge(world)
        if world.config.evaluate.control:
            yield from control(world).run(world)
        for mark in world.config.evaluate.marks:
            for arm in arms_of(world):
                yield from judge(world, arm, mark)


def find(world: World) -> Iterator[Tick]:
    """Only the search: a ticket per region."""
    yield from search(world).run(world)


def train(world: World, numbers: Sequence[int], parallel: int = 1) -> Iterator[Tick]:
    """The small networks of these regions, one after another or side by side; before them what they branch from."""
    if world.config.regions.branch_at:
        yield from joint(world).run(world)
    if parallel > 1 and len(numbers) > 1:
        yield from side_by_side(world, parallel)
        return
    for number in numbers:
        yield from region(world, number).run(world)


def merge(world: World, folders: Sequence[Path] = ()) -> Path:
    """One router out of the regions' final networks, in <out>/router.

    Args:
        folders: of finished regions, in any order; by default the run's own.

    Raises:
        EbdiffError: a region is not finished, the regions do not tile the schedule, or a router of other regions than
            these folders' is there.
    """
    found = parts(world, folders)
    if folders:
        _refuse_other_router(world.out / "router", [folder for _, folder in found])

    def write(where: Path) -> None:
        partition = Partition.of([part for part, _ in found])
        TimestepRouter(partition, [load(network_at(folder, 1.0)) for _, folder in found]).save_pretrained(where)

    write_folder(world.out / "router", write)
    return world.out / "router"


def _refuse_other_router(router: Path, folders: Sequence[Path]) -> None:
    """A router that is there already stays as it is, so it must be of these regions."""
    present = [fingerprint(net) for net in sorted(router.glob("net*"), key=lambda net: int(net.name[3:]))]
    if router.exists() and present != [fingerprint(network_at(folder, 1.0)) for folder in folders]:
        raise EbdiffError(
            f"{router} is a router of other regions",
            expected=", ".join(map(str, folders)),
            got="other weights",
            remedy="give another --out, with the --config of one of these runs",
        )


def parts(world: World, folders: Sequence[Path] = ()) -> list[tuple[Region, Path]]:
    """(region, its folder) in ascending t, checked to tile the schedule.

    Raises:
        EbdiffError: as `merge`.
    """
    found: list[tuple[Region, Path]] = []
    lost = next((str(folder) for folder in folders if not folder.is_dir()), None)
    if lost is not None:
        raise EbdiffError("no such folder", expected="that of a trained region", got=lost, remedy="check the path")
    for folder in folders or [region_folder(world.out, number) for number in range(len(world.partition))]:
        which = f" --region {folder.name}" if folder.name.isdecimal() else ""
        facts: dict[str, Any] = needed(folder, f"ebdiff train{which}")
        if "region" not in facts:
            raise EbdiffError(f"{folder} holds no region", expected="a folder regions/<k> of a run", remedy="check it")
        found.append((Region.from_json(facts["region"]), folder))
    found.sort(key=lambda part: (part[0].lo, part[0].hi))
    Partition.of([part for part, _ in found], T=world.config.schedule.timesteps)
    return found


def work(world: World) -> list[Work]:
    """What `run` will do, in its order; nothing is touched.

    A search that may end earlier, and the control after it, take this at most. With ratios "auto" the regions' MACs
    are the budget's mean, since their split is known only after the search.
    """
    s, r = world.config.search, world.config.regions
    each, dense = [world.plan.macs(mask) for mask in world.example_masks], world.plan.macs()
    note = f"dense, {dense / 1e6:.1f} MMACs an image" + ("; until all have settled" if s.until == "settled" else "")
    drawing = macs_at_most(world) if s.criterion == "diff-pruning" else 0.0
    works = [Work("search", cost_per_step(world, dense) * s.steps + drawing, s.steps, note)]
    if r.branch_at:
        macs = min(dense, max(each))
        works.append(Work("joint", cost_per_step(world, macs) * r.branch_at, r.branch_at, "at least the widest region"))
    for number, (macs, steps) in enumerate(zip(each, steps_of(world), strict=True)):
        note = f"{world.partition[number]} trained on {world.trained_region(number)}, {macs / dense:.1%} of the MACs"
        works.append(Work(f"region {number}", cost_per_step(world, macs) * steps, steps, note))
    if world.config.evaluate.control:
        total = sum(part.macs for part in works)
        works.append(Work("dense control", total, round(total / cost_per_step(world, dense)), "equal MACs"))
    return [*works, *judging(world, each)]
