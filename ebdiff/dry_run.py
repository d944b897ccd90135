"""What a run would do: its tickets, its stages and what they cost, as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from .errors import EbdiffError
from .pruning.mask import ChannelMask
from .training.estimate import Measured, measure
from .training.stages import Work
from .training.world import World

__all__ = ["planned", "show_stages"]


def planned(
    world: World, works: Callable[[World], list[Work]], console: Console, dry_run: bool, timed: bool = False
) -> bool:
    """In a dry run show what would be done, and say True.

    Args:
        works: what would be done; asked after the configuration was checked.
        timed: measure a training step, too.

    Raises:
        EbdiffError: what cannot work, or `timed` without a dry run.
    """
    if not dry_run:
        if timed:
            raise EbdiffError("--measure", expected="--dry-run with it", got="a run", remedy="leave one of them out")
        return False
    world.check(images=False)
    stages = works(world)
    show_tickets(world, console)
    show_stages(world, stages, console, measure(world) if timed else None)
    return True


def show_tickets(world: World, console: Console) -> None:
    """Width, parameters and MACs of each region's network; with ratios "auto" those of a mean one."""
    table = Table("region", "removed", "kept", "parameters", "MACs", "share", box=None, header_style="bold")
    masks, dense = world.example_masks, world.plan.macs()
    parameters = [world.plan.parameters(mask) for mask in masks]
    macs = [world.plan.macs(mask) for mask in masks]
    for region, mask, size, cost in zip(world.partition, masks, parameters, macs, strict=True):
        removed = f"{mask.asked['ratio']:g}" if "ratio" in mask.asked else "auto"
        table.add_row(str(region), removed, kept(mask), _si(size), _si(cost), f"{cost / dense:.1%}")
    table.add_row("dense", "", "", _si(world.plan.parameters()), _si(dense), "")
    console.print(table)
    T = world.partition.T
    stored = sum(parameters)
    mean = sum(cost * len(region) / T for region, cost in zip(world.partition, macs, strict=True))
    console.print(
        f"{len(world.plan)} prunable axes; the tickets together have {_si(stored)} parameters, and an image takes them "
        f"{_si(mean)} MACs, averaged over all timesteps: {mean / dense:.1%} of the dense network's\n",
        highlight=False,
        soft_wrap=True,
    )


def kept(mask: ChannelMask) -> str:
    """The widths of a mask, one entry for all axes of a size: "1152→806, 4608→3226, head 16→11"."""
    found: dict[tuple[str, int], list[int]] = {}
    for space in mask.plan:
        unit = "" if space.unit == "channel" else f"{space.unit} "
        found.setdefault((unit, space.size), []).append(int(mask.keep[space.name].sum()))
    parts = []
    for (unit, size), widths in sorted(found.items()):
        least, most = min(widths), max(widths)
        if least < size:
            parts.append(f"{unit}{size}→{least}" + (f"-{most}" if most > least else ""))
    return ", ".join(parts) or "all"


def show_stages(world: World, works: Sequence[Work], console: Console, measured: Measured | None = None) -> None:
    """The steps and MACs of each stage, and an estimate of device-seconds where a step was measured."""
    columns = ["stage", "steps", "MACs", "share", *(["device-seconds"] if measured else []), ""]
    table = Table(*columns, box=None, header_style="bold")
    total = sum(work.macs for work in works)
    whole = total or 1.0  # a search of no steps takes none
    for work in works:
        estimate = [f"{measured.seconds_of(work.macs):,.0f}"] if measured else []
        steps = str(work.steps) if work.steps else "-"
        table.add_row(work.stage, steps, _si(work.macs), f"{work.macs / whole:.1%}", *estimate, work.note)
    console.print(table)
    lines = [f"total {_si(total)} MACs; results would go to {world.out}; nothing was touched"]
    if measured:
        seconds = measured.seconds_of(total)
        lines += [
            f"about {seconds:,.0f} device-seconds ({seconds / 3600:,.1f} hours), an estimate: by MACs from a training "
            f"step of the dense network with {measured.images} images on {measured.device}, {measured.seconds:.3g} "
            "device-seconds; small networks take longer than their MACs say"
        ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _si(value: float) -> str:
    """Four digits and a prefix."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:g}"
