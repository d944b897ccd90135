"""The tables of a suite: results in, markdown out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from ebdiff.report_tables import table

from .arms import ARMS
from .counting import (
    LATE,
    SEEDS,
    SHARES,
    Clock,
    Facts,
    Headline,
    Results,
    Spread,
    compared,
    headline,
    measure_of,
    named,
    on_clock,
    reached_in_macs,
    seconds_at,
    wall_seconds,
)
from .rates import Tried, chosen, tabled
from .suite import Suite

RULE = (
    "Device-seconds are {device}; those of all stages are added up, the search included, and of arms that start from "
    "the dense arm's network all of its own. Judging is not counted. {clock} Between two marks scores are linear in "
    "the logarithm of the device-seconds. *To the dense score*: where an arm's curve first comes down to the final "
    "{measure} of the dense arm of the same seed, over all device-seconds of that dense arm. *At 25, 50 and 100%*: the "
    "{measure} of the network that the device-seconds give which the dense arm had taken at this share of its steps; "
    "where an arm's first scored network is up to {late:.0%} later, that one's; an arm that ended before keeps its "
    "last, and one that starts from the dense arm's network has none. Mean ± standard deviation over seeds, of scores "
    "over those that the dense arm has, too; numbers alone are means. A star marks fewer than {seeds} seeds."
)
OWN = "A step counts the seconds that it took in its own cell; cells ran beside other work."
CLOCKED = (
    "Steps count the seconds of one clock, on which all networks were timed in turn (`--clock`, {place}).{missing}"
)
MISSING = (
    " Nothing that counts seconds is compared of {arms} (not on the clock yet: run --clock); their costs are those of "
    "their own cells."
)


def markdown(
    suite: Suite,
    results: Results,
    unfinished: Sequence[str],
    clock: Clock | None,
    pictures: Mapping[str, str],
    tuning: Sequence[Tried] = (),
    place: str = "",
) -> str:
    """The page of a suite.

    Args:
        results: of finished cells.
        unfinished: a line for each of the others.
        clock: see `counting`.
        pictures: {what: file name} beside the page.
        tuning: what came of the suite's learning rates; empty where not all of them were tried.
        place: where the clock's seconds were measured.
    """
    parts = [f"# {suite.name}: {suite.about}"]
    if "dense" not in results:
        return "\n\n".join([*parts, "No dense arm is finished, so nothing can be compared.", *_rest(unfinished)]) + "\n"
    measure = measure_of(results)
    parts += [
        _setting(suite, results, measure, clock, bool(tuning), place),
        provenance(results),
        "## When an arm is as good as the dense one",
        table(
            [title.format(named(measure)) for title in _HEADLINES],
            headlines(results, measure, clock),
        ),
        *(f"![{what}]({name})" for what, name in pictures.items()),
        "## What arms cost",
        table(
            _COSTS if clock is None else [*_COSTS[:2], "measured in its own cell", *_COSTS[2:]], costs(results, clock)
        ),
        *_given(strayed(results, clock)),
        "## Arms",
        table(["arm", "what it is"], [[name, ARMS[name].about] for name in results]),
        *_rate(suite, tuning),
        "## Provenance",
        provenance(results, in_full=True),
        *_rest(unfinished),
    ]
    return "\n\n".join(parts) + "\n"


_HEADLINES = [
    "arm",
    "seeds",
    "to the dense score",
    "{} at 25%",
    "at 50%",
    "at 100%",
    "at its end",
    "held-out loss at its end",
    "precision, recall",
    "to the dense score, in MACs",
]


def headlines(results: Results, measure: str, clock: Clock | None) -> list[list[str]]:
    """A row per arm, of the seeds that the dense arm has, too."""
    rows = []
    form = ".2f" if measure == "fid" else ".4f"
    for arm, found in results.items():
        head = headline(found, results["dense"], measure, clock)
        ends = [facts["curve"][-1] for facts in compared(found, results["dense"])]
        rows.append(
            [
                arm,
                f"{head.seeds}{'' if head.seeds >= SEEDS else ' *'}",
                to_dense(head),
                *("-" if ARMS[arm].after else head.at[share].text(form) for share in SHARES),
                head.final.text(form),
                Spread(tuple(end["loss"] for end in ends)).text(".4f"),
                ", ".join(_mean(ends, key, ".2f") for key in ("precision", "recall")),
                reached_in_macs(found, results["dense"], measure).text(),
            ]
        )
    return rows


def to_dense(head: Headline) -> str:
    """Share of the dense device-seconds, and how many seeds got there where not all did."""
    count = len(head.reached.values)
    if not count:
        return head.absent
    return head.reached.text() + ("" if count == head.seeds else f" ({count} of {head.seeds} seeds)")


_COSTS = [
    "arm",
    "device-seconds",
    "before the regions",
    "wall-clock, a device per region",
    "steps",
    "a step, s",
    "parameters stored",
    "at work",
    "MACs of an image per sampler step",
    "per training step, timesteps uniform",
    "ticket settled",
]


def costs(results: Results, clock: Clock | None) -> list[list[str]]:
    """A row per arm; means over seeds. With a clock, there is a column more: what the cells themselves took."""
    rows = []
    for arm, found in results.items():
        seconds = _clocked if clock is not None and on_clock(found, clock) else _seconds
        spent = [seconds_at(facts, facts["curve"][-1], clock) for facts in found]
        before = [sum(s for name, s in each.items() if not name.startswith("region")) for each in spent]
        ends = [facts["curve"][-1]["stages"] for facts in found]
        stages = [name for name, stage in ends[0].items() if stage["steps"]]
        steps = {name: [end[name]["steps"] for end in ends] for name in stages}
        per_step = {name: [s[name] / n for s, n in zip(spent, steps[name], strict=True)] for name in stages}
        parameters, macs = mean_of(found, "parameters"), mean_of(found, "macs_per_image")
        rows.append(
            [
                arm,
                seconds([sum(each.values()) for each in spent]),
                *([] if clock is None else [_seconds([_total(facts) for facts in found])]),
                seconds(before),
                seconds([wall_seconds(facts, clock) for facts in found]),
                " + ".join(f"{mean(steps[name]):.0f}" for name in stages),
                " / ".join(f"{mean(per_step[name]):.3f}" for name in stages),
                *(
                    f"{parameters[key] / 1e6:.2f}M ({parameters[key] / parameters['dense']:.0%})"
                    for key in ("stored", "active")
                ),
                *(f"{macs[key] / 1e6:.1f}M ({macs[key] / macs['dense']:.0%})" for key in ("sampler", "uniform")),
                settled(found),
            ]
        )
    return rows


def strayed(results: Results, clock: Clock | None) -> str:
    """How far the other arms' device-seconds lie from the dense arm's; empty where there is none to compare."""
    timed = {arm: found for arm, found in results.items() if on_clock(found, clock)}
    means = {arm: mean(_total(facts, clock) for facts in found) for arm, found in timed.items()}
    others = [arm for arm in means if arm != "dense" and not ARMS[arm].after]
    if "dense" not in means or not others:
        return ""
    shares = [means[arm] / means["dense"] for arm in others]
    by = "this clock" if clock is not None else "the seconds of their own cells"
    span = " to ".join(dict.fromkeys(f"{share:.2f}" for share in (min(shares), max(shares))))
    return (
        f"By {by} arms spent {span} of the dense arm's device-seconds; the columns at 25, 50 and 100% compare at equal "
        "ones."
    )


def mean_of(found: Sequence[Facts], what: str) -> dict[str, float]:
    """Numbers of these names, means over seeds."""
    return {key: mean(facts[what][key] for facts in found) for key in found[0][what]}


def settled(found: Sequence[Facts]) -> str:
    """At which step of the search, seed by seed; regions beside each other.

    A trained network is pruned at once, whatever passes its criterion takes before.
    """
    if ARMS[found[0]["arm"]].after:
        return "drawn once"
    if not found[0]["curve"][-1]["stages"]["search"]["steps"]:
        return "no search"
    seeds = []
    for facts in found:
        seeds.append("/".join(str(t["step"]) if t["settled"] else "no" for t in facts["tickets"]))
    return ", ".join(seeds)


def provenance(results: Results, in_full: bool = False) -> str:
    """How many cells of how many commits, and how many of them ran from library code that differs from its commit.

    Args:
        in_full: with their names, and torch's versions.
    """
    commits = {
        f"{arm}-{facts['seed']}": facts["machine"]["commit"] for arm, found in results.items() for facts in found
    }
    names = list(dict.fromkeys(name.rstrip("+") for commit in commits.values() for name in commit.split(", ")))
    loose = [f"{cell} ({commit})" for cell, commit in commits.items() if "+" in commit]
    start = f"{_plural(len(commits), 'cell')} of {_plural(len(names), 'commit')}"
    if not in_full:
        among = f", {len(loose)} of them from uncommitted library code in part" if loose else ""
        return f"{start}{among} (see Provenance)."
    versions = dict.fromkeys(facts["machine"]["torch"] for found in results.values() for facts in found)
    text = f"{start} ({', '.join(names)}), torch {', '.join(versions)}."
    if loose:
        text += (
            "\n\nCells that ran, at one start at least, from library code that differs from the commit, "
            f"marked by a plus: {', '.join(loose)}."
        )
    silent = sum("data" not in facts for found in results.values() for facts in found)
    if silent:
        text += f"\n\n{_plural(silent, 'cell')} kept no fingerprint of the images, as older ones did not."
    return text


def _rate(suite: Suite, tuning: Sequence[Tried]) -> list[str]:
    """How the learning rate was chosen, where it was."""
    if not tuning:
        return []
    steps = suite.quarter(suite.lr).steps
    return ["## Learning rate", chosen(suite.lr, tuning), tabled(suite.name, steps, tuning)]


def _setting(suite: Suite, results: Results, measure: str, clock: Clock | None, tuned: bool, place: str) -> str:
    config = results["dense"][0]["config"]
    train, machines = config["train"], [facts["machine"] for found in results.values() for facts in found]
    places = dict.fromkeys(f"{machine['threads']}, {machine['cpu']}" for machine in machines)
    tried = "not tuned yet"
    if tuned:
        rates = ", ".join(f"{lr:g}" for lr in suite.lrs)
        tried = f"of {rates}, tried for the dense arm and for a ticket of half the channels alike"
    missing = [arm for arm, found in results.items() if not on_clock(found, clock)]
    note = MISSING.format(arms=", ".join(missing)) if missing else ""
    rule = RULE.format(
        device="CPU seconds of the process" if machines[0]["device"] == "cpu" else "wall-clock of the GPU",
        clock=OWN if clock is None else CLOCKED.format(place=place, missing=note),
        measure=named(measure),
        seeds=SEEDS,
        late=LATE,
    )
    return (
        f"Every arm, where it does not say otherwise: {' or '.join(places)}; batch {train['batch_size']} x "
        f"{train['accumulate']}, AdamW {train['lr']:g} "
        f"({tried}), EMA up to {train['ema_decay']:g}, {config['evaluate']['samples']} images in "
        f"{config['sample']['steps']} DDIM steps, judged with EMA weights.\n\n{rule}"
    )


def _total(facts: Facts, clock: Clock | None = None) -> float:
    """Device-seconds of all stages."""
    return sum(seconds_at(facts, facts["curve"][-1], clock).values())


def _seconds(values: Sequence[float]) -> str:
    return Spread(tuple(values)).text(".0f")


def _clocked(values: Sequence[float]) -> str:
    """Steps of equal networks count alike: seeds differ only where their searches ended apart."""
    return _seconds(values).removesuffix(" ± 0")


def _mean(ends: Sequence[Facts], key: str, form: str) -> str:
    values = [end[key] for end in ends if end[key] is not None]
    return f"{sum(values) / len(values):{form}}" if values else "-"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _given(text: str) -> list[str]:
    return [text] if text else []


def _rest(unfinished: Sequence[str]) -> list[str]:
    return ["## Not finished", "\n".join(f"- {line}" for line in unfinished)] if unfinished else []
