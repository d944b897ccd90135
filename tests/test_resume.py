"""Going on from a checkpoint is the same as never having stopped, to the bit, and after SIGKILL at any point too."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from kill_me import STEPS, half, net, pictures, whole
from torch import Tensor
from unets import unet

import ebdiff
from ebdiff.errors import EbdiffError
from ebdiff.training.checkpoint import Checkpoints
from ebdiff.training.log import StepLog, read_log
from ebdiff.training.loop import TrainConfig, TrainState, train

SCRIPT = Path(__file__).with_name("kill_me.py")


def begin(config: TrainConfig, kind: str = "net") -> TrainState:
    return TrainState.begin(net() if kind == "net" else unet(dropout=0.2), config)


def go(state: TrainState, config: TrainConfig, until: int, **options: Any) -> None:
    size = 6 if hasattr(state.model, "first") else 8
    images = pictures().repeat(1, 1, 2, 2)[:, :, :size, :size]
    sampler = ebdiff.Stratified(1000)
    for _ in train(
        state, images, scheduler=DDPMScheduler(1000), sampler=sampler, config=config, until=until, **options
    ):
        pass


def equal(a: TrainState, b: TrainState) -> bool:
    return a.facts() == b.facts() and same(a.tensors(), b.tensors())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("net", {}),
    "accumulated": ("net", {"accumulate": 2, "flip": True}),
    "bf16": ("net", {"precision": "bf16"}),
    "batch of more than an epoch": ("net", {"batch_size": 23}),
    "UNet": ("unet", {}),
}


@pytest.mark.parametrize(("kind", "options"), RUNS.values(), ids=RUNS)
def test_going_on_from_a_checkpoint_is_never_having_stopped(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    """Weights, EMA, moments and the step, bit for bit, with dropout."""
    config = TrainConfig(**{"batch_size": 3, "lr": 1e-2, **options})
    regions = ebdiff.Partition(0, 240, 440, 1000)
    straight, first, second = (begin(config, kind) for _ in range(3))
    go(straight, config, 7, regions=regions)
    go(first, config, 3, regions=regions, checkpoints=Checkpoints(tmp_path))
    torch.rand(5)  # whatever the user does in between
    second.restore(whole(Checkpoints(tmp_path)))
    assert equal(first, second)
    go(second, config, 7, regions=regions, checkpoints=Checkpoints(tmp_path))
    assert equal(straight, second)
    assert not equal(straight, first)
    third = begin(config, kind)
    third.restore(whole(Checkpoints(tmp_path)))
    assert third.step == 7
    go(third, config, 7)  # rerun is resume: nothing is left to do
    assert equal(straight, third)


def test_the_rate_of_the_checkpoint_holds(tmp_path: Path) -> None:
    config = TrainConfig(batch_size=2)
    state, again = begin(config), begin(TrainConfig(batch_size=2, lr=1.0))
    state.optimizer.param_groups[0]["lr"] = 0.125
    go(state, config, 1, checkpoints=Checkpoints(tmp_path))
    again.restore(whole(Checkpoints(tmp_path)))
    assert again.optimizer.param_groups[0]["lr"] == 0.125
    assert again.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize(
    "damage", [b'{"st\n', b"\0\0\0\0\n", b"\xff\xfe\n", b"3\n", b"{}\n", b'{"step": "1"}\n', b"\n"]
)
def test_a_damaged_line_of_the_log_costs_that_line_alone(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 2}\n' + damage + b'{"step": 4}\n{"step": 6')
    assert [record["step"] for record in read_log(tmp_path)] == [2, 4]
    with StepLog(tmp_path, 3, 2):
        assert read_log(tmp_path) == [{"step": 2}]


def test_another_run_s_checkpoint_changes_nothing(tmp_path: Path) -> None:
    config = TrainConfig(batch_size=2)
    state, wider, other, grouped = (begin(config) for _ in range(4))
    wider.__init__(**vars(TrainState.begin(net(width=9), config)))  # type: ignore[misc]
    other.optimizer = torch.optim.SGD(other.model.parameters(), lr=1e-3, momentum=0.9)
    weight, *rest = grouped.model.parameters()
    grouped.optimizer = torch.optim.AdamW([{"params": [weight]}, {"params": rest}])
    go(state, config, 2, checkpoints=Checkpoints(tmp_path))
    saved = whole(Checkpoints(tmp_path))
    for victim, problem in ((wider, "another model"), (other, "another optimizer"), (grouped, "another optimizer")):
        go(victim, config, 1)
        tensors, facts = {name: t.clone() for name, t in victim.tensors().items()}, victim.facts()
        with pytest.raises(EbdiffError, match=f"{problem}.*expected.*got.*resume with"):
            victim.restore(saved)
        assert same(tensors, victim.tensors())
        assert facts == victim.facts()


def test_shrinking_in_the_middle_goes_on_and_resumes(tmp_path: Path) -> None:
    """The rebuilt state must be shrunken by the same mask; a dense one is refused."""
    config = TrainConfig(batch_size=3, lr=1e-2)

    def shrunken(state: TrainState) -> TrainState:
        ebdiff.shrink_(state.model, half(state.model), optimizer=state.optimizer, ema=state.ema)
        return state

    straight, again, dense = begin(config), begin(config), begin(config)
    sizes = []
    for report in train(
        straight,
        pictures(),
        scheduler=DDPMScheduler(1000),
        sampler=ebdiff.Stratified(1000),
        config=config,
        until=6,
        checkpoints=Checkpoints(tmp_path, keep=9),
        checkpoint_every=1,
    ):
        sizes.append(straight.optimizer.state[straight.model.first.weight]["exp_avg"].shape[0])  # type: ignore[union-attr, index]
        if report.step == 2:
            shrunken(straight)
    assert sizes == [8, 8, 4, 4, 4, 4]
    for step in (5, 6):
        shutil.rmtree(tmp_path / f"step-{step:08d}")
    saved = whole(Checkpoints(tmp_path))
    with pytest.raises(EbdiffError, match=r"another model.*ticket"):
        dense.restore(saved)
    shrunken(again).restore(saved)
    assert again.step == 4
    go(again, config, 6)
    assert equal(straight, again)


def life(folder: Path, *options: str) -> int:
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder), *options], capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.mark.slow
def test_killed_and_started_again_by_hand(tmp_path: Path) -> None:
    """The same command in a new interpreter each time: killed at a step, in a write, then to the end."""
    assert life(tmp_path / "killed", "--kill", "step:3") == -signal.SIGKILL
    assert life(tmp_path / "killed", "--kill", "rename:2") == -signal.SIGKILL
    assert life(tmp_path / "killed") == 0
    assert life(tmp_path / "whole") == 0
    one, other = (whole(Checkpoints(tmp_path / name)) for name in ("whole", "killed"))
    assert one.step == other.step == STEPS
    assert same(one.tensors, other.tensors)


def test_killed_at_every_step_and_at_every_rename_and_sync(tmp_path: Path) -> None:
    """SIGKILL to a real process; the next one goes on and ends with the weights of the run that was never killed."""
    life(tmp_path, "--everywhere")
    one = whole(Checkpoints(tmp_path / "whole"))
    # 3 writes: 3 renames and 5 syncs each. The last of each kind lived to the end at once.
    names = {
        f"{where}:{k}" for where, count in (("step", STEPS), ("rename", 9), ("fsync", 15)) for k in range(1, count + 2)
    }
    assert {place.name for place in tmp_path.iterdir()} == names | {"whole"}
    for name in names:
        other = whole(Checkpoints(tmp_path / name))
        assert other.step == one.step == STEPS
        assert other.facts == one.facts
        assert same(one.tensors, other.tensors), name
