"""A suite: data, a base network, and the few numbers that all its arms share; one YAML file beside this one each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ebdiff.config import Config, read, validated
from ebdiff.errors import EbdiffError

from .result import unplaced

HERE = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in HERE.glob("*.yaml")))


@dataclass(frozen=True)
class SearchPace:
    """How tickets are looked for.

    Args:
        steps: dense steps of a search of fixed length.
        most: of one that ends when its ticket has settled, at the latest.
        window, every: iteration-wise: masks compared span so many steps, one is drawn every so many.
        epoch: epoch-wise: one mask in so many steps, five are compared. A pseudo-epoch, since a real one is too long.
    """

    steps: int
    most: int
    window: int
    every: int
    epoch: int


@dataclass(frozen=True)
class Suite:
    """What all arms of a suite share.

    Args:
        name: also of its folder of results.
        about: one line.
        steps: of the dense arm; every other arm gets the steps that cost as many device-seconds, search included.
        lr: of every arm that does not change it.
        lrs: what `--tune` tries.
        search: how tickets are looked for.
        cost_of_step: {ratio: device-seconds of a step of a ticket over those of a dense step}; `--pace` measures them.
        base: sections of a configuration.
        cost_of_step_by_cost: as `cost_of_step`, of the one ratio of tickets that lose more where channels cost more
            (`search.scope`); a suite without it has no arms of such tickets.
        finetune: steps after pruning a trained network, over the dense steps.
        marks, score_marks: shares of the training at which arms are judged, and at which of them images are scored.
        dense_score_marks: the latter of the dense arms; drawing images takes longest with the whole network.
        threads: of each cell's process.
        arguments: how a command names it, with its images.
        tuning: is it there to choose the learning rate?
    """

    name: str
    about: str
    steps: int
    lr: float
    lrs: tuple[float, ...]
    search: SearchPace
    cost_of_step: Mapping[float, float]
    base: Mapping[str, Any]
    cost_of_step_by_cost: Mapping[float, float] = field(default_factory=dict)
    finetune: float = 0.125
    marks: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
    score_marks: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
    dense_score_marks: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    threads: int = 1
    arguments: str = ""
    tuning: bool = False

    @classmethod
    def load(cls, name: str) -> Suite:
        """The suite of this name, or of a YAML file.

        Raises:
            EbdiffError: there is none, the file has a key too many or too few, no cost of a dense step, or tickets by
                cost at several ratios.
        """
        path = HERE / f"{name}.yaml" if name in NAMES else Path(name)
        if path.suffix != ".yaml" or not path.is_file():
            raise EbdiffError("no such suite", expected=f"one of {', '.join(NAMES)}, or a .yaml file", got=name)
        values = read(path)
        by_cost = values.get("cost_of_step_by_cost", {})
        if not isinstance(by_cost, dict) or len(by_cost) > 1:
            raise EbdiffError(
                f"{path}: cost_of_step_by_cost",
                expected="one ratio and what its step costs, as {0.44: 0.27}",
                got=str(by_cost),
                remedy="leave one, or leave the key out and with it the arms eb-cost-*",
            )
        values |= {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        costs = values.get("cost_of_step")
        if not isinstance(costs, dict) or 0.0 not in costs:
            expected = "{ratio: what its step costs}, 0.0: 1.0 among them"
            raise EbdiffError(f"{path}: cost_of_step", expected=expected, got=str(costs), remedy=f"see {NAMES[0]}.yaml")
        try:
            arguments = f"--suite {name if name in NAMES else path.name}"
            return cls(name=path.stem, arguments=arguments, **{**values, "search": SearchPace(**values["search"])})
        except (KeyError, TypeError) as error:
            raise EbdiffError(f"{path} is no suite", got=str(error), remedy=f"see {NAMES[0]}.yaml") from None

    def on(self, data: str | None) -> Suite:
        """The same on images from elsewhere.

        Raises:
            EbdiffError: the suite needs images and got none.
        """
        if data is not None:
            base = {**self.base, "data": {**self.base.get("data", {}), "source": data}}
            return replace(self, base=base, arguments=f"{self.arguments} --data {unplaced(data)}")
        if "source" not in self.base.get("data", {}):
            raise EbdiffError(
                f"{self.name} needs images", expected="--data FILE", remedy="any .npz, folder or hf: name"
            )
        return self

    @property
    def on_gpu(self) -> bool:
        """Do its cells train on a GPU, here?"""
        device = self.base.get("device") or "auto"
        return torch.cuda.is_available() if device == "auto" else str(device).startswith("cuda")

    def price(self, ratio: float, scope: str = "local") -> float:
        """Device-seconds of a step of a ticket over those of a dense step.

        Raises:
            EbdiffError: the suite does not say.
        """
        costs = self.cost_of_step_by_cost if scope == "cost" else self.cost_of_step
        if ratio not in costs:
            raise EbdiffError(
                f"{self.name}: cost_of_step",
                expected=f"what a step costs at {ratio:g} removed",
                got=", ".join(f"{known:g}" for known in costs),
                remedy="add it with a guess; --pace measures it",
            )
        return costs[ratio]

    def quarter(self, lr: float) -> Suite:
        """A quarter of the steps, also of the search, at another learning rate; for `--tune`."""
        search = replace(self.search, steps=max(1, self.search.steps // 4))
        name = f"{self.name}/tune/{lr:g}"
        return replace(self, name=name, lr=lr, steps=self.steps // 4, search=search, tuning=True)

    def config(self, overrides: Mapping[str, Any], seed: int) -> Config:
        """The base with dotted keys on top, {"train.lr": 1e-3, ...}.

        No preset lies below it: what nobody says is the schema's default.

        Raises:
            EbdiffError: an unknown key, or a value that does not fit.
        """
        values: dict[str, Any] = copy.deepcopy(dict(self.base))
        shared = {
            "seed": seed,
            "train.lr": self.lr,
            "evaluate.marks": list(self.marks),
            "evaluate.score_marks": list(self.score_marks),
            "evaluate.control": False,
        }
        for key, value in {**shared, **overrides}.items():
            *path, last = key.split(".")
            section = values
            for part in path:
                section = section.setdefault(part, {})
            section[last] = value
        return validated(values)
