"""The tables of the report: numbers in, rows of text out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .report_verdict import Facts, seconds_shown

__all__ = ["NAMES", "along", "comparison", "distances", "parameters", "table", "tickets"]

NAMES = {"dense": "dense control", "tickets": "tickets"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comparison(facts: Facts) -> str:
    """The arms at the end, side by side."""
    arms = list(facts["marks"])
    rows = [*_sizes(facts), *_costs(facts), *_scores(facts), *_likeness(facts)]
    return table(["", *(NAMES[arm] for arm in arms)], [[label, *(cells[arm] for arm in arms)] for label, cells in rows])


Row = tuple[str, dict[str, str]]  # what it says, and its cell for each arm


def _ends(facts: Facts) -> dict[str, Any]:
    return {arm: marks[-1] for arm, marks in facts["marks"].items()}


def parameters(facts: Facts) -> dict[str, float]:
    """Of the dense network; of all networks together; and of the one at work, mean over the sampler's steps."""
    dense, sampler = facts["dense"]["parameters"], facts["sampler"]
    kept = [ticket["achieved"]["parameters"] * dense for ticket in facts["tickets"]]
    active = sum(k * visits for k, visits in zip(kept, sampler["in_region"], strict=True)) / sampler["steps"]
    return {"dense": dense, "stored": sum(kept), "active": active}


def _sizes(facts: Facts) -> list[Row]:
    count, steps = len(facts["tickets"]), facts["sampler"]["steps"]
    million = {name: f"{number / 1e6:.2f}M" for name, number in parameters(facts).items()}
    macs = {arm: end["macs_per_image"] for arm, end in _ends(facts).items()}
    stored = f"{million['stored']} in {count} {'networks' if count > 1 else 'network'}"
    return [
        ("parameters stored", {"dense": million["dense"], "tickets": stored}),
        (
            f"parameters active, mean over the {steps} sampler steps",
            {"dense": million["dense"], "tickets": million["active"]},
        ),
        (
            "MACs of an image per sampler step, mean over these steps",
            {arm: f"{each['sampler'] / 1e6:.1f}M" for arm, each in macs.items()},
        ),
        ("the same, mean over all timesteps", {arm: f"{each['uniform'] / 1e6:.1f}M" for arm, each in macs.items()}),
    ]


def _costs(facts: Facts) -> list[Row]:
    cost, total = facts["cost"], {arm: end["cost"] for arm, end in _ends(facts).items()}
    before = [cost["search"], *([cost["joint"]] if cost["joint"] else [])]
    wall = sum(c["wall_seconds"] for c in before) + max(c["wall_seconds"] for c in cost["regions"])
    steps = {"tickets": " + ".join(str(c["steps"]) for c in [*before, *cost["regions"]])}
    per_step = {"tickets": " / ".join(_per_step(c) for c in cost["regions"])}
    if cost["dense"]:
        steps["dense"], per_step["dense"] = str(cost["dense"]["steps"]), _per_step(cost["dense"])
    return [
        ("training steps", steps),
        ("training MACs, the search included", {arm: f"{c['macs'] / 1e12:.3g}T" for arm, c in total.items()}),
        (
            "device-seconds, the search included",
            {arm: seconds_shown(c["device_seconds"]) for arm, c in total.items()},
        ),
        ("of these the search", {"dense": "-", "tickets": seconds_shown(cost["search"]["device_seconds"])}),
        (
            "wall-clock, regions one after another, s",
            {arm: seconds_shown(c["wall_seconds"]) for arm, c in total.items()},
        ),
        ("wall-clock if each region had a machine like this, s", {"dense": "-", "tickets": seconds_shown(wall)}),
        ("device-seconds per training step", per_step),
        ("held-out loss", {arm: f"{end['loss']['total']:.4f}" for arm, end in _ends(facts).items()}),
    ]


def _scores(facts: Facts) -> list[Row]:
    scores = {arm: end["scores"] for arm, end in _ends(facts).items()}
    if not all(scores.values()):
        return [("FID, KID, precision, recall", dict.fromkeys(scores, "no extractor"))]
    rows = []
    for name, key, form in (
        ("FID", "fid", ".2f"),
        ("KID", "kid", ".4f"),
        ("precision", "precision", ".3f"),
        ("recall", "recall", ".3f"),
    ):
        label = f"{name} [{scores['tickets']['extractor']}, n = {scores['tickets']['n']}]"
        rows.append((label, {arm: f"{each[key]:{form}}" for arm, each in scores.items()}))
    return rows


def _likeness(facts: Facts) -> list[Row]:
    """Of super-resolution: how like the true images those drawn are."""
    found = {arm: end["likeness"] for arm, end in _ends(facts).items() if "likeness" in end}
    if not found:
        return []
    rows = []
    for name, key, form in (("PSNR", "psnr", ".2f"), ("SSIM", "ssim", ".4f")):
        label = f"{name} to the true images (of the low resolution alone {found['tickets']['low_res'][key]:{form}})"
        rows.append((label, {arm: f"{each['drawn'][key]:{form}}" for arm, each in found.items()}))
    return rows


def _per_step(cost: Facts) -> str:
    return f"{cost['device_seconds'] / max(cost['steps'], 1):.3f}"


def along(facts: Facts) -> str:
    """One row per mark and arm."""
    rows = []
    for marks in zip(*facts["marks"].values(), strict=True):
        for arm, mark in zip(facts["marks"], marks, strict=True):
            rows.append(
                [
                    f"{mark['mark']:.0%}",
                    NAMES[arm] if arm == "dense" or mark["mark"] else "the search's network",
                    seconds_shown(mark["cost"]["device_seconds"]),
                    f"{mark['cost']['macs'] / 1e12:.3g}",
                    f"{mark['loss']['total']:.4f}",
                    f"{mark['scores']['fid']:.2f}" if mark["scores"] else "-",
                ]
            )
    return table(["share of the regions' training", "arm", "device-seconds", "TMACs", "held-out loss", "FID"], rows)


def tickets(facts: Facts) -> str:
    """One row per ticket."""
    head = [
        "region",
        "trained on",
        "asked",
        "channels removed",
        "MACs kept",
        "parameters kept",
        "drawn",
        "s/step",
        "steps",
        "of all timesteps drawn",
    ]
    rows = [_ticket(facts, ticket) for ticket in facts["tickets"]]
    kept = [ticket["achieved"].get("blocks") for ticket in facts["tickets"]]
    if any(kept):
        head.append("attention blocks kept")
        rows = [[*row, f"{share:.1%}"] for row, share in zip(rows, kept, strict=True)]
    return table(head, rows)


def _ticket(facts: Facts, ticket: Facts) -> list[str]:
    asked = ", ".join(f"{name} {number:g}" for name, number in ticket["asked"].items()) or f"ratio {ticket['ratio']:g}"
    dense = facts["cost"]["dense"]
    return [
        "[{}, {})".format(*ticket["region"]),
        "[{}, {})".format(*ticket["trained"]),
        asked,
        *(f"{ticket['achieved'][key]:.1%}" for key in ("channels", "macs", "parameters")),
        _drawn(facts, ticket),
        _per_step(ticket["cost"]) + (f" (dense {_per_step(dense)})" if dense else ""),
        str(ticket["cost"]["steps"]),
        f"{ticket['mass']:.1%}",
    ]


def _drawn(facts: Facts, ticket: Facts) -> str:
    if not facts["search"]["heatmaps"]:
        return f"by {ticket['criterion']}, step {ticket['step']}"
    return f"{'settled' if ticket['settled'] else 'NOT settled'}, step {ticket['step']}"


def distances(facts: Facts) -> str:
    """How far the regions' masks are from each other; empty where there is one."""
    pairs = facts["search"]["between_regions"]
    rows = [
        [f"{a} and {b}", f"{own:.3f}", f"{same:.3f}", f"{corrected:.2f}"]
        for (a, b), own, same, corrected in zip(
            pairs["pairs"], pairs["tickets"], pairs["at_common_ratio"], pairs["corrected"], strict=True
        )
    ]
    common = f"both at ratio {pairs['common_ratio']:.2f}"
    return table(["regions", "of the tickets", common, "of this, corrected for chance"], rows) if rows else ""
