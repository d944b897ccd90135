"""The configuration of a run: one schema, presets as YAML beside it, files and dotted overrides on top.

Every number of steps is fixed here and costs that decide anything are MACs: no timing decides what is trained.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import EbdiffError
from .files import write_bytes

__all__ = ["PRESETS", "Config", "keep", "resolve"]

PRESETS = ("smoke", "demo", "cifar10")
FILE = "config.yaml"


class Section(BaseModel):
    """Unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    """Which images; see `ebdiff.data.load_images`."""

    source: str = "fashion16"
    size: int | None = Field(default=None, ge=1)
    channels: Literal[1, 3] | None = None
    limit: int | None = Field(default=None, ge=1)


class Schedule(Section):
    """The noise: DDPM's schedule (Ho et al. 2020) by default."""

    timesteps: int = Field(default=1000, ge=2)
    beta_start: float = Field(default=1e-4, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"


class Train(Section):
    """What all training runs share: the search, every region and the dense control.

    `sampler`: how timesteps are drawn and weighted, one of `ebdiff.timesteps.SAMPLERS`; `stratified`: spread them
    evenly over each batch.
    """

    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=2e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip: float | None = Field(default=1.0, gt=0)
    accumulate: int = Field(default=1, ge=1)
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    precision: Literal["no", "bf16"] = "no"
    flip: bool = True
    sampler: str = "speed"
    stratified: bool = True
    checkpoint_every: int = Field(default=1000, ge=1)
    log_every: int = Field(default=50, ge=1)


class Search(Section):
    """The dense run that tickets are drawn from; see `ebdiff.EarlyBird`.

    `ratios` is the share of channels REMOVED per region; "auto" splits `macs`, the share of the dense MACs KEPT on
    average over all timesteps, by each region's predicted loss increase.
    """

    steps: int = Field(ge=1)
    ratios: list[float] | Literal["auto"] = [0.3, 0.6, 0.8]
    macs: float | None = Field(default=None, gt=0, lt=1)
    criterion: Literal["magnitude", "magnitude-l1", "taylor", "random"] = "taylor"
    window: int = Field(ge=1)
    every: int | None = Field(default=None, ge=1)
    eta: float | None = Field(default=None, gt=0)
    corrected: bool = False
    norm: Literal["ragged", "balanced"] = "ragged"
    multiple_of: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _auto(self) -> Search:
        if (self.ratios == "auto") != (self.macs is not None):
            raise ValueError("ratios: auto goes with macs, the share of the dense MACs to keep; a list goes without")
        if self.ratios == "auto" and self.criterion != "taylor":
            raise ValueError("ratios: auto predicts the loss from gradients, so it needs criterion: taylor")
        return self


class Regions(Section):
    """Which timesteps each ticket serves: bounds that tile the schedule, or a list of [lo, hi) pairs.

    `overlap`: so many more timesteps upward in training. `steps`: training steps of each region after the search; or
    one number for all, whose cost at equal shares is spent in proportion to what the sampler draws from each region.
    `branch_at`: first train one network, of the channels that any region keeps, for so many steps on all timesteps.
    """

    bounds: list[int] | list[tuple[int, int]] = [0, 240, 440, 1000]
    overlap: int = Field(default=20, ge=0)
    steps: list[int] | int
    branch_at: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _trained(self) -> Regions:
        steps = self.steps if isinstance(self.steps, list) else [self.steps]
        if not steps or min(steps) < 1:
            raise ValueError(f"steps: a whole number of at least 1 for each region, or one for all, got {self.steps}")
        return self


class Sample(Section):
    """DDIM (Song et al. 2021) without noise."""

    steps: int = Field(default=100, ge=1)
    spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    batch_size: int = Field(default=128, ge=1)
    grid: int = Field(default=64, ge=1)


class Evaluate(Section):
    """How both arms are judged.

    `marks`: at which shares of the regions' training both arms are compared at equal MACs; 0 is the end of the search,
    1 (always included) the end. `score_marks`: at which of them images are drawn and scored, too.
    `margin`: relative difference below which the report calls two scores equal.
    """

    marks: list[float] = [0.0, 0.5, 1.0]
    score_marks: list[float] = [1.0]
    samples: int = Field(default=50_000, ge=5)
    extractor: str = "auto"
    loss_bins: int = Field(default=20, ge=1)
    loss_per_bin: int = Field(default=256, ge=1)
    margin: float = Field(default=0.05, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Evaluate:
        if any(not 0 <= mark <= 1 for mark in self.marks) or sorted(set(self.marks)) != self.marks:
            raise ValueError("marks: rising shares in [0, 1]")
        if 1.0 not in self.marks or 1.0 not in self.score_marks or not set(self.score_marks) <= set(self.marks):
            raise ValueError("marks and score_marks end with 1.0, and every score mark is one of the marks")
        return self


class Config(Section):
    """Everything a run depends on. `model`: the arguments of diffusers' UNet2DModel."""

    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    model: dict[str, Any]
    data: Data = Data()
    schedule: Schedule = Schedule()
    train: Train = Train()
    search: Search
    regions: Regions
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()

    def to_yaml(self) -> str:
        """The whole configuration, defaults included."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)
        return text


def resolve(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    seed: int | None = None,
) -> Config:
    """The configuration that a preset, a YAML file and overrides make, each on top of the one before.

    Args:
        preset: one of PRESETS; by default "demo", or none at all when the file has every section that needs one.
        file: YAML with any part of the schema; its `model` replaces the preset's as a whole.
        overrides: "train.lr=1e-4" and the like, values in YAML.
        seed: overrides everything else's.

    Raises:
        EbdiffError: no such preset or file, an unknown key (with the nearest valid one), a value that does not fit.
    """
    values = _preset(preset or "demo")
    if file is not None:
        _merge(values, _read(Path(file)))
    for override in overrides:
        _override(values, override)
    if seed is not None:
        values["seed"] = seed
    return _validated(values)


def keep(config: Config, folder: str | Path) -> None:
    """Write config.yaml beside the results; a folder that holds results of another configuration is refused.

    Raises:
        EbdiffError: names the first key that differs.
    """
    path = Path(folder) / FILE
    if path.exists():
        refuse_other(config, path)
    else:
        write_bytes(path, config.to_yaml().encode())


def refuse_other(config: Config, path: Path) -> None:
    """Raise unless the configuration kept at `path` is this one."""
    saved, ours = dict(_flat(_read(path))), dict(_flat(config.model_dump(mode="json")))
    different = [key for key in {**ours, **saved} if saved.get(key) != ours.get(key)]
    if different:
        raise EbdiffError(
            f"{path.parent} holds results of another configuration: {', '.join(different[:4])}"
            + (f" and {len(different) - 4} more" if len(different) > 4 else ""),
            expected=f"{different[0]}={saved.get(different[0])}",
            got=str(ours.get(different[0])),
            remedy="give another --out, or the same configuration",
        )


def _preset(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise EbdiffError(
            "no such preset", expected=f"one of {', '.join(PRESETS)}", got=name, remedy=_nearest(name, PRESETS)
        )
    values: dict[str, Any] = yaml.safe_load((resources.files("ebdiff.assets") / f"{name}.yaml").read_text("utf-8"))
    return values


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise EbdiffError("no configuration file", expected="a YAML file", got=str(path), remedy="check the path")
    try:
        values = yaml.load(path.read_text("utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EbdiffError(f"{path} is no YAML", got=" ".join(str(error).split()), remedy="correct it") from None
    if values is not None and not isinstance(values, dict):
        raise EbdiffError(f"{path}", expected="keys and values", got=type(values).__name__, remedy="see a config.yaml")
    return values or {}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and truth values: 1e-4 is a number and "no" is a word (PyYAML follows YAML 1.1)."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def _merge(values: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if key != "model" and isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _override(values: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise EbdiffError("override", expected="key=value, as train.lr=1e-4", got=text, remedy="see a config.yaml")
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        raise EbdiffError(f"override of {key}", expected="a YAML value", got=value, remedy="quote it") from None
    for part in path[:-1]:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise EbdiffError(f"override of {key}", expected="a section", got=f"{part}={inner}", remedy="shorten it")
        values = inner
    values[path[-1]] = parsed


def _validated(values: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> EbdiffError:
    """The first problem in one line; unknown keys first, since they cause the others."""
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    where = ".".join(str(part) for part in problem["loc"]) or "configuration"
    if problem["type"] == "extra_forbidden":
        known = _keys_beside(problem["loc"])
        return EbdiffError("unknown configuration key", got=where, remedy=_nearest(where, known))
    message = problem["msg"].removeprefix("Value error, ")
    got = "" if problem["type"] in ("missing", "value_error") else repr(problem["input"])
    return EbdiffError(f"configuration key {where}", expected=message, got=got, remedy="see a config.yaml of a run")


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    section: Any = Config
    for part in location[:-1]:
        section = section.model_fields[str(part)].annotation
    return [".".join([*map(str, location[:-1]), name]) for name in section.model_fields]


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1, 0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value), dictionaries opened."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
