"""The report of a run: report.md with pictures, report.json with every number in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plots
from .files import read_json, read_tensors, write_bytes, write_json
from .report_tables import NAMES
from .report_text import markdown
from .report_verdict import value, verdict
from .timesteps.sampler import Sampler, Within
from .training.costs import training_cost
from .training.judge import arms_of, judged
from .training.regions import region_folder
from .training.sampling import passes
from .training.stages import needed
from .training.world import World

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["gather", "write"]


def write(world: World) -> tuple[Path, str]:
    """Write report.md, report.json and the pictures of a finished run.

    Returns:
        The report's path, and its sentence about which arm is better.

    Raises:
        EbdiffError: a stage is not finished.
    """
    facts = gather(world)
    facts["verdict"] = verdict(facts)
    pictures = draw(world, facts)
    write_json(world.out / "report.json", facts)
    write_bytes(world.out / "report.md", markdown(facts, pictures).encode())
    return world.out / "report.md", facts["verdict"]["sentence"]


def gather(world: World) -> dict[str, Any]:
    """Every number of the report, as JSON values."""
    search = needed(world.out / "search", "ebdiff find")
    regions = [needed(region_folder(world.out, k), f"ebdiff train --region {k}") for k in range(len(world.partition))]
    control = needed(world.out / "dense", "ebdiff run")["cost"] if world.config.evaluate.control else None
    marks = world.config.evaluate.marks
    joint = needed(world.out / "joint", "ebdiff run")["cost"] if world.config.regions.branch_at else None
    tickets = []
    for number, (ticket, facts) in enumerate(zip(search["tickets"], regions, strict=True)):
        mass = world.sampler.mass(world.partition[number])
        tickets.append({**ticket, "number": number, "trained": facts["trained"], "cost": facts["cost"], "mass": mass})
    return {
        "config": world.config.model_dump(mode="json"),
        "data": {"name": world.data.name, "train": len(world.data.train), "test": len(world.data.test)},
        "machine": _machine(world),
        "dense": {
            "parameters": world.plan.parameters(),
            "macs": world.plan.macs(),
            "macs_per_image": world.plan.macs() * passes(world),
        },
        "cost": {
            "search": search["cost"],
            "joint": joint,
            "regions": [r["cost"] for r in regions],
            "dense": control,
        },
        "tickets": tickets,
        "search": {key: search[key] for key in ("eta", "corrected", "heatmaps", "between_regions")},
        "sampler": _visits(world),
        "marks": {arm: [_mark(world, arm, mark) for mark in marks] for arm in reversed(arms_of(world))},
    }


def _machine(world: World) -> str:
    import torch

    if world.device.type == "cuda":
        return f"{torch.cuda.get_device_name(world.device)}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _visits(world: World) -> dict[str, Any]:
    """How many of the sampler's steps fall into each region."""
    import torch

    visited = world.partition.of_t(torch.as_tensor(world.sampling_scheduler().timesteps))
    counts = torch.bincount(visited, minlength=len(world.partition)).tolist()
    return {"steps": world.config.sample.steps, "spacing": world.config.sample.spacing, "in_region": counts}


def _mark(world: World, arm: str, mark: float) -> dict[str, Any]:
    """An arm at a mark: how it was judged, and what it had cost by then."""
    found: dict[str, Any] = read_json(judged(world.out, arm, mark))
    cost = found.pop("training_cost", None) or training_cost(world, arm, mark).to_json()
    return {**found, "judging": found["cost"], "cost": cost}


def draw(world: World, facts: Mapping[str, Any]) -> dict[str, str]:
    """Draw the pictures; returns {what: file name}."""
    names = {what: f"{what}.png" for what in ("curves", "samples", "mask-distance", "loss-per-timestep", "timesteps")}
    plots.lines(_curves(facts), world.out / names["curves"])
    plots.lines([_losses(world, facts)], world.out / names["loss-per-timestep"])
    plots.lines(_timesteps(world), world.out / names["timesteps"])
    if facts["search"]["heatmaps"]:
        _draw_distances(world, facts, world.out / names["mask-distance"])
    else:
        del names["mask-distance"]
    grids = {NAMES[arm]: _grid(world, arm) for arm in facts["marks"]}
    if all(images is not None for images in grids.values()):
        plots.grid(grids, world.out / names["samples"])
    else:
        del names["samples"]
    return names


def _draw_distances(world: World, facts: Mapping[str, Any], path: Path) -> None:
    """A square for each region; all on one scale."""
    maps = facts["search"]["heatmaps"]
    top = max(max(map(max, each["distances"])) for each in maps) or 1.0
    titles = [f"region {world.partition[k]}, ratio {each['ratio']:g}" for k, each in enumerate(maps)]
    squares = [(title, each["steps"], each["distances"]) for title, each in zip(titles, maps, strict=True)]
    plots.heatmaps(squares, top, path)


def _grid(world: World, arm: str) -> Any:
    path = judged(world.out, arm, 1.0).with_suffix(".safetensors")
    return read_tensors(path)[0]["grid"] if path.exists() else None


def _curves(facts: Mapping[str, Any]) -> list[plots.Panel]:
    """Held-out loss and, where there is one, FID along the device-seconds."""
    panels = []
    for measure in ("held-out loss", "FID"):
        series: dict[str, Sequence[tuple[float, float]]] = {}
        for arm, found in facts["marks"].items():
            marks = [mark for mark in found if measure != "FID" or mark["scores"]]
            series[NAMES[arm]] = [(mark["cost"]["device_seconds"], value(mark, measure)) for mark in marks]
        if any(series.values()):
            panels.append(plots.Panel(measure, "device-seconds, the search included", measure, series))
    return panels


def _timesteps(world: World) -> list[plots.Panel]:
    """How often each timestep is drawn, and its weight: on the whole schedule, and in each region's training."""
    T = world.partition.T
    samplers = {"all timesteps": world.sampler}
    for number, region in enumerate(world.partition):
        samplers[f"region {region}"] = Within(world.trained_region(number), world.sampler)
    panels = []
    for title, of in (("drawn, times uniform", _density), ("weight", _weight)):
        series = {}
        for name, sampler in samplers.items():
            drawn, values = sampler.pmf() > 0, of(sampler)
            series[name] = [(t, float(values[t])) for t in range(T) if drawn[t]]
        panels.append(plots.Panel(title, "timestep", title, series, world.partition.bounds[1:-1]))
    return panels


def _density(sampler: Sampler) -> Tensor:
    return sampler.T * sampler.pmf()


def _weight(sampler: Sampler) -> Tensor:
    return sampler.weights()


def _losses(world: World, facts: Mapping[str, Any]) -> plots.Panel:
    series = {}
    for arm, marks in facts["marks"].items():
        loss = marks[-1]["loss"]
        middles = [(lo + hi) / 2 for lo, hi in zip(loss["edges"], loss["edges"][1:], strict=False)]
        series[NAMES[arm]] = list(zip(middles, loss["mean"], strict=True))
    title = "held-out loss per timestep bin, at the end"
    return plots.Panel(title, "timestep", "squared error of the noise", series, world.partition.bounds[1:-1], log=True)
