"""What the environment asks of the build; refused at once where it makes no sense."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["MODES", "Settings", "read"]

MODES = {
    "auto": "what can be built is built",
    "cpu": "the CPU part only, which must succeed",
    "cuda": "CPU and CUDA, which must both succeed",
    "none": "pure Python",
    "require": "as auto, but any failure is an error",
}


class Settings(NamedTuple):
    """Which parts to build, and how.

    Attributes:
        mode: a key of MODES.
        architectures: CUDA architectures asked for, such as ("90",); empty means the usual ones.
        werror: compiler warnings are errors.
    """

    mode: str = "auto"
    architectures: tuple[str, ...] = ()
    werror: bool = False

    @property
    def must_not_fail(self) -> bool:
        """Is a part that does not build an error?"""
        return self.mode in ("cpu", "cuda", "require")


def read(environment: Mapping[str, str]) -> Settings:
    """EBDIFF_BUILD, EBDIFF_CUDA_ARCHS ("90", "8.0 9.0") and EBDIFF_WERROR ("1").

    Raises:
        ValueError: a value that means nothing.
    """
    mode = environment.get("EBDIFF_BUILD") or "auto"
    if mode not in MODES:
        choices = ", ".join(f"{name} ({meaning})" for name, meaning in MODES.items())
        raise ValueError(f"EBDIFF_BUILD={mode!r} is none of: {choices}")
    asked = re.split(r"[\s,;]+", environment.get("EBDIFF_CUDA_ARCHS", "").strip())
    names = tuple(dict.fromkeys(name.replace(".", "") for name in asked if name))
    wrong = [name for name in names if not re.fullmatch(r"\d{2,3}[af]?", name)]
    if wrong:
        raise ValueError(f"EBDIFF_CUDA_ARCHS: expected numbers as in '80 90', got {', '.join(wrong)}")
    return Settings(mode, names, environment.get("EBDIFF_WERROR", "") not in ("", "0"))
