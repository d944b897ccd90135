"""Builds csrc/cuda with g++ instead of nvcc, as the module that it is part of: tests run the kernels on the CPU."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Emulator", "build", "needs_compiler"]

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = "-std=c++20 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror -DEBDIFF_CUDA_THREADS=64"
WATCHED = "-O1 -fsanitize=alignment,shift,signed-integer-overflow -Wno-unknown-pragmas -Wno-maybe-uninitialized"

needs_compiler = pytest.mark.skipif(
    shutil.which(shlex.split(os.environ.get("CXX", "g++"))[0]) is None or find_spec("pybind11") is None,
    reason="no g++, or no pybind11",
)


class Emulator:
    """The module, built so that its kernels run on the CPU, and the switches of the machine that runs them."""

    def __init__(self, path: Path) -> None:
        spec = spec_from_file_location("cuda_on_cpu._C", path)
        assert spec is not None
        assert spec.loader is not None
        self.module: Any = module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.switches = ctypes.CDLL(str(path))

    def order(self, order: int) -> None:
        """In which order threads and blocks run: 0 rising, 1 falling, else threads shuffled by this seed."""
        self.switches.emulator_order(order)

    def blocks(self, first: int = 0, last: int = 2**62) -> None:
        """Run only these blocks of each launch."""
        self.switches.emulator_blocks(ctypes.c_int64(first), ctypes.c_int64(last))

    def fail(self, why: str) -> None:
        """Let every launch fail with this message; not, if empty."""
        self.switches.emulator_fail(why.encode())

    def device(self) -> int:
        """The device that is current."""
        return int(self.switches.emulator_device())

    def launches(self) -> int:
        """How many there were since the last call."""
        return int(self.switches.emulator_launches())

    def blocks_run(self) -> int:
        """How many there were since the last call."""
        return int(self.switches.emulator_blocks_run())


def build(folder: Path) -> Emulator:
    """Compile everything in csrc with g++ into `folder`; about 15 seconds on two cores."""
    import pybind11

    compiler = os.environ.get("CXX", "g++").split()
    include = ["-I", str(CSRC), "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    # Another namespace: pybind11 tells types apart by name, and ebdiff._C may be loaded too.
    common = [*compiler, *FLAGS.split(), "-Debdiff=ebdiff_on_cpu", "-DEBDIFF_CUDA", *include]
    shim = [*WATCHED.split(), "-x", "c++", "-include", str(HERE / "shim.h")]
    sources = {path: shim if path.suffix == ".cu" else [] for path in CSRC.rglob("*.c*") if path.suffix != ".cuh"}
    sources[HERE / "emulator.cpp"] = ["-O1"]
    objects = [folder / f"{path.parent.name}_{path.name}.o" for path in sources]
    commands = [
        [*common, *extra, "-c", str(path), "-o", str(out)]
        for (path, extra), out in zip(sources.items(), objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    module = folder / "_C.so"
    _run([*compiler, "-shared", "-o", str(module), *map(str, objects), "-ldl", "-lpthread"])
    return Emulator(module)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, " ".join(command) + "\n" + done.stderr
