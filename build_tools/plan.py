"""Which compiler turns which source into what: the ninja file. Sources are found, not listed.

csrc/*.cpp          the bindings: pybind11; compiled twice, with -DEBDIFF_CUDA for the module that holds both parts
csrc/cpu/*.cpp      the CPU part; *_avx2.cpp and *_avx512.cpp for processors that have it, chosen at run time
csrc/cuda/*.cu      the CUDA part, *.cpp too
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .cuda import Nvcc, gencode
from .tools import Compiler

__all__ = ["SANITIZE", "Plan", "ninja_file"]

# No contraction into FMAs anywhere: the reference, every instruction set and CUDA are to give the same bits.
CXX = "-O3 -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra"
NVCC = "-O3 -std=c++20 --fmad=false -cudart static -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off"
AVX2 = "-mavx2 -mfma -mf16c"
WIDER = {
    "_avx2": AVX2,
    "_avx512": f"-mavx512f -mavx512bw -mavx512dq -mavx512vl {AVX2} -mprefer-vector-width=512",
}
# For what `together` (csrc/cpu/vectors.h) makes; clang does so anyway. Random numbers become 3% slower with it.
INTERLEAVE = "-fschedule-insns"
# The vptr check needs type information that pybind11's hidden visibility takes away.
SANITIZE = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all -fno-sanitize=vptr"
# --exclude-libs: the symbols of libcudart_static must not meet those of torch's libcudart.
LINK = {
    "linux": "-shared -Wl,--exclude-libs,ALL -ldl -lpthread -lrt",
    "darwin": "-bundle -undefined dynamic_lookup",
}


class Plan(NamedTuple):
    """Everything that the ninja file depends on.

    Attributes:
        csrc: the sources.
        folder: where objects and modules are made.
        compiler: for C++.
        python: the folder of Python.h.
        nvcc: for CUDA, or None.
        info: what `_C.build_info()` says, for each module that is made ("cpu", "cuda").
        werror: warnings are errors.
        extra: more flags for C++, for compiling and linking.
    """

    csrc: Path
    folder: Path
    compiler: Compiler
    python: Path
    nvcc: Nvcc | None
    info: dict[str, dict[str, Any]]
    werror: bool = False
    extra: str = ""


def ninja_file(plan: Plan) -> str:
    """The text of build.ninja. Its targets are "cpu" and "cuda": modules with one and with both parts."""
    both = plan.nvcc is not None
    cpu = dict(_objects(plan, sorted((plan.csrc / "cpu").glob("*.cpp")), "cpu"))
    cuda = sorted(path for end in ("cu", "cpp") for path in (plan.csrc / "cuda").glob(f"*.{end}"))
    gpu = dict(_objects(plan, cuda, "cuda")) if both else {}
    lines = [
        "rule compile\n  command = $run\n  depfile = $out.d\n  deps = gcc\n  description = compile $out",
        "rule link\n  command = $run\n  description = link $out",
        *cpu.values(),
        *gpu.values(),
    ]
    for part in ("cpu", "cuda") if both else ("cpu",):
        sources = [*sorted(plan.csrc.glob("*.cpp")), plan.folder / f"info_{part}.cpp"]
        bindings = dict(_objects(plan, sources, f"bindings_{part}"))
        objects = [*bindings, *cpu, *(gpu if part == "cuda" else [])]
        lines += [*bindings.values(), _link(plan, part, objects), f"build {part}: phony {_path(f'{part}/_C.so')}"]
    return "\n".join(lines) + "\n"


def info_source(info: dict[str, Any]) -> str:
    """A C++ file that holds the facts of a build; a file of its own, since it changes with every source."""
    return f"extern const char* const ebdiff_build_info;\nconst char* const ebdiff_build_info = {_literal(info)};\n"


def _objects(plan: Plan, sources: list[Path], group: str) -> Iterator[tuple[str, str]]:
    """(object, its build statement) for each source."""
    for source in sources:
        out = f"objects/{group}/{source.name}.o"
        words = [*(_nvcc(plan) if source.suffix == ".cu" else _cxx(plan, source, group))]
        words += ["-MD" if source.suffix == ".cu" else "-MMD", "-MF", f"{out}.d", "-c", str(source), "-o", out]
        yield out, f"build {_path(out)}: compile {_path(str(source))}\n  run = {_command(words)}"


def _cxx(plan: Plan, source: Path, group: str) -> list[str]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    words = [*plan.compiler.command, *CXX.split()]
    words += next((flags.split() for end, flags in WIDER.items() if x86 and source.stem.endswith(end)), [])
    words += [INTERLEAVE] if source.stem.startswith("group_norm_") and "clang" not in plan.compiler.version else []
    words += [*(["-Werror"] if plan.werror else []), *plan.extra.split(), "-I", str(plan.csrc)]
    if group != "cpu":  # what may see pybind11
        words += ["-I", "include", "-isystem", "headers", "-isystem", str(plan.python)]
    if group == "bindings_cuda":
        words.append("-DEBDIFF_CUDA")
    if plan.nvcc and group in ("cuda", "bindings_cuda"):
        words += ["-isystem", str(plan.nvcc.include)]
    return words


def _nvcc(plan: Plan) -> list[str]:
    assert plan.nvcc is not None
    words = [str(plan.nvcc.path), *NVCC.split(), *gencode(plan.nvcc.architectures), "-I", str(plan.csrc)]
    # nvcc from wheels does not find its own headers.
    words += ["-isystem", str(plan.nvcc.include), "-isystem", str(plan.nvcc.include / "cccl")]
    words += ["-ccbin", plan.compiler.command[0]] if len(plan.compiler.command) == 1 else []
    return [*words, *(["-Werror", "all-warnings"] if plan.werror else [])]


def _link(plan: Plan, part: str, objects: list[str]) -> str:
    out = f"{part}/_C.so"
    runtime = [str(plan.nvcc.runtime)] if plan.nvcc and part == "cuda" else []
    flags = LINK.get(sys.platform, LINK["linux"]).split()
    words = [*plan.compiler.command, *plan.extra.split(), "-o", out, *objects, *runtime, *flags]
    return f"build {_path(out)}: link {' '.join(map(_path, objects))}\n  run = {_command(words)}"


def _path(path: str) -> str:
    for letter in "$ :":
        path = path.replace(letter, f"${letter}")
    return path


def _command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _literal(info: dict[str, Any]) -> str:
    return json.dumps(json.dumps(info, sort_keys=True))
