"""One script per ecosystem: the ten lines that ebdiff is in it, what they do, and the script without them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image
from test_examples import EXAMPLES, TWO_PROCESSES, run

import ebdiff
from ebdiff.data import load_images

TRAINER = "train_denoising_diffusion"
LOOPS = ("train_unconditional", "train_dit", "train_plain")
MARKED, WAS = re.compile(r"  # ebdiff$"), re.compile(r"^( *)# was: (.*)$")
Main = Callable[..., str]


def source(name: str) -> str:
    return (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")


def baseline(name: str) -> str:
    """The script before ebdiff: without the marked lines, with those that they took the place of."""
    kept = (line for line in source(name).splitlines() if not MARKED.search(line))
    return "\n".join(WAS.sub(r"\1\2", line) for line in kept) + "\n"


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a script's `main` with these options, here, and return what it said."""

    def call(folder: Path, name: str, **options: Any) -> str:
        given = [str(word) for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
        monkeypatch.setattr(sys, "argv", [name, *given, "--out", str(tmp_path / "out")])
        monkeypatch.syspath_prepend(folder)
        importlib.import_module(name).main()
        return capsys.readouterr().out

    yield call
    for name in (*LOOPS, *(f"{name}_before" for name in LOOPS), "super_resolution"):
        sys.modules.pop(name, None)


def keeps(said: str) -> float:
    """The share of the parameters that the ticket keeps, by what was printed."""
    found = re.search(r"of the MACs and ([\d.]+)% of the parameters", said)
    assert found, said
    return float(found[1]) / 100


@pytest.mark.parametrize("name", [*LOOPS, TRAINER])
def test_ebdiff_is_ten_lines_of_it_at_most(name: str) -> None:
    lines = source(name).splitlines()
    marked = [line for line in lines if MARKED.search(line)]
    assert 5 <= len(marked) <= 10
    assert any("trace(" in line for line in marked)
    replaced = [after for before, after in pairwise(lines) if WAS.match(before)]
    assert all(MARKED.search(line) for line in replaced)


@pytest.mark.parametrize("name", [*LOOPS, TRAINER])
def test_no_line_serves_ebdiff_without_a_mark(name: str, tmp_path: Path) -> None:
    before = baseline(name)
    assert "ebdiff" not in re.sub(r'""".*?"""|from ebdiff.data import .*', "", before, count=2, flags=re.DOTALL)
    path = tmp_path / f"{name}.py"
    path.write_text(before, encoding="utf-8")
    found = subprocess.run(  # nothing is left over that nothing uses, and nothing is missing
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("name", LOOPS)
def test_the_script_runs_without_ebdiff(name: str, main: Main, tmp_path: Path) -> None:
    (tmp_path / f"{name}_before.py").write_text(baseline(name), encoding="utf-8")
    said = main(tmp_path, f"{name}_before", steps=2, batch_size=2)
    assert "step 2: loss" in said
    assert "ticket" not in said


@pytest.mark.parametrize("name", [*LOOPS, "super_resolution"])
@pytest.mark.parametrize("wrong", [{"steps": -3}, {"batch_size": 0}])
def test_numbers_that_make_no_sense_are_refused_in_a_sentence(
    name: str, wrong: dict[str, int], main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(EXAMPLES, name, **wrong)
    assert "at least 1" in capsys.readouterr().err


def test_a_batch_larger_than_the_data_is_refused(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(EXAMPLES, "train_unconditional", batch_size=100_000)
    assert "--batch-size is of each process: at most" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [1, 8])
def test_the_diffusers_script_goes_on_with_the_ticket(steps: int, main: Main, tmp_path: Path) -> None:
    said = main(EXAMPLES, "train_unconditional", steps=steps, batch_size=2)
    assert f"step {steps}: loss" in said
    assert "29 of 39 group norms" in said
    unet = DDPMPipeline.from_pretrained(tmp_path / "out").unet
    assert type(unet).__name__ == "ShrunkUNet2DModel"
    assert keeps(said) < 0.5


def test_the_transformer_loses_heads_and_channels(main: Main, tmp_path: Path) -> None:
    said = main(EXAMPLES, "train_dit", steps=8, batch_size=2)
    assert "step 8: loss" in said
    small = ebdiff.load(tmp_path / "out")
    block = small.transformer_blocks[0]
    assert block.attn1.heads == 2
    assert block.ff.net[0].proj.out_features < 256
    x, label = torch.randn(2, 1, 16, 16), torch.tensor([3, 10])
    assert small(x, timestep=torch.tensor([5, 9]), class_labels=label).sample.isfinite().all()
    assert keeps(said) < 0.6


def test_a_network_of_ones_own_is_saved_small(main: Main, tmp_path: Path) -> None:
    said = main(EXAMPLES, "train_plain", steps=8, batch_size=2)
    assert "step 8: loss" in said
    small = ebdiff.load(tmp_path / "out")
    dense = sys.modules["train_plain"].UNet()
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in dense.parameters())
    assert share == pytest.approx(keeps(said), abs=1e-3)
    assert small(torch.randn(1, 1, 16, 16), torch.tensor([3])).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TWO_PROCESSES], ids=["alone", "two processes"])
def test_the_trainer_draws_and_saves_a_small_network(
    launcher: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ema_pytorch")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    if not importlib.util.find_spec("torchvision"):
        stand_ins = [str(Path(__file__).parent / "stand_ins"), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, stand_ins)))
    (tmp_path / "images").mkdir()
    for number, image in enumerate(load_images("fashion16").train[:100, 0]):
        Image.fromarray(image.numpy()).save(tmp_path / "images" / f"{number}.png")
    said = run(
        f"{TRAINER}.py", "--images", str(tmp_path / "images"), "--steps", "4", "--size", "16", "--dim", "8",
        "--out", str(tmp_path / "out"), launcher=launcher,
    )  # fmt: skip
    assert said.count("NOT settled") == 1
    assert (tmp_path / "out" / "sample-2.png").is_file()
    saved = torch.load(tmp_path / "out" / "model-last.pt", weights_only=True)
    average = {name.removeprefix("ema_model."): tensor.shape for name, tensor in saved["ema"].items()}
    assert all(average[name] == tensor.shape for name, tensor in saved["model"].items())
    assert saved["step"] == 4
    assert saved["opt"]["state"][0]["step"] == 4, "one optimizer, and its moments, from the first step to the last"
    assert saved["opt"]["state"][0]["exp_avg"].shape == saved["model"]["model.init_conv.weight"].shape
    assert saved["model"]["model.mid_attn.to_qkv.weight"].shape[0] == 3 * 2 * 32, "two of four heads, of 32 each"
    assert keeps(said) < 0.5
