"""The words of the report: numbers in, markdown out. Which arm is better follows from a stated rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

__all__ = ["markdown", "verdict"]

Facts = Mapping[str, Any]
_NAMED = {"dense": "the dense control", "tickets": "the set of tickets"}
RULE = (
    "The rule: of two scores the lower one is better if they differ by more than {margin:.0%}. Scores are compared at "
    "the end (equal MACs) and at equal device-seconds (the most that both arms reached; linear between the marks). The "
    "arm that is better in one of these and not worse in the other is called better; FID decides, the held-out loss "
    "where there is none. All of it comes from one seed ({seed}), so no difference here is shown to be significant."
)


def verdict(facts: Facts) -> dict[str, Any]:
    """Which arm is better here, and one sentence about it. {"better": "dense", "tickets" or None, "sentence": ...}."""
    margin = facts["config"]["evaluate"]["margin"]
    scored = all(facts["marks"][arm][-1]["scores"] for arm in ("dense", "tickets"))
    ends = {arm: facts["marks"][arm][-1] for arm in ("dense", "tickets")}
    measure = "FID" if scored else "held-out loss"
    at_macs = {arm: value(end, measure) for arm, end in ends.items()}
    seconds, at_seconds = equal_seconds(facts, measure)
    first, second = winner(at_macs, margin), winner(at_seconds, margin) if at_seconds else None
    votes = {first, second} - {None}
    better = votes.pop() if len(votes) == 1 else None
    if first and second and first != second:
        claim = f"It depends: {_NAMED[first]} is better at equal MACs, {_NAMED[second]} at equal device-seconds"
    else:
        claim = f"Better here: {_NAMED[better]}" if better else "Neither is better here"
    parts = [f"{claim}; {measure} {_pair(at_macs)} at equal MACs"]
    if at_seconds:
        parts.append(f"{_pair(at_seconds)} at {_seconds(seconds)} device-seconds each")
    if scored:
        parts.append(f"held-out loss {_pair({arm: value(end, 'held-out loss') for arm, end in ends.items()}, '.4f')}")
    share = ends["tickets"]["macs_per_image"]["sampler"] / ends["dense"]["macs_per_image"]["sampler"]
    parts.append(f"an image costs the tickets {share:.0%} of the dense MACs to draw (one seed)")
    return {"better": better, "measure": measure, "sentence": ", ".join(parts) + "."}


def value(mark: Facts, measure: str) -> float:
    """A score of an arm at a mark; lower is better."""
    found: float = mark["scores"]["fid"] if measure == "FID" else mark["loss"]["total"]
    return found


def winner(values: Mapping[str, float], margin: float) -> str | None:
    """The arm with the lower value, if they differ by more than `margin` of the larger."""
    low, high = sorted(values, key=lambda arm: values[arm])
    return low if values[high] - values[low] > margin * values[high] else None


def equal_seconds(facts: Facts, measure: str) -> tuple[float, dict[str, float]]:
    """(device-seconds that both arms reached, {arm: score there}); empty where the marks do not allow it."""
    curves = {}
    for arm in ("dense", "tickets"):
        marks = [m for m in facts["marks"][arm] if measure != "FID" or m["scores"]]
        curves[arm] = [(m["cost"]["device_seconds"], value(m, measure)) for m in marks]
    seconds = min(points[-1][0] for points in curves.values())
    if any(points[0][0] > seconds for points in curves.values()):
        return seconds, {}
    return seconds, {arm: interpolated(points, seconds) for arm, points in curves.items()}


def interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    """Linear between points of rising x; x lies inside."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / max(x1 - x0, 1e-12)
    return points[-1][1]


def _pair(values: Mapping[str, float], form: str = ".2f") -> str:
    form = ".4f" if max(abs(v) for v in values.values()) < 1 else form
    return f"{values['tickets']:{form}} (tickets) against {values['dense']:{form}} (dense)"


def markdown(facts: Facts, pictures: Mapping[str, str]) -> str:
    """The report. `pictures`: {what: file name} beside it."""
    data, evaluate = facts["data"], facts["config"]["evaluate"]
    parts = [
        f"# Early-bird tickets on {data['name']}: dense control against tickets",
        f"**{facts['verdict']['sentence']}**",
        RULE.format(margin=evaluate["margin"], seed=facts["config"]["seed"]),
        "## Both arms at equal MACs",
        table(["", "dense control", "tickets"], comparison(facts)),
        _notes(facts),
        "## Scores along the way",
        f"![scores against device-seconds]({pictures['curves']})",
        table(
            ["share of the regions' training", "arm", "device-seconds", "TMACs", "held-out loss", "FID"], along(facts)
        ),
        "A share of 0 is the end of the search, before anything is shrunken; both arms had equal MACs at each share.",
    ]
    if "samples" in pictures:
        parts += ["## Samples from the same noise", f"![samples of both arms]({pictures['samples']})"]
    parts += [
        "## Tickets",
        table(
            [
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
            ],
            [_ticket(facts, ticket) for ticket in facts["tickets"]],
        ),
        *_distances(facts, pictures),
        "## Timesteps",
        f"![how often timesteps are drawn, and their weights]({pictures['timesteps']})",
        _timesteps(facts),
        "## Held-out loss per timestep bin",
        f"![loss per timestep bin]({pictures['loss-per-timestep']})",
        "Squared error of the predicted noise on held-out images; dotted lines are the regions' borders.",
    ]
    return "\n\n".join(parts) + "\n"


def comparison(facts: Facts) -> list[list[str]]:
    """The rows that set both arms side by side."""
    cost, ends = facts["cost"], {arm: facts["marks"][arm][-1] for arm in ("dense", "tickets")}
    total = {arm: ends[arm]["cost"] for arm in ends}
    kept = [t["achieved"]["parameters"] * facts["dense"]["parameters"] for t in facts["tickets"]]
    visits, steps = facts["sampler"]["in_region"], facts["sampler"]["steps"]
    active = sum(k * v for k, v in zip(kept, visits, strict=True)) / steps
    macs = {arm: ends[arm]["macs_per_image"] for arm in ends}
    slowest = max(c["wall_seconds"] for c in cost["regions"])
    before = cost["search"]["wall_seconds"] + (cost["joint"] or {"wall_seconds": 0})["wall_seconds"]
    trained = [cost["search"], *([cost["joint"]] if cost["joint"] else []), *cost["regions"]]
    million = facts["dense"]["parameters"] / 1e6
    rows = [
        ["parameters stored", f"{million:.2f}M", f"{sum(kept) / 1e6:.2f}M in {len(kept)} networks"],
        [f"parameters active, mean over the {steps} sampler steps", f"{million:.2f}M", f"{active / 1e6:.2f}M"],
        [
            "MACs of an image per sampler step, mean over these steps",
            f"{macs['dense']['sampler'] / 1e6:.1f}M",
            f"{macs['tickets']['sampler'] / 1e6:.1f}M",
        ],
        ["the same, mean over all timesteps", *(f"{macs[arm]['uniform'] / 1e6:.1f}M" for arm in macs)],
        ["training steps", str(cost["dense"]["steps"]), " + ".join(str(c["steps"]) for c in trained)],
        ["training MACs, the search included", *(f"{total[arm]['macs'] / 1e12:.3g}T" for arm in total)],
        ["device-seconds, the search included", *(_seconds(total[arm]["device_seconds"]) for arm in total)],
        ["of these the search", "-", _seconds(cost["search"]["device_seconds"])],
        ["wall-clock, regions one after another, s", *(_seconds(total[arm]["wall_seconds"]) for arm in total)],
        ["wall-clock if each region had a machine like this, s", "-", _seconds(before + slowest)],
        [
            "device-seconds per training step",
            _per_step(cost["dense"]),
            " / ".join(_per_step(c) for c in cost["regions"]),
        ],
        ["held-out loss", *(f"{ends[arm]['loss']['total']:.4f}" for arm in ends)],
    ]
    return rows + _scores({arm: ends[arm]["scores"] for arm in ends}) + _likeness(ends)


def _scores(scores: Mapping[str, Any]) -> list[list[str]]:
    if not all(scores.values()):
        return [["FID, KID, precision, recall", "no extractor", "no extractor"]]
    rows = []
    for name, key, form in (
        ("FID", "fid", ".2f"),
        ("KID", "kid", ".4f"),
        ("precision", "precision", ".3f"),
        ("recall", "recall", ".3f"),
    ):
        label = f"{name} [{scores['dense']['extractor']}, n = {scores['dense']['n']}]"
        rows.append([label, *(f"{scores[arm][key]:{form}}" for arm in scores)])
    return rows


def _likeness(ends: Mapping[str, Facts]) -> list[list[str]]:
    """Of super-resolution: how like the true images those drawn are."""
    found = {arm: end["likeness"] for arm, end in ends.items() if "likeness" in end}
    if not found:
        return []
    rows = []
    for name, key, form in (("PSNR", "psnr", ".2f"), ("SSIM", "ssim", ".4f")):
        label = f"{name} to the true images (of the low resolution alone {found['dense']['low_res'][key]:{form}})"
        rows.append([label, *(f"{found[arm]['drawn'][key]:{form}}" for arm in found)])
    return rows


def _told(facts: Facts) -> str:
    told = facts["config"]["conditional"]
    if told is None:
        return ""
    what = {"labels": "label", "embeddings": "caption", "low_res": f"low resolution, {told['factor']} times smaller"}
    return (
        f" The networks are told each image's {what[told['by']]}, and nothing about {told['dropout']:.0%} of the "
        f"images in training; images are drawn about held-out ones, with guidance {told['guidance']:g}."
    )


def _notes(facts: Facts) -> str:
    train, sampler = facts["config"]["train"], facts["sampler"]
    return (
        f"Both arms: {facts['machine']}; batch {train['batch_size']} x {train['accumulate']}, AdamW {train['lr']:g}, "
        f"EMA up to {train['ema_decay']:g}, precision {train['precision']}, the same first weights and seed; trained "
        f"on {facts['data']['train']} images, judged with EMA weights on {facts['data']['test']} held-out ones. The "
        f"control is dense and sees all timesteps in every step. The sampler is DDIM, {sampler['steps']} steps "
        f"({sampler['spacing']}), of which {' + '.join(map(str, sampler['in_region']))} fall into the regions. A "
        "training step counts three forward passes of MACs. Device-seconds are process CPU time, or wall-clock times "
        "GPUs; judging is not counted to an arm." + _told(facts)
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.1f}"


def _per_step(cost: Facts) -> str:
    return f"{cost['device_seconds'] / max(cost['steps'], 1):.3f}"


def along(facts: Facts) -> list[list[str]]:
    """One row per mark and arm."""
    rows = []
    for dense, tickets in zip(facts["marks"]["dense"], facts["marks"]["tickets"], strict=True):
        for name, mark in (
            ("dense control", dense),
            ("tickets" if tickets["mark"] else "the search's network", tickets),
        ):
            fid = f"{mark['scores']['fid']:.2f}" if mark["scores"] else "-"
            cost = mark["cost"]
            rows.append(
                [
                    f"{mark['mark']:.0%}",
                    name,
                    _seconds(cost["device_seconds"]),
                    f"{cost['macs'] / 1e12:.3g}",
                    f"{mark['loss']['total']:.4f}",
                    fid,
                ]
            )
    return rows


def _ticket(facts: Facts, ticket: Facts) -> list[str]:
    lo, hi = ticket["region"]
    asked = ", ".join(f"{name} {number:g}" for name, number in ticket["asked"].items()) or f"ratio {ticket['ratio']:g}"
    achieved = ticket["achieved"]
    return [
        f"[{lo}, {hi})",
        "[{}, {})".format(*ticket["trained"]),
        asked,
        *(f"{achieved[key]:.1%}" for key in ("channels", "macs", "parameters")),
        _drawn(facts, ticket),
        f"{_per_step(ticket['cost'])} (dense {_per_step(facts['cost']['dense'])})",
        str(ticket["cost"]["steps"]),
        f"{ticket['mass']:.1%}",
    ]


def _drawn(facts: Facts, ticket: Facts) -> str:
    if not facts["search"]["heatmaps"]:
        return f"by {ticket['criterion']}, step {ticket['step']}"
    return f"{'settled' if ticket['settled'] else 'NOT settled'}, step {ticket['step']}"


def _timesteps(facts: Facts) -> str:
    train, steps = facts["config"]["train"], facts["config"]["regions"]["steps"]
    drawn = "spread evenly over each batch" if train["stratified"] else "each by itself"
    split = "as configured"
    if not isinstance(steps, list):
        split = f"what {steps} at equal shares cost, spent in proportion to what the sampler draws from each region"
    return (
        f"Both arms draw timesteps by the sampler `{train['sampler']}`, {drawn}; weights have mean 1 in each run. "
        f"Steps of the regions: {split}."
    )


def _distances(facts: Facts, pictures: Mapping[str, str]) -> list[str]:
    """How masks moved during the search, and how far the regions' are from each other; what there is of it."""
    search, criterion = facts["search"], facts["config"]["search"]["criterion"]
    parts = []
    if search["heatmaps"]:
        kind = "Chance-corrected Hamming" if search["corrected"] else "Normalised Hamming"
        parts = [
            f"![mask distances]({pictures['mask-distance']})",
            f"{kind} distance between the masks drawn during the search, by {criterion} scores; masks settle at "
            f"{search['eta']:g}, and a map ends where its ticket was drawn.",
        ]
    pairs = search["between_regions"]
    rows = [
        [f"{a} and {b}", f"{own:.3f}", f"{same:.3f}", f"{corrected:.2f}"]
        for (a, b), own, same, corrected in zip(
            pairs["pairs"], pairs["tickets"], pairs["at_common_ratio"], pairs["corrected"], strict=True
        )
    ]
    if rows:
        common = f"both at ratio {pairs['common_ratio']:.2f}"
        parts += [
            "How far the regions' masks are from each other; 1 in the last column is no more in common than chance:",
            table(["regions", "of the tickets", common, "of this, corrected for chance"], rows),
        ]
    return parts


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
