"""How ebdiff._C is built: on a tree with three lines of C++ and a stand-in for nvcc, in well under a second each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest

from build_tools import cuda
from build_tools.settings import Settings, read
from build_tools.tools import Missing
from ebdiff.ops.sources import ABI, digest_of

pytest.importorskip("pybind11")
pytest.importorskip("ninja")
if not shutil.which("g++"):
    pytest.skip("no C++ compiler", allow_module_level=True)

ROOT = Path(__file__).parent.parent
MODULE = f"_C{EXTENSION_SUFFIXES[0]}"
BINDINGS = """
#include <Python.h>
#include "ebdiff_build_info.h"
int part();
#ifdef EBDIFF_CUDA
int device_part();
#endif
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  PyObject* m = PyModule_Create(&definition);
  PyModule_AddIntConstant(m, "ABI", ABI_OF_THE_TEST);
  PyModule_AddIntConstant(m, "part", part());
#ifdef EBDIFF_CUDA
  PyModule_AddIntConstant(m, "device_part", device_part());
#endif
  PyModule_AddStringConstant(m, "info", EBDIFF_BUILD_INFO);
  return m;
}
"""
# Answers as nvcc does; compiles host code only, unless the source says so.
NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit ;;
  *--list-gpu-code*) printf 'sm_75\\nsm_80\\nsm_90\\nsm_100\\n'; exit ;;
  *--dryrun*) echo "#$ TOP=HOME_OF_THE_TEST" >&2; exit ;;
esac
while [ $# -gt 0 ]; do
  case "$1" in -c) source=$2 ;; -o) out=$2 ;; -gencode=*) echo "$1" >>HOME_OF_THE_TEST/gencode ;; esac
  shift
done
exec g++ -x c++ -fPIC -c "$source" -o "$out"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with a tiny compiled part, in a folder whose name needs quoting."""
    tree = tmp_path / "a $tree"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "ebdiff/__init__.py", "ebdiff/ops/sources.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    shutil.copytree(ROOT / "build_tools", tree / "build_tools")
    (tree / "csrc" / "cpu").mkdir(parents=True)
    (tree / "csrc" / "bindings.cpp").write_text(BINDINGS.replace("ABI_OF_THE_TEST", str(ABI)))
    (tree / "csrc" / "cpu" / "part.h").write_text("#pragma once\nint part();\n")
    (tree / "csrc" / "cpu" / "part.cpp").write_text('#include "cpu/part.h"\nint part() { return 1; }\n')
    return tree


@pytest.fixture
def cuda_home(tree: Path, tmp_path: Path) -> Path:
    """A toolkit whose nvcc compiles host code, and a CUDA part for it."""
    home = tmp_path / "cuda"
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    (home / "bin" / "nvcc").write_text(NVCC.replace("HOME_OF_THE_TEST", str(home)))
    (home / "bin" / "nvcc").chmod(0o755)
    (home / "lib64" / "libcudart_static.a").write_text("!<arch>\n")
    (tree / "csrc" / "cuda").mkdir()
    (tree / "csrc" / "cuda" / "part.cu").write_text("int device_part() { return 2; }\n")
    return home


def run(tree: Path, *, fails: bool = False, **environment: str) -> str:
    """What `setup.py build_ext --inplace` prints, its exit code checked."""
    kept = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "LC_ALL": "C"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=tree, env=kept | environment, capture_output=True, text=True)
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result.stdout + result.stderr


def loaded(tree: Path) -> dict[str, Any]:
    """The attributes of the module that was built, read in a fresh process."""
    code = (
        "import sys, json; from importlib.util import *; s = spec_from_file_location('ebdiff._C', sys.argv[1]);"
        "m = module_from_spec(s); s.loader.exec_module(m);"
        "print(json.dumps({k: v for k, v in vars(m).items() if type(v) in (int, str)}))"
    )
    path = tree / "ebdiff" / MODULE
    output = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    found = json.loads(output)
    return {**found, "info": json.loads(found["info"])}


def note(tree: Path) -> dict[str, Any]:
    return dict(json.loads((tree / "ebdiff" / "_build.json").read_text()))


def in_place(tree: Path) -> set[str]:
    """What lies in the package besides its sources: no temporary file, ever."""
    return {path.name for path in (tree / "ebdiff").iterdir()} - {"__init__.py", "ops", "__pycache__"}


def test_the_cpu_part_is_built_and_says_what_from(tree: Path) -> None:
    run(tree, EBDIFF_BUILD="cpu", EBDIFF_WERROR="1")
    found = loaded(tree)
    assert (found["ABI"], found["part"]) == (ABI, 1)
    assert found["info"]["parts"] == ["cpu"]
    assert found["info"]["sources"] == digest_of(tree / "csrc")
    assert "g++" in found["info"]["compiler"]
    assert in_place(tree) == {MODULE, "_build.json"}
    assert note(tree)["built"] == ["cpu"]
    assert note(tree)["missing"]["cuda"]["problem"] == "EBDIFF_BUILD=cpu"


def test_a_second_build_does_nothing_and_a_changed_header_is_noticed(tree: Path) -> None:
    run(tree, EBDIFF_BUILD="cpu")
    before = (tree / "ebdiff" / MODULE).stat()
    assert "no work to do" in run(tree, EBDIFF_BUILD="cpu")
    after = (tree / "ebdiff" / MODULE).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    (tree / "csrc" / "cpu" / "part.h").write_text("#pragma once\nint part();  // another remark\n")
    said = run(tree, EBDIFF_BUILD="cpu")
    assert "part.cpp" in said
    assert "bindings.cpp" not in said
    assert loaded(tree)["info"]["sources"] == digest_of(tree / "csrc")


def test_nothing_asked_for_takes_an_older_module_away(tree: Path) -> None:
    run(tree, EBDIFF_BUILD="cpu")
    run(tree, EBDIFF_BUILD="none")
    assert in_place(tree) == {"_build.json"}
    assert note(tree)["missing"]["cpu"] == {"problem": "EBDIFF_BUILD=none", "remedy": "unset it", "output": ""}


def test_what_does_not_compile_is_shown_and_leaves_no_module(tree: Path, tmp_path: Path) -> None:
    run(tree, EBDIFF_BUILD="cpu")
    whole = (tree / "ebdiff" / MODULE).read_bytes()
    (tree / "csrc" / "cpu" / "part.cpp").write_text("int part() { return nonsense; }\n")
    said = run(tree, EBDIFF_BUILD="cpu", fails=True)
    assert "nonsense" in said
    assert (tree / "ebdiff" / MODULE).read_bytes() == whole  # an error changes nothing
    said = run(tree, CUDA_HOME=str(tmp_path))
    assert "nonsense" in said
    assert in_place(tree) == {"_build.json"}
    assert "nonsense" in note(tree)["missing"]["cpu"]["output"]


def test_what_does_not_load_counts_as_not_built(tree: Path) -> None:
    (tree / "csrc" / "cpu" / "part.cpp").write_text("int missing(); int part() { return missing(); }\n")
    said = run(tree, EBDIFF_BUILD="cpu", fails=True)
    assert "missing" in said
    (tree / "csrc" / "cpu" / "part.cpp").write_text("int part() { return 1; }\n")
    (tree / "csrc" / "bindings.cpp").write_text(BINDINGS.replace("ABI_OF_THE_TEST", str(ABI + 1)))
    said = run(tree, EBDIFF_BUILD="cpu", fails=True)
    assert f"its ABI is {ABI + 1}" in said
    assert in_place(tree) == set()


def test_without_a_compiler_the_package_is_pure_python(tree: Path, tmp_path: Path) -> None:
    said = run(tree, PATH=str(tmp_path))
    assert "no C++ compiler on PATH; install g++" in said
    assert in_place(tree) == {"_build.json"}
    assert "no C++ compiler" in run(tree, PATH=str(tmp_path), EBDIFF_BUILD="require", fails=True)


@pytest.mark.parametrize("mode", ["auto", "cuda", "require"])
def test_both_parts_are_built_for_the_architectures_there_are(tree: Path, cuda_home: Path, mode: str) -> None:
    run(tree, EBDIFF_BUILD=mode, CUDA_HOME=str(cuda_home))
    found = loaded(tree)
    assert (found["part"], found["device_part"]) == (1, 2)
    assert found["info"]["parts"] == ["cpu", "cuda"]
    assert found["info"]["nvcc"] == "13.0.88"
    assert found["info"]["architectures"] == ["sm_80", "sm_90", "sm_100", "compute_100"]
    assert len((cuda_home / "gencode").read_text().splitlines()) == 4
    assert note(tree)["missing"] == {}


def test_fewer_architectures_can_be_asked_for(tree: Path, cuda_home: Path) -> None:
    run(tree, CUDA_HOME=str(cuda_home), EBDIFF_CUDA_ARCHS="9.0")
    assert loaded(tree)["info"]["architectures"] == ["sm_90", "compute_90"]
    said = run(tree, CUDA_HOME=str(cuda_home), EBDIFF_CUDA_ARCHS="90 70", EBDIFF_BUILD="require", fails=True)
    assert "does not compile for sm_70; EBDIFF_CUDA_ARCHS chooses from 75 80 90 100" in said


def test_what_has_no_cuda_sources_passes_where_nothing_may_fail(tree: Path) -> None:
    run(tree, EBDIFF_BUILD="require")
    assert loaded(tree)["info"]["parts"] == ["cpu"]
    assert "no CUDA sources" in run(tree, EBDIFF_BUILD="cuda", fails=True)


def test_a_failing_nvcc_leaves_the_cpu_part(tree: Path, cuda_home: Path) -> None:
    (tree / "csrc" / "cuda" / "part.cu").write_text("int device_part() { return nonsense; }\n")
    said = run(tree, CUDA_HOME=str(cuda_home))
    assert "nonsense" in said
    assert loaded(tree)["info"]["parts"] == ["cpu"]
    assert "nonsense" in note(tree)["missing"]["cuda"]["output"]
    for mode in ("cuda", "require"):
        run(tree, CUDA_HOME=str(cuda_home), EBDIFF_BUILD=mode, fails=True)


def test_a_cuda_home_without_nvcc_is_a_mistake_not_a_machine_without_cuda(tree: Path, cuda_home: Path) -> None:
    nowhere = str(cuda_home / "nowhere")
    assert "holds no bin/nvcc; correct CUDA_HOME" in run(tree, CUDA_HOME=nowhere)
    assert loaded(tree)["info"]["parts"] == ["cpu"]
    assert "holds no bin/nvcc" in run(tree, CUDA_HOME=nowhere, EBDIFF_BUILD="require", fails=True)


def test_nvcc_is_found_where_it_is(cuda_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc"
    wheels.parent.mkdir(parents=True)
    wheels.touch()
    monkeypatch.setattr(cuda.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.setattr(cuda, "USUAL_PLACE", tmp_path / "nowhere")
    monkeypatch.setenv("CUDA_HOME", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cuda._locate() == wheels
    monkeypatch.setattr(cuda, "USUAL_PLACE", cuda_home)
    assert cuda._locate() == cuda_home / "bin" / "nvcc"
    on_path = tmp_path / "elsewhere" / "nvcc"
    on_path.parent.mkdir()
    shutil.copy2(cuda_home / "bin" / "nvcc", on_path)
    monkeypatch.setenv("PATH", f"{on_path.parent}:/usr/bin:/bin")
    assert cuda._locate() == on_path
    found = cuda.find_nvcc()
    assert found is not None
    assert found.runtime == cuda_home / "lib64" / "libcudart_static.a"  # what is on PATH calls the one elsewhere
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    assert cuda._locate() == cuda_home / "bin" / "nvcc"


def test_a_broken_nvcc_is_named(cuda_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cuda_home / "bin" / "nvcc").write_text("#!/bin/sh\necho no license >&2; exit 3\n")
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    with pytest.raises(Missing, match="nvcc does not run") as caught:
        cuda.find_nvcc()
    assert caught.value.output == "no license\n"
    (cuda_home / "lib64" / "libcudart_static.a").unlink()
    (cuda_home / "bin" / "nvcc").write_text(NVCC.replace("HOME_OF_THE_TEST", str(cuda_home)))
    with pytest.raises(Missing, match="no CUDA runtime"):
        cuda.find_nvcc()


def test_machine_code_for_each_and_ptx_of_the_last() -> None:
    assert cuda.gencode(["80", "90"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_settings_are_read_or_refused() -> None:
    assert read({}) == Settings("auto", (), False)
    asked = {"EBDIFF_BUILD": "cuda", "EBDIFF_CUDA_ARCHS": "8.0, 90;90a 90", "EBDIFF_WERROR": "1"}
    assert read(asked) == Settings("cuda", ("80", "90", "90a"), True)
    assert read({"EBDIFF_BUILD": "", "EBDIFF_CUDA_ARCHS": " ", "EBDIFF_WERROR": "0"}) == Settings()
    with pytest.raises(ValueError, match="'Cuda' is none of: auto"):
        read({"EBDIFF_BUILD": "Cuda"})
    with pytest.raises(ValueError, match="got native"):
        read({"EBDIFF_CUDA_ARCHS": "90 native"})


def test_an_unknown_mode_is_refused_before_anything_happens(tree: Path) -> None:
    assert "EBDIFF_BUILD='fast' is none of" in run(tree, EBDIFF_BUILD="fast", fails=True)
    assert in_place(tree) == set()
    assert not (tree / "build").exists()


def test_the_digest_knows_names_and_contents_of_sources_only(tmp_path: Path) -> None:
    (tmp_path / "a.h").write_text("x")
    before = digest_of(tmp_path)
    (tmp_path / "notes.txt").write_text("y")
    assert digest_of(tmp_path) == before
    (tmp_path / "a.h").rename(tmp_path / "b.h")
    renamed = digest_of(tmp_path)
    (tmp_path / "b.h").write_text("z")
    assert len({before, renamed, digest_of(tmp_path)}) == 3
