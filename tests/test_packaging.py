"""What pip builds and installs: every file once, `kernels` only as ebdiff.kernels, from any working directory.

Without the compiled part, but for one test; how that is built: tests/test_build.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

IMPORT = "import ebdiff, ebdiff.kernels as k; print(ebdiff.__file__); print(k.__file__); print(ebdiff.__version__)"


class Built(NamedTuple):
    """The two distributions and the wheel that the source distribution builds."""

    sdist: Path
    wheel: Path
    wheel_of_sdist: Path


def python(*args: str, cwd: Path, **environment: str) -> list[str]:
    """The lines a fresh interpreter prints; it sees this environment's packages, but nothing of `cwd` or `tests`."""
    flags = ["-P"] if args[0] == "-c" else []
    result = subprocess.run(
        [sys.executable, *flags, *args], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def build(kind: str, source: Path, into: Path, **environment: str) -> Path:
    """Call the build backend that pyproject.toml names, as pip does, but without installing it anew (no network)."""
    into.mkdir()
    call = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(into)!r}))"
    return into / python("-c", call, cwd=source, **{"EBDIFF_BUILD": "none", **environment})[-1]


def committed_files() -> list[str]:
    """What git would commit, relative to the root; links are named, not followed."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [name for name in set(listing.stdout.split("\0")) if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree as git would commit it."""
    tree = tmp_path_factory.mktemp("source") / "tree"
    for name in committed_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    return tree


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("packaging")
    sdist = build("sdist", tree, folder / "sdist")
    wheel = build("wheel", tree, folder / "wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return Built(sdist, wheel, build("wheel", unpacked, folder / "again"))


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel is a zip of what pip puts into site-packages."""
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(built.wheel) as wheel:
        wheel.extractall(target)
    return target


def contents(wheel: Path) -> list[str]:
    return sorted(name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name)


def test_the_wheel_holds_every_source_and_asset_once(built: Built) -> None:
    expected = [
        f"ebdiff/{name}" if name.startswith("kernels/") else name
        for name in committed_files()
        if name.startswith(("ebdiff/", "kernels/")) and name != "ebdiff/kernels" and not name.endswith(".md")
    ]
    assert {"ebdiff/kernels/__init__.py", "ebdiff/py.typed", "ebdiff/assets/fashion16.npz"} <= set(expected)
    assert contents(built.wheel) == sorted([*expected, "ebdiff/_build.json"])


def test_the_source_distribution_holds_what_a_build_needs(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("build_tools/", "csrc/", "kernels/", "ebdiff/", "tests/")
    sources = {name for name in committed_files() if name.startswith(folders)}
    assert sources - {"ebdiff/kernels"} <= names
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"} <= names
    assert not any("__pycache__" in name or name.endswith((".so", ".pyc")) for name in names)


def test_a_wheel_of_the_source_distribution_is_the_same(built: Built) -> None:
    assert contents(built.wheel_of_sdist) == contents(built.wheel)


def test_a_wheel_without_the_compiled_part_is_for_every_platform(built: Built) -> None:
    assert built.wheel.name.endswith("-py3-none-any.whl")


@pytest.fixture(scope="module")
def compiled(tree: Path, built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with the CPU part of csrc; its objects stay in the tree's build folder. Takes about 15 seconds."""
    if not shutil.which("g++") or not find_spec("pybind11") or not find_spec("ninja"):
        pytest.skip("no C++ compiler, pybind11 or ninja")
    into = tmp_path_factory.mktemp("compiled") / "wheel"
    return build("wheel", tree, into, EBDIFF_BUILD="cpu", EBDIFF_WERROR="1", PATH=os.environ["PATH"])


@pytest.mark.slow
def test_a_wheel_with_the_compiled_part_holds_it_once_and_loads_it(
    compiled: Path, built: Built, tmp_path: Path
) -> None:
    (module,) = set(contents(compiled)) - set(contents(built.wheel))
    assert Path(module).match("ebdiff/_C.*.so")
    with zipfile.ZipFile(compiled) as archive:
        archive.extractall(tmp_path / "installed")
    call = (
        "from ebdiff.ops import native; print(native.why_not(), native.is_outdated()); print(native.facts()['parts']);"
        "print(native.module().isa()); print(native.module().__file__)"
    )
    lines = python("-c", call, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert lines[:2] == [" False", "['cpu']"]
    assert lines[2] in ("base", "avx2", "avx512")
    assert Path(lines[3]) == tmp_path / "installed" / module


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nm"), reason="no binutils")
def test_code_for_wider_registers_shares_nothing_with_the_rest(compiled: Path, tree: Path) -> None:
    """A weak symbol, such as an inline function's, could be the copy that the linker keeps for every machine."""
    objects = sorted(tree.glob("build/_C-*/objects/cpu/rows_*.cpp.o"))
    assert [path.name.split(".")[0] for path in objects] == ["rows_avx2", "rows_avx512", "rows_base"]
    for path in objects:
        listing = subprocess.run(["nm", "--defined-only", "--extern-only", path], capture_output=True, text=True)
        assert [line for line in listing.stdout.splitlines() if path.name.split(".")[0] not in line] == []


def test_the_licences_and_the_command_are_in_the_metadata(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
        assert "ebdiff = ebdiff.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
        licences = [name for name in wheel.namelist() if name.startswith(f"{info}/licenses/")]
    assert {Path(name).name for name in licences} == {"LICENSE", "fashion16-LICENSE.txt"}


def test_an_installed_wheel_works_from_any_working_directory(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()  # somebody else's package of that name, in the way
    (tmp_path / "kernels" / "__init__.py").write_text("raise ImportError('not ours')")
    for place in (tmp_path, ROOT, ROOT / "ebdiff", Path("/")):
        home, kernels, version = python("-c", IMPORT, cwd=place, PYTHONPATH=str(installed))
        assert Path(home) == installed / "ebdiff" / "__init__.py"
        assert Path(kernels) == installed / "ebdiff" / "kernels" / "__init__.py"
        assert version


def test_an_installed_wheel_brings_no_top_level_kernels(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"ebdiff"}


def test_assets_are_found_where_the_package_is_installed(installed: Path, tmp_path: Path) -> None:
    call = "from ebdiff.data import load_images; print(tuple(load_images('fashion16', limit=8).train.shape))"
    assert python("-c", call, cwd=tmp_path, PYTHONPATH=str(installed)) == ["(8, 1, 16, 16)"]


def test_the_editable_install_works_from_any_working_directory(tmp_path: Path) -> None:
    found = find_spec("ebdiff")
    assert found is not None
    assert found.origin is not None
    if not Path(found.origin).is_relative_to(ROOT):
        pytest.skip("ebdiff is installed, but not editable from here")
    for place in (tmp_path, ROOT, Path("/")):
        home, kernels, version = python("-c", IMPORT, cwd=place)
        assert Path(home) == Path(found.origin)
        assert Path(kernels).parent.resolve() == ROOT / "kernels"
        assert version


def test_the_link_is_committed_as_a_link() -> None:
    link = ROOT / "ebdiff" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
