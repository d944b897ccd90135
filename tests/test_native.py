"""ebdiff._C as the package sees it: there or not, why not, for which devices, and what `ebdiff info` says of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ebdiff import info
from ebdiff.ops import native
from ebdiff.ops.sources import ABI

ROOT = Path(__file__).parent.parent
SAID = "g++ -c x.cpp\nx.cpp:3:1: error: no such thing\nmake: stopped\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package without a compiled part; what is known of the real one is forgotten meanwhile."""
    package = tmp_path / "site-packages" / "ebdiff"
    package.mkdir(parents=True)
    monkeypatch.setattr(native, "PACKAGE", package)
    monkeypatch.setattr(native, "CSRC", package.parent / "csrc")
    for name in ("EBDIFF_NATIVE", "EBDIFF_C_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("_load", "facts", "covers"):
        monkeypatch.setattr(native, name, forgetful(getattr(native, name).__wrapped__))
    return package


def forgetful(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments)


def built_with(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    module = SimpleNamespace(ABI=ABI, build_info=lambda: facts, isa=lambda: "avx2")
    monkeypatch.setattr(native, "_load", lambda: (module, ""))


def leave_note(package: Path, **missing: str) -> None:
    missing_parts = {part: {"problem": why, "remedy": "mend it", "output": SAID} for part, why in missing.items()}
    note = {"python": sys.implementation.cache_tag, "missing": missing_parts}
    (package / "_build.json").write_text(json.dumps(note))


def test_without_a_module_the_reason_is_that_of_the_build(package: Path) -> None:
    assert native.module() is None
    assert native.why_not().startswith("not built; pip install")
    leave_note(package, cpu="no C++ compiler")
    assert native.why_not().startswith("not built: no C++ compiler; mend it, then pip install")
    (package / "_build.json").write_text(json.dumps({"python": "cpython-39", "missing": {}}))
    assert "built for cpython-39" in native.why_not()
    (package / "_build.json").write_text("{")
    assert native.why_not().startswith("not built; pip install")
    assert not native.has_cuda()
    assert not native.covers(9, 0)


def test_a_damaged_module_is_a_reason_not_a_crash(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / f"_C{EXTENSION_SUFFIXES[0]}").write_text("not a library")
    assert native.module() is None
    assert native.why_not().startswith("it does not load")
    monkeypatch.setenv("EBDIFF_NATIVE", "0")
    assert native.why_not() == "switched off by EBDIFF_NATIVE=0"


def test_a_module_with_another_interface_is_not_used(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EBDIFF_C_PATH", "elsewhere.so")
    monkeypatch.setattr(native, "_import", lambda path: SimpleNamespace(ABI=ABI + 1, path=path))
    assert native.module() is None
    assert f"ABI {ABI + 1}, not {ABI}" in native.why_not()
    monkeypatch.setattr(native, "_import", lambda path: SimpleNamespace(ABI=ABI, path=path))
    assert native.module().path == "elsewhere.so"  # type: ignore[union-attr]


# Machine code serves its major version from its minor version on; PTX everything from its version on; "a" only itself.
@pytest.mark.parametrize(
    ("built", "served", "not_served"),
    [
        (["sm_80"], [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        (["sm_86", "sm_120", "compute_120"], [(8, 6), (8, 7), (12, 0), (12, 1), (13, 0)], [(8, 0), (9, 0), (10, 0)]),
        (["sm_90a"], [(9, 0)], [(9, 1), (8, 0), (10, 0)]),
        ([], [], [(8, 0)]),
    ],
)
def test_the_devices_that_are_served(
    built: list[str],
    served: list[tuple[int, int]],
    not_served: list[tuple[int, int]],
    package: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built_with(monkeypatch, parts=["cpu", "cuda"], architectures=built)
    assert [pair for pair in [*served, *not_served] if native.covers(*pair)] == served


def test_info_of_both_parts(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"compiler": "g++ 12", "pybind11": "3", "nvcc": "13.0", "architectures": ["sm_90", "compute_90"]}
    built_with(monkeypatch, parts=["cpu", "cuda"], sources="of another day", **facts)
    said = "\n".join(info.installation())
    assert "compiled part: CPU and CUDA, " in said
    assert "by g++ 12, pybind11 3" in said
    assert "CUDA by nvcc 13.0 for sm_90, compute_90" in said
    assert "masked_adamw_" in said
    assert re.search("group_norm_silu: C\\+\\+ avx2 on the CPU, (Triton|reference) on a GPU", said)
    assert "C++ avx2 on the CPU, CUDA on a GPU" in said
    assert "other sources" not in said  # there are none beside an installed package, whatever site-packages/csrc holds
    (package.parent / "csrc").mkdir()
    assert not native.is_outdated()
    (package.parent / "setup.py").touch()
    assert "built from other sources: pip install -e . again" in "\n".join(info.installation())


def test_info_says_what_is_missing_why_and_how_to_add_it(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_note(package, cpu="no compiler", cuda="no nvcc")
    said = "\n".join(info.installation())
    assert "compiled part: not built: no compiler; mend it, then pip install" in said
    assert "x.cpp:3:1: error: no such thing" in said
    assert "make: stopped" not in said
    assert "reference on the CPU, reference on a GPU" in said
    built_with(monkeypatch, parts=["cpu"])
    said = "\n".join(info.installation())
    assert "no CUDA part: no nvcc; mend it, then pip install" in said
    assert "C++ avx2 on the CPU, reference on a GPU" in said


def test_info_names_a_gpu_that_is_not_served(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built_with(monkeypatch, parts=["cpu", "cuda"], architectures=["sm_80"], nvcc="13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(8, 0), (7, 5)][index])
    said = "\n".join(info.installation())
    assert "GPU: card 0 (sm_80)\n" in said
    assert "GPU: card 1 (sm_75), not served by the CUDA part: EBDIFF_CUDA_ARCHS='75' pip install" in said


def test_every_op_that_info_lists_is_registered() -> None:
    import ebdiff.ops.channel_mask
    import ebdiff.ops.group_norm  # noqa: F401

    assert [name for name in (*info.COMPILED_OPS, info.TRITON_OP) if not hasattr(torch.ops.ebdiff, name)] == []


def test_switched_off_everything_still_imports() -> None:
    code = "from ebdiff.ops import native; assert native.module() is None; import ebdiff.ops.channel_mask"
    environment = {"EBDIFF_NATIVE": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)
