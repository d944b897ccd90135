"""What a resumed state keeps whatever its optimizer is, what the loop leaves to a reader, what it refuses at once."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor, nn

import ebdiff
from ebdiff.errors import EbdiffError
from ebdiff.seeds import seed_for
from ebdiff.timesteps.sampler import Sampler
from ebdiff.training.checkpoint import Checkpoints
from ebdiff.training.loop import StepReport, TrainConfig, TrainState, train

pytestmark = pytest.mark.usefixtures("one_thread")

T = 50
CONFIG = TrainConfig(batch_size=4, lr=1e-2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 1, 3, padding=1)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(self.first(x) + t[:, None, None, None] / T))
        return out


def images() -> Tensor:
    return torch.randint(0, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def begin(seed: int = 0, model: Callable[[], nn.Module] = Net) -> TrainState:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TrainState.begin(model(), CONFIG)


def settings(**changes: Any) -> dict[str, Any]:
    own = {"scheduler": DDPMScheduler(T), "sampler": ebdiff.Uniform(T), "config": CONFIG}
    return {**own, "accelerator": Accelerator(cpu=True), **changes}


def steps(state: TrainState, until: int, **options: Any) -> list[StepReport]:
    return list(train(state, images(), until=until, **settings(**options)))


def equal(a: TrainState, b: TrainState) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    return (
        a.facts() == b.facts()
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
        and all(ours[name].stride() == theirs[name].stride() for name in ours)
    )


def channels_last() -> nn.Module:
    return Net().to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("model", "make"),
    [
        (channels_last, lambda p: torch.optim.AdamW(p, lr=0.01)),
        (Net, lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), amsgrad=True)),
        (Net, lambda p: torch.optim.NAdam(p, lr=0.01)),
        (Net, lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True)),
        (Net, lambda p: torch.optim.SGD(p, lr=0.1)),
        (Net, lambda p: torch.optim.Adagrad([{"params": p[2:], "lr": 0.05}, {"params": p[:2]}])),
    ],
    ids=["channels_last", "lr a tensor", "NAdam", "RMSprop", "SGD", "groups"],
)
def test_any_optimizer_and_memory_format_resumes(tmp_path: Path, model: Any, make: Any) -> None:
    straight, first, second = (begin(seed, model) for seed in (0, 0, 1))
    for state in (straight, first, second):
        state.optimizer = make(list(state.model.parameters()))
    for state in (straight, first):  # what a schedule of the learning rate does
        for group in state.optimizer.param_groups:
            group["lr"] *= 0.5
    steps(straight, 6)
    steps(first, 3, checkpoints=Checkpoints(tmp_path))
    saved = Checkpoints(tmp_path).newest()
    assert saved is not None
    second.restore(saved)
    assert equal(second, first)
    steps(second, 6)
    assert equal(second, straight)


def test_a_checkpoint_of_torch_s_adamw_restores(tmp_path: Path) -> None:
    """What was written before AdamW moved the EMA itself, with torch's settings, goes on here to rounding."""
    straight, writer, reader = begin(), begin(), begin(1)
    for state in (straight, writer):
        state.optimizer = torch.optim.AdamW(state.model.parameters(), lr=CONFIG.lr, weight_decay=0.0, fused=True)
    steps(straight, 6)
    steps(writer, 3, checkpoints=Checkpoints(tmp_path))
    saved = Checkpoints(tmp_path).newest()
    assert saved is not None
    reader.restore(saved)
    assert equal(reader, writer)
    steps(reader, 6)
    for name, tensor in straight.tensors().items():
        torch.testing.assert_close(reader.tensors()[name], tensor, rtol=1e-5, atol=1e-6)
    assert reader.facts()["ema"] == straight.facts()["ema"]


@pytest.mark.parametrize("wrap", [lambda o: o, Accelerator(cpu=True).prepare], ids=["plain", "prepared"])
def test_the_ema_moves_once_in_a_step(wrap: Callable[[Any], Any]) -> None:
    """Whether the optimizer moves it, or the loop does because the optimizer moves none or another one."""
    state, by_torch, replaced = begin(), begin(), begin()
    state.optimizer = wrap(state.optimizer)
    by_torch.optimizer = torch.optim.AdamW(by_torch.model.parameters(), lr=CONFIG.lr, weight_decay=0.0)
    replaced.ema = copy.deepcopy(replaced.ema)
    for one in (state, by_torch, replaced):
        steps(one, 5)
        assert one.ema.optimization_step == 5
    for shadows in zip(state.ema.shadow_params, by_torch.ema.shadow_params, replaced.ema.shadow_params, strict=True):
        torch.testing.assert_close(shadows[0], shadows[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(shadows[0], shadows[2], rtol=1e-5, atol=1e-6)


def grouped(state: TrainState, first: int) -> TrainState:
    """Two parameter groups: the first parameters, and the others at a rate of 1."""
    p = list(state.model.parameters())
    state.optimizer = torch.optim.AdamW([{"params": p[:first]}, {"params": p[first:], "lr": 1.0}])
    return state


def test_other_groups_or_facts_change_nothing(tmp_path: Path) -> None:
    writer, reader, untouched = grouped(begin(), 1), grouped(begin(1), 3), grouped(begin(1), 3)
    steps(writer, 2, checkpoints=Checkpoints(tmp_path))
    saved = Checkpoints(tmp_path).newest()
    assert saved is not None
    with pytest.raises(EbdiffError, match=r"first\.bias in parameter group 0, got first\.bias elsewhere"):
        reader.restore(saved)
    with pytest.raises(EbdiffError, match=r"no training state.*got none about step, ema, optimizer"):
        reader.restore(replace(saved, facts={"state": saved.facts}))
    with pytest.raises(EbdiffError, match=r"no training state.*got none about scalars, groups, parameters"):
        reader.restore(replace(saved, facts={**saved.facts, "optimizer": {"kind": "AdamW"}}))
    assert equal(reader, untouched)


class Planner(torch.optim.SGD):
    """Keeps something that is neither a tensor nor a number."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            self.state[p]["plan"] = {"of": "a kind"}
        return super().step(closure)


def test_an_optimizer_whose_state_cannot_be_saved_is_named() -> None:
    state = begin()
    state.optimizer = Planner(state.model.parameters(), lr=0.1)
    steps(state, 1)
    with pytest.raises(EbdiffError, match=r"Planner cannot be saved.*plan: dict"):
        state.facts()


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"a": torch.ones(2)}, {})
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001.bak")
    (tmp_path / "step-notes").write_text("mine")
    checkpoints.save(2, {"a": torch.ones(2)}, {})
    saved = checkpoints.newest()
    assert saved is not None
    assert saved.step == checkpoints.newest_step() == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001.bak", "step-00000002", "step-notes"]


def test_gradients_are_cleared_before_the_first_step_and_after_the_last() -> None:
    state, other = begin(), begin()
    for p in other.model.parameters():
        p.grad = torch.full_like(p, 9.0)  # of something before
    for ours, theirs in zip(
        train(state, images(), **settings(), until=3), train(other, images(), **settings(), until=3), strict=True
    ):
        assert ours == theirs
        for p, q in zip(state.model.parameters(), other.model.parameters(), strict=True):
            assert p.grad is not None
            assert torch.equal(p.grad, q.grad)
    assert all(p.grad is None for p in state.model.parameters())


def test_what_the_optimizer_does_not_hold_neither_piles_up_nor_counts() -> None:
    """Taylor scores read the gradients of all parameters: each step's own, also of those that are not trained."""
    state, all_held, frozen = begin(), begin(), begin()
    for one in (state, frozen):
        one.optimizer = torch.optim.SGD(one.model.last.parameters(), lr=0.1)
    all_held.optimizer = torch.optim.SGD(
        [{"params": all_held.model.last.parameters()}, {"params": all_held.model.first.parameters(), "lr": 0.0}], lr=0.1
    )
    frozen.model.first.requires_grad_(False)
    state.model.first.weight.grad = torch.ones(6, 1, 3, 3)  # of something before
    config = replace(CONFIG, grad_clip=None)
    runs = [train(one, images(), **settings(config=config), until=4) for one in (state, all_held, frozen)]
    for ours, theirs, only_last in zip(*runs, strict=True):
        assert torch.equal(state.model.first.weight.grad, all_held.model.first.weight.grad)
        assert ours == only_last
        assert ours.grad_norm < theirs.grad_norm


class Recorder(nn.Module):
    """Answers 0 times a weight; remembers the timesteps it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.asked.append(t)
        return x * 0 * self.weight


class Falling(Sampler):
    """Low timesteps more often, high ones with more weight."""

    T = T

    def pmf(self) -> Tensor:
        p = torch.arange(T, 0, -1, dtype=torch.float64)
        return p / p.sum()

    def weights(self) -> Tensor:
        w = torch.arange(1, T + 1, dtype=torch.float64)
        return (w / (self.pmf() * w).sum()).float()


@pytest.mark.parametrize("regions", [None, ebdiff.Partition(0, 10, T)])
def test_the_objective_is_the_same_with_regions_and_without(regions: ebdiff.Partition | None) -> None:
    """White images and an answer of 0 have error 1, so a step's loss is the mean weight of its timesteps."""
    state, sampler = begin(model=Recorder), Falling()
    scheduler = DDPMScheduler(T, prediction_type="sample")
    white = torch.full((5, 1, 4, 4), 255, dtype=torch.uint8)
    for report in train(state, white, **settings(scheduler=scheduler, sampler=sampler), until=5, regions=regions):
        t = state.model.asked[-1]  # type: ignore[index]
        assert report.loss == pytest.approx(float(sampler.weights()[t].mean()), rel=1e-6)


def test_a_numpy_seed_is_the_same_seed() -> None:
    assert seed_for(np.int64(7), "noise", 1) == seed_for(7, "noise", 1)  # type: ignore[arg-type]


def extra_parameter(state: TrainState) -> None:
    state.optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.ones(2)))]})


def wrapped(state: TrainState) -> None:
    state.model = nn.DataParallel(state.model)


class Other:
    """An accelerator with a precision of its own; a scheduler without a prediction type."""

    num_processes, mixed_precision, config = 1, "bf16", type("Config", (), {"num_train_timesteps": T})


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"images": images().float()}, None, "images: expected uint8"),
        ({"images": images().to("meta")}, None, "images: expected uint8.*on the CPU.*meta"),
        ({"sampler": ebdiff.Uniform(1000)}, None, "scheduler: expected 1000 timesteps.*got 50"),
        ({"scheduler": Other()}, None, "prediction_type.*got None"),
        ({"checkpoint_every": 3}, None, "checkpoint_every: expected checkpoints"),
        ({"accelerator": Other()}, None, 'mixed_precision "no", got "bf16".*TrainConfig'),
        ({}, extra_parameter, "optimizer: expected the model's parameters"),
        ({}, wrapped, "DataParallel"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_call_itself(options: dict[str, Any], change: Any, message: str) -> None:
    state = begin()
    if change is not None:
        change(state)
    arguments = {"images": images(), **settings(), **options}
    with pytest.raises(EbdiffError, match=message):
        train(state, until=3, **arguments)
