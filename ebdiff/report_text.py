"""The words of the report: numbers in, markdown out."""

from __future__ import annotations

from collections.abc import Mapping

from .report_tables import along, comparison, distances, tickets
from .report_verdict import RULE, Facts

__all__ = ["markdown"]


def markdown(facts: Facts, pictures: Mapping[str, str]) -> str:
    """The report. `pictures`: {what: file name} beside it."""
    data, both = facts["data"], "dense" in facts["marks"]
    parts = [
        f"# Early-bird tickets on {data['name']}" + (": dense control against tickets" if both else ""),
        f"**{facts['verdict']['sentence']}**",
    ]
    if both:
        config = facts["config"]
        parts.append(RULE.format(margin=config["evaluate"]["margin"], seed=config["seed"]))
    parts += [
        "## Both arms at equal MACs" if both else "## At the end",
        comparison(facts),
        _notes(facts),
        "## Scores along the way",
        f"![scores against device-seconds]({pictures['curves']})",
        along(facts),
        "A share of 0 is the end of the search, before anything is shrunken"
        + ("; both arms had equal MACs at each share." if both else "."),
    ]
    if "samples" in pictures:
        parts.append("## Samples from the same noise" if both else "## Samples")
        parts.append(f"![samples]({pictures['samples']})")
    parts += [
        "## Tickets",
        tickets(facts),
        *_settling(facts, pictures),
        *_between(facts),
        "## Timesteps",
        f"![how often timesteps are drawn, and their weights]({pictures['timesteps']})",
        _timesteps(facts),
        "## Held-out loss per timestep bin",
        f"![loss per timestep bin]({pictures['loss-per-timestep']})",
        "Squared error of the predicted noise on held-out images; dotted lines are the regions' borders.",
    ]
    return "\n\n".join(parts) + "\n"


def _told(facts: Facts) -> str:
    told = facts["config"]["conditional"]
    if told is None:
        return ""
    what = {"labels": "label", "embeddings": "caption", "low_res": f"low resolution, {told['factor']} times smaller"}
    return (
        f" The networks are told each image's {what[told['by']]}, and nothing about {told['dropout']:.0%} of the "
        f"images in training; images are drawn about held-out ones, with guidance {told['guidance']:g}."
    )


_STARTS = {
    "search": "",
    "initial": " Each region started from the weights before the first step, cut by its ticket.",
    "fresh": " Each region started from new weights, drawn at the widths of its ticket.",
}


def _first(facts: Facts) -> str:
    folder = facts["config"]["pretrained"]
    return "" if folder is None else f", first weights from {folder}"


def _rates(config: Facts) -> str:
    of_tickets = config["regions"]["lr"]
    return f"{config['train']['lr']:g}" + (f" (tickets {of_tickets:g})" if of_tickets else "")


def _notes(facts: Facts) -> str:
    train, sampler, both = facts["config"]["train"], facts["sampler"], "dense" in facts["marks"]
    search = facts["config"]["search"]
    return (
        f"{'Both arms: ' if both else ''}{facts['machine']}; batch {train['batch_size']} x {train['accumulate']}, "
        f"AdamW {_rates(facts['config'])}, EMA up to {train['ema_decay']:g}, precision {train['precision']}"
        f"{', the same first weights and seed' if both else ''}{_first(facts)}; trained on "
        f"{facts['data']['train']} images, judged with EMA weights on {facts['data']['test']} held-out ones. "
        + ("The control is dense and sees all timesteps in every step. " if both else "")
        + f"The sampler is DDIM, {sampler['steps']} steps ({sampler['spacing']}), of which "
        f"{' + '.join(map(str, sampler['in_region']))} fall into the regions. A training step counts three forward "
        "passes of MACs. Device-seconds are process CPU time, or wall-clock of the GPU; judging is not counted."
        + (" The search includes Diff-Pruning's passes." if search["criterion"] == "diff-pruning" else "")
        + (" MACs count every block of attention." if search["attention"] else "")
        + _STARTS[facts["config"]["regions"]["start"]]
        + _told(facts)
    )


def _timesteps(facts: Facts) -> str:
    train, steps = facts["config"]["train"], facts["config"]["regions"]["steps"]
    drawn = "spread evenly over each batch" if train["stratified"] else "each by itself"
    split = "as configured"
    if not isinstance(steps, list):
        split = f"what {steps} at equal shares cost, spent in proportion to what the sampler draws from each region"
    return (
        f"Timesteps are drawn by the sampler `{train['sampler']}`, {drawn}; weights have mean 1 in each run. "
        f"Steps of the regions: {split}."
    )


def _settling(facts: Facts, pictures: Mapping[str, str]) -> list[str]:
    """How masks moved during the search, if it watched them."""
    search, criterion = facts["search"], facts["config"]["search"]["criterion"]
    if not search["heatmaps"]:
        return []
    kind = "Chance-corrected Hamming" if search["corrected"] else "Normalised Hamming"
    return [
        f"![mask distances]({pictures['mask-distance']})",
        f"{kind} distance between the masks drawn during the search, by {criterion} scores; masks settle at "
        f"{search['eta']:g}, and a map ends where its ticket was drawn.",
    ]


def _between(facts: Facts) -> list[str]:
    rows = distances(facts)
    said = "How far the regions' masks are from each other; 1 in the last column is no more in common than chance:"
    return [said, rows] if rows else []
