"""Build what can be built in one folder, through ninja; say what could not be built, and why."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from .cuda import GET_CUDA, Nvcc, find_nvcc
from .plan import Plan, info_source, ninja_file
from .settings import Settings
from .tools import Missing, cores, find_compiler, find_ninja, find_pybind11, find_python

__all__ = ["ROOT", "Outcome", "build", "sources"]

ROOT = Path(__file__).resolve().parent.parent
LOOK = "correct what the compiler says (EBDIFF_BUILD={} leaves it out)"

LOAD = """
import sys
from importlib.util import module_from_spec, spec_from_file_location

spec = spec_from_file_location("ebdiff._C", sys.argv[1])
module = module_from_spec(spec)
spec.loader.exec_module(module)
print(module.ABI)
"""


class Outcome(NamedTuple):
    """What was made.

    Attributes:
        module: the finished module in the build folder; None where not even the CPU part could be built.
        parts: what it holds: (), ("cpu",) or ("cpu", "cuda").
        missing: why each other part is not in it.
    """

    module: Path | None
    parts: tuple[str, ...]
    missing: dict[str, Missing]


def sources() -> ModuleType:
    """ebdiff/ops/sources.py, without importing ebdiff: that needs torch."""
    spec = spec_from_file_location("ebdiff_sources", ROOT / "ebdiff" / "ops" / "sources.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(settings: Settings, within: Path, extra: str = "") -> Outcome:
    """Build ebdiff._C in a folder below `within`, one for each set of tools, so that each rebuilds what changed."""
    if settings.mode == "none":
        off = Missing("EBDIFF_BUILD=none", "unset it", failure=False)
        return Outcome(None, (), {"cpu": off, "cuda": off})
    nvcc, missing = None, {}
    try:
        nvcc = _nvcc(settings)
    except Missing as error:
        missing["cuda"] = error
    try:
        plan, ninja = _prepare(settings, within, extra, nvcc)
        with _alone(plan.folder):
            _write(plan)
            if nvcc:
                try:
                    return Outcome(_make(ninja, plan, "cuda"), ("cpu", "cuda"), {})
                except Missing as error:
                    missing["cuda"] = error
            return Outcome(_make(ninja, plan, "cpu"), ("cpu",), missing)
    except Missing as error:
        if nvcc:
            missing["cuda"] = Missing("it needs the CPU part", error.remedy)
        return Outcome(None, (), {"cpu": error, **missing})


def _nvcc(settings: Settings) -> Nvcc:
    if settings.mode == "cpu":
        raise Missing("EBDIFF_BUILD=cpu", "unset it", failure=False)
    if not any((ROOT / "csrc" / "cuda").glob("*.cu")):
        raise Missing("no CUDA sources in this version", "a later one may have some", failure=settings.mode == "cuda")
    nvcc = find_nvcc(settings.architectures)
    if nvcc is None:
        raise Missing("no nvcc on this machine", GET_CUDA, failure=settings.mode == "cuda")
    return nvcc


def _prepare(settings: Settings, within: Path, extra: str, nvcc: Nvcc | None) -> tuple[Plan, str]:
    compiler, ninja = find_compiler(), find_ninja()
    pybind11, version = find_pybind11()
    facts: dict[str, Any] = {
        "sources": sources().digest_of(ROOT / "csrc"),
        "python": sys.implementation.cache_tag,
        "compiler": compiler.version,
        "pybind11": version,
        "flags": extra,
        "parts": ["cpu"],
    }
    info = {"cpu": facts}
    if nvcc:
        names = [*(f"sm_{name}" for name in nvcc.architectures), f"compute_{nvcc.architectures[-1]}"]
        info["cuda"] = {**facts, "parts": ["cpu", "cuda"], "nvcc": nvcc.version, "architectures": names}
    key = repr((sys.executable, compiler, version, extra, nvcc, settings.werror))
    folder = within / f"_C-{sys.implementation.cache_tag}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    plan = Plan(ROOT / "csrc", folder, compiler, find_python(), nvcc, info, settings.werror, extra)
    (folder / "include").mkdir(parents=True, exist_ok=True)
    # Through a link, so that the command lines, and with them the objects, outlive pip's temporary environments.
    link = folder / "headers"
    link.unlink(missing_ok=True)
    link.symlink_to(pybind11)
    return plan, ninja


def _write(plan: Plan) -> None:
    header = "extern const char* const ebdiff_build_info;\n#define EBDIFF_BUILD_INFO ebdiff_build_info\n"
    files = {"build.ninja": ninja_file(plan), "include/ebdiff_build_info.h": header}
    files |= {f"info_{part}.cpp": info_source(info) for part, info in plan.info.items()}
    for name, text in files.items():
        path = plan.folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _make(ninja: str, plan: Plan, part: str) -> Path:
    """Run ninja for a part, and load what it made in another process: what does not load counts as not built."""
    instead = "cpu" if part == "cuda" else "none"
    run = subprocess.run(
        [ninja, "-C", str(plan.folder), "-j", str(cores()), part],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if run.returncode:
        raise Missing(
            f"the {part.upper()} part does not compile",
            LOOK.format(instead),
            run.stdout[max(0, run.stdout.find("FAILED:")) :],
        )
    print(run.stdout, end="", flush=True)
    module = plan.folder / part / "_C.so"
    if "-fsanitize" not in plan.extra:
        _try(module, instead)
    return module


def _try(module: Path, instead: str) -> None:
    run = subprocess.run([sys.executable, "-c", LOAD, str(module)], capture_output=True, text=True)
    wanted = sources().ABI
    if run.returncode or run.stdout.strip() != str(wanted):
        said = run.stderr or f"its ABI is {run.stdout.strip()}, that of ebdiff/ops/sources.py is {wanted}"
        raise Missing("the module is built, but does not load", LOOK.format(instead), said)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two builds in one folder wait for each other: ninja itself does not."""
    import fcntl

    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
