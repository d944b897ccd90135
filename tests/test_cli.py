"""The commands: a dry run touches nothing, bad input is one line and exit code 2, each command does its part."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from diffusers import DDIMPipeline, DDIMScheduler
from tiny import TINY, ebdiff, run, tiny
from unets import unet

from ebdiff.files import read_json
from ebdiff.progress import Tally, follow
from ebdiff.training.stages import Tick, Work

COMMANDS = ("run", "find", "train", "merge", "sample", "eval", "info")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    run(tiny(out))
    return out


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ebdiff(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_an_interrupted_command_says_that_it_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("ebdiff.info.installation", interrupted)
    assert ebdiff(monkeypatch, "info") == 130
    assert capsys.readouterr().err.strip() == "ebdiff: interrupted; the same command resumes"


def test_help_loads_neither_torch_nor_diffusers() -> None:
    code = "import sys, ebdiff.cli; print(sorted({'torch', 'diffusers', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["run", "train"])
def test_branch_at_plans_a_joint_ticket_first(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = (command, "--preset", "smoke", "--dry-run")
    assert ebdiff(monkeypatch, *plain) == 0
    assert "joint" not in capsys.readouterr().out
    assert ebdiff(monkeypatch, *plain, "--branch-at", "7") == 0
    assert "joint" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_sampler_is_chosen_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Steps of the regions follow the mass that it draws from them: uniform draws more of the noisiest."""
    monkeypatch.chdir(tmp_path)
    plain, shown = ("run", "--preset", "smoke", "--dry-run"), {}
    for sampler in ("speed", "uniform"):
        assert ebdiff(monkeypatch, *plain, "--sampler", sampler) == 0
        shown[sampler] = capsys.readouterr().out
    assert shown["speed"] != shown["uniform"]
    assert ebdiff(monkeypatch, *plain) == 0
    assert capsys.readouterr().out == shown["speed"]
    assert ebdiff(monkeypatch, *plain, "--sampler", "sped") == 2
    assert "one of uniform, speed" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "find", "train"])
@pytest.mark.parametrize("preset", ["smoke", "demo", "cifar10"])
def test_a_dry_run_touches_nothing(
    command: str, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ebdiff(monkeypatch, command, "--preset", preset, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "nothing was touched" in shown
    assert "MACs" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "train.lrr=1"], "did you mean train.lr?"),
        (["run", "--set", "trian.lr=1"], "did you mean train?"),
        (["run", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["run", "--preset", "demi"], "did you mean demo?"),
        (["run", "regions.bounds=[0, 240, 1200]"], "outside the schedule"),
        (["run", "regions.bounds=[[0, 300], [240, 1000]]"], "overlap"),
        (["find", "model.layers=3"], "did you mean model.layers_per_block?"),
        (["train", "--region", "3"], "no such region"),
        (["train", "--region", "0"], "run `ebdiff find` first"),
        (["merge"], "run `ebdiff train --region 0` first"),
        (["sample", "--model", "nowhere"], "nowhere"),
        (["sample", "--arm", "both"], "tickets or dense"),
        (["eval"], "run `ebdiff train --region 0` first"),
        (["info", "nowhere"], "no folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ebdiff(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_damaged_ticket_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "regions" / "1")
    masks = out / "search" / "tickets" / "1" / "ticket.safetensors"
    masks.write_bytes(masks.read_bytes()[:-3])
    before = everything(out)
    for command in (["train", "--region", "1", "--out", out], ["info", masks.parent]):
        assert ebdiff(monkeypatch, *command) == 2
        assert "ticket.safetensors is damaged" in capsys.readouterr().err
    assert everything(out) == before


def test_the_folders_own_configuration_is_the_default(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ebdiff(monkeypatch, "run", "--out", finished) == 0
    assert "report.md" in capsys.readouterr().out
    assert (finished / "report.md").exists()
    assert ebdiff(monkeypatch, "run", "--out", finished, "--seed", "1") == 2
    assert "expected seed=0, got 1" in capsys.readouterr().err


def test_the_report_says_it_all(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ebdiff(monkeypatch, "run", "--preset", "smoke", "--out", finished, *TINY) == 0
    text = (finished / "report.md").read_text()
    facts = read_json(finished / "report.json")
    assert facts["verdict"]["sentence"] in text
    for words in ("parameters stored", "device-seconds, the search included", "one seed", "[fashion16-cnn"):
        assert words in text
    for picture in ("curves", "samples", "mask-distance", "loss-per-timestep"):
        assert f"({picture}.png)" in text
        assert (finished / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_find_train_and_merge_are_the_run_in_parts(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "parts"
    assert ebdiff(monkeypatch, "find", "--preset", "smoke", "--out", out, *TINY) == 0
    assert "taylor ticket for timesteps [440, 1000)" in capsys.readouterr().out
    for number in (2, 0, 1):
        assert ebdiff(monkeypatch, "train", "--region", str(number), "--out", out) == 0
    assert ebdiff(monkeypatch, "merge", "--out", out, "--dry-run") == 0
    assert not (out / "router").exists()
    assert ebdiff(monkeypatch, "merge", "--out", out) == 0
    for path in finished.glob("router/*/ebdiff.safetensors"):
        assert (out / path.relative_to(finished)).read_bytes() == path.read_bytes()


def test_sample_and_eval(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "images.png"
    command = ["sample", "--out", finished, "-n", "5", "--to", picture]
    assert ebdiff(monkeypatch, *command, "--dry-run") == 0
    assert not picture.exists()
    drawn = []
    for options in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--seed", "1", "--arm", "dense"]):
        assert ebdiff(monkeypatch, *command, *options) == 0
        drawn.append(picture.read_bytes())
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
    capsys.readouterr()
    assert ebdiff(monkeypatch, "eval", "--out", finished, "--model", finished / "router") == 0
    shown = capsys.readouterr().out
    loss = read_json(finished / "evaluation" / "tickets-1.json")["loss"]["total"]
    assert f"held-out loss {loss:.4f}" in shown
    assert "[fashion16-cnn" in shown


def test_only_png_is_drawn_and_before_anything_is(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pic.jpg", "pic"):
        for options in ([], ["--dry-run"]):
            assert ebdiff(monkeypatch, "sample", "--out", finished, "--to", tmp_path / name, *options) == 2
            assert f"--to: expected a .png, got {tmp_path / name}" in capsys.readouterr().err
    assert ebdiff(monkeypatch, "sample", "--out", finished, "--to", tmp_path / "pic.PNG", "-n", "1") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["pic.PNG"]


def test_networks_of_other_channels_and_pipelines_are_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    DDIMPipeline(unet(in_channels=3, out_channels=3), DDIMScheduler()).save_pretrained(tmp_path)
    for command, folder, words in (
        ("sample", "unet", "expected 1 channels in, those of this run, got 3"),
        ("eval", "unet", "expected 1 channels in, those of this run, got 3"),
        ("sample", "", "is a pipeline, not a network; pass its subfolder unet"),
        ("eval", "", "pass its subfolder unet"),
    ):
        assert ebdiff(monkeypatch, command, "--out", finished, "--model", tmp_path / folder) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert ebdiff(monkeypatch, "info", tmp_path) == 2
    assert "pass its subfolder unet" in capsys.readouterr().err
    assert ebdiff(monkeypatch, "info", tmp_path / "unet") == 0


def test_info_without_a_gpu_and_about_folders(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, words in {
        "": "torch ",
        "search/tickets/0": "taylor ticket for timesteps [0, 240)",
        "router": "TimestepRouter",
        "dense/nets/1": "UNet2DModel",
        ".": "regions/2",
    }.items():
        assert ebdiff(monkeypatch, "info", *([finished / folder] if folder else [])) == 0
        assert words in capsys.readouterr().out


def test_progress_counts_planned_macs() -> None:
    tally = Tally([Work("a", 60), Work("b", 40)])
    tally.add(Tick("a", 30))
    assert tally.share == pytest.approx(0.3)
    tally.add(Tick("a", 100))
    assert tally.share == pytest.approx(0.6)
    tally.add(Tick("b", 0, "already there", before=True))
    assert tally.share == 1
    assert tally.before == 40


def test_eta_comes_from_this_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally([Work("a", 100)])
    tally.add(Tick("a", 50, before=True))
    monkeypatch.setattr(time, "monotonic", lambda: tally.started + 10)
    assert tally.seconds_left is None
    tally.add(Tick("a", 25))
    assert tally.seconds_left == pytest.approx(10)


def test_without_a_terminal_progress_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    follow([Tick("a", 1, "x"), Tick("a", 1, "y"), Tick("b", 2, "z")], [Work("a", 2), Work("b", 2)], Console())
    assert capsys.readouterr().out.splitlines() == [" 25.0%  a: x", "100.0%  b: z"]
