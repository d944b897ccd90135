"""Checkpoints that are either whole or not there: safetensors and JSON, checksummed, a few newest kept."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import EbdiffError
from ..files import checksum, digest, read_json, read_tensors, sync, write_json, write_tensors

__all__ = ["Checkpoints", "Saved"]

_TENSORS, _FACTS = "state.safetensors", "state.json"
_NAME = re.compile(r"(step|\.old)-\d{8,}\Z")  # anything else in the folder is somebody else's


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, a folder each (step-00001234), written beside and renamed into place.

    Args:
        folder: where they live; made at the first `save`.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise EbdiffError(
                "Checkpoints", expected="keep of at least 1", got=str(keep), remedy="keep=2 is the default"
            )
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove all but it and the newest others, and what a killed write left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean()
        place, beside = self.folder / f"step-{step:08d}", self.folder / f".new-{step:08d}"
        write_tensors(beside / _TENSORS, tensors)
        content = {"step": step, "facts": dict(facts)}
        write_json(beside / _FACTS, {**content, "sha256": [checksum(beside / _TENSORS), digest(content)]})
        if place.exists():  # the same step again: the old one goes only when the new one is whole
            os.rename(place, self.folder / f".old-{step:08d}")
        os.rename(beside, place)
        sync(self.folder)
        # Never the one just written, even when damaged or abandoned ones of later steps lie beside it.
        for old in [other for other in self._places() if other != place][self.keep - 1 :]:
            shutil.rmtree(old)
        self._clean()

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole; None where there is none at all. Damaged ones are named in a warning.

        Raises:
            EbdiffError: there are checkpoints, and every one is damaged.
        """
        problems = []
        for place in self._places():
            try:
                return _read(place)
            except EbdiffError as error:
                problems.append(str(error))
                warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=2)
        if problems:
            raise EbdiffError(
                f"no whole checkpoint in {self.folder}",
                expected="one whole checkpoint",
                got=problems[0],
                remedy="restore one, or remove the folder to start again",
            )
        return None

    def newest_step(self) -> int | None:
        """The step of the newest checkpoint, unread."""
        places = self._places()
        return _step(places[0]) if places else None

    def _places(self) -> list[Path]:
        """Newest first; a step that was killed while its new checkpoint took the old one's place has the old one."""
        found = [
            place for kind in (".old", "step") for place in self.folder.glob(f"{kind}-*") if _NAME.match(place.name)
        ]
        places = {_step(place): place for place in found}
        return [places[step] for step in sorted(places, reverse=True)]

    def _clean(self) -> None:
        for place in self._places():
            if place.name.startswith("."):
                os.rename(place, self.folder / f"step-{_step(place):08d}")
        for left in [*self.folder.glob(".new-*"), *self.folder.glob(".old-*")]:
            shutil.rmtree(left)


def _step(place: Path) -> int:
    return int(place.name.rpartition("-")[2])


def _read(place: Path) -> Saved:
    content = read_json(place / _FACTS)
    wanted = content.pop("sha256", None) if isinstance(content, dict) else None
    tensors, _ = read_tensors(place / _TENSORS)
    found = [checksum(place / _TENSORS), digest(content)]
    if found != wanted:
        raise EbdiffError(f"{place} was changed", expected=f"sha256 {wanted}", got=str(found))
    return Saved(content["step"], tensors, content["facts"])
