"""What a finished cell leaves: one JSON file, made of its run's report and of the costs kept beside its networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebdiff.config import Config
from ebdiff.files import read_json, read_object
from ebdiff.pruning.mask import ChannelMask
from ebdiff.report_tables import parameters
from ebdiff.training.accounting import Cost
from ebdiff.training.costs import stages_at
from ebdiff.training.regions import joint_ticket, ticket_of
from ebdiff.training.world import World

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
    world, bought = World(config, folder), {BEFORE: before} if before is not None else {}
    return {
        "machine": {**place, "threads": report["machine"]},
        "config": portable(config),
        "data": read_object(folder / "data.json"),
        "curve": [point(mark, bought | stages_at(world, mark["mark"])) for mark in marks],
        "judging_device_seconds": sum(mark["judging"]["device_seconds"] for mark in report["marks"]["tickets"]),
        "parameters": parameters(report),
        "widths": widths(world),
        "macs_per_image": {**marks[-1]["macs_per_image"], "dense": report["dense"]["macs"]},
        "tickets": [
            {key: ticket[key] for key in ("region", "ratio", "settled", "step", "achieved")}
            for ticket in report["tickets"]
        ],
    }


def point(mark: Mapping[str, Any], stages: Mapping[str, Cost]) -> Facts:
    """A point of the curve: cost so far, and how the networks were judged."""
    total, scores = sum(stages.values(), Cost()), mark["scores"]
    judged = {key: scores[key] if scores else None for key in ("fid", "kid", "precision", "recall")}
    each = {name: cost.to_json() for name, cost in stages.items()}
    return {"share": mark["mark"], **total.to_json(), "loss": mark["loss"]["total"], **judged, "stages": each}


def widths(world: World) -> dict[str, dict[str, int]]:
    """{stage after the search: {channel space: kept channels}}, all that the time of a step depends on."""
    masks = {"joint": joint_ticket(world).mask} if world.config.regions.branch_at else {}
    masks |= {f"region {number}": ticket_of(world, number).mask for number in range(len(world.partition))}
    return {name: widths_of(mask) for name, mask in masks.items()}


def widths_of(mask: ChannelMask) -> dict[str, int]:
    """{channel space: kept channels}."""
    return {space: int(kept.sum()) for space, kept in mask.keep.items()}


def portable(config: Config) -> Facts:
    """The configuration without the places where files lie on this machine."""
    values: Facts = config.model_dump(mode="json")
    for section, key in ((values["data"], "source"), (values["data"], "vae"), (values["evaluate"], "extractor")):
        section[key] = section[key] and unplaced(section[key])
    if values.get("pretrained"):
        values["pretrained"] = Path(values["pretrained"]).parent.name  # <arm>-<seed>
    return values


def unplaced(text: str) -> str:
    """What a configuration calls data, without the folder where they lie; "hf:owner/name" is no folder."""
    kind, colon, path = text.rpartition("latents:")
    return text if text.startswith("hf:") else f"{kind}{colon}{Path(path).name}"
