"""The examples run as their users run them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run(name: str, *arguments: str, launcher: Sequence[str] = ()) -> str:
    command = [sys.executable, *launcher, str(EXAMPLES / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_two_processes_train_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    options = ["--steps", "100", "--batch-size", "1", "--out", str(tmp_path / "out")]
    said = run("train_unconditional.py", *options, launcher=TWO_PROCESSES)
    assert said.count("step 100: loss") == 1
    assert said.split("rate ")[-1].startswith("0.0e+00"), "the learning rate is spent with the last step, not before"
    assert (tmp_path / "out" / "unet").is_dir()


def test_super_resolution_draws_a_picture(tmp_path: Path) -> None:
    options = ["--steps", "2", "--batch-size", "4", "--count", "2", "--out", str(tmp_path / "three.png")]
    said = run("super_resolution.py", *options)
    assert "drawn: PSNR" in said
    assert (tmp_path / "three.png").read_bytes().startswith(b"\x89PNG")
