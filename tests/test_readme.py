"""The README keeps its word: its script is the example and runs, its first commands and its links exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")


def blocks(language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_script_is_the_example() -> None:
    assert blocks("python") == [QUICKSTART]


def test_the_script_is_short() -> None:
    assert len([line for line in QUICKSTART.splitlines() if line.strip()]) <= 25


def test_the_script_runs(tmp_path: Path) -> None:
    tiny = QUICKSTART
    for large, small in ((", 200\n", ", 4\n"), ("(32,))]", "(2,))]"), ("(32, 32, 64, 64)", "(8, 8, 16, 16)")):
        assert tiny.count(large) == 1
        tiny = tiny.replace(large, small)
    result = subprocess.run([sys.executable, "-c", tiny], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "sample.png") as picture:
        assert picture.size == (16, 16)


def test_the_first_two_commands_are_in_the_makefile() -> None:
    commands = [line.split("#")[0].strip() for line in "".join(blocks()).splitlines()]
    assert commands[:2] == ["make demo", "make test"]
    assert "pip install -e ." in commands
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"demo", "test", "lint", "bench"} <= set(targets)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()] == []
