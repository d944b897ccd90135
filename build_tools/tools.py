"""The tools of the build: a C++ compiler, ninja, pybind11. Each is found, or Missing says what to do about it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

__all__ = ["Compiler", "Missing", "cores", "find_compiler", "find_ninja", "find_pybind11", "find_python", "output_of"]


class Missing(Exception):
    """A part cannot be built.

    Args:
        problem: what is wrong.
        remedy: what the user can do.
        output: what the compiler itself said.
        failure: is it an error where nothing may fail? Not what nobody asked for, or what this machine has no tool for.
    """

    def __init__(self, problem: str, remedy: str, output: str = "", *, failure: bool = True) -> None:
        super().__init__(problem)
        self.problem, self.remedy, self.output, self.failure = problem, remedy, output, failure


class Compiler(NamedTuple):
    """A C++ compiler: the words that start its command line, and what it calls itself."""

    command: list[str]
    version: str


def output_of(command: list[str]) -> str:
    """What a command prints; raises OSError or CalledProcessError where it does not run."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def find_compiler() -> Compiler:
    """CXX, or else g++, clang++, c++ on PATH."""
    remedy = "install g++ 11 or later (Debian: apt install g++), or let CXX name a compiler"
    if os.name == "nt":
        raise Missing("the compiled part is for Linux and macOS", "on Windows ebdiff runs in pure Python")
    asked = shlex.split(os.environ.get("CXX", ""))
    command = asked or [name for name in ("g++", "clang++", "c++") if shutil.which(name)][:1]
    if not command:
        raise Missing("no C++ compiler on PATH", remedy)
    try:
        return Compiler(command, output_of([*command, "--version"]).splitlines()[0])
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise Missing(f"the C++ compiler does not run: {shlex.join(command)}", remedy, str(error)) from None


def find_ninja() -> str:
    """The ninja of the build environment, or of the system."""
    found = shutil.which("ninja")
    if not found:
        try:
            import ninja
        except ModuleNotFoundError:
            raise Missing("ninja is missing", "pip install ninja") from None
        found = str(Path(ninja.BIN_DIR) / "ninja")
    return found


def find_pybind11() -> tuple[Path, str]:
    """The folder of pybind11's headers, and its version."""
    try:
        import pybind11
    except ModuleNotFoundError:
        raise Missing("pybind11 is missing", "pip install pybind11") from None
    return Path(pybind11.get_include()), pybind11.__version__


def find_python() -> Path:
    """The folder of Python.h."""
    folder = Path(sysconfig.get_path("include"))
    if not (folder / "Python.h").exists():
        raise Missing("Python's own headers are missing", "install them (Debian: apt install python3-dev)")
    return folder


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
