"""A configuration out of a preset, a file and overrides, and the one that is kept beside a run's results."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from ..errors import EbdiffError
from ..files import write_bytes
from .schema import Config

__all__ = ["FILE", "PRESETS", "completed", "keep", "read", "refuse_other", "resolve", "validated"]

PRESETS = (
    "smoke",
    "demo",
    "cifar10",
    "celeba",
    "lsun-church",
    "lsun-bedroom",
    "imagenet-ldm",
    "metfaces-dit",
    "metfaces-unet",
    "ffhq-dit",
    "ffhq-unet",
)
FILE = "config.yaml"
_NEEDED = {name for name, field in Config.model_fields.items() if field.is_required()}


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
    given = read(Path(file)) if file is not None else {}
    values = {} if preset is None and given.keys() >= _NEEDED else _preset(preset or "demo")
    _merge(values, given)
    for override in overrides:
        _override(values, override)
    if seed is not None:
        values["seed"] = seed
    return validated(values)


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
    saved, ours = dict(_flat(completed(read(path)))), dict(_flat(config.model_dump(mode="json")))
    different = [key for key in {**ours, **saved} if saved.get(key) != ours.get(key)]
    if different:
        raise EbdiffError(
            f"{path.parent} holds results of another configuration: {', '.join(different[:4])}"
            + (f" and {len(different) - 4} more" if len(different) > 4 else ""),
            expected=f"{different[0]}={saved.get(different[0])}",
            got=str(ours.get(different[0])),
            remedy="give another --out, or the same configuration",
        )


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """What a run kept, with the defaults of keys that are newer than it; as it is where it fits no longer."""
    try:
        return Config.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


def _preset(name: str) -> dict[str, Any]:
    """The values of a preset. One with a `base` changes another, and has a model of its own where the class differs."""
    if name not in PRESETS:
        raise EbdiffError(
            "no such preset", expected=f"one of {', '.join(PRESETS)}", got=name, remedy=_nearest(name, PRESETS)
        )
    values: dict[str, Any] = yaml.safe_load((resources.files("ebdiff.assets") / f"{name}.yaml").read_text("utf-8"))
    if "base" not in values:
        return values
    whole, own = _preset(values.pop("base")), values.pop("model", None)
    _merge(whole, values)
    if own is not None:
        alike = own.get("class") == whole["model"].get("class")
        whole["model"] = whole["model"] | own if alike else own
    return whole


def read(path: Path) -> dict[str, Any]:
    """The values of a YAML file, numbers and truth values as YAML 1.2 has them.

    Raises:
        EbdiffError: there is none, or it is no YAML of keys and values.
    """
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
        values[part] = inner = {} if values.get(part) is None else values[part]
        if not isinstance(inner, dict):
            raise EbdiffError(f"override of {key}", expected="a section", got=f"{part}={inner}", remedy="shorten it")
        values = inner
    _merge(values, {path[-1]: parsed})


def validated(values: Mapping[str, Any]) -> Config:
    """The configuration of these values.

    Raises:
        EbdiffError: the first key that is unknown (with the nearest valid one) or whose value does not fit.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> EbdiffError:
    """The first problem in one line; unknown keys first, since they cause the others."""
    problems = [(_path(each["loc"]), each) for each in error.errors(include_url=False)]
    for path, problem in problems:
        if problem["type"] == "extra_forbidden":
            known = _keys_beside(path)
            where = ".".join(map(str, path))
            return EbdiffError("unknown configuration key", got=where, remedy=_nearest(where, known))
    first = _key(problems[0][0])
    deepest = max((path for path, _ in problems if _key(path) == first), key=len)
    alike = [problem for path, problem in problems if path == deepest]
    message = " or ".join(dict.fromkeys(problem["msg"].removeprefix("Value error, ") for problem in alike))
    kind, where = alike[0]["type"], ".".join(map(str, deepest))
    return EbdiffError(
        f"configuration key {where}" if where else "configuration",
        expected=message,
        got="" if kind in ("missing", "value_error") else repr(alike[0]["input"]),
        remedy="give it, or a preset that does" if kind == "missing" else "see a config.yaml of a run",
    )


def _path(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The keys and places in lists, without what pydantic adds for each type that a value may have."""
    section, parts = Config, list[int | str]()
    for part in location:
        if isinstance(part, int) or section is not None:
            parts.append(part)
        section = _section(section, part)
    return tuple(parts)


def _key(path: tuple[int | str, ...]) -> list[str]:
    return [part for part in path if isinstance(part, str)]


def _section(section: Any, part: int | str) -> Any:
    """What lies at a key of a section; None where that has no keys of its own."""
    if section is None or part not in section.model_fields:
        return None
    kind = section.model_fields[part].annotation
    return next((each for each in get_args(kind) or (kind,) if hasattr(each, "model_fields")), None)


def _keys_beside(path: tuple[int | str, ...]) -> list[str]:
    section = reduce(_section, path[:-1], Config)
    return [".".join([*map(str, path[:-1]), name]) for name in section.model_fields]


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
