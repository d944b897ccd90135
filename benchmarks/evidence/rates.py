"""How a suite's learning rate was chosen: a few rates tried for the dense arm and for a ticket alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ebdiff.report_tables import table

from .counting import Facts, named

DENSE, TICKET = TUNED = "dense", "eb-speed-50"

FORMS = {"loss": ".4f", "fid": ".2f"}
RULE = "It follows the rule: the rate that is best for the ticket{by} and for the dense arm by held-out loss."


@dataclass(frozen=True)
class Tried:
    """What an arm came to at a learning rate.

    Args:
        lr, arm: which.
        loss, fid: scores at the end; None where there is none.
    """

    lr: float
    arm: str
    loss: float | None = None
    fid: float | None = None

    @classmethod
    def of(cls, lr: float, arm: str, facts: Facts | None) -> Tried:
        """From a cell's result, None where it is not finished."""
        end = facts["curve"][-1] if facts is not None else {"loss": None, "fid": None}
        return cls(lr, arm, end["loss"], end["fid"])

    def score(self, measure: str) -> float | None:
        """By "loss" or "fid"."""
        return self.fid if measure == "fid" else self.loss


def best(tried: Sequence[Tried], arm: str, measure: str) -> tuple[float, float]:
    """(lowest score, its learning rate) of an arm that has scores."""
    scores = [(each.score(measure), each.lr) for each in tried if each.arm == arm]
    return min((score, lr) for score, lr in scores if score is not None)


def chosen(lr: float, tried: Sequence[Tried]) -> str:
    """Which rate is best for whom by which measure, and whether `lr`, that of all arms, follows from it.

    Args:
        tried: of both arms, all with a loss. FIDs count where all have one.
    """
    measures = ["loss", "fid"] if all(each.fid is not None for each in tried) else ["loss"]
    words = []
    for arm in TUNED:
        found = [(measure, *best(tried, arm, measure)) for measure in measures]
        rates = [f"{rate:g} by {named(measure)} ({score:{FORMS[measure]}})" for measure, score, rate in found]
        words.append(f"for {arm}: {', '.join(rates)}")
    text = f"Arms train at {lr:g}, where they do not say otherwise. Best of those tried, {'; '.join(words)}."
    if lr == best(tried, DENSE, "loss")[1] == best(tried, TICKET, measures[-1])[1]:
        text += " " + RULE.format(by=f" by {named('fid')}" if "fid" in measures else "")
    return text


def tabled(name: str, steps: int, tried: Sequence[Tried]) -> str:
    """A row per learning rate and arm.

    Args:
        name: the suite's.
        steps: of the dense arm.
    """
    rows = []
    for each in tried:
        scores = [(each.score(measure), form) for measure, form in FORMS.items()]
        words = ["-" if score is None else f"{score:{form}}" for score, form in scores]
        rows.append([f"{each.lr:g}", each.arm, *words])
    text = f"Learning rates of {name}: {steps} dense steps or what costs as much, one seed.\n\n"
    return text + table(["lr", "arm", *map(named, FORMS)], rows)
