"""What a finished cell leaves: one JSON file, made of its run's report and of the costs kept beside its networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebdiff.config import Config
from ebdiff.files import read_json
from ebdiff.training.accounting import Cost
from ebdiff.training.regions import region_folder
from ebdiff.training.stages import needed
from ebdiff.training.stretch import cost_of

BEFORE = "before"  # the stage that other cells' networks cost
Facts = dict[str, Any]


def gathered(config: Config, folder: Path, before: Cost | None, place: Mapping[str, Any]) -> Facts:
    """Everything about a finished run that tables need.

    Args:
        config: the run's.
        folder: the run's.
        before: what the network that it started from had cost.
        place: where it ran.
    """
    report = read_json(folder / "report.json")
    marks = [mark for mark in report["marks"]["tickets"] if mark["mark"] > 0]
    ends = {mark["mark"]: stages_at(folder, mark["mark"], len(report["tickets"]), before) for mark in marks}
    return {
        "machine": {**place, "threads": report["machine"]},
        "config": portable(config),
        "stages": {name: of_stage(cost) for name, cost in ends[1.0].items()},
        "curve": [point(mark, ends[mark["mark"]]) for mark in marks],
        "judging_device_seconds": sum(mark["judging"]["device_seconds"] for mark in report["marks"]["tickets"]),
        "parameters": parameters(report),
        "macs_per_image": {**marks[-1]["macs_per_image"], "dense": report["dense"]["macs"]},
        "tickets": [
            {key: ticket[key] for key in ("region", "ratio", "settled", "step", "achieved")}
            for ticket in report["tickets"]
        ],
    }


def stages_at(folder: Path, share: float, regions: int, before: Cost | None) -> dict[str, Cost]:
    """{stage: its cost} when the regions had taken this share of their training."""
    stages = {BEFORE: before} if before is not None else {}
    stages["search"] = Cost.from_json(needed(folder / "search", "ebdiff find")["cost"])
    if (folder / "joint").exists():
        stages["joint"] = Cost.from_json(needed(folder / "joint", "ebdiff run")["cost"])
    return stages | {f"region {k}": cost_of(region_folder(folder, k), share) for k in range(regions)}


def cost_of_run(folder: Path, regions: int = 1) -> Cost:
    """What a finished run cost, judging not counted."""
    return sum(stages_at(folder, 1.0, regions, None).values(), Cost())


def of_stage(cost: Cost) -> Facts:
    """Its cost, and the seconds of a step."""
    return {**cost.to_json(), "seconds_per_step": cost.device_seconds / cost.steps if cost.steps else None}


def point(mark: Mapping[str, Any], stages: Mapping[str, Cost]) -> Facts:
    """A point of the curve: cost so far, and how the networks were judged."""
    total, scores = sum(stages.values(), Cost()), mark["scores"]
    judged = {key: scores[key] if scores else None for key in ("fid", "kid", "precision", "recall")}
    each = {name: cost.to_json() for name, cost in stages.items()}
    return {"share": mark["mark"], **total.to_json(), "loss": mark["loss"]["total"], **judged, "stages": each}


def parameters(report: Mapping[str, Any]) -> dict[str, float]:
    """Of the dense network; of all networks together; and of the one at work, mean over the sampler's steps."""
    dense, sampler = report["dense"]["parameters"], report["sampler"]
    kept = [ticket["achieved"]["parameters"] * dense for ticket in report["tickets"]]
    active = sum(k * visits for k, visits in zip(kept, sampler["in_region"], strict=True)) / sampler["steps"]
    return {"dense": dense, "stored": sum(kept), "active": active}


def portable(config: Config) -> Facts:
    """The configuration without the places where files lie on this machine."""
    values: Facts = config.model_dump(mode="json")
    for section, key in ((values["data"], "source"), (values["evaluate"], "extractor")):
        section[key] = Path(section[key]).name
    if values.get("pretrained"):
        values["pretrained"] = Path(values["pretrained"]).parent.name  # <arm>-<seed>
    return values
