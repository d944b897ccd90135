"""What Triton makes of the group normalisation kernels, without a GPU: no spills, 128-bit accesses, no float64.

The launcher runs on meta tensors; what it would launch is compiled for each architecture with what the JIT would have
noticed about the arguments. `python tests/test_group_norm_aot.py` writes the table anew, after a change to the kernels.
"""

from __future__ import annotations

import importlib
import inspect
import json
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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ebdiff.ops import group_norm_cuda
from ebdiff.ops.group_norm_reference import Norm

TABLE = Path(__file__).with_suffix(".json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.bool: "i1"}
known: dict[tuple[Any, ...], Any] = {}  # what has been compiled: some kernels are the same in several variants
# Registers are given out to a warp eight a thread at a time: less than that changes no occupancy.
REGISTERS_APART = 8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump", "nvdisasm")), reason="no tools in Triton"
    ),
]


class Variant(NamedTuple):
    """A norm of [n, c, hw], and whether its rows are aligned, so that loads can be 128 bits wide."""

    shape: tuple[int, int, int]
    groups: int | tuple[int, ...]
    dtype: torch.dtype
    last: bool
    everything: bool
    aligned: bool = True

    def norm(self) -> tuple[Tensor, Norm]:
        n, c, hw = self.shape
        size = (n, hw, c) if self.last else (n, c, hw)
        x = torch.empty(size, dtype=self.dtype, device="meta")
        small = [torch.empty(s, device="meta") for s in ((c,), (c,), (n, c), (n, c), (n, c))]
        keep = torch.empty(c, dtype=torch.bool, device="meta") if self.everything else None
        rest = small if self.everything else [*small[:2], None, None, None]
        ends = tuple(range(0, c + 1, c // self.groups)) if isinstance(self.groups, int) else self.groups
        return x.movedim(-1, 1) if self.last else x, Norm(*rest, keep, ends, 1e-5, True)


BF16, FP32 = torch.bfloat16, torch.float32
VARIANTS = {
    "held, NCHW": Variant((128, 128, 1024), 32, BF16, False, False),
    "held, channels last, everything": Variant((128, 128, 256), 32, BF16, True, True),
    "held, 16384 elements, channels last, everything": Variant((128, 128, 1024), 32, BF16, True, True),
    "held, 16384 elements, float32, NCHW, everything": Variant((8, 512, 1024), 32, FP32, False, True),
    "ragged 88 channels, channels last": Variant((128, 88, 256), (0, 8, 11, 24, 29, 32, 70, 88), BF16, True, False),
    "87 channels, channels last, everything": Variant((128, 87, 1024), 29, BF16, True, True, False),
    "a channel a group, one position": Variant((256, 512, 1), 512, BF16, False, True, False),
    "cached, NCHW, everything": Variant((8, 320, 4096), 32, BF16, False, True),
    "cached, channels last": Variant((8, 1280, 1024), 32, BF16, True, False),
    "two passes, NCHW": Variant((8, 128, 65536), 32, BF16, False, False),
    "two passes, channels last, everything": Variant((8, 128, 65536), 32, BF16, True, True),
    "two passes, float32, channels last, everything": Variant((8, 128, 65536), 32, FP32, True, True),
}


class Launch(NamedTuple):
    """A kernel, with what the JIT would take from its arguments."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    warps: int

    @property
    def touches_x(self) -> bool:
        return "X" in self.types


class Found(NamedTuple):
    """What was compiled: registers a thread, bytes of stack and shared memory, 128-bit accesses; its PTX."""

    registers: int
    stack: int
    shared: int
    loads: int
    stores: int
    ptx: str

    def row(self) -> list[int]:
        return [self.registers, self.shared, self.loads, self.stores]


def specialised(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """Triton's rules: None and 1 are constants, and multiples of 16 are noticed, of addresses and of integers."""
    warps = options.pop("num_warps")
    bound = inspect.signature(kernel.fn).bind(*arguments, **options).arguments
    types, constants, attributes = {}, dict(options), {}
    for place, (name, value) in enumerate(bound.items()):
        if name in options or value is None or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        is_tensor = isinstance(value, Tensor)
        types[name] = f"*{TYPES[value.dtype]}" if is_tensor else "i32" if value < 1 << 31 else "i64"
        if (value.storage_offset() * value.element_size() if is_tensor else value) % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return Launch(kernel, types, constants, attributes, warps)


class Recorder:
    """Stands in for a kernel and notes how it is launched."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert 0 < grid[0] < 1 << 31
        return lambda *arguments, **options: self.launches.append(specialised(self.kernel, arguments, options))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("one_pass", "two_pass"):
            module = importlib.import_module(f"ebdiff.kernels.group_norm_{name}")
            for kernel in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, kernel, Recorder(getattr(module, kernel), launches))
        yield launches


def launches_of(variant: Variant) -> list[Launch]:
    """Of one forward and one backward pass."""
    x, norm = variant.norm()
    with recorded() as launches:
        y, mean, rstd = group_norm_cuda.forward(x, norm)
        group_norm_cuda.backward(y, x, mean, rstd, norm, [True] * 6)
    return launches


def compiled(launch: Launch, architecture: int) -> Found:
    key = (launch.kernel.__name__, *map(str, launch[1:]), architecture)
    if key not in known:
        known[key] = compile_anew(launch, architecture)
    return known[key]


def compile_anew(launch: Launch, architecture: int) -> Found:
    source = ASTSource(launch.kernel, launch.types, launch.constants, launch.attributes)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": launch.warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = output("cuobjdump", "--dump-resource-usage", file.name)
        code = output("nvdisasm", "-c", file.name)
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert used
    loads, stores = (len(re.findall(rf"\b{name}\.E[.\w]*\.128", code)) for name in ("LDG", "STG"))
    return Found(int(used[1]), int(used[2]), made.metadata.shared, loads, stores, made.asm["ptx"])


def output(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def everything(name: str, architecture: int) -> dict[str, tuple[Launch, Found]]:
    """{kernel: how it is launched and what it was compiled to}."""
    launches = {launch.kernel.__name__: launch for launch in launches_of(VARIANTS[name])}
    return {kernel: (launch, compiled(launch, architecture)) for kernel, launch in launches.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_kernels(name: str, architecture: int) -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    expected = table["kernels"][name]
    found = everything(name, architecture)
    for kernel, (launch, made) in found.items():
        # ptxas may park two numbers to fit twice as many programs; where rows are not aligned it does.
        assert made.stack <= (0 if VARIANTS[name].aligned else 8), f"{kernel} spills {made.stack} bytes"
        assert ".f64" not in made.ptx, kernel
        assert not re.search(r"\b(atom|red)\.", made.ptx), kernel
        if VARIANTS[name].aligned and launch.touches_x:
            assert made.loads > 0, kernel
            assert made.stores > 0 or not {"Y", "DX"} & launch.types.keys(), kernel
        if table["triton"] == triton.__version__:
            registers, *rest = expected[kernel][f"sm_{architecture}"]
            assert abs(made.registers - registers) < REGISTERS_APART, f"{kernel}: {made.row()}"
            assert made.row()[1:] == rest, kernel


def write_table() -> None:
    kernels: dict[str, dict[str, dict[str, list[int]]]] = {}
    for name in VARIANTS:
        for architecture in ARCHITECTURES:
            for kernel, (launch, made) in everything(name, architecture).items():
                kernels.setdefault(name, {}).setdefault(kernel, {})[f"sm_{architecture}"] = made.row()
                if made.stack or (launch.touches_x and not made.loads):
                    print(name, kernel, architecture, made[:5], f"{launch.warps} warps")
    about = "[registers a thread, bytes of shared memory, 128-bit loads, 128-bit stores]"
    table = {"about": about, "triton": triton.__version__, "kernels": kernels}
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write_table())
