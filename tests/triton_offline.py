"""Triton's kernels without a GPU: interpreted on the CPU, and compiled for architectures that are not here."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", minversion="3.6")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
# Registers are given out to a warp eight a thread at a time: less than that changes no occupancy.
REGISTERS_APART = 8
ABOUT = "[registers a thread, bytes of shared memory, 128-bit loads, 128-bit stores]"

needs_tools = pytest.mark.skipif(
    not all((TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump", "nvdisasm")), reason="no tools in Triton"
)
known: dict[tuple[Any, ...], Any] = {}  # what has been compiled: some kernels are the same in several variants


# Interpreted ----------------------------------------------------------------------------------------------------------


@contextmanager
def interpreting(family: str) -> Iterator[None]:
    """A family of kernels is imported anew, for the interpreter, which changes triton.language and leaves it changed.

    Args:
        family: what the names of its modules in ebdiff.kernels begin with.
    """
    package, family_ = importlib.import_module("ebdiff.kernels"), f"ebdiff.kernels.{family}"
    before = [(place, dict(vars(place))) for place in [package, *places()]]
    for name in [name for name in vars(package) if name.startswith(family)]:
        delattr(package, name)  # `from . import` would find the compiled ones there
    compiled = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(family_)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton.knobs.runtime, "interpret", True)
            # Triton's own is compiled, for it was there before the knob.
            patch.setattr(tl, "sum", lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine))
            patch.setattr(tl, "max", lambda x, axis: tl.reduce(x, axis, tl.standard._elementwise_max))
            yield
    finally:
        for name in [name for name in sys.modules if name.startswith(family_)]:
            del sys.modules[name]
        sys.modules.update(compiled)
        for place, had in before:
            put_back(place, had)


def places() -> list[Any]:
    """Modules and classes whose functions the interpreter replaces."""
    modules = [tl, tl.core, tl.math]
    return modules + [thing for place in modules for thing in vars(place).values() if inspect.isclass(thing)]


def put_back(place: Any, had: dict[str, Any]) -> None:
    for name in [name for name in vars(place) if name not in had]:
        delattr(place, name)
    for name, value in had.items():
        if vars(place).get(name) is not value:
            setattr(place, name, value)


# Compiled -------------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """A kernel, with what the JIT would take from its arguments."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    warps: int
    stages: int = 3  # Triton's own choice


class Found(NamedTuple):
    """What was compiled: registers a thread, bytes of stack and shared memory, 128-bit accesses; its PTX.

    And 128-bit copies from global into shared memory, and the instructions of tensor cores: {name: how many}.
    """

    registers: int
    stack: int
    shared: int
    loads: int
    stores: int
    ptx: str
    copies: int
    matrix: dict[str, int]

    def row(self) -> list[int]:
        return [self.registers, self.shared, self.loads, self.stores]

    def check_row(self, row: list[int]) -> None:
        """That of the table, made with the same Triton."""
        assert abs(self.registers - row[0]) < REGISTERS_APART, self.row()
        assert self.row()[1:] == row[1:]


def specialised(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """Triton's rules: None and 1 are constants, and multiples of 16 are noticed, of addresses and of integers."""
    warps, stages = options.pop("num_warps"), options.pop("num_stages", 3)
    bound = inspect.signature(kernel.fn).bind(*arguments, **options).arguments
    types, constants, attributes = {}, dict(options), {}
    for place, (name, value) in enumerate(bound.items()):
        if name in options or value is None or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, float):
            types[name] = "fp32"
            continue
        is_tensor = isinstance(value, Tensor)
        types[name] = f"*{TYPES[value.dtype]}" if is_tensor else "i32" if value < 1 << 31 else "i64"
        if (value.storage_offset() * value.element_size() if is_tensor else value) % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return Launch(kernel, types, constants, attributes, warps, stages)


class Recorder:
    """Stands in for a kernel and notes how it is launched."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert 0 < grid[0] < 1 << 31
        return lambda *arguments, **options: self.launches.append(specialised(self.kernel, arguments, options))


@contextmanager
def recorded(*modules: str) -> Iterator[list[Launch]]:
    """All launches of the kernels in these modules of ebdiff.kernels, which are not run."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in modules:
            module = importlib.import_module(f"ebdiff.kernels.{name}")
            for kernel in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, kernel, Recorder(getattr(module, kernel), launches))
        yield launches


def compiled(launch: Launch, architecture: int) -> Found:
    key = (launch.kernel.__name__, *map(str, launch[1:]), architecture)
    if key not in known:
        known[key] = compile_anew(launch, architecture)
    found: Found = known[key]
    return found


def compile_anew(launch: Launch, architecture: int) -> Found:
    source = ASTSource(launch.kernel, launch.types, launch.constants, launch.attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = output("cuobjdump", "--dump-resource-usage", file.name)
        code = output("nvdisasm", "-c", file.name)
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert used
    loads, stores, copies = (len(re.findall(rf"\b{name}\.E[.\w]*\.128", code)) for name in ("LDG", "STG", "LDGSTS"))
    matrix = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("HMMA", "HGMMA", "UTCHMMA")}
    return Found(int(used[1]), int(used[2]), made.metadata.shared, loads, stores, made.asm["ptx"], copies, matrix)


def output(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout
