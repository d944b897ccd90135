"""setuptools' build_ext, for the one extension: build it, then put it in place whole or not at all."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

from .build import ROOT, Outcome, sources
from .build import build as make
from .settings import read

__all__ = ["Build", "BuildCompiled"]

LONGEST = 4000  # characters of a compiler's message that are kept for `ebdiff info`


class Build(build):
    """`build` that runs build_ext always: with nothing to compile, an older module is still to be taken away."""

    sub_commands = (("build_py", None), ("build_ext", None))


class BuildCompiled(build_ext):
    """Builds ebdiff._C as EBDIFF_BUILD says and writes down what could not be built."""

    def run(self) -> None:
        """Build, report, put in place.

        Raises:
            CompileError: a part that had to be built was not.
        """
        settings = read(os.environ)
        with _workplace() as folder:
            outcome = make(settings, folder)
            print(_report(outcome), flush=True)
            failures = [why.problem for why in outcome.missing.values() if why.failure]
            if settings.must_not_fail and failures:  # an error changes nothing: what was there stays
                raise CompileError(f"EBDIFF_BUILD={settings.mode}, but {failures[0]}")
            _place(outcome, self._target(), Path(self.get_ext_filename("_C")).name, settings.mode)

    def get_outputs(self) -> list[str]:
        """The module and the note beside it, in build_lib."""
        return sorted(self.get_output_mapping()) if self.inplace else self._files(self._target())

    def get_output_mapping(self) -> dict[str, str]:
        """{file in build_lib: file in the source tree}, for installs that link."""
        if not self.inplace:
            return {}
        here = self._files(ROOT / "ebdiff")
        return {str(Path(self.build_lib, "ebdiff", Path(path).name)): path for path in here}

    def _target(self) -> Path:
        return ROOT / "ebdiff" if self.inplace else Path(self.build_lib, "ebdiff")

    def _files(self, folder: Path) -> list[str]:
        names = (sources().STATUS, Path(self.get_ext_filename("_C")).name)
        return [str(folder / name) for name in names if (folder / name).exists()]


@contextlib.contextmanager
def _workplace() -> Iterator[Path]:
    """build/ in the source tree, where a second build finds what the first one made; elsewhere if it is read-only."""
    try:
        (ROOT / "build").mkdir(exist_ok=True)
        writable = os.access(ROOT / "build", os.W_OK)
    except OSError:
        writable = False
    if writable:
        yield ROOT / "build"
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def _report(outcome: Outcome) -> str:
    lines = [f"ebdiff._C: built {' and '.join(outcome.parts) or 'nothing; ebdiff runs in pure Python'}"]
    for part, why in outcome.missing.items():
        lines += [*why.output.splitlines(), f"ebdiff._C: no {part} part: {why.problem}; {why.remedy}"]
    return "\n".join(lines)


def _place(outcome: Outcome, folder: Path, name: str, mode: str) -> None:
    """Put the module into a folder in one step; without one, take an older one away. The note goes beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES):
        if old.exists() and (outcome.module is None or old.name != name):
            old.unlink()
    if outcome.module is not None and not _same(outcome.module, folder / name):
        _replace(folder / name, outcome.module.read_bytes())
    note: dict[str, Any] = {"python": sys.implementation.cache_tag, "asked": mode, "built": outcome.parts}
    note["missing"] = {
        part: {"problem": why.problem, "remedy": why.remedy, "output": why.output[-LONGEST:]}
        for part, why in outcome.missing.items()
    }
    _replace(folder / sources().STATUS, (json.dumps(note, indent=1) + "\n").encode())


def _same(one: Path, other: Path) -> bool:
    return other.exists() and filecmp.cmp(one, other, shallow=False)


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        beside.chmod(0o755 if path.suffix == ".so" else 0o644)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
