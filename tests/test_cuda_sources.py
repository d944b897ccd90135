"""What nvcc makes of csrc/cuda, without a GPU: no warnings, no spills, 128-bit accesses, no contraction."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from build_tools.cuda import find_nvcc, gencode
from build_tools.plan import NVCC

CSRC = Path(__file__).parent.parent / "csrc"
FOUND = find_nvcc()
# What a kernel may use. 64 registers leave 4 blocks of 256 threads on a multiprocessor, 80 leave 3, 128 leave 2.
REGISTERS = {
    "apply_mask": 80,
    "mask_distance": 40,
    "move": 80,
    "masked_adamw": 80,
    "tile_sums": 104,
    "channel_sums": 64,
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(FOUND is None, reason="no nvcc")]


class Kernel(NamedTuple):
    """A kernel: its name without template arguments, its mangled name, ptxas' report, its PTX."""

    name: str
    mangled: str
    report: str
    ptx: str


class Compiled(NamedTuple):
    kernels: list[Kernel]
    cubins: list[Path]

    def named(self, name: str) -> list[Kernel]:
        return [kernel for kernel in self.kernels if kernel.name == name]


@pytest.fixture(scope="module", params=["80", "90", "120"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Everything for one architecture, with the flags of the build; about 20 seconds on two cores."""
    assert FOUND is not None
    if request.param not in FOUND.architectures:
        pytest.skip(f"this nvcc does not compile for sm_{request.param}")
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda source: compile_one(source, request.param, folder), sources))
    return Compiled([kernel for kernels, _ in parts for kernel in kernels], [cubin for _, cubin in parts])


def compile_one(source: Path, architecture: str, folder: Path) -> tuple[list[Kernel], Path]:
    assert FOUND is not None
    include = ["-I", str(CSRC), "-isystem", str(FOUND.include), "-isystem", str(FOUND.include / "cccl")]
    own = folder / source.stem
    own.mkdir()
    command = [str(FOUND.path), *NVCC.split(), gencode([architecture])[0], *include, "-Werror", "all-warnings"]
    command += ["-Xptxas", "-v", "--keep", "--keep-dir", str(own), "-cubin", "-o", str(own / "out.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (ptx_file,) = own.glob("*.ptx")
    ptx = dict(re.findall(r"\.entry (\w+)\((.*?)\n}\n", ptx_file.read_text(), re.DOTALL))
    reports = re.split(r"Compiling entry function '(\w+)'", done.stderr)[1:]
    found = dict(zip(reports[::2], reports[1::2], strict=True))
    assert found.keys() == ptx.keys()
    return [Kernel(name_of(mangled), mangled, found[mangled], ptx[mangled]) for mangled in ptx], own / "out.cubin"


def name_of(mangled: str) -> str:
    return re.findall(r"\d([a-z_]+)_kernel", mangled)[-1]


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def test_every_kernel_is_there(compiled: Compiled) -> None:
    assert {kernel.name for kernel in compiled.kernels} == REGISTERS.keys()
    assert len(compiled.named("masked_adamw")) == len(compiled.named("tile_sums")) == 4  # dtypes


def test_no_kernel_spills_or_uses_too_many_registers(compiled: Compiled) -> None:
    for kernel in compiled.kernels:
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", kernel.report)
        used = re.search(r"Used (\d+) registers", kernel.report)
        assert memory is not None
        assert used is not None
        assert memory.groups() == ("0", "0", "0"), kernel.mangled
        assert int(used[1]) <= REGISTERS[kernel.name], kernel.mangled


def test_pieces_of_16_bytes_in_ptx(compiled: Compiled) -> None:
    load, store = r"ld\.global\S*\.(v4\.[bfu]32|v2\.[bfu]64)", r"st\.global\.(v4\.[bfu]32|v2\.[bfu]64)"
    for kernel in compiled.named("masked_adamw"):
        assert count(load, kernel.ptx) >= 5, kernel.mangled  # p, g, m, v, e
        assert count(store, kernel.ptx) >= 4 + 4, kernel.mangled  # results, and zeros
    for kernel in compiled.named("move"):
        assert count(load, kernel.ptx) >= 2, kernel.mangled
        assert count(store, kernel.ptx) >= 2, kernel.mangled
    (kernel,) = compiled.named("apply_mask")
    assert count(store, kernel.ptx) >= 1
    assert count(load, kernel.ptx) == 0  # what is masked is not read
    floats = next(kernel for kernel in compiled.named("tile_sums") if "kernelIf" in kernel.mangled)
    assert count(load, floats.ptx) >= 2


def test_all_memory_is_addressed_as_global_or_shared(compiled: Compiled) -> None:
    for kernel in compiled.kernels:
        assert count(r"\b(ld|st)\.(v\d\.)?[bfsu]\d+", kernel.ptx) == 0, kernel.mangled
        assert count(r"\b(ld|st)\.local", kernel.ptx) == 0, kernel.mangled


# In PTX every operation stands for one rounding: ".rn" forbids ptxas to fuse it with others, and what becomes of div.rn
# and sqrt.rn (with FFMA in it) is the rounded quotient and root. So it shows here, not in the machine code.
def test_adamw_rounds_every_operation_once(compiled: Compiled) -> None:
    for kernel in compiled.named("masked_adamw"):
        operations = re.findall(r"\b([a-z][a-z0-9]*(?:\.[a-z0-9]+)*\.f(?:32|64))\b", kernel.ptx)
        arithmetic = [op for op in operations if not re.match(r"(ld|st|mov|cvt|setp|selp|neg|abs|param)\b", op)]
        kinds = {re.sub(r"\.f(32|64)$", "", op) for op in arithmetic}
        assert kinds == {"add.rn", "sub.rn", "mul.rn", "div.rn", "sqrt.rn"}, kernel.mangled
        assert not re.search(r"\b(fma|mad)\.\S*f(32|64)", kernel.ptx)
        assert ".ftz" not in kernel.ptx


def test_what_is_converted_is_rounded_to_the_nearest(compiled: Compiled) -> None:
    (half,) = [kernel for kernel in compiled.named("masked_adamw") if "7float16" in kernel.mangled]
    assert "cvt.rn.f16.f32" in half.ptx
    for kernel in compiled.kernels:
        assert count(r"cvt\.r[zmp]\.", kernel.ptx) == 0, kernel.mangled


def test_machine_code_keeps_the_pieces_and_needs_no_local_memory(compiled: Compiled) -> None:
    disassembler = nvdisasm()
    if disassembler is None:
        pytest.skip("no nvdisasm (the CUDA toolkit has it, and the triton wheel)")
    text = ""
    for cubin in compiled.cubins:
        said = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
        assert not re.search(r"\b(LDL|STL)\b", said), cubin
        if cubin.parent.name in ("adamw", "compact"):
            assert "LDG.E.128" in said
        if cubin.parent.name in ("adamw", "compact", "mask"):
            assert "STG.E.128" in said
        text += said
    assert not re.search(r"\b(LD|ST)\.E\b", text)


def nvdisasm() -> str | None:
    assert FOUND is not None
    spec = find_spec("triton")
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else None
    for folder in (FOUND.path.parent, bundled):
        if folder and (folder / "nvdisasm").exists():
            return str(folder / "nvdisasm")
    return shutil.which("nvdisasm")
