"""nvcc and what belongs to it: found through CUDA_HOME, PATH, /usr/local/cuda, or the wheels in this environment."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .tools import Missing, output_of

__all__ = ["GET_CUDA", "USUAL", "Nvcc", "find_nvcc", "gencode"]

USUAL = ("80", "86", "89", "90", "100", "120")
USUAL_PLACE = Path("/usr/local/cuda")
GET_CUDA = "install the CUDA toolkit, or `pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl`"


class Nvcc(NamedTuple):
    """A CUDA compiler.

    Attributes:
        path: the program.
        version: such as "13.0.88".
        include: the folder of cuda_runtime.h.
        runtime: libcudart_static.a.
        architectures: those to compile for, oldest first; PTX of the last one is added.
    """

    path: Path
    version: str
    include: Path
    runtime: Path
    architectures: tuple[str, ...]


def find_nvcc(asked: Sequence[str] = ()) -> Nvcc | None:
    """The CUDA compiler of this machine for the architectures asked for (or USUAL), None where there is none.

    Raises:
        Missing: there is one, or CUDA_HOME says so, but it cannot serve.
    """
    path = _locate()
    if path is None:
        return None
    try:
        version = re.search(r"V(\d[\d.]*)", output_of([str(path), "--version"]))
        able = set(re.findall(r"sm_(\w+)", output_of([str(path), "--list-gpu-code"])))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise Missing(f"{path} does not run", f"{GET_CUDA}, or EBDIFF_BUILD=cpu leaves it out", said) from None
    include, runtime = _beside(_home(path))
    return Nvcc(path, version[1] if version else "of unknown version", include, runtime, _choose(asked, able))


def gencode(architectures: Sequence[str]) -> list[str]:
    """nvcc's flags: machine code for each, and PTX of the last, from which a driver compiles for what comes later."""
    codes = [(name, f"sm_{name}") for name in architectures] + [(architectures[-1], f"compute_{architectures[-1]}")]
    return [f"-gencode=arch=compute_{name},code={code}" for name, code in codes]


def _locate() -> Path | None:
    home = os.environ.get("CUDA_HOME")
    if home:
        path = Path(home, "bin", "nvcc")
        if not path.exists():
            raise Missing(f"CUDA_HOME={home} holds no bin/nvcc", "correct CUDA_HOME, or unset it")
        return path
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    wheels = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/nvcc"))
    return next((path for path in [USUAL_PLACE / "bin" / "nvcc", *reversed(wheels)] if path.exists()), None)


def _home(path: Path) -> Path:
    """The toolkit's folder as nvcc itself sees it: what is on PATH may be a script somewhere else that calls it."""
    said = subprocess.run([path, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", said.stderr, re.MULTILINE)
    return Path(top[1]).resolve() if top else path.resolve().parent.parent


def _beside(home: Path) -> tuple[Path, Path]:
    target = home / "targets" / f"{platform.machine()}-linux"
    headers = [home / "include", target / "include"]
    libraries = [home / "lib64", home / "lib", target / "lib"]
    include = next((folder for folder in headers if (folder / "cuda_runtime.h").exists()), None)
    runtime = next((folder for folder in libraries if (folder / "libcudart_static.a").exists()), None)
    if include is None or runtime is None:
        raise Missing(f"no CUDA runtime (cuda_runtime.h, libcudart_static.a) in {home}", GET_CUDA)
    return include, runtime / "libcudart_static.a"


def _choose(asked: Sequence[str], able: set[str]) -> tuple[str, ...]:
    wrong = [name for name in asked if name not in able]
    chosen = sorted(asked or [name for name in USUAL if name in able], key=_age)
    if wrong or not chosen:
        what = f"sm_{', sm_'.join(wrong or USUAL)}"
        raise Missing(
            f"this nvcc does not compile for {what}",
            f"EBDIFF_CUDA_ARCHS chooses from {' '.join(sorted(able, key=_age))}",
        )
    return tuple(chosen)


def _age(name: str) -> tuple[int, str]:
    return int(name.rstrip("af")), name
