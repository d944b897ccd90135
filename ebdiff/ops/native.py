"""The compiled part, ebdiff._C: there or not, and why not. It takes raw addresses; only ebdiff.ops may call it.

EBDIFF_NATIVE=0 switches it off, so that the references serve everything; EBDIFF_C_PATH names another build of it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from .sources import ABI, STATUS, digest_of

__all__ = ["again", "covers", "facts", "has_cuda", "is_outdated", "missing", "module", "why_not"]

PACKAGE = Path(__file__).resolve().parent.parent
CSRC = PACKAGE.parent / "csrc"


def module() -> ModuleType | None:
    """ebdiff._C, or None: `why_not()` says why."""
    return _load()[0]


def why_not() -> str:
    """Why there is no compiled part, and what to do; empty where there is one."""
    return _load()[1]


def has_cuda() -> bool:
    """Is there a compiled part that holds the CUDA kernels? They were compiled for `facts()["architectures"]`."""
    return "cuda" in facts().get("parts", ())


@cache
def covers(major: int, minor: int) -> bool:
    """Do the CUDA kernels run on a device of this compute capability?

    Machine code serves its own major version from its minor version on, PTX everything that is not older.
    """
    for name in facts().get("architectures", ()):
        kind, number, exact = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", name).groups()  # type: ignore[union-attr]
        built = divmod(int(number), 10)
        if built == (major, minor):
            return True
        if not exact and built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return False


@cache
def facts() -> dict[str, Any]:
    """What the compiled part says about its build: parts, sources, compiler, nvcc, architectures; {} without one."""
    compiled = module()
    return dict(compiled.build_info()) if compiled else {}


def missing() -> dict[str, dict[str, str]]:
    """What the last build left out: {"cpu" or "cuda": {"problem", "remedy", "output"}}; {} where nothing was noted."""
    return dict(_note().get("missing", {}))


def is_outdated() -> bool:
    """Was the compiled part built from other sources than those that lie beside the package?"""
    return _in_checkout() and facts().get("sources", "") not in ("", digest_of(CSRC))


def again() -> str:
    """The command that builds the compiled part."""
    return "pip install -e ." if _in_checkout() else "pip install --force-reinstall --no-deps --no-binary ebdiff ebdiff"


def _in_checkout() -> bool:
    """Is this the source tree, and not site-packages, where csrc may be anybody's?"""
    return CSRC.is_dir() and (PACKAGE.parent / "setup.py").is_file()


@cache
def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("EBDIFF_NATIVE") == "0":
        return None, "switched off by EBDIFF_NATIVE=0"
    path = os.environ.get("EBDIFF_C_PATH") or _beside()
    if not path:
        return None, _not_built()
    try:
        compiled = _import(path)
    except (ImportError, OSError) as error:
        return None, f"it does not load ({error}); {again()}"
    if getattr(compiled, "ABI", None) != ABI:
        return None, f"built from other sources (ABI {getattr(compiled, 'ABI', None)}, not {ABI}); {again()}"
    return compiled, ""


def _beside() -> str:
    """The module in this very package; by name, another installation's might answer."""
    paths = (PACKAGE / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((str(path) for path in paths if path.exists()), "")


def _import(path: str) -> ModuleType:
    spec = spec_from_file_location("ebdiff._C", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no extension module")
    compiled = module_from_spec(spec)
    spec.loader.exec_module(compiled)
    sys.modules["ebdiff._C"] = compiled
    return compiled


def _not_built() -> str:
    note = _note()
    why = missing().get("cpu")
    if why:
        return f"not built: {why['problem']}; {why['remedy']}, then {again()}"
    tag = sys.implementation.cache_tag
    if note.get("python", tag) != tag:
        return f"built for {note['python']}, not for this {tag}; {again()}"
    return f"not built; {again()}"


def _note() -> dict[str, Any]:
    try:
        return dict(json.loads((PACKAGE / STATUS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
