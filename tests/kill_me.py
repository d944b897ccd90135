"""A run of a few steps that kills itself where it is told to; the same command again goes on.

    python kill_me.py FOLDER [--kill WHERE:K] [--dropout P] [--shrink-at STEP] [--learns]
    python kill_me.py FOLDER --everywhere

WHERE is `step` (the K-th step has just been taken), `rename` or `fsync` (the K-th call of that is about to happen, so a
checkpoint is half written). `--everywhere` lives a whole run in FOLDER/whole, and for each such point WHERE:K a run in
FOLDER/WHERE:K: one life that ends there and one that goes on, each a process of its own.
"""

from __future__ import annotations

import argparse
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor, nn

import ebdiff
from ebdiff.timesteps.adaptive import Adaptive
from ebdiff.training.checkpoint import Checkpoints, Saved
from ebdiff.training.loop import StepReport, TrainConfig, TrainState, train

STEPS, EVERY, KEEP = 5, 2, 1


class Net(nn.Module):
    """A network of two convolutions, which any dropout makes depend on the global random numbers."""

    def __init__(self, dropout: float = 0.2, width: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, width, 3, padding=1), nn.Conv2d(width, 2, 3, padding=1)
        self.time, self.drop = nn.Linear(1, width), nn.Dropout(dropout)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift = self.time(t[:, None] / 1000)[:, :, None, None]
        return self.last(self.drop(torch.relu(self.first(x) + shift)))  # type: ignore[no-any-return]


def net(**options: Any) -> Net:
    """The same network every time, whatever the user's random numbers are."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Net(**options)


def pictures(count: int = 10) -> Tensor:
    """uint8 [count, 2, 6, 6]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 2, 6, 6), dtype=torch.uint8, generator=generator)


class Seen(nn.Module):
    """A network of one weight that notes what it is called with; its output is the weight, or any function's."""

    def __init__(self, function: Any = None) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.zeros(())), function
        self.noisy: list[Tensor] = []
        self.t: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.noisy.append(x)
        self.t.append(t)
        return self.weight * torch.ones_like(x) + (0 if self.function is None else self.function(x, t))


def steps(model: nn.Module | TrainState, until: int, images: Tensor | None = None, **options: Any) -> list[StepReport]:
    """Train to the end; options are those of `train` or of `TrainConfig`."""
    return list(training(model, until, images, **options))


def training(model: nn.Module | TrainState, until: int, images: Tensor | None = None, **options: Any) -> Any:
    known = {"scheduler", "sampler", "regions", "checkpoints", "checkpoint_every", "conditions"}
    others = {key: options.pop(key) for key in known & options.keys()}
    config = TrainConfig(**{"batch_size": 4, "lr": 1e-2, **options})
    state = model if isinstance(model, TrainState) else TrainState.begin(model, config)
    return train(
        state,
        pictures() if images is None else images,
        **{"scheduler": DDPMScheduler(1000), "sampler": ebdiff.Uniform(1000), **others},
        config=config,
        until=until,
    )


def whole(checkpoints: Checkpoints) -> Saved:
    """The newest checkpoint, which nothing may warn about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = checkpoints.newest()
    assert saved is not None
    return saved


def half(model: nn.Module) -> ebdiff.ChannelMask:
    """The mask that removes half of a network's channels by the magnitude of its first weights."""
    plan = ebdiff.trace(model, torch.zeros(1, 2, 6, 6), torch.zeros(1))
    return ebdiff.ChannelMask.draw(ebdiff.importance(net(dropout=0), plan), plan=plan, ratio=0.5)


def run(folder: Path, kill: str = "", dropout: float = 0.2, shrink_at: int = 0, learns: bool = False) -> None:
    config = TrainConfig(batch_size=4, accumulate=2, lr=1e-2, flip=True)
    profile = ebdiff.NoiseProfile.from_scheduler(DDPMScheduler(1000))
    sampler = Adaptive(profile, buckets=1, every=3) if learns else ebdiff.Uniform(1000)
    state = TrainState.begin(net(dropout=dropout), config, sampler.learner)
    checkpoints = Checkpoints(folder, keep=KEEP)
    saved = checkpoints.newest()
    if saved is not None:
        state.restore(saved)
    where, _, count = kill.partition(":")
    if where in ("rename", "fsync"):
        arm(where, int(count))
    accelerator = Accelerator(cpu=True)
    for report in train(
        state,
        pictures(),
        scheduler=DDPMScheduler(1000),
        sampler=sampler,
        config=config,
        until=STEPS,
        checkpoints=checkpoints,
        checkpoint_every=EVERY,
        accelerator=accelerator,
    ):
        if accelerator.is_main_process:
            print("loss", report.loss, flush=True)
        if report.step == shrink_at:
            ebdiff.shrink_(state.model, half(state.model), optimizer=state.optimizer, ema=state.ema)
        if where == "step" and report.step == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
    accelerator.end_training()  # gloo's threads may abort a process that ends while its group is alive


def arm(where: str, count: int) -> None:
    """Let this process die at its count-th call."""
    calls = 0

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return counted

    for name in ("rename", "replace") if where == "rename" else ("fsync",):
        setattr(os, name, deadly(getattr(os, name)))


def live(folder: Path, kill: str = "") -> int:
    """One life in a process of its own; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(folder, kill)
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"{folder} failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def everywhere(folder: Path) -> None:
    assert live(folder / "whole") == 0
    for where in ("step", "rename", "fsync"):
        for count in range(1, 100):
            place = folder / f"{where}:{count}"
            if live(place, f"{where}:{count}") == 0:  # the run has fewer of these
                break
            assert live(place) == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--everywhere", action="store_true")
    parser.add_argument("--kill", default="")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--shrink-at", type=int, default=0)
    parser.add_argument("--learns", action="store_true", help="where to draw timesteps")
    options = vars(parser.parse_args())
    if options.pop("everywhere"):
        everywhere(options["folder"])
    else:
        run(**options)
